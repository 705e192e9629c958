//! Training runs in this process, one after another.
//!
//! Owns one run: its trainer, its steps and what is noted of each. What becomes of several is `losses`' and `costs`'.

use moe_runtime::collectives::{Communicator, Groups};
use moe_runtime::config::Config;
use moe_runtime::data::{Corpus, Loader};
use moe_runtime::exit::Failure;
use moe_runtime::stages::Stage;
use moe_runtime::topology::Rank;
use moe_runtime::training::{Requests, StepError, Trainer};
use moe_runtime::worker::{Ranked, build, grid_of};

use super::super::ranks::connect;
use super::Setting;

/// First steps that no time is taken of.
pub(super) const WARMUP: usize = 3;

/// What is noted of one step.
pub(super) struct Noted {
    pub(super) tokens_per_s: f64,
    /// The busiest expert's load over the mean, the largest over the layers.
    pub(super) busiest: f64,
    /// Share of the choices that capacity dropped.
    pub(super) dropped: f64,
    /// Entropy of a token's probabilities in nats, the mean over the layers.
    pub(super) entropy: f64,
    /// Milliseconds on this rank.
    pub(super) stages: Vec<(Stage, f64)>,
}

impl Noted {
    /// Milliseconds in the stages that a MoE layer has and other layers have not.
    pub(super) fn layer_ms(&self) -> f64 {
        [Stage::Route, Stage::Dispatch, Stage::Experts, Stage::Combine].into_iter().map(|stage| self.ms(stage)).sum()
    }

    /// Milliseconds in a stage.
    pub(super) fn ms(&self, of: Stage) -> f64 {
        self.stages.iter().filter(|(stage, _)| *stage == of).map(|(_, ms)| ms).sum()
    }
}

/// What trains on a device.
pub(super) type InTraining<B> = Trainer<B, <B as Ranked>::Group, Loader>;

/// The ranks, connected on a device.
pub(super) struct Session<'a, B: Ranked> {
    setting: &'a Setting<'a>,
    queue: B,
    group: B::Group,
}

impl<'a, B: Ranked> Session<'a, B> {
    pub(super) fn new(setting: &'a Setting<'a>, queue: B) -> Result<Self, Failure> {
        Ok(Self { group: connect(setting.world, &queue)?, setting, queue })
    }

    /// Where it computes.
    pub(super) fn queue(&self) -> &B {
        &self.queue
    }

    /// Trains a model of `config` from its seed on, tells of each step to `each`, and adds what `finish` makes of the trained model. A loss
    /// that is no number is an outcome of its own, in words.
    pub(super) fn train<T>(
        &self,
        (config, corpus): (&Config, &Corpus),
        each: impl Fn(),
        finish: impl FnOnce(&mut InTraining<B>) -> Result<T, StepError>,
    ) -> Result<Result<(Vec<Noted>, T), String>, Failure> {
        let Setting { world, device, .. } = self.setting;
        let (rank, ranks) = world.place();
        let grid = grid_of(config, ranks)?;
        let groups = Groups::of_grid(self.group.split("world", 0, rank)?, &grid)?;
        let loader = Loader::new(corpus, config.loader_spec(rank, ranks))?;
        let told = |error: StepError| match error {
            StepError::Device(error) => device.explain(error, config, &grid),
            error => error.into(),
        };
        let built = build(self.queue.clone(), config, (&grid, Rank(rank)), groups, loader);
        let mut trainer = built.map_err(told)?;
        let mut steps = Vec::new();
        for step in 1..=config.train.steps {
            let metrics = match trainer.step(step, Requests::default()) {
                Ok((metrics, _)) => metrics,
                Err(error @ StepError::NotFinite { .. }) => return Ok(Err(error.to_string())),
                Err(error) => return Err(told(error)),
            };
            let layers = trainer.balance().layers;
            steps.push(Noted {
                tokens_per_s: metrics.tokens_per_s,
                busiest: metrics.load_max_over_mean,
                dropped: metrics.dropped_fraction,
                entropy: layers.iter().map(|layer| f64::from(layer.entropy)).sum::<f64>() / layers.len().max(1) as f64,
                stages: trainer.stage_times().to_vec(),
            });
            each();
        }
        let finished = finish(&mut trainer).map_err(told)?;
        Ok(Ok((steps, finished)))
    }
}
