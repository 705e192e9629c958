//! `moe-launch bench routers`: what each gate does to the loss, to the balance and to the time.
//!
//! One small model is trained on one text with each gate, from several seeds; with `--cost`, a few steps of a larger one say what share of
//! the MoE layers' time goes into routing. Owns the flags and the choice of gates. Gates are rows of `rows`.

mod costs;
mod losses;
mod rows;
mod session;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use moe_runtime::config::{Config, ConfigBuilder};
use moe_runtime::data::{Corpus, tokenizer};
use moe_runtime::exit::{ExitCode as Code, Failure};
use moe_runtime::worker::{Device, DeviceChoice, World, configured_corpus, set_threads};

use super::measure::print_json;
use super::ranks::together;
use super::shapes::chosen;
use costs::Costs;
use losses::Losses;
use rows::{ROWS, Row};

/// Gates side by side.
#[derive(Args)]
pub(crate) struct RoutersArgs {
    /// Only these gates, separated by commas.
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    only: Vec<String>,
    /// Text file or directory; may be given several times. Default: that of moe-worker.
    #[arg(long, value_name = "PATH")]
    text: Vec<PathBuf>,
    /// Steps of a run. Default: 500; with --cost 13, of which the first three are not timed.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    steps: Option<u64>,
    /// Runs of each gate, from seeds 1, 2, 3 …
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..))]
    seeds: u64,
    /// Built-in configuration: model, batch and sequence length. Default: tiny; with --cost moe-15m.
    #[arg(long)]
    preset: Option<String>,
    /// Sets one key for all gates, as `train.global_batch=4`; a gate's own settings go before. May be given several times.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// The share of the MoE layers' time that routing, its losses and the shuffle's plan take, instead of losses.
    #[arg(long, conflicts_with = "seeds")]
    cost: bool,
    /// Where to compute.
    #[arg(long, value_enum, default_value_t = DeviceChoice::Auto)]
    device: DeviceChoice,
    /// Expert-parallel size. Default: the largest that divides both ranks and experts.
    #[arg(long, value_name = "N")]
    ep: Option<usize>,
    /// Threads of a rank. Default: this rank's share of the cores.
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// One JSON object instead of a table.
    #[arg(long)]
    json: bool,
}

impl RoutersArgs {
    fn steps(&self) -> u64 {
        self.steps.unwrap_or(if self.cost { 13 } else { 500 })
    }

    fn preset(&self) -> &str {
        self.preset.as_deref().unwrap_or(if self.cost { "moe-15m" } else { "tiny" })
    }

    /// What the first run of `row` trains.
    fn configure(&self, row: &Row, ranks: usize) -> Result<Config, Failure> {
        let sets: Vec<String> = self.set.iter().cloned().chain(row.assignments()).collect();
        let builder = ConfigBuilder::new().given(Some(self.preset()), None, &sets);
        let mut builder = builder.flag("--steps", "train.steps", self.steps());
        let tags = row.tags();
        if tags.is_empty() && !self.text.is_empty() {
            builder = builder.flag("--text", "data.paths", self.text.clone());
        }
        for tag in tags {
            // The same text under each tag: the shares of a router of its own, not other texts.
            let paths: Vec<_> = self.text.iter().map(|path| path.display().to_string()).collect();
            builder = builder.set(format!("data.sources.tag{tag}.paths={paths:?}"));
            builder = builder.set(format!("data.sources.tag{tag}.tag={tag}"));
        }
        if let Some(ep) = self.ep {
            builder = builder.flag("--ep", "parallel.ep", ep);
        }
        if let Some(threads) = self.threads {
            builder = builder.flag("--threads", "run.threads", threads);
        }
        let named = |error: &dyn std::fmt::Display| Failure::new(Code::Usage, format!("{}: {error}", row.name));
        let resolved = builder.build().map_err(|error| named(&error))?;
        resolved.validate(ranks).map_err(|error| named(&error))?;
        if resolved.config.model.moe_layers().next().is_none() {
            return Err(named(&"the model has no MoE layer, and nothing to route"));
        }
        Ok(resolved.config)
    }
}

pub(crate) fn run(args: &RoutersArgs) -> Result<ExitCode, Failure> {
    let rows = chosen(&ROWS, |row| row.name, &args.only).map_err(|name| {
        let names: Vec<_> = ROWS.iter().map(|row| row.name).collect();
        Failure::new(Code::Usage, format!("--only {name}: accepted: {}", names.join(", ")))
    })?;
    let (rows, untagged): (Vec<Row>, Vec<Row>) =
        rows.into_iter().partition(|row| row.tags().is_empty() || !args.text.is_empty());
    for Row { name, .. } in untagged {
        if args.only.iter().any(|only| only == name) {
            let message =
                format!("{name}: its routers know text by a tag, which the default text has not; give --text");
            return Err(Failure::new(Code::Usage, message));
        }
        eprintln!("{name} is left out: it needs --text");
    }
    if args.cost {
        let measure = |world: &World| {
            let setting = Setting::new(args, &rows, world)?;
            setting.device.visit(Costs(&setting))
        };
        return together(measure, |report| if args.json { print_json(report) } else { report.show() });
    }
    let measure = |world: &World| {
        let setting = Setting::new(args, &rows, world)?;
        setting.device.visit(Losses(&setting))
    };
    together(measure, |report| if args.json { print_json(report) } else { report.show() })
}

/// What is compared, and where.
struct Setting<'a> {
    args: &'a RoutersArgs,
    /// Each gate with its configuration, from seed 1 on, and its text.
    configured: Vec<(Row, Config, Corpus)>,
    world: &'a World,
    device: Device,
}

impl<'a> Setting<'a> {
    /// Checks all gates before the first is trained for an hour.
    fn new(args: &'a RoutersArgs, rows: &[Row], world: &'a World) -> Result<Self, Failure> {
        let (_, ranks) = world.place();
        if args.cost && ranks > 1 {
            let message = format!("--cost is of one rank, and there are {ranks}: start it without mpirun");
            return Err(Failure::new(Code::Usage, message));
        }
        let configured = rows.iter().map(|row| Ok((*row, args.configure(row, ranks)?)));
        let configured: Vec<(Row, Config)> = configured.collect::<Result<_, Failure>>()?;
        // `chosen` gives one row at least.
        let first = &configured[0].1;
        set_threads(first, world)?;
        let device = Device::choose(args.device, first.train.precision, world)?;
        for (row, config) in &configured {
            device
                .check((&config.model, &config.router))
                .map_err(|error| Failure::new(Code::Usage, format!("{}: {error}", row.name)))?;
        }
        let tokenizer = tokenizer(&first.data.tokenizer)?;
        // Read once for all gates that are given the same sources.
        let mut with_text: Vec<(Row, Config, Corpus)> = Vec::new();
        for (row, config) in configured {
            let corpus = match with_text.iter().find(|(_, other, _)| other.data == config.data) {
                Some((_, _, corpus)) => corpus.clone(),
                None => configured_corpus(&config, tokenizer.as_ref())?,
            };
            with_text.push((row, config, corpus));
        }
        Ok(Self { args, configured: with_text, world, device })
    }
}
