//! `moe-launch balance`: how evenly a run uses its experts.
//!
//! Owns the table and the heat map of one reading of `balance.jsonl`. It works while the job runs and after it has ended.

use std::io::{self, Write};
use std::path::PathBuf;

use clap::Args;
use console::{Style, Term, colors_enabled};
use moe_runtime::exit::{Classified, ExitCode};
use moe_runtime::telemetry::{BalanceReading, LayerBalance, MetricsError};
use moe_runtime::worker::RunDir;

const EXAMPLES: &str = "\
Examples:
  moe-launch balance runs/a
  moe-launch balance runs/a --step 500
  moe-launch balance runs/a --json | jq '.layers[0].load'

Loads are choices before capacity, as multiples of their mean over the layer's experts: 1 is even. p10, p50 and p90 are
percentiles over experts, cv is their standard deviation, mass the highest mean probability of an expert times their number,
entropy that of a token's probabilities over ln E: 1 where the gate decides nothing, 0 where it is sure.

The map has a line a layer and a column an expert; higher blocks are busier: · none, ▄ the mean, █ twice it and more.";

/// Show how evenly a run uses its experts.
#[derive(Args)]
#[command(after_long_help = EXAMPLES)]
pub(crate) struct BalanceArgs {
    /// The run directory.
    #[arg(value_name = "RUN_DIR")]
    run_dir: PathBuf,
    /// The step to show. Default: the last one written down; run.balance_every says which are.
    #[arg(long, value_name = "N")]
    step: Option<u64>,
    /// Print the reading as it is in balance.jsonl, one JSON object.
    #[arg(long)]
    json: bool,
}

/// Why there is nothing to show.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BalanceError {
    /// The file cannot be read.
    #[error(transparent)]
    File(#[from] MetricsError),
    /// There is no run.
    #[error("{}: is no run directory: config.toml is missing", path.display())]
    NoRun {
        /// What was named.
        path: PathBuf,
    },
    /// It has no such step.
    #[error("{}: has no reading{}; run.balance_every says after which steps there is one", path.display(), step.map_or(String::new(), |step| format!(" of step {step}")))]
    NoReading {
        /// The file.
        path: PathBuf,
        /// What was asked for.
        step: Option<u64>,
    },
    /// The output could not be written.
    #[error("cannot write the answer: {0}")]
    Output(#[from] io::Error),
}

impl Classified for BalanceError {
    fn exit_code(&self) -> ExitCode {
        match self {
            Self::File(error) => error.exit_code(),
            Self::NoRun { .. } => ExitCode::Io,
            Self::NoReading { .. } => ExitCode::Usage,
            Self::Output(_) => ExitCode::Io,
        }
    }
}

pub(crate) fn run(args: &BalanceArgs, out: &mut impl Write) -> Result<(), BalanceError> {
    let run_dir = RunDir::at(&args.run_dir);
    if !run_dir.config().exists() {
        return Err(BalanceError::NoRun { path: args.run_dir.clone() });
    }
    let path = run_dir.balance();
    let Some(reading) = BalanceReading::read(&path, args.step)? else {
        return Err(BalanceError::NoReading { path, step: args.step });
    };
    if args.json {
        serde_json::to_writer(&mut *out, &reading).map_err(io::Error::from)?;
        writeln!(out)?;
    } else {
        write_table(&reading, out)?;
        writeln!(out)?;
        let width = usize::from(Term::stdout().size().1).max(40);
        write_map(&reading, width, colors_enabled(), out)?;
    }
    Ok(out.flush()?)
}

const HEAD: [&str; 11] =
    ["layer", "busiest", "p90", "p50", "p10", "idle", "cv", "mass", "entropy", "dropped", "experts"];

fn write_table(reading: &BalanceReading, out: &mut impl Write) -> io::Result<()> {
    writeln!(out, "step {} · {} tokens · {} MoE layers\n", reading.step, reading.tokens, reading.layers.len())?;
    let rows = reading.layers.iter().enumerate().map(|(index, layer)| cells(index, layer));
    let rows: Vec<[String; 11]> = std::iter::once(HEAD.map(str::to_owned)).chain(rows).collect();
    let widths: [usize; 11] = std::array::from_fn(|column| rows.iter().map(|row| row[column].len()).max().unwrap_or(0));
    for row in &rows {
        let padded: Vec<String> = row.iter().zip(widths).map(|(cell, width)| format!("{cell:>width$}")).collect();
        writeln!(out, "{}", padded.join("  "))?;
    }
    Ok(())
}

fn cells(index: usize, layer: &LayerBalance) -> [String; 11] {
    let experts = layer.load.len();
    let mass = layer.mass.iter().copied().fold(0.0, f32::max) * experts as f32;
    let entropy = if experts > 1 { f64::from(layer.entropy) / (experts as f64).ln() } else { 0.0 };
    [
        index.to_string(),
        format!("{:.2}", layer.percentile(1.0)),
        format!("{:.2}", layer.percentile(0.9)),
        format!("{:.2}", layer.percentile(0.5)),
        format!("{:.2}", layer.percentile(0.1)),
        layer.idle().to_string(),
        format!("{:.2}", layer.variation()),
        format!("{mass:.2}"),
        format!("{entropy:.2}"),
        format!("{:.1} %", 100.0 * layer.dropped_fraction()),
        experts.to_string(),
    ]
}

/// From little to twice the mean.
const BLOCKS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
/// Colours of the 256 that terminals have, from cold over grey, near the mean, to hot.
const COLOURS: [u8; 8] = [27, 33, 75, 250, 250, 215, 208, 196];

/// The shade of a load: None where there is none.
fn shade(load: f64) -> Option<usize> {
    (load > 0.0).then(|| ((load * 4.0).ceil() as usize).clamp(1, BLOCKS.len()) - 1)
}

fn write_map(reading: &BalanceReading, width: usize, coloured: bool, out: &mut impl Write) -> io::Result<()> {
    for (index, layer) in reading.layers.iter().enumerate() {
        let loads = layer.relative_loads();
        for (line, loads) in loads.chunks(width - 7).enumerate() {
            match line {
                0 => write!(out, "{index:>5}  ")?,
                _ => write!(out, "       ")?,
            }
            for &load in loads {
                match shade(load) {
                    None => write!(out, "·")?,
                    Some(shade) => {
                        let style = Style::new().force_styling(coloured).color256(COLOURS[shade]);
                        write!(out, "{}", style.apply_to(BLOCKS[shade]))?;
                    }
                }
            }
            writeln!(out)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading() -> BalanceReading {
        let even = LayerBalance { load: vec![4; 4], mass: vec![0.25; 4], dropped: Vec::new(), entropy: 1.386_29 };
        let uneven = LayerBalance {
            load: vec![13, 3, 0, 0],
            mass: vec![0.7, 0.3, 0.0, 0.0],
            dropped: vec![4, 0, 0, 0],
            entropy: 0.0,
        };
        BalanceReading { step: 12, tokens: 8, layers: vec![even, uneven] }
    }

    #[test]
    fn the_table_has_a_line_a_layer() {
        let mut out = Vec::new();
        write_table(&reading(), &mut out).unwrap();
        let expected = "\
step 12 · 8 tokens · 2 MoE layers

layer  busiest   p90   p50   p10  idle    cv  mass  entropy  dropped  experts
    0     1.00  1.00  1.00  1.00     0  0.00  1.00     1.00    0.0 %        4
    1     3.25  3.25  0.00  0.00     2  1.33  2.80     0.00   25.0 %        4
";
        assert_eq!(String::from_utf8(out).unwrap(), expected);
    }

    #[test]
    fn the_map_has_a_column_an_expert_and_colours_only_where_they_are_seen() {
        let map = |width, coloured| {
            let mut out = Vec::new();
            write_map(&reading(), width, coloured, &mut out).unwrap();
            String::from_utf8(out).unwrap()
        };
        assert_eq!(map(40, false), "    0  ▄▄▄▄\n    1  █▃··\n");
        assert_eq!(map(10, false), "    0  ▄▄▄\n       ▄\n    1  █▃·\n       ·\n");
        assert!(map(40, true).contains("\u{1b}[38;5;196m█"), "{:?}", map(40, true));
    }

    #[test]
    fn a_run_without_a_reading_is_told_what_writes_them() {
        let folder = tempfile::tempdir().unwrap();
        let args = |step| BalanceArgs { run_dir: folder.path().into(), step, json: true };
        let error = run(&args(Some(3)), &mut Vec::new()).unwrap_err();
        assert_eq!(error.exit_code(), ExitCode::Io);
        assert!(error.to_string().contains("is no run directory: config.toml is missing"), "{error}");
        std::fs::write(folder.path().join("config.toml"), "").unwrap();
        let error = run(&args(Some(3)), &mut Vec::new()).unwrap_err();
        assert_eq!(error.exit_code(), ExitCode::Usage);
        assert!(error.to_string().contains("balance.jsonl: has no reading of step 3; run.balance_every"), "{error}");
        std::fs::write(
            folder.path().join("balance.jsonl"),
            format!("{}\n", serde_json::to_string(&reading()).unwrap()),
        )
        .unwrap();
        let mut out = Vec::new();
        run(&args(None), &mut out).unwrap();
        assert_eq!(serde_json::from_slice::<BalanceReading>(&out).unwrap(), reading());
    }
}
