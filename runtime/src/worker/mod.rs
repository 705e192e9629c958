//! `moe-worker`: one rank of a run, from its command line to its exit code.
//!
//! Owns the order in which everything is started and ended. What a step is, is `training`'s; what files are, is `checkpoint`'s.

mod args;
mod coordinate;
mod cores;
mod device;
mod last_resort;
mod lobby;
mod meter;
mod ranked;
mod run_dir;
mod run_loop;
mod settle;
mod signals;
mod world;

use std::io::IsTerminal;
use std::sync::Arc;

use clap::Parser;
use moe_kernels::{Backend, Cpu};

pub use args::{DeviceChoice, Resume, WorkerArgs};
pub use coordinate::{coordinator_listener, reachable_addr};
pub use device::{Device, OnDevice};
pub use ranked::{Arrival, Gather, OnFailure, Ranked};
pub use run_dir::{RunDir, RunDirError};
pub use settle::{configured_corpus, read_corpus, resolved_config};
pub use world::World;

use crate::checkpoint::{Checkpoint, CheckpointError, GO_BACK, HfFolder, Store, probe_shared};
use crate::collectives::{Communicator, Groups, HostCommunicator, RankFlags, rank_facts};
use crate::config::Config;
use crate::data::{Corpus, Loader};
use crate::exit::{Classified, ExitCode, Failure, caught};
use crate::model::layout::parameter_counts;
use crate::model::{ModelSetup, Transformer};
use crate::routing::Gate;
use crate::system::memory_now;
use crate::telemetry::{Console, Progress, ProgressMode, ProgressSpec, TraceFile, init_logs, log_filter};
use crate::topology::{Grid, Rank};
use crate::training::{PersistError, StepError, Trainer};
use coordinate::{Coordinated, Coordination};
use last_resort::LastResort;
use lobby::Lobby;
use meter::Meter;
use run_loop::{DataState, Ending, Records, RunLoop, Surroundings};
use settle::{Kept, Plan, agreed, decide, from_rank_0, share_corpus};
use signals::StopRequest;

/// Runs the worker of this process and ends the process.
pub fn main() -> ! {
    run(None)
}

/// As [`main`], for a program with a gate of its own, which `router.kind = "custom"` then names.
pub fn main_with_gate(gate: Arc<dyn Gate>) -> ! {
    run(Some(gate))
}

fn run(gate: Option<Arc<dyn Gate>>) -> ! {
    let args = match WorkerArgs::try_parse() {
        Ok(args) => WorkerArgs { gate, ..args },
        Err(error) => {
            // Help and version are not errors; where the terminal is gone nothing more can be said.
            let _ = error.print();
            let code = if error.use_stderr() { ExitCode::Usage } else { ExitCode::Done };
            std::process::exit(i32::from(code.number()));
        }
    };
    let (world, lobby) = match arrive(&args) {
        Ok(arrived) => arrived,
        Err(failure) => {
            eprintln!("error: {failure}");
            std::process::exit(i32::from(failure.exit_code().number()));
        }
    };
    let (rank, size) = world.place();
    let who = if size > 1 { format!("rank {rank}: ") } else { String::new() };
    // Kept until the process ends, destructors of libraries included.
    let last_resort = LastResort::watch(Communicator::<Cpu>::context(&world.communicator).clone(), who.clone());
    let ended = match &last_resort {
        Ok(last_resort) => caught(|| train(&args, &world, lobby, last_resort)),
        Err(error) => Err(Failure::new(ExitCode::Internal, format!("cannot start a thread: {error}"))),
    };
    match ended {
        Ok(Ending::Done) => world.leave(ExitCode::Done),
        Ok(Ending::Stopped) => world.leave(ExitCode::Temporary),
        Err(failure) => {
            if !failure.is_told_elsewhere() {
                // In one piece: ranks share the terminal.
                let line = format!("error: {who}{failure}\n");
                eprint!("{line}");
            }
            world.abandon(failure.exit_code())
        }
    }
}

/// Joins the other ranks: over MPI where an MPI launcher started this process, else at the coordinator that it was given.
fn arrive(args: &WorkerArgs) -> Result<(World, Option<Lobby>), Failure> {
    let flags = RankFlags { rank: args.rank, world_size: args.world_size };
    let facts = rank_facts(flags, |name| std::env::var(name).ok())?;
    match facts.filter(|facts| facts.size > 1 && !facts.launcher.has_mpi()) {
        Some(facts) => lobby::enter(args, facts).map(|(world, lobby)| (world, Some(lobby))),
        None => Ok((World::join_as(flags, args.start_timeout())?, None)),
    }
}

/// Everything between the start and the end of MPI.
fn train(
    args: &WorkerArgs,
    world: &World,
    mut lobby: Option<Lobby>,
    last_resort: &LastResort,
) -> Result<Ending, Failure> {
    let (rank, size) = world.place();
    // Before anything that takes long: a signal would end the process until then.
    let context = Communicator::<Cpu>::context(&world.communicator);
    let stop = StopRequest::listen(context.abort_handle())
        .map_err(|error| Failure::new(ExitCode::Io, format!("cannot listen to signals: {error}")))?;
    let console = Console::new();
    let rust_log = std::env::var("RUST_LOG").ok();
    let log_file = init_logs(rank, &log_filter(rank, args.verbose, rust_log.as_deref()), &console)?;
    let mut kept = lobby.as_mut().map(|lobby| std::mem::take(&mut lobby.kept)).unwrap_or_default();
    let settled = lobby.as_mut().and_then(|lobby| lobby.plan.take());
    let plan: Plan = from_rank_0(&world.communicator, || settled.map_or_else(|| decide(args, size, &mut kept), Ok))??;
    let config = &plan.config;
    let run_dir = RunDir::at(&plan.run_dir);
    let grid = grid_of(config, size)?;
    set_threads(config, world)?;
    let device = Device::choose(args.device, config.train.precision, world)?;
    device.check((&config.model, &config.router))?;
    agreed(&world.communicator, device.check_memory(config, &grid, world.neighbours()).map_err(Failure::from))?;
    probe_shared::<Cpu, _>(&world.communicator, run_dir.path())?;
    log_file.write_to(&run_dir.logs().join(format!("rank-{rank:05}.log")))?;
    let coordination = match lobby {
        Some(lobby) => Coordination::go_on(lobby, run_dir.path())?,
        None => {
            let fingerprint = config.fingerprint()?;
            let job = Coordinated {
                grid: &grid,
                fingerprint: &fingerprint,
                run_dir: run_dir.path(),
                seat: args.seat()?,
                start_timeout: args.start_timeout(),
            };
            Coordination::start(world, job, context.abort_handle())?
        }
    };
    let outside = Outside { console: &console, coordination: &coordination, stop: &stop, last_resort };
    let part = Part { args, world, plan: &plan, grid: &grid, device: &device, outside };
    let ending = part.take(&mut kept);
    match &ending {
        Ok(ending) => tracing::debug!(?ending, "the run ends"),
        Err(failure) => tracing::debug!(%failure, "the run ends"),
    }
    // However it ends: the others are told, and no file says that a coordinator still answers.
    coordination.leave(&ending);
    ending
}

/// One rank's part in a job that is coordinated.
struct Part<'a> {
    args: &'a WorkerArgs,
    world: &'a World,
    plan: &'a Plan,
    grid: &'a Grid,
    device: &'a Device,
    outside: Outside<'a>,
}

impl Part<'_> {
    /// From the text to the last step.
    fn take(self, kept: &mut Kept) -> Result<Ending, Failure> {
        let Self { args, world, plan, grid, device, outside } = self;
        let (config, (rank, size)) = (&plan.config, world.place());
        let corpus = share_corpus(&world.communicator, kept)?;
        Communicator::<Cpu>::context(&world.communicator).set_deadline(config.run.collective_timeout());
        let loader = Loader::new(&corpus, config.loader_spec(rank, size))?;
        let start = Start {
            args,
            plan,
            run_dir: &RunDir::at(&plan.run_dir),
            grid: *grid,
            rank: Rank(rank),
            device,
            corpus: &corpus,
            start_bytes: memory_now().map_or(0, |(now, _)| now),
        };
        device.visit(Training { start, outside, world, loader })
    }
}

/// What a run starts from.
struct Start<'a> {
    args: &'a WorkerArgs,
    plan: &'a Plan,
    run_dir: &'a RunDir,
    grid: Grid,
    rank: Rank,
    device: &'a Device,
    corpus: &'a Corpus,
    /// Resident memory before the model.
    start_bytes: u64,
}

/// Who looks at a run and may ask something of it.
struct Outside<'a> {
    console: &'a Console,
    coordination: &'a Coordination,
    stop: &'a StopRequest,
    last_resort: &'a LastResort,
}

/// The run itself, on whatever device.
struct Training<'a> {
    start: Start<'a>,
    outside: Outside<'a>,
    world: &'a World,
    loader: Loader,
}

/// The name under which ranks tell the coordinator what they compute on.
const MEETING: &str = "devices";

impl Training<'_> {
    /// The groups of this rank, and in words what carries their buffers. Ranks that cannot talk yet meet at the coordinator.
    fn connect<B: Ranked>(&self, device: &B) -> Result<(Groups<B::Group>, Vec<String>), Failure> {
        let Self { start, outside, world, .. } = self;
        let coordination = outside.coordination;
        let arrival = Arrival {
            control: duplicate(&world.communicator)?,
            local_rank: world.local_rank(),
            gather: &|mine| Ok(coordination.session().gather(MEETING, mine, start.args.start_timeout())?),
            on_failure: Box::new(coordination.reporter()),
        };
        let (all, carried) = device.connect(arrival)?;
        Ok((Groups::of_grid(all, &start.grid)?, carried))
    }
}

impl OnDevice for Training<'_> {
    type Output = Result<Ending, Failure>;

    fn run<B: Ranked>(self, device: B) -> Result<Ending, Failure> {
        let (groups, carried) = self.connect(&device)?;
        let Self { start, outside, world, loader } = self;
        let Start { args, plan, run_dir, grid, corpus, .. } = start;
        let Outside { console, coordination, stop, last_resort } = outside;
        let config = &plan.config;
        let mut trainer = build_with_gate(device, config, (&grid, start.rank), groups, (loader, args.gate.clone()))
            .map_err(|error| refused(&start, error))?;
        trainer.set_peak_flops(start.device.peak_flops());
        let mut steps = || -> Result<Ending, Failure> {
            let done = agreed(&world.communicator, start_values(&mut trainer, plan, corpus))?;
            if plan.resume.is_some() && start.rank.0 == 0 {
                run_dir.save_config(config)?;
            }
            let on_terminal = std::io::stdout().is_terminal() && std::io::stderr().is_terminal();
            let mode = ProgressMode::choose(start.rank.0, args.json, on_terminal);
            let spec = ProgressSpec { mode, done, steps: config.train.steps, log_every: config.train.log_every };
            let mut progress = Progress::new(spec, Box::new(std::io::stdout()), console);
            for line in introduction(&start, &carried, done) {
                // A reader that went away does not end a run.
                let _ = progress.message(&line);
            }
            let surroundings = Surroundings {
                config,
                run_dir,
                store: Store::new(run_dir.checkpoints(), config.train.keep_checkpoints),
                text_sha256: &corpus.sha256,
                coordination,
                stop,
                device: start.device,
                grid,
            };
            let trace = args.trace.as_deref().map(|path| TraceFile::create(path, start.rank.0)).transpose()?;
            let records = Records { trace: trace.map(Ok), meter: Meter::new(start.start_bytes), ..Records::default() };
            let mut run = RunLoop::new(&mut trainer, surroundings, &mut progress, records);
            let ending = run.run(done).and_then(|ending| run.close(args.trace.as_deref()).map(|()| ending));
            progress.finish();
            ending
        };
        steps().inspect_err(|failure| {
            // What this rank holds is let go of without its peers, who may wait for it elsewhere and learn why they need not.
            coordination.report_failure(failure);
            last_resort.end_with(failure.exit_code());
            Communicator::<Cpu>::context(&world.communicator).abort_handle().abort(None, failure.to_string());
        })
    }
}

/// Why the model could not be built, with what would fit where memory did not suffice.
fn refused(start: &Start<'_>, error: StepError) -> Failure {
    match error {
        StepError::Device(error) => start.device.explain(error, &start.plan.config, &start.grid),
        error => error.into(),
    }
}

/// A group of the same ranks, so that the world stays this process's own.
fn duplicate(world: &HostCommunicator) -> Result<HostCommunicator, Failure> {
    Ok(Communicator::<Cpu>::split(world, "world", 0, Communicator::<Cpu>::rank(world))?)
}

/// The grid that a configuration asks for, or the automatic one.
pub fn grid_of(config: &Config, world: usize) -> Result<Grid, Failure> {
    let (divisible, experts) = (
        config.model.divisible_experts(),
        if config.model.moe_layers().next().is_some() { config.model.experts } else { 0 },
    );
    let grid = match config.parallel.ep {
        Some(ep) => Grid::new(world, ep, divisible),
        None => Grid::automatic(world, divisible),
    };
    // What divides all blocks' experts divides the most of them.
    let grid = grid.and_then(|grid| Grid::new(world, grid.ep(), experts));
    grid.map_err(|error| Failure::new(ExitCode::Usage, format!("parallel.ep: {error}")))
}

/// Starts the threads of this rank: as many as it is told, or its share of the CPUs it may use.
pub fn set_threads(config: &Config, world: &World) -> Result<(), Failure> {
    let threads = match config.run.threads {
        0 => world.threads(),
        threads => threads,
    };
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build_global()
        .map_err(|error| Failure::new(ExitCode::Internal, format!("cannot start {threads} threads: {error}")))
}

/// The model and its trainer on this rank, with initial weights.
///
/// # Errors
/// Too little memory, or a setting of training that cannot be: the same command fails again.
pub fn build<B: Backend, C: Communicator<B>, D: crate::training::TrainingData>(
    device: B,
    config: &Config,
    (grid, rank): (&Grid, Rank),
    groups: Groups<C>,
    data: D,
) -> Result<Trainer<B, C, D>, StepError> {
    build_with_gate(device, config, (grid, rank), groups, (data, None))
}

/// As [`build`], with the gate of `router.kind = "custom"`.
///
/// # Errors
/// As [`build`]'s.
pub fn build_with_gate<B: Backend, C: Communicator<B>, D: crate::training::TrainingData>(
    device: B,
    config: &Config,
    (grid, rank): (&Grid, Rank),
    groups: Groups<C>,
    (data, gate): (D, Option<Arc<dyn Gate>>),
) -> Result<Trainer<B, C, D>, StepError> {
    let setup = ModelSetup {
        model: config.model.clone(),
        router: config.router.clone(),
        grid: *grid,
        rank,
        seed: config.train.seed,
        chunks: config.parallel.chunks,
        receive_headroom: config.parallel.receive_headroom,
        direct: config.parallel.direct,
        max_sequences: config.train.micro_batch_for(grid.world()),
        sequence_length: config.train.sequence_length,
        recompute: config.train.recompute,
        gate,
    };
    let model = groups.end_alone_unless(Transformer::new(device, setup))?;
    Trainer::new(model, groups, config, data)
}

/// Loads what the run starts from and returns the steps that are done.
fn start_values<B: Backend, C: Communicator<B>, D: crate::training::TrainingData>(
    trainer: &mut Trainer<B, C, D>,
    plan: &Plan,
    corpus: &Corpus,
) -> Result<u64, Failure> {
    if let Some(folder) = &plan.weights {
        let device = trainer.model.device().clone();
        HfFolder::open(folder)?.load_into(&device, trainer.model.parameters_mut())?;
    }
    let Some(checkpoint) = &plan.resume else { return Ok(0) };
    let checkpoint = Checkpoint::open(checkpoint)?;
    let progress = trainer.restore(&checkpoint).map_err(|error| match &error {
        PersistError::Checkpoint(CheckpointError::Peer { exit_code, .. }) => Failure::of_another_rank(*exit_code),
        PersistError::Checkpoint(fault) if fault.is_damage() => {
            Failure::new(error.exit_code(), format!("{error}; {GO_BACK}"))
        }
        _ => error.into(),
    })?;
    if progress.step == 0 {
        // A model that was brought in: it has no place in any text yet.
        return Ok(0);
    }
    let then = serde_json::from_value::<DataState>(progress.cursor.clone()).map(|state| state.text_sha256);
    match then {
        Ok(then) if then == corpus.sha256 => Ok(progress.step),
        Ok(then) => {
            let now = &corpus.sha256;
            let reason = "its place in the data would mean other text; bring the old text back, or begin a new run";
            let message = format!("the text has sha256 {now}, and had {then} when the run began: {reason}");
            Err(Failure::new(ExitCode::BadData, message))
        }
        Err(error) => {
            let message = format!("{}: the cursor in manifest.json: {error}", checkpoint.dir().display());
            Err(Failure::new(ExitCode::BadData, message))
        }
    }
}

/// What a reader should know before the first step.
fn introduction(start: &Start<'_>, carried: &[String], done: u64) -> Vec<String> {
    let Start { plan, grid, corpus, device, .. } = start;
    let Config { model, router, train, .. } = &plan.config;
    let (all, active) = parameter_counts(model, router);
    let millions = |n: usize| format!("{:.1} M", n as f64 / 1e6);
    let experts = match model.moe_layers().count() {
        0 => "dense".to_owned(),
        layers if model.experts_by_layer.is_empty() => {
            format!("{} experts in {layers} layers, top {}", model.experts, model.top_k)
        }
        layers => format!("{:?} experts in {layers} layers, top {}", model.layer_experts(), model.top_k),
    };
    let peak = |flops: f64| format!("; MFU is of its {:.1} TFLOP/s, dense", flops / 1e12);
    let mut lines = vec![
        format!("run directory  {}", plan.run_dir.display()),
        format!("model          {} parameters, {} active a token, {experts}", millions(all), millions(active)),
        format!("ranks          {} = {} expert-parallel x {} data-parallel", grid.world(), grid.ep(), grid.dp()),
        format!("device         {}{}", device.describe(), device.peak_flops().map_or(String::new(), peak)),
        format!("text           {}, sha256 {}", corpus.description, corpus.sha256),
        format!(
            "batch          {} sequences of {} tokens, {} steps",
            train.global_batch, train.sequence_length, train.steps
        ),
    ];
    if let Some(idle) = grid.world().checked_sub(train.global_batch).filter(|idle| *idle > 0) {
        lines.push(format!("idle           {idle} of {} ranks have no sequence of their own", grid.world()));
    }
    if let Some((by, places)) = carried.split_first() {
        lines.push(format!("exchange       {by}"));
        lines.extend(places.iter().map(|place| format!("               {place}")));
    }
    if router.looks_ahead() && model.moe_layers().next().is_some() {
        lines.push("looks ahead    what becomes of a token in training depends on later ones; evaluation and generation do without".to_owned());
    }
    if let Some(entropy) = corpus.entropy {
        lines.push(format!("entropy        {entropy:.4} nats per token: the loss cannot stay below"));
    }
    if done >= train.steps {
        lines.push(format!("nothing to do  {done} steps are done already; give a larger --steps to go on"));
    } else if done > 0 {
        lines.push(format!("resuming       after step {done}"));
    } else if plan.again {
        lines.push(
            "again          from the start, with the settings of before: the run had left no checkpoint".to_owned(),
        );
    }
    lines
}
