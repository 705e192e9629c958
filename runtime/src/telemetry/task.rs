//! Progress of long work that is no training: preparing data, training a tokenizer.
//!
//! Owns a bar in bytes on a terminal, and a line now and then elsewhere, both on stderr. It is told what is done and measures only
//! time.

use std::io::{self, IsTerminal, Write};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Between two lines where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Shows how much of some bytes is done; may be told by several threads.
pub struct TaskProgress {
    what: &'static str,
    bar: ProgressBar,
    lines: Option<Mutex<Instant>>,
}

impl TaskProgress {
    /// Progress of `what` ("preparing") through `bytes` of input.
    pub fn start(what: &'static str, bytes: u64) -> Self {
        let terminal = io::stderr().is_terminal();
        let target = if terminal { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(bytes), target).with_message(what);
        // The template is a constant; a fault in it shows in the test below.
        if let Ok(style) = ProgressStyle::with_template(TEMPLATE) {
            bar.set_style(style);
        }
        Self { what, bar, lines: (!terminal).then(|| Mutex::new(Instant::now())) }
    }

    /// So many more bytes are done.
    pub fn add(&self, bytes: u64) {
        self.bar.inc(bytes);
        // Whoever finds the lock taken leaves the line to the other.
        let Some(Ok(mut last)) = self.lines.as_ref().map(Mutex::try_lock) else { return };
        if last.elapsed() >= LINE_EVERY {
            *last = Instant::now();
            let (done, all) = (self.bar.position() as f64 / 1e6, self.bar.length().unwrap_or(0) as f64 / 1e6);
            let left = self.bar.eta().as_secs();
            // A reader that went away does not end the work.
            let _ = writeln!(io::stderr(), "{} {done:.0} of {all:.0} MB, {left} s left", self.what);
        }
    }

    /// Takes the bar away.
    pub fn finish(self) {
        self.bar.finish_and_clear();
    }
}

const TEMPLATE: &str = "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta} left";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_done_is_counted_and_the_template_is_one() {
        ProgressStyle::with_template(TEMPLATE).unwrap();
        let progress = TaskProgress::start("testing", 10);
        progress.add(4);
        progress.add(5);
        assert_eq!(progress.bar.position(), 9);
        progress.finish();
    }
}
