//! The terminal that a progress bar and log lines share.
//!
//! Owns the order of the two: a log line is written while the bar is out of the way.

use std::io::{self, Write};
use std::sync::Arc;

use indicatif::{MultiProgress, ProgressBar};

/// Where logs go to; clones share it. The bar and the logs are on stderr, so that stdout holds readings only.
#[derive(Clone, Debug, Default)]
pub struct Console {
    bars: Arc<MultiProgress>,
}

impl Console {
    /// The console of this process.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts `bar` on the console.
    pub(super) fn show(&self, bar: ProgressBar) -> ProgressBar {
        self.bars.add(bar)
    }

    /// Runs `write` while no bar is in the way.
    pub fn aside<T>(&self, write: impl FnOnce() -> T) -> T {
        self.bars.suspend(write)
    }
}

/// A log line on its way to stderr: collected, then written at once between two states of the bar.
pub(super) struct LogLine {
    console: Console,
    text: Vec<u8>,
}

impl LogLine {
    pub(super) fn new(console: Console) -> Self {
        Self { console, text: Vec::with_capacity(256) }
    }
}

impl Write for LogLine {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.text.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let text = std::mem::take(&mut self.text);
        self.console.aside(|| io::stderr().write_all(&text))
    }
}

impl Drop for LogLine {
    fn drop(&mut self) {
        if !self.text.is_empty() {
            // A log line that stderr does not take has nowhere else to be reported.
            let _ = self.flush();
        }
    }
}
