//! The loop around the steps: metrics, evaluation, checkpoints, requests to stop.
//!
//! Owns when things happen. All ranks take the same turns: what one rank alone has heard is agreed on inside the step.

use std::path::{Path, PathBuf};

use moe_kernels::DeviceError;
use serde::{Deserialize, Serialize};

use super::coordinate::Coordination;
use super::device::Device;
use super::meter::Meter;
use super::ranked::Ranked;
use super::run_dir::RunDir;
use super::signals::StopRequest;
use crate::checkpoint::{CheckpointError, Store};
use crate::collectives::{CollectiveError, Communicator};
use crate::config::Config;
use crate::coordination::{Activity, Progress as Reading};
use crate::data::{Cursor, Loader};
use crate::exit::{Classified, ExitCode, Failure};
use crate::telemetry::{EventFile, MetricsFile, Progress, StepMetrics, TraceError, TraceFile, merge_traces};
use crate::topology::Grid;
use crate::training::{PersistError, Requests, StepError, Trainer};

/// How a run ended without a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// The last step is done.
    Done,
    /// It was asked to stop, and can be resumed.
    Stopped,
}

/// Where the data stands, as a checkpoint keeps it.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct DataState {
    #[serde(flatten)]
    cursor: Cursor,
    /// The text that the cursor counts in.
    pub(super) text_sha256: String,
}

/// What surrounds the steps.
pub(super) struct Surroundings<'a> {
    /// The configuration.
    pub config: &'a Config,
    /// Where the run writes.
    pub run_dir: &'a RunDir,
    /// Its checkpoints.
    pub store: Store,
    /// Hash of the text.
    pub(super) text_sha256: &'a str,
    /// Who may ask for something.
    pub coordination: &'a Coordination,
    /// What signals asked.
    pub stop: &'a StopRequest,
    /// What is computed on.
    pub device: &'a Device,
    /// The ranks.
    pub grid: Grid,
}

/// What a rank writes down of its run.
#[derive(Default)]
pub(super) struct Records {
    /// One line a step; rank 0.
    pub metrics: Option<MetricsFile>,
    /// How experts were used; rank 0 keeps it, of a model that has any.
    pub balance: Option<MetricsFile>,
    /// The same for TensorBoard; rank 0, where it is asked for.
    pub events: Option<EventFile>,
    /// Spans of stages, where they are asked for, until they cannot be written: a run does not end for them.
    pub trace: Option<Result<TraceFile, TraceError>>,
    /// What the steps use.
    pub meter: Meter,
}

/// One run of steps.
pub(super) struct RunLoop<'a, B: Ranked> {
    trainer: &'a mut Trainer<B, B::Group, Loader>,
    surroundings: Surroundings<'a>,
    progress: &'a mut Progress,
    records: Records,
    last_checkpoint: Option<PathBuf>,
}

impl<'a, B: Ranked> RunLoop<'a, B> {
    /// A run of `trainer`.
    pub(super) fn new(
        trainer: &'a mut Trainer<B, B::Group, Loader>,
        surroundings: Surroundings<'a>,
        progress: &'a mut Progress,
        records: Records,
    ) -> Self {
        Self { trainer, surroundings, progress, records, last_checkpoint: None }
    }

    /// Takes the steps after `done`.
    pub(super) fn run(&mut self, done: u64) -> Result<Ending, Failure> {
        let run_dir = self.surroundings.run_dir;
        if self.trainer.groups().world.rank() == 0 {
            // What an interrupted run wrote after its checkpoint will be written again.
            MetricsFile::truncate_after(&run_dir.metrics(), done)?;
            self.records.metrics = Some(MetricsFile::open(run_dir.metrics())?);
            let Config { model, run, .. } = self.surroundings.config;
            if run.balance_every > 0 && model.moe_layers().next().is_some() {
                MetricsFile::truncate_after(&run_dir.balance(), done)?;
                self.records.balance = Some(MetricsFile::open(run_dir.balance())?);
            }
            if self.surroundings.config.run.tensorboard {
                self.records.events = Some(EventFile::create(&run_dir.tensorboard(), done + 1)?);
            }
        }
        if self.records.trace.is_some() {
            self.trainer.keep_spans();
        }
        if done > 0 {
            self.last_checkpoint = Some(self.surroundings.store.step_dir(done));
        }
        let train = &self.surroundings.config.train;
        for step in done + 1..=train.steps {
            let mut wishes = self.surroundings.coordination.requests();
            wishes.stop |= self.surroundings.stop.graceful();
            self.records.meter.begin(self.trainer);
            let (mut metrics, agreed) = self.trainer.step(step, wishes).map_err(|error| self.failed(step, error))?;
            self.records.meter.end(self.trainer);
            let last = step == train.steps;
            if due(step, train.eval_every) || last {
                self.tell(&metrics, Activity::Evaluating);
                metrics.val_loss = self.trainer.evaluate().map_err(|error| self.failed(step, error))?;
            }
            self.record(&metrics)?;
            if agreed.stop && !last {
                self.surroundings.coordination.announce_stop(step);
            }
            if due(step, train.checkpoint_every) || last || agreed != Requests::default() {
                self.tell(&metrics, Activity::Checkpointing);
                self.save(step)?;
            }
            if agreed.stop && !last {
                // A reader that went away does not end a run.
                let _ = self.progress.message(&format!("stopped after step {step}; start again to go on"));
                return Ok(Ending::Stopped);
            }
        }
        Ok(Ending::Done)
    }

    /// Ends what is written down: the record of what was used, and the trace, which rank 0 puts together. All ranks call this once the
    /// run has ended in order.
    pub(super) fn close(&mut self, trace: Option<&Path>) -> Result<(), Failure> {
        self.records.meter.usage(self.trainer).write(&self.surroundings.run_dir.logs())?;
        let (Some(path), Some(file)) = (trace, self.records.trace.take()) else { return Ok(()) };
        let finished = file.and_then(TraceFile::finish);
        let world = &self.trainer.groups().world;
        let all = world.all_gather_bytes(&[u8::from(finished.is_ok())]);
        finished?;
        if world.rank() == 0 && all?.iter().all(|finished| *finished == [1]) {
            merge_traces(path, world.size())?;
        }
        Ok(())
    }

    fn record(&mut self, metrics: &StepMetrics) -> Result<(), Failure> {
        self.tell(metrics, Activity::Training);
        if let Some(file) = &mut self.records.metrics {
            file.append(metrics)?;
        }
        let (every, last) = (self.surroundings.config.run.balance_every, self.surroundings.config.train.steps);
        let told = metrics.step == 1 || due(metrics.step, every) || metrics.step == last;
        if let Some(file) = self.records.balance.as_mut().filter(|_| told) {
            file.append(&self.trainer.balance())?;
        }
        if let Some(events) = &mut self.records.events {
            events.append(metrics)?;
        }
        if let Some(Ok(trace)) = &mut self.records.trace
            && let Err(error) = trace.step(metrics.step, &self.trainer.take_spans())
        {
            tracing::warn!(%error, "the trace ends here; the run goes on");
            self.records.trace = Some(Err(error));
        }
        // A reader that went away does not end a run; the metrics file has everything.
        let _ = self.progress.step(metrics);
        Ok(())
    }

    fn save(&mut self, step: u64) -> Result<(), Failure> {
        let text_sha256 = self.surroundings.text_sha256.to_owned();
        let cursor = serde_json::to_value(DataState { cursor: self.trainer.data().cursor(step), text_sha256 })
            .map_err(|error| Failure::new(ExitCode::Internal, format!("the data cursor: {error}")))?;
        let path = self.trainer.save(&self.surroundings.store, step, cursor).map_err(|error| {
            if let PersistError::Checkpoint(CheckpointError::Peer { exit_code, .. }) = error {
                return Failure::of_another_rank(exit_code);
            }
            let message = format!("the checkpoint of step {step} was not written: {error}; {}", self.remedy());
            Failure::new(error.exit_code(), message)
        })?;
        tracing::debug!(path = %path.display(), step, "checkpoint written");
        self.last_checkpoint = Some(path);
        Ok(())
    }

    fn tell(&self, metrics: &StepMetrics, activity: Activity) {
        let StepMetrics { step, loss, tokens_per_s, .. } = *metrics;
        self.surroundings.coordination.session().progress(Reading { step, loss, tokens_per_s, activity });
    }

    /// Where the next start goes on.
    fn remedy(&self) -> String {
        match &self.last_checkpoint {
            Some(path) => format!("the last checkpoint is {}", path.display()),
            None => "there is no checkpoint yet".to_owned(),
        }
    }

    /// Why the run ends at `step`, with what a reader needs to go on.
    fn failed(&self, step: u64, error: StepError) -> Failure {
        if matches!(error, StepError::NotFinite { .. }) {
            // Every rank sees the same sums and comes here; one of them says it, once all have.
            let world = &self.trainer.groups().world;
            let _ = world.barrier();
            if world.rank() > 0 {
                return Failure::of_another_rank(error.exit_code().number());
            }
        }
        self.surroundings.coordination.report(step, &error);
        let (remedy, code) = (self.remedy(), error.exit_code());
        if let StepError::Device(error @ DeviceError::OutOfMemory { .. }) = error {
            let Surroundings { device, config, grid, .. } = &self.surroundings;
            return Failure::new(code, format!("step {step}: {}; {remedy}", device.explain(error, config, grid)));
        }
        let message = match &error {
            StepError::Collective(CollectiveError::Aborted { .. } | CollectiveError::GivenUp { .. })
                if self.surroundings.stop.immediate() =>
            {
                format!("step {step} was given up: {error}; {remedy}")
            }
            _ => format!("{error}; {remedy}"),
        };
        Failure::new(code, message)
    }
}

/// Whether something that happens every `every` steps (0: never) happens after `step`.
fn due(step: u64, every: u64) -> bool {
    every > 0 && step.is_multiple_of(every)
}
