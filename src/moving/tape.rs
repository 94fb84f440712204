//! A sequence of named files as one stream, in the form of `tar`, so that any `tar` lists it and
//! takes it apart.

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use crate::error::{Error, Kind, Reason, Result};

/// Everything begins at a multiple of this.
const BLOCK: usize = 512;
/// Bytes that are read at once.
const PIECE: usize = 256 << 10;
/// Sizes from here on do not fit eleven octal digits.
const LARGE: u64 = 1 << 33;

/// Writes files one after another.
pub struct Writer<W> {
    to: W,
    /// Bytes of the file that are still to come, and those that fill its last block.
    left: u64,
    padding: usize,
    written: u64,
}

impl<W: AsyncWrite + Unpin> Writer<W> {
    /// A tape without files.
    pub fn new(to: W) -> Self {
        Self { to, left: 0, padding: 0, written: 0 }
    }

    /// Begins a file. The last part of its path has up to 100 bytes, the rest up to 155.
    pub async fn begin(&mut self, path: &str, size: u64) -> Result<()> {
        self.end().await?;
        let header = header(path, size)
            .ok_or_else(|| Error::internal(format!("`{path}` is too long for a tape")))?;
        self.put(&header).await?;
        self.left = size;
        self.padding = padding_of(size);
        Ok(())
    }

    /// The next bytes of the file.
    pub async fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let left = self.left.checked_sub(bytes.len() as u64);
        self.left = left.ok_or_else(|| Error::internal("more bytes than the file has"))?;
        self.put(bytes).await
    }

    /// A whole file.
    pub async fn file(&mut self, path: &str, bytes: &[u8]) -> Result<()> {
        self.begin(path, bytes.len() as u64).await?;
        self.write(bytes).await
    }

    async fn end(&mut self) -> Result<()> {
        if self.left > 0 {
            return Err(Error::internal(format!("{} bytes of the file are missing", self.left)));
        }
        let padding = std::mem::take(&mut self.padding);
        self.put(&[0; BLOCK][..padding]).await
    }

    /// Ends the tape; returns what it was written to, and how many bytes it has.
    pub async fn finish(mut self) -> Result<(W, u64)> {
        self.end().await?;
        self.put(&[0; 2 * BLOCK]).await?;
        self.to.flush().await.map_err(Error::storage)?;
        Ok((self.to, self.written))
    }

    async fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.written += bytes.len() as u64;
        self.to.write_all(bytes).await.map_err(Error::storage)
    }
}

/// A file on a tape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Where it is.
    pub path: String,
    /// Bytes that it has.
    pub size: u64,
}

/// Reads files one after another.
pub struct Reader<R> {
    from: R,
    left: u64,
    padding: usize,
}

impl<R: AsyncRead + Unpin> Reader<R> {
    /// A tape from its beginning.
    pub fn new(from: R) -> Self {
        Self { from, left: 0, padding: 0 }
    }

    /// The next file, past what was not read of the one before; `None` at the end.
    pub async fn next(&mut self) -> Result<Option<Entry>> {
        while self.read().await?.is_some() {}
        let mut block = [0; BLOCK];
        let padding = std::mem::take(&mut self.padding);
        self.fill(&mut block[..padding]).await?;
        self.fill(&mut block).await?;
        if block == [0; BLOCK] {
            return Ok(None);
        }
        let entry = parse(&block).ok_or_else(|| damaged("a header is not one of a tar file"))?;
        self.left = entry.size;
        self.padding = padding_of(entry.size);
        Ok(Some(entry))
    }

    /// The next bytes of the file; `None` when there are no more.
    pub async fn read(&mut self) -> Result<Option<Bytes>> {
        if self.left == 0 {
            return Ok(None);
        }
        let most = usize::try_from(self.left).unwrap_or(PIECE).min(PIECE);
        let mut piece = BytesMut::with_capacity(most);
        let mut from = (&mut self.from).take(most as u64);
        let n_read = from.read_buf(&mut piece).await.map_err(Error::storage)?;
        if n_read == 0 {
            return Err(cut_off());
        }
        self.left -= n_read as u64;
        Ok(Some(piece.freeze()))
    }

    /// The whole file, which must not have more than `most` bytes.
    pub async fn whole(&mut self, most: u64) -> Result<Vec<u8>> {
        if self.left > most {
            return Err(damaged(format!("a part has {} bytes, more than {most}", self.left)));
        }
        let mut bytes = Vec::new();
        while let Some(piece) = self.read().await? {
            bytes.extend_from_slice(&piece);
        }
        Ok(bytes)
    }

    async fn fill(&mut self, bytes: &mut [u8]) -> Result<()> {
        match self.from.read_exact(bytes).await {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Err(cut_off()),
            Err(error) => Err(Error::storage(error)),
        }
    }
}

/// It is not what an export writes.
pub fn damaged(what: impl std::fmt::Display) -> Error {
    let message = format!("this is not a whole export of baton: {what}; export anew");
    Error::new(Kind::InvalidArgument, Reason::InvalidParams, message)
}

fn cut_off() -> Error {
    damaged("it ends in the middle")
}

fn padding_of(size: u64) -> usize {
    let over = usize::try_from(size % BLOCK as u64).unwrap_or(0);
    (BLOCK - over) % BLOCK
}

/// The block before a file of mode 0600.
fn header(path: &str, size: u64) -> Option<[u8; BLOCK]> {
    let mut block = [0; BLOCK];
    let (prefix, name) = if path.len() <= 100 { ("", path) } else { path.rsplit_once('/')? };
    if name.len() > 100 || prefix.len() > 155 {
        return None;
    }
    block[..name.len()].copy_from_slice(name.as_bytes());
    block[100..107].copy_from_slice(b"0000600");
    block[108..115].copy_from_slice(b"0000000");
    block[116..123].copy_from_slice(b"0000000");
    if size < LARGE {
        block[124..135].copy_from_slice(format!("{size:011o}").as_bytes());
    } else {
        block[124] = 0x80;
        block[128..136].copy_from_slice(&size.to_be_bytes());
    }
    block[136..147].copy_from_slice(b"00000000000");
    block[156] = b'0';
    block[257..265].copy_from_slice(b"ustar\x0000");
    block[345..345 + prefix.len()].copy_from_slice(prefix.as_bytes());
    let sum = format!("{:06o}\0 ", checksum(&block));
    block[148..156].copy_from_slice(sum.as_bytes());
    Some(block)
}

/// Of a header, with its own eight bytes as spaces.
fn checksum(block: &[u8; BLOCK]) -> u32 {
    let own = 148..156;
    let byte = |(at, byte): (usize, &u8)| if own.contains(&at) { 32 } else { u32::from(*byte) };
    block.iter().enumerate().map(byte).sum()
}

fn parse(block: &[u8; BLOCK]) -> Option<Entry> {
    if &block[257..262] != b"ustar" || octal(&block[148..154])? != u64::from(checksum(block)) {
        return None;
    }
    if !matches!(block[156], b'0' | 0) {
        return None;
    }
    let size = match block[124] {
        0x80 => u64::from_be_bytes(block[128..136].try_into().ok()?),
        _ => octal(&block[124..135])?,
    };
    let (name, prefix) = (text(&block[..100])?, text(&block[345..500])?);
    let path = if prefix.is_empty() { name.to_owned() } else { format!("{prefix}/{name}") };
    Some(Entry { path, size })
}

fn octal(digits: &[u8]) -> Option<u64> {
    u64::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok()
}

fn text(field: &[u8]) -> Option<&str> {
    let end = field.iter().position(|byte| *byte == 0).unwrap_or(field.len());
    std::str::from_utf8(&field[..end]).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn written(files: &[(&str, Vec<u8>)]) -> Vec<u8> {
        let mut writer = Writer::new(Vec::new());
        for (path, bytes) in files {
            writer.file(path, bytes).await.unwrap();
        }
        let (tape, n_bytes) = writer.finish().await.unwrap();
        assert_eq!(tape.len() as u64, n_bytes);
        tape
    }

    fn files() -> Vec<(&'static str, Vec<u8>)> {
        let long = "artifacts/a-type-of-a-name-that-is-rather-long/\
                    0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
        vec![
            ("one", vec![1; 511]),
            ("dir/empty", Vec::new()),
            (long, vec![2; 512]),
            ("large", vec![3; 600_000]),
        ]
    }

    #[tokio::test]
    async fn what_was_written_is_read() {
        let tape = written(&files()).await;
        let mut reader = Reader::new(&tape[..]);
        for (path, bytes) in files() {
            let entry = reader.next().await.unwrap().unwrap();
            assert_eq!((entry.path.as_str(), entry.size), (path, bytes.len() as u64));
            if path != "dir/empty" && path != "one" {
                assert_eq!(reader.whole(u64::MAX).await.unwrap(), bytes);
            }
        }
        assert_eq!(reader.next().await.unwrap(), None);
    }

    #[tokio::test]
    async fn a_tape_that_ends_early_is_refused_wherever_it_does() {
        let tape = written(&files()).await;
        for end in [0, 100, 512, 600, 1_024, 2_000, 300_000, tape.len() - 1_024] {
            let mut reader = Reader::new(&tape[..end]);
            let outcome = loop {
                match reader.next().await {
                    Ok(Some(_)) => {}
                    other => break other,
                }
            };
            assert!(outcome.unwrap_err().message().contains("ends in the middle"), "{end}");
        }
    }

    #[tokio::test]
    async fn a_header_with_a_flipped_bit_is_refused() {
        let tape = written(&[("one", vec![1; 10])]).await;
        for at in [0, 126, 150, 260] {
            let mut tape = tape.clone();
            tape[at] ^= 1;
            assert!(Reader::new(&tape[..]).next().await.is_err(), "{at}");
        }
    }

    #[test]
    fn sizes_beyond_eight_gib_have_their_own_form() {
        for size in [0, 1, LARGE - 1, LARGE, u64::MAX] {
            assert_eq!(parse(&header("x", size).unwrap()).unwrap().size, size);
        }
    }

    /// The `tar` of the system agrees.
    #[tokio::test]
    async fn any_tar_takes_it_apart() {
        let dir = tempfile::tempdir().unwrap();
        let tape = dir.path().join("tape");
        std::fs::write(&tape, written(&files()).await).unwrap();
        let run = std::process::Command::new("tar")
            .args(["-xf".as_ref(), tape.as_os_str(), "-C".as_ref(), dir.path().as_os_str()])
            .status();
        assert!(run.unwrap().success());
        for (path, bytes) in files() {
            assert_eq!(std::fs::read(dir.path().join(path)).unwrap(), bytes, "{path}");
        }
    }
}
