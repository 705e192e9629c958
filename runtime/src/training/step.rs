//! One training step: passes, sums over ranks, clipping, update.
//!
//! Owns the order of a step and its arithmetic over ranks: gradients are those of the mean loss over the global batch, whatever
//! the layout. It reads no file, writes none, and shows nothing.

use std::time::Instant;

use moe_kernels::{Backend, DeviceError};

use super::sharing::Sharing;
use crate::checkpoint::Selection;
use crate::collectives::{CollectiveError, Communicator, Groups, ReduceOp};
use crate::config::Config;
use crate::data::{Batch, Loader};
use crate::exit::{Classified, ExitCode};
use crate::invalid::InvalidValue;
use crate::memory::{Kind, Slot, Tally};
use crate::model::{PassTokens, StepSums, Transformer};
use crate::optimizer::{Optimizer, Schedule, Shard};
use crate::pass_error::PassError;
use crate::plan::Flops;
use crate::routing::{BalanceReport, BatchShare};
use crate::stages::{Span, Stage, StageClock};
use crate::telemetry::{BalanceReading, StageMs, StepMetrics};
use crate::topology::share;

/// Why a step did not happen.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Another rank or the way to it failed.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// A setting of training that cannot be.
    #[error(transparent)]
    Setting(#[from] InvalidValue),
    /// The loss or the gradient is not a number: the parameters are as they were before the step.
    #[error("step {step}: the {what} is {value}; the parameters are those of step {}", step - 1)]
    NotFinite {
        /// The step.
        step: u64,
        /// What it was.
        what: &'static str,
        /// What was found.
        value: f64,
    },
}

impl From<PassError> for StepError {
    fn from(error: PassError) -> Self {
        match error {
            PassError::Device(error) => Self::Device(error),
            PassError::Collective(error) => Self::Collective(error),
        }
    }
}

impl Classified for StepError {
    fn exit_code(&self) -> ExitCode {
        match self {
            // The same step would need the same memory again.
            Self::Device(DeviceError::OutOfMemory { .. }) => ExitCode::Usage,
            Self::Device(_) | Self::NotFinite { .. } => ExitCode::Internal,
            Self::Setting(error) => error.exit_code(),
            Self::Collective(error) => error.exit_code(),
        }
    }
}

/// What someone asked of a run while it runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Requests {
    /// Write a checkpoint after this step.
    pub checkpoint: bool,
    /// Write one and stop.
    pub stop: bool,
}

/// Where a rank's batches come from.
pub trait TrainingData {
    /// Passes of a step: the same on every rank.
    fn passes(&self) -> usize;
    /// Fills `batch` with pass `pass` of the step that follows `steps_done` steps; perhaps with no sequence.
    fn train_pass(&self, steps_done: u64, pass: usize, batch: &mut Batch);
    /// Passes of an evaluation: the same on every rank; 0: there is nothing to evaluate on.
    fn eval_passes(&self) -> usize;
    /// Fills `batch` with pass `pass` of an evaluation.
    fn eval_pass(&self, pass: usize, batch: &mut Batch);
}

impl TrainingData for Loader {
    fn passes(&self) -> usize {
        self.passes()
    }

    fn train_pass(&self, steps_done: u64, pass: usize, batch: &mut Batch) {
        self.train_pass(steps_done, pass, batch);
    }

    fn eval_passes(&self) -> usize {
        self.eval_passes()
    }

    fn eval_pass(&self, pass: usize, batch: &mut Batch) {
        self.eval_pass(pass, batch);
    }
}

/// A model in training on one rank.
pub struct Trainer<B: Backend, C, D> {
    /// The model.
    pub model: Transformer<B>,
    /// Its optimizer.
    pub optimizer: Optimizer<B>,
    pub(super) sharing: Sharing<B>,
    pub(super) groups: Groups<C>,
    schedule: Schedule,
    config: Config,
    data: D,
    batch: Batch,
    clock: StageClock<B>,
    stage_times: Vec<(Stage, f64)>,
    peak_flops: Option<f64>,
    /// Of the last step: its number and how its experts were used.
    last: (u64, BalanceReport),
    sums: Slot<B, f64>,
    selection: Selection,
}

impl<B: Backend, C: Communicator<B>, D: TrainingData> Trainer<B, C, D> {
    /// A trainer of `model`, whose parameters are set already.
    pub fn new(model: Transformer<B>, groups: Groups<C>, config: &Config, data: D) -> Result<Self, StepError> {
        let parts = || {
            let device = model.device();
            let regions = &model.parameters().layout().regions;
            let shard = match config.parallel.shard_optimizer {
                true => Shard::of_groups(regions, &groups),
                false => Shard::whole(regions),
            };
            let selection = Selection::new(&config.train.freeze, &config.train.trainable)?;
            let mut optimizer = Optimizer::new(device, &config.optimizer, shard)?;
            optimizer.freeze(selection.frozen_ranges(config.model.family, model.parameters().layout()));
            let sums = Slot::new(device, "sums over ranks")?;
            Ok::<_, StepError>((optimizer, selection, Sharing::new(device)?, sums))
        };
        let (optimizer, selection, sharing, sums) = groups.end_alone_unless(parts())?;
        Ok(Self {
            optimizer,
            selection,
            sharing,
            schedule: Schedule::new(config.optimizer.lr, config.train.steps, &config.schedule),
            sums,
            config: config.clone(),
            data,
            batch: Batch::default(),
            clock: StageClock::of(model.device()),
            stage_times: Vec::new(),
            peak_flops: None,
            last: Default::default(),
            groups,
            model,
        })
    }

    /// The groups this rank is in.
    pub fn groups(&self) -> &Groups<C> {
        &self.groups
    }

    /// The data.
    pub fn data(&self) -> &D {
        &self.data
    }

    /// Step `step`, counted from 1. On an error nothing was updated.
    ///
    /// Requests reach ranks at different moments; what is returned beside the metrics is what any rank had heard when it finished
    /// its passes, the same on all.
    pub fn step(&mut self, step: u64, requests: Requests) -> Result<(StepMetrics, Requests), StepError> {
        let started = Instant::now();
        self.groups.world.context().set_step(step);
        self.model.begin_step();
        let passes = self.data.passes();
        let mut valid = 0;
        for pass in 0..passes {
            self.data.train_pass(step - 1, pass, &mut self.batch);
            valid += self.batch.valid_targets();
        }
        let valid = self.sum_over_world(&mut [valid as f64])?[0];
        let scale = (1.0 / valid.max(1.0)) as f32;
        // A block of sharded state is not a stretch of a model's block.
        let early = self.config.parallel.reduce_early && !self.config.parallel.shard_optimizer;
        for pass in 0..passes {
            if passes > 1 {
                self.data.train_pass(step - 1, pass, &mut self.batch);
            }
            let share = self.batch_share(pass);
            let tokens = PassTokens {
                inputs: &self.batch.inputs,
                targets: &self.batch.targets,
                starts: self.batch.starts.as_deref(),
                sequence_length: self.batch.sequence_length,
                first_token: self.batch.first_sample * self.batch.sequence_length as u64,
                tags: &self.batch.tags,
                step: step - 1,
            };
            let Self { model, sharing, groups, clock, .. } = self;
            if !early || pass + 1 < passes {
                model.train_pass(groups, clock, tokens, share, scale)?;
                continue;
            }
            model.train_last_pass(groups, clock, tokens, (share, scale), &mut |gradients, range, ownership| {
                sharing.begin(groups, gradients, (range, ownership))
            })?;
        }
        self.clock.enter(Stage::Reduce);
        // The norm first: reading it is where the host waits for the passes, and what is read after it is ready.
        let grad_norm = self.sharing.reduce(&self.groups, self.model.parameters_mut(), &mut self.optimizer)?;
        let (sums, requests) = self.reduce_sums(requests)?;
        self.groups.world.check()?;
        let loss = sums.loss / valid.max(1.0);
        require_finite(step, "loss", loss)?;
        require_finite(step, "gradient norm", grad_norm)?;
        self.clock.enter(Stage::Optimizer);
        let lr = self.schedule.lr(step);
        let grad_scale = self.optimizer.clip_factor(grad_norm);
        let device = self.model.device().clone();
        self.optimizer.update(&device, self.model.parameters_mut(), lr, grad_scale);
        self.sharing.spread(&self.groups, self.model.parameters_mut(), self.optimizer.shard())?;
        self.update_selection_biases(&sums.balance.loads)?;
        self.clock.leave();
        device.synchronize()?;
        self.groups.world.check()?;
        self.clock.settle();
        let seconds = started.elapsed().as_secs_f64();
        let tokens = (self.config.train.global_batch * self.config.train.sequence_length) as f64;
        let stage_ms = self.stage_ms();
        let (router, losses) = (&self.config.router, sums.balance.losses);
        // Tokens as routers see them.
        let routed = tokens * self.config.model.sub_tokens as f64;
        let of = |coefficient: f32, loss: f64| (coefficient > 0.0).then_some(loss);
        let metrics = StepMetrics {
            step,
            loss,
            balance_loss: losses.balance,
            lr,
            grad_norm,
            tokens_per_s: tokens / seconds,
            mfu: self.peak_flops.map(|peak| {
                Flops::of(&self.config).total() * tokens / (seconds * peak * self.groups.world.size() as f64)
            }),
            dropped_fraction: self.dropped_fraction(sums.balance.dropped.iter().sum(), routed),
            load_max_over_mean: max_over_mean(&sums.balance.loads, &self.config.model.layer_experts()),
            stage_ms,
            importance_loss: of(router.importance(), losses.importance),
            load_loss: router.is_noisy().then_some(losses.load),
            device_loss: of(router.device_coefficient, losses.device),
            difference_loss: of(router.difference_coefficient, losses.difference),
            entropy_loss: of(router.entropy_coefficient, sums.balance.entropy.iter().sum::<f64>() / routed),
            batch_entropy_loss: of(router.batch_entropy_coefficient, losses.batch_entropy),
            z_loss: of(router.z_coefficient, sums.balance.z_sum / routed),
            extra_rounds: (self.groups.expert.size() > 1).then_some(sums.extra_rounds as u64),
            val_loss: None,
        };
        self.last = (step, sums.balance);
        Ok((metrics, requests))
    }

    /// Mean loss on the held-out text, in nats per token; None: nothing is held out.
    pub fn evaluate(&mut self) -> Result<Option<f64>, StepError> {
        let mut sums = [0.0, 0.0];
        for pass in 0..self.data.eval_passes() {
            self.data.eval_pass(pass, &mut self.batch);
            let tokens = PassTokens {
                inputs: &self.batch.inputs,
                targets: &self.batch.targets,
                starts: self.batch.starts.as_deref(),
                sequence_length: self.batch.sequence_length,
                first_token: 0,
                tags: &self.batch.tags,
                step: 0,
            };
            sums[0] += self.model.evaluate_pass(&self.groups, tokens)?;
            sums[1] += self.batch.valid_targets() as f64;
        }
        let sums = self.sum_over_world(&mut sums)?;
        Ok((sums[1] > 0.0).then(|| sums[0] / sums[1]))
    }

    /// Bytes of this rank's buffers.
    pub fn tally(&self) -> Tally {
        let mut tally = Tally::default();
        self.model.tally(&mut tally);
        self.optimizer.tally(&mut tally);
        self.sharing.tally(&mut tally);
        tally.add(Kind::Activations, [self.sums.bytes()]);
        tally.add(Kind::Communication, [self.groups.world.staging_bytes()]);
        tally
    }

    /// What a rank's device could compute in a second, as its maker says: steps then have a utilisation.
    pub fn set_peak_flops(&mut self, peak: Option<f64>) {
        self.peak_flops = peak;
    }

    /// How the experts of each layer were used in the last step, over all ranks.
    pub fn balance(&self) -> BalanceReading {
        let (Config { train, model, .. }, (step, report)) = (&self.config, &self.last);
        {
            let tokens = train.global_batch * train.sequence_length * model.sub_tokens;
            BalanceReading::of(*step, tokens as u64, report, &model.layer_experts())
        }
    }

    /// Keeps the spans of stages from now on; see [`Trainer::take_spans`].
    pub fn keep_spans(&mut self) {
        self.clock.keep_spans();
    }

    /// The spans of stages since they were last taken.
    pub fn take_spans(&mut self) -> Vec<Span> {
        self.clock.take_spans()
    }

    /// Time in each stage of the last step on this rank, in ms.
    pub fn stage_times(&self) -> &[(Stage, f64)] {
        &self.stage_times
    }

    fn stage_ms(&mut self) -> StageMs {
        self.stage_times.clear();
        self.stage_times.extend(self.clock.take().map(|(stage, time)| (stage, time.as_secs_f64() * 1e3)));
        let mut ms = StageMs::default();
        for &(stage, time) in &self.stage_times {
            match stage {
                Stage::Route => ms.route = time,
                Stage::Dispatch => ms.dispatch = time,
                Stage::Experts => ms.experts = time,
                Stage::Combine => ms.combine = time,
                Stage::Aggregate => ms.aggregate = time,
                _ => {}
            }
        }
        ms
    }

    /// Tokens of pass `pass` and of those before it, over all ranks: every rank works out the same.
    fn batch_share(&self, pass: usize) -> BatchShare {
        let (train, world) = (&self.config.train, self.groups.world.size());
        let micro = train.micro_batch_for(world);
        let sequences_by_end = |passes: usize| -> usize {
            (0..world).map(|rank| share(train.global_batch, world, rank).len().min(passes * micro)).sum()
        };
        let (before, by_end) = (sequences_by_end(pass), sequences_by_end(pass + 1));
        let s = train.sequence_length;
        BatchShare {
            global_tokens: train.global_batch * s,
            tokens_so_far: by_end * s,
            pass_tokens: (by_end - before) * s,
        }
    }

    /// Sums host numbers over the world.
    fn sum_over_world<'a>(&mut self, values: &'a mut [f64]) -> Result<&'a [f64], StepError> {
        if self.groups.world.size() == 1 {
            return Ok(values);
        }
        let (device, n) = (self.model.device(), values.len());
        self.sums.reserve(device, n)?;
        device.upload(values, self.sums.view_mut(n));
        device.wait(&self.groups.world.all_reduce(device, self.sums.view_mut(n), ReduceOp::Sum)?);
        device.read_to_host(self.sums.view(n), values)?;
        self.groups.world.check()?;
        Ok(values)
    }

    /// The step's sums over all ranks, and what any of them was asked.
    fn reduce_sums(&mut self, requests: Requests) -> Result<(StepSums, Requests), StepError> {
        let mut sums = self.model.step_sums()?;
        let balance = &mut sums.balance;
        let flag = |asked: bool| f64::from(u8::from(asked));
        let mut packed =
            vec![sums.loss, balance.z_sum, flag(requests.checkpoint), flag(requests.stop), sums.extra_rounds];
        packed.extend(balance.losses.each_mut().map(|loss| *loss));
        let fixed = packed.len();
        let mut by_expert = vec![&mut balance.mass, &mut balance.dropped, &mut balance.entropy];
        if !self.model.loads_are_global() {
            by_expert.push(&mut balance.loads);
        }
        by_expert.iter().for_each(|values| packed.extend_from_slice(values));
        self.sum_over_world(&mut packed)?;
        let mut rest = &packed[fixed..];
        for values in by_expert {
            let (mine, others) = rest.split_at(values.len());
            values.copy_from_slice(mine);
            rest = others;
        }
        [sums.loss, balance.z_sum, sums.extra_rounds] = [packed[0], packed[1], packed[4]];
        balance.losses.each_mut().into_iter().zip(&packed[5..]).for_each(|(loss, &sum)| *loss = sum);
        Ok((sums, Requests { checkpoint: packed[2] > 0.0, stop: packed[3] > 0.0 }))
    }

    /// Moves each selection bias towards even load by a fixed rate (Wang et al. 2024).
    fn update_selection_biases(&mut self, loads: &[f64]) -> Result<(), StepError> {
        let most = self.config.model.experts;
        let rate = self.config.router.bias_update_rate;
        for (layer, mut bias) in self.model.selection_biases()? {
            if self.selection.freezes_bias(self.config.model.family, layer) {
                continue;
            }
            let index = self.config.model.moe_layers().take_while(|&moe| moe < layer).count();
            let loads = &loads[index * most..index * most + bias.len()];
            let mean = loads.iter().sum::<f64>() / bias.len() as f64;
            for (bias, &load) in bias.iter_mut().zip(loads) {
                *bias += rate * (mean - load).partial_cmp(&0.0).map_or(0.0, |order| order as i8 as f32);
            }
            self.model.set_selection_bias(layer, &bias);
        }
        Ok(())
    }

    fn dropped_fraction(&self, dropped: f64, tokens: f64) -> f64 {
        let model = &self.config.model;
        let choices = tokens * (model.top_k * model.moe_layers().count()) as f64;
        if choices > 0.0 { dropped / choices } else { 0.0 }
    }
}

fn require_finite(step: u64, what: &'static str, value: f64) -> Result<(), StepError> {
    if value.is_finite() { Ok(()) } else { Err(StepError::NotFinite { step, what, value }) }
}

/// The busiest expert's load over the mean, the worst of the layers; 0 without MoE layers.
fn max_over_mean(loads: &[f64], experts: &[usize]) -> f64 {
    let most = experts.iter().copied().max().unwrap_or(0).max(1);
    loads.chunks_exact(most).zip(experts).fold(0.0, |worst, (layer, &experts)| {
        let total: f64 = layer.iter().sum();
        let most = layer.iter().copied().fold(0.0, f64::max);
        if total > 0.0 { worst.max(most * experts as f64 / total) } else { worst }
    })
}
