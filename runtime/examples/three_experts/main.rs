//! Three experts of which each knows two of three classes, and how much better they are together.
//!
//! ```text
//! cargo run --release --example three_experts
//! ```
//!
//! Three ranks, as threads of this process, hold an expert each and a replica of the gate. Rows of four normal numbers belong to one of three
//! classes, which shift one of the numbers; no classifier can be right about more than two thirds of them. See [`moe_runtime::mixture`] for
//! the three ways, and docs/routers.md.

mod experiment;

use std::process::ExitCode;

use experiment::{ALONE, Outcome, WAYS, mean_and_spread, run};
use moe_runtime::exit::Failure;

/// Seeds of the table.
const SEEDS: u64 = 10;

fn main() -> ExitCode {
    let shown = ALONE.into_iter().try_for_each(|updates| {
        let outcomes: Vec<Outcome> = (0..SEEDS).map(|seed| run(seed, updates)).collect::<Result<_, _>>()?;
        show(updates, &outcomes);
        Ok(())
    });
    match shown {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            let failure: Failure = failure;
            eprintln!("error: {failure}");
            failure.exit_code().into()
        }
    }
}

fn show(updates: usize, outcomes: &[Outcome]) {
    println!("experts updated {updates} times by themselves; {SEEDS} seeds");
    println!("{:<26}{:>9}{:>9}", "classified rightly, %", "mean", "spread");
    let line = |name: &str, of: &dyn Fn(&Outcome) -> f64| {
        let (mean, spread) = mean_and_spread(outcomes.iter().map(of));
        println!("{name:<26}{:>9.1}{:>9.1}", 100.0 * mean, 100.0 * spread);
    };
    for e in 0..outcomes.first().map_or(0, |outcome| outcome.experts.len()) {
        line(&format!("expert {e} alone"), &|outcome| outcome.experts[e]);
    }
    line("best expert alone", &Outcome::best_expert);
    for (w, way) in WAYS.iter().enumerate() {
        line(way.name(), &|outcome| outcome.mixtures[w]);
    }
    println!();
}
