//! A parser of server-sent events, fed with bytes as they come.
//!
//! Pure: it holds the unfinished line and the unfinished event, nothing else.

/// One event.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Event {
    /// Name; empty when the server gave none.
    pub name: String,
    /// Data lines joined by newlines.
    pub data: String,
}

/// An event grew beyond [`Parser::LIMIT`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a server-sent event is larger than {} bytes", Parser::LIMIT)]
pub struct TooLarge;

/// The parser.
#[derive(Clone, Debug, Default)]
pub struct Parser {
    line: Vec<u8>,
    event: Event,
    has_data: bool,
    after_cr: bool,
    started: bool,
}

impl Parser {
    /// Largest line and largest event, in bytes.
    pub const LIMIT: usize = 4 << 20;

    /// Takes bytes and appends the events that they complete to `events`.
    pub fn push(&mut self, bytes: &[u8], events: &mut Vec<Event>) -> Result<(), TooLarge> {
        for &byte in bytes {
            let after_cr = std::mem::replace(&mut self.after_cr, byte == b'\r');
            match byte {
                // The second half of CR LF.
                b'\n' if after_cr => {}
                b'\n' | b'\r' => {
                    let mut line = std::mem::take(&mut self.line);
                    self.take_line(&line, events)?;
                    line.clear();
                    self.line = line;
                }
                byte => {
                    if self.line.len() >= Self::LIMIT {
                        return Err(TooLarge);
                    }
                    self.line.push(byte);
                }
            }
        }
        Ok(())
    }

    fn take_line(&mut self, line: &[u8], events: &mut Vec<Event>) -> Result<(), TooLarge> {
        let first = !std::mem::replace(&mut self.started, true);
        let line = if first { line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(line) } else { line };
        if line.is_empty() {
            let event = std::mem::take(&mut self.event);
            if std::mem::take(&mut self.has_data) {
                events.push(event);
            }
            return Ok(());
        }
        let (field, value) = match line.iter().position(|&byte| byte == b':') {
            // A comment, which servers send to keep the connection.
            Some(0) => return Ok(()),
            Some(colon) => (&line[..colon], &line[colon + 1..]),
            None => (line, &[][..]),
        };
        let value = String::from_utf8_lossy(value.strip_prefix(b" ").unwrap_or(value));
        match field {
            b"data" => {
                if std::mem::replace(&mut self.has_data, true) {
                    self.event.data.push('\n');
                }
                if self.event.data.len() + value.len() > Self::LIMIT {
                    return Err(TooLarge);
                }
                self.event.data.push_str(&value);
            }
            b"event" => self.event.name = value.into_owned(),
            // `id` and `retry` serve reconnects, which an engine does not make.
            _ => {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{Event, Parser, TooLarge};

    fn parse<'a>(chunks: impl IntoIterator<Item = &'a [u8]>) -> Vec<Event> {
        let (mut parser, mut events) = (Parser::default(), Vec::new());
        for chunk in chunks {
            parser.push(chunk, &mut events).unwrap();
        }
        events
    }

    fn data(events: &[Event]) -> Vec<&str> {
        events.iter().map(|event| event.data.as_str()).collect()
    }

    #[test]
    fn reads_names_data_comments_and_any_line_end() {
        let events = parse([
            &b"\xef\xbb\xbf: hello\r\ndata: a\r\ndata:b\r\n\r\n"[..],
            b"event: x\ndata\n\nid: 3\n\ndata:  two\r\rdata: unfinished\n",
        ]);
        assert_eq!(data(&events), ["a\nb", "", " two"]);
        assert_eq!(events[1].name, "x");
        assert_eq!(events[2].name, "");
    }

    #[test]
    fn an_endless_line_is_refused() {
        let mut parser = Parser::default();
        let chunk = vec![b'x'; Parser::LIMIT];
        assert_eq!(parser.push(&chunk, &mut Vec::new()), Ok(()));
        assert_eq!(parser.push(b"x", &mut Vec::new()), Err(TooLarge));
    }

    proptest! {
        #[test]
        fn chunk_boundaries_do_not_matter(
            lines in proptest::collection::vec("(data: ?|event: ?|: )?[a-zä€\u{1f600}:]{0,6}(\n|\r\n|\r)", 0..20),
            cuts in proptest::collection::vec(any::<prop::sample::Index>(), 0..10),
        ) {
            let text = lines.concat().into_bytes();
            let whole = parse([&text[..]]);
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(text.len() + 1)).collect();
            cuts.push(0);
            cuts.push(text.len());
            cuts.sort_unstable();
            let parts = parse(cuts.windows(2).map(|pair| &text[pair[0]..pair[1]]));
            prop_assert_eq!(&whole, &parts);
            let bytes = parse(text.chunks(1));
            prop_assert_eq!(&whole, &bytes);
        }
    }
}
