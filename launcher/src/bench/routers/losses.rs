//! What each gate comes to in the end: loss, balance, speed.
//!
//! Owns the runs of all gates and seeds, and the table.

use indicatif::{ProgressBar, ProgressStyle};
use moe_runtime::exit::{ExitCode as Code, Failure};
use moe_runtime::stages::Stage;
use moe_runtime::worker::{OnDevice, Ranked};
use serde::Serialize;

use super::super::measure::{commit, median};
use super::Setting;
use super::session::{InTraining, Noted, Session, WARMUP};
use crate::out::say;

/// Trains every gate from every seed.
pub(super) struct Losses<'a>(pub(super) &'a Setting<'a>);

/// What was measured.
#[derive(Serialize)]
pub(super) struct Report {
    preset: String,
    device: String,
    ranks: usize,
    text: String,
    steps: u64,
    seeds: u64,
    commit: String,
    gates: Vec<Gate>,
}

/// One gate.
#[derive(Serialize)]
struct Gate {
    name: &'static str,
    paper: &'static str,
    optimises: &'static str,
    /// Its settings over the preset's.
    set: Vec<String>,
    #[serde(flatten)]
    outcome: Outcome,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Outcome {
    Trained {
        /// On the held-out text after the last step, in nats a token.
        val_loss: Spread,
        /// The busiest expert's load over the mean in the worst layer; this and the next two are means over the last tenth of the steps.
        busiest_over_mean: Spread,
        /// Share of the choices.
        dropped: Spread,
        /// Nats.
        entropy: Spread,
        /// The median step's.
        tokens_per_s: Spread,
        /// The route stage's share of the MoE layers' time, in the median step.
        route_share: Spread,
    },
    Failed {
        failed: String,
    },
}

/// A figure over seeds.
#[derive(Clone, Copy, Serialize)]
struct Spread {
    mean: f64,
    /// Standard deviation of one seed's from the mean; none of a single seed.
    spread: Option<f64>,
}

impl Spread {
    fn of(values: &[f64]) -> Self {
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let squares: f64 = values.iter().map(|x| (x - mean).powi(2)).sum();
        Self { mean, spread: (values.len() > 1).then(|| (squares / (n - 1.0)).sqrt()) }
    }

    fn show(self, scale: f64, digits: usize) -> String {
        let spread = self.spread.map_or(String::new(), |spread| format!(" +- {:.digits$}", scale * spread));
        format!("{:.digits$}{spread}", scale * self.mean)
    }
}

/// The figures of one run.
struct Figures {
    val_loss: f64,
    busiest: f64,
    dropped: f64,
    entropy: f64,
    tokens_per_s: f64,
    route_share: f64,
}

impl Figures {
    fn of(steps: &[Noted], val_loss: f64) -> Self {
        let last = &steps[steps.len() - steps.len().div_ceil(10)..];
        let mean = |of: fn(&Noted) -> f64| last.iter().map(of).sum::<f64>() / last.len() as f64;
        let timed = &steps[WARMUP.min(steps.len() - 1)..];
        let middle = |of: fn(&Noted) -> f64| median(&mut timed.iter().map(of).collect::<Vec<_>>());
        Self {
            val_loss,
            busiest: mean(|step| step.busiest),
            dropped: mean(|step| step.dropped),
            entropy: mean(|step| step.entropy),
            tokens_per_s: middle(|step| step.tokens_per_s),
            route_share: middle(|step| step.ms(Stage::Route) / step.layer_ms()),
        }
    }
}

impl OnDevice for Losses<'_> {
    type Output = Result<Report, Failure>;

    fn run<B: Ranked>(self, queue: B) -> Result<Report, Failure> {
        let setting = self.0;
        let (args, (rank, ranks)) = (setting.args, setting.world.place());
        let session = Session::new(setting, queue)?;
        let bar = if rank == 0 { progress(setting) } else { ProgressBar::hidden() };
        let mut gates = Vec::new();
        for (row, config, corpus) in &setting.configured {
            let mut runs = Vec::new();
            let mut failed = None;
            for seed in 1..=args.seeds {
                bar.set_message(format!("{}, seed {seed}", row.name));
                let mut config = config.clone();
                config.train.seed = seed;
                match session.train((&config, corpus), || bar.inc(1), InTraining::<B>::evaluate)? {
                    Ok((steps, val_loss)) => runs.push(Figures::of(&steps, val_loss.ok_or_else(nothing_held_out)?)),
                    Err(reason) => failed = Some(format!("seed {seed}: {reason}")),
                }
            }
            let over = |of: fn(&Figures) -> f64| Spread::of(&runs.iter().map(of).collect::<Vec<_>>());
            let outcome = match failed {
                Some(failed) => Outcome::Failed { failed },
                None => Outcome::Trained {
                    val_loss: over(|run| run.val_loss),
                    busiest_over_mean: over(|run| run.busiest),
                    dropped: over(|run| run.dropped),
                    entropy: over(|run| run.entropy),
                    tokens_per_s: over(|run| run.tokens_per_s),
                    route_share: over(|run| run.route_share),
                },
            };
            let (name, paper, optimises) = (row.name, row.paper, row.optimises);
            gates.push(Gate { name, paper, optimises, set: row.assignments().collect(), outcome });
        }
        bar.finish_and_clear();
        Ok(Report {
            preset: args.preset().to_owned(),
            device: setting.device.describe(),
            ranks,
            // `chosen` gives one gate at least.
            text: setting.configured[0].2.description.clone(),
            steps: args.steps(),
            seeds: args.seeds,
            commit: commit(),
            gates,
        })
    }
}

/// A bar over the steps of all runs.
fn progress(setting: &Setting<'_>) -> ProgressBar {
    let runs = setting.configured.len() as u64 * setting.args.seeds;
    let bar = ProgressBar::new(runs * setting.args.steps());
    match ProgressStyle::with_template("{msg} [{wide_bar}] {pos}/{len} steps, {eta} left") {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

fn nothing_held_out() -> Failure {
    Failure::new(Code::Usage, "data.validation_fraction = 0: gates are compared by the loss on held-out text")
}

impl Report {
    pub(super) fn show(&self) -> Result<(), Failure> {
        let Self { preset, device, ranks, text, steps, seeds, commit, gates } = self;
        say!("{preset} on {device}, commit {commit}: {ranks} ranks, {steps} steps, {seeds} seeds; {text}")?;
        say!(
            "{:<18}{:>18}{:>16}{:>16}{:>16}{:>10}{:>8}  {:<42}{}",
            "gate",
            "validation loss",
            "busiest/mean",
            "dropped, %",
            "entropy",
            "tokens/s",
            "route",
            "paper",
            "optimises"
        )?;
        for Gate { name, paper, optimises, outcome, .. } in gates {
            match outcome {
                Outcome::Trained { val_loss, busiest_over_mean, dropped, entropy, tokens_per_s, route_share } => say!(
                    "{name:<18}{:>18}{:>16}{:>16}{:>16}{:>10.0}{:>6.1} %  {paper:<42}{optimises}",
                    val_loss.show(1.0, 4),
                    busiest_over_mean.show(1.0, 2),
                    dropped.show(100.0, 2),
                    entropy.show(1.0, 3),
                    tokens_per_s.mean,
                    100.0 * route_share.mean,
                )?,
                Outcome::Failed { failed } => say!("{name:<18}{failed}")?,
            }
        }
        say!(
            "route: the share of the MoE layers' time; busiest, dropped and entropy: means over the last tenth of the steps"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_is_the_deviation_of_a_seed() {
        let Spread { mean, spread } = Spread::of(&[1.0, 2.0, 3.0]);
        assert_eq!((mean, spread), (2.0, Some(1.0)));
        assert_eq!(Spread::of(&[1.0, 2.0, 3.0]).show(10.0, 1), "20.0 +- 10.0");
        assert_eq!(Spread::of(&[4.0]).show(1.0, 2), "4.00");
    }
}
