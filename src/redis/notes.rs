//! Notes: what servers say of themselves for the others to read, each until it lapses.

use std::{collections::HashMap, time::Duration};

use bytes::Bytes;

use super::{Error, Redis, Result, script::Args, wire::Call};

impl Redis {
    /// Puts a note on a board under a name, in place of an earlier one. It lapses after `keep`
    /// unless it is put there again.
    pub async fn put_note(
        &self,
        board: &str,
        name: &str,
        text: Bytes,
        keep: Duration,
    ) -> Result<()> {
        let keep = u64::try_from(keep.as_millis()).unwrap_or(u64::MAX);
        let args = Args::default().text(board).text(name).bytes(text).number(keep);
        self.run(&self.0.scripts.note, args).await.map(drop)
    }

    /// Whether it is this server's turn to do something that one at a time does. Nobody else has
    /// one for `lasts`; what comes of it is harmless if somebody has.
    pub async fn take_turn(&self, what: &str, lasts: Duration) -> Result<bool> {
        let lasts = i64::try_from(lasts.as_millis()).unwrap_or(i64::MAX);
        let key = self.key(&format!("turn:{what}"));
        let args = vec![key.into(), "1".into(), "NX".into(), "PX".into(), lasts.into()];
        // Sent again it would find itself before it.
        let call = Call { again: false, ..Call::new("SET", args) };
        let answer = self.0.line.call(call).await.map_err(Error::command("set"))?;
        Ok(!answer.is_null())
    }

    /// The notes on a board, by name.
    pub async fn notes(&self, board: &str) -> Result<HashMap<String, Bytes>> {
        let mut reply = self.run(&self.0.scripts.notes, Args::default().text(board)).await?;
        let mut notes = HashMap::new();
        while !reply.is_empty() {
            let (name, text) = (reply.text()?, reply.bytes()?);
            notes.insert(name, text);
        }
        Ok(notes)
    }
}
