//! What rank 0 shows of a run while it runs.
//!
//! Owns three forms: a bar on a terminal, a readable line, a JSON object. It writes what it is given and measures only the time
//! that is left.

use std::io::{self, Write};

use indicatif::{ProgressBar, ProgressStyle};

use super::{Console, StepMetrics};

/// In which form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProgressMode {
    /// A bar with the newest readings, on a terminal.
    Bar,
    /// One readable line.
    Lines,
    /// One JSON object a line.
    Json,
    /// Nothing: every rank but 0.
    Silent,
}

impl ProgressMode {
    /// The form for `rank`: JSON where it is asked for, else a bar where both stdout and stderr are `terminal`s, else lines.
    pub fn choose(rank: usize, json: bool, terminal: bool) -> Self {
        match (rank, json, terminal) {
            (1.., ..) => Self::Silent,
            (_, true, _) => Self::Json,
            (_, _, true) => Self::Bar,
            _ => Self::Lines,
        }
    }
}

/// What a run's progress is counted against.
#[derive(Clone, Copy, Debug)]
pub struct ProgressSpec {
    /// In which form.
    pub mode: ProgressMode,
    /// Steps done when it starts: more than 0 where a run resumes.
    pub done: u64,
    /// The last step.
    pub steps: u64,
    /// Steps between lines (`train.log_every`). The first step, the last one and those that evaluate have a line as well.
    pub log_every: u64,
}

/// Shows a run.
pub struct Progress {
    spec: ProgressSpec,
    out: Box<dyn Write + Send>,
    console: Console,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// Progress that writes lines to `out` (stdout) and its bar to `console`.
    pub fn new(spec: ProgressSpec, out: Box<dyn Write + Send>, console: &Console) -> Self {
        let bar = (spec.mode == ProgressMode::Bar).then(|| {
            let bar = console.show(ProgressBar::new(spec.steps).with_position(spec.done));
            // The template is a constant; a fault in it shows in the test below.
            if let Ok(style) = ProgressStyle::with_template("{wide_bar} {pos}/{len} {msg} {eta} left") {
                bar.set_style(style);
            }
            // Steps of earlier runs say nothing about the speed of this one.
            bar.reset_eta();
            bar
        });
        Self { spec, out, console: console.clone(), bar }
    }

    /// A step is done.
    pub fn step(&mut self, metrics: &StepMetrics) -> io::Result<()> {
        if let Some(bar) = &self.bar {
            bar.set_message(bar_text(metrics));
            bar.set_position(metrics.step);
        }
        let due = metrics.step.is_multiple_of(self.spec.log_every.max(1))
            || metrics.step == self.spec.done + 1
            || metrics.step == self.spec.steps
            || metrics.val_loss.is_some();
        match self.spec.mode {
            ProgressMode::Lines if due => self.line(&readable(metrics, self.spec.steps)),
            ProgressMode::Json if due => self.line(&serde_json::to_string(metrics)?),
            ProgressMode::Bar => metrics.val_loss.map_or(Ok(()), |loss| {
                self.line(&format!("step {}: validation loss {loss:.4} nats per token", metrics.step))
            }),
            _ => Ok(()),
        }
    }

    /// Something a reader should know: the corpus, the layout, a checkpoint. As JSON it is `{"message": …}`.
    pub fn message(&mut self, text: &str) -> io::Result<()> {
        match self.spec.mode {
            ProgressMode::Silent => Ok(()),
            ProgressMode::Json => self.line(&serde_json::json!({ "message": text }).to_string()),
            ProgressMode::Bar | ProgressMode::Lines => self.line(text),
        }
    }

    /// Takes the bar away; what was written stays.
    pub fn finish(self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    fn line(&mut self, text: &str) -> io::Result<()> {
        let Self { out, console, .. } = self;
        console.aside(|| {
            writeln!(out, "{text}")?;
            out.flush()
        })
    }
}

fn bar_text(metrics: &StepMetrics) -> String {
    format!("loss {:.4}  {} tokens/s", metrics.loss, grouped(metrics.tokens_per_s))
}

/// The readings of a step on one line.
fn readable(metrics: &StepMetrics, steps: u64) -> String {
    let StepMetrics { step, loss, balance_loss, lr, grad_norm, .. } = metrics;
    let stage = &metrics.stage_ms;
    let mut line = format!(
        "step {step}/{steps}  loss {loss:.4}  balance {balance_loss:.4}  lr {lr:.2e}  grad norm {grad_norm:.3}  \
         {} tokens/s{}  dropped {:.1} %  busiest/mean expert {:.2}  \
         ms route {:.1} dispatch {:.1} experts {:.1} combine {:.1}",
        grouped(metrics.tokens_per_s),
        metrics.mfu.map_or(String::new(), |mfu| format!("  MFU {:.1} %", 100.0 * mfu)),
        100.0 * metrics.dropped_fraction,
        metrics.load_max_over_mean,
        stage.route,
        stage.dispatch,
        stage.experts,
        stage.combine,
    );
    if let Some(loss) = metrics.val_loss {
        line += &format!("  validation loss {loss:.4}");
    }
    line
}

/// A rate in whole units with commas between thousands.
fn grouped(rate: f64) -> String {
    if !(0.0..1e15).contains(&rate) {
        return format!("{rate}");
    }
    let digits = format!("{rate:.0}");
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::telemetry::StageMs;

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn reading(step: u64) -> StepMetrics {
        StepMetrics {
            step,
            loss: 2.34567,
            balance_loss: 1.02,
            lr: 3e-4,
            grad_norm: 0.8768,
            tokens_per_s: 12345.6,
            mfu: Some(0.4321),
            dropped_fraction: 0.0123,
            load_max_over_mean: 1.5,
            stage_ms: StageMs { route: 1.0, dispatch: 2.0, experts: 30.0, combine: 4.0, aggregate: 5.0 },
            ..StepMetrics::default()
        }
    }

    /// What is written about steps `done + 1` to `steps`, of which `evaluated` evaluates, with a line every ten.
    fn shown(mode: ProgressMode, done: u64, steps: u64, evaluated: u64) -> Vec<String> {
        let out = Shared::default();
        let spec = ProgressSpec { mode, done, steps, log_every: 10 };
        let mut progress = Progress::new(spec, Box::new(out.clone()), &Console::new());
        progress.message("corpus: one").unwrap();
        for step in done + 1..=steps {
            let val_loss = (step == evaluated).then_some(1.75);
            progress.step(&StepMetrics { val_loss, ..reading(step) }).unwrap();
        }
        progress.finish();
        String::from_utf8(out.0.lock().unwrap().clone()).unwrap().lines().map(str::to_owned).collect()
    }

    #[test]
    fn a_line_says_everything_that_matters() {
        let lines = shown(ProgressMode::Lines, 0, 1, 1);
        assert_eq!(
            lines,
            [
                "corpus: one",
                "step 1/1  loss 2.3457  balance 1.0200  lr 3.00e-4  grad norm 0.877  12,346 tokens/s  MFU 43.2 %  dropped 1.2 %  \
                 busiest/mean expert 1.50  ms route 1.0 dispatch 2.0 experts 30.0 combine 4.0  validation loss 1.7500"
            ]
        );
    }

    #[test]
    fn lines_come_at_their_pace_and_first_last_and_evaluated_steps_always() {
        let steps: Vec<_> = shown(ProgressMode::Lines, 3, 25, 17)[1..]
            .iter()
            .map(|line| line.split(['/', ' ']).nth(1).unwrap().to_owned())
            .collect();
        assert_eq!(steps, ["4", "10", "17", "20", "25"]);
    }

    #[test]
    fn json_is_one_object_a_line_and_nothing_else() {
        let lines = shown(ProgressMode::Json, 0, 20, 0);
        let values: Vec<serde_json::Value> = lines.iter().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(values[0]["message"], "corpus: one");
        assert_eq!(values.iter().filter_map(|value| value["step"].as_u64()).collect::<Vec<_>>(), [1, 10, 20]);
        assert!(values[1]["tokens_per_s"].is_number());
    }

    #[test]
    fn ranks_above_zero_are_silent_and_a_bar_leaves_only_what_stays() {
        assert!(shown(ProgressMode::Silent, 0, 20, 7).is_empty());
        assert_eq!(
            shown(ProgressMode::Bar, 0, 20, 7),
            ["corpus: one", "step 7: validation loss 1.7500 nats per token"]
        );
        ProgressStyle::with_template("{wide_bar} {pos}/{len} {msg} {eta} left").unwrap();
    }

    #[test]
    fn the_form_follows_rank_flag_and_terminal() {
        assert_eq!(ProgressMode::choose(0, false, true), ProgressMode::Bar);
        assert_eq!(ProgressMode::choose(0, false, false), ProgressMode::Lines);
        assert_eq!(ProgressMode::choose(0, true, true), ProgressMode::Json);
        assert_eq!(ProgressMode::choose(1, true, true), ProgressMode::Silent);
    }

    #[test]
    fn rates_are_grouped_by_thousands() {
        for (rate, text) in
            [(0.4, "0"), (999.0, "999"), (1000.0, "1,000"), (1_234_567.0, "1,234,567"), (f64::NAN, "NaN")]
        {
            assert_eq!(grouped(rate), text);
        }
    }
}
