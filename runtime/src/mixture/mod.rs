//! Dense mixtures of a few whole networks: every row goes to every expert, a gate says how much each counts.
//!
//! Owns the experts of this rank, a replica of the gate, and a step of each way to train them. It is the idea that sparse layers inside a
//! model (`model::moe`) came from, and has nothing to do with them: no row is routed, no expert is left out, no token is known here.
//!
//! - [`Form::Cooperative`]: the gate weights the experts' outputs, and their sum's loss is what all learn from.
//! - [`Form::Competitive`]: each expert answers for itself and the gate says how likely each is to be the right one to ask; the loss is
//!   that of the likelihood of the label under the mixture (Jacobs, Jordan, Nowlan and Hinton 1991, "Adaptive Mixtures of Local
//!   Experts"). Trained by its gradient ([`Mixture::step`]), or by expectation-maximisation ([`Mixture::em_step`]; Jordan and Jacobs 1994,
//!   "Hierarchical Mixtures of Experts and the EM Algorithm"): posteriors of the experts first, then updates towards them held fast. The
//!   M step of networks has no closed form, so a few updates stand for it: generalised EM, which raises the likelihood whenever it
//!   lowers the expected loss.
//!
//! E experts are shared out over the W ranks of a group, E/W consecutive ones to a rank. All ranks are given the same rows. Outputs are
//! gathered, once a pass; what a row's outputs become ([`mixing`]) is worked out on every rank alike, on the host, since it is a few
//! numbers a row. Gates start alike and see the same gradients, so that replicas stay the same on ranks of one kind of processor and
//! number of threads.

pub mod mixing;
mod network;

use std::ops::Range;

use moe_kernels::{Activation, ActivationKind, Backend, DeviceError, View, ViewMut};

pub use network::{Network, Update};

use crate::collectives::{CollectiveError, Communicator};
use crate::exit::{Classified, ExitCode};
use crate::topology::share;
use mixing::{Gradients, MixingDims, Outputs};

/// What the experts' outputs become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// One answer, the softmax of the weighted sum of outputs.
    Cooperative,
    /// A weighted sum of the experts' own answers.
    Competitive,
}

/// Sizes of a mixture.
#[derive(Clone, Debug, PartialEq)]
pub struct MixtureConfig {
    /// Numbers of a row.
    pub inputs: usize,
    /// K: classes of a label.
    pub classes: usize,
    /// E.
    pub experts: usize,
    /// Widths of an expert's hidden layers.
    pub expert_hidden: Vec<usize>,
    /// Widths of the gate's hidden layers; none: a linear gate.
    pub gate_hidden: Vec<usize>,
    /// Between layers.
    pub activation: ActivationKind,
    /// What the outputs become.
    pub form: Form,
}

/// What a mixture cannot do.
#[derive(Debug, thiserror::Error)]
pub enum MixtureError {
    /// A network with a layer of no width.
    #[error("{what}: layers of {widths:?}; every width must be at least 1")]
    Empty {
        /// Which network.
        what: &'static str,
        /// Its widths, input first.
        widths: Vec<usize>,
    },
    /// Experts that cannot be shared out.
    #[error("{experts} experts cannot be shared evenly by {ranks} ranks")]
    ExpertsNotDivisible {
        /// E.
        experts: usize,
        /// W.
        ranks: usize,
    },
    /// Rows that are not whole, or too many or too few labels for them.
    #[error("{numbers} numbers and {labels} labels: {labels} rows of {inputs} numbers have {}", labels * inputs)]
    Rows {
        /// Numbers given.
        numbers: usize,
        /// Labels given.
        labels: usize,
        /// Numbers of a row.
        inputs: usize,
    },
    /// A label that no output stands for.
    #[error("label {label} in row {row}: there are {classes} classes, from 0")]
    Label {
        /// The label.
        label: usize,
        /// Its row.
        row: usize,
        /// K.
        classes: usize,
    },
    /// The device's.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A collective's.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
}

impl Classified for MixtureError {
    fn exit_code(&self) -> ExitCode {
        match self {
            Self::Empty { .. } | Self::ExpertsNotDivisible { .. } => ExitCode::Usage,
            Self::Rows { .. } | Self::Label { .. } => ExitCode::BadData,
            Self::Device(DeviceError::OutOfMemory { .. }) => ExitCode::Usage,
            Self::Device(DeviceError::Fault { .. }) => ExitCode::Internal,
            Self::Collective(error) => error.exit_code(),
        }
    }
}

impl MixtureConfig {
    /// The widths of an expert.
    fn expert_widths(&self) -> Vec<usize> {
        [&[self.inputs], self.expert_hidden.as_slice(), &[self.classes]].concat()
    }

    /// The widths of the gate.
    fn gate_widths(&self) -> Vec<usize> {
        [&[self.inputs], self.gate_hidden.as_slice(), &[self.experts]].concat()
    }

    /// Whether networks have layers, and experts can be shared by `ranks`.
    pub fn validate(&self, ranks: usize) -> Result<(), MixtureError> {
        for (what, widths) in [("experts", self.expert_widths()), ("gate", self.gate_widths())] {
            if widths.contains(&0) {
                return Err(MixtureError::Empty { what, widths });
            }
        }
        if !self.experts.is_multiple_of(ranks) {
            return Err(MixtureError::ExpertsNotDivisible { experts: self.experts, ranks });
        }
        Ok(())
    }
}

/// Labelled rows.
#[derive(Clone, Copy, Debug)]
pub struct Samples<'a> {
    /// `[T, inputs]`.
    pub x: &'a [f32],
    /// `[T]`: classes, from 0.
    pub labels: &'a [usize],
}

/// Some networks and a gate over them, as one rank of a group holds them.
///
/// All ranks of the group call the same methods in the same order with the same rows, except where a method says otherwise.
pub struct Mixture<'g, B: Backend, C: Communicator<B>> {
    device: B,
    group: &'g C,
    config: MixtureConfig,
    gate: Network<B>,
    /// Of this rank, in order.
    experts: Vec<Network<B>>,
}

/// Outputs of a pass, on the host.
struct Pass<B: Backend> {
    x: B::Buffer<B::Act>,
    dims: MixingDims,
    gate: Vec<f32>,
    experts: Vec<f32>,
}

impl<B: Backend> Pass<B> {
    fn outputs(&self) -> Outputs<'_> {
        Outputs { dims: self.dims, gate: &self.gate, experts: &self.experts }
    }
}

impl<'g, B: Backend, C: Communicator<B>> Mixture<'g, B, C> {
    /// Initial values that depend on `seed` and on an expert's number alone, so that they are the same on any number of ranks.
    ///
    /// # Errors
    /// As [`MixtureConfig::validate`], or too little memory.
    pub fn new(device: B, group: &'g C, config: MixtureConfig, seed: u64) -> Result<Self, MixtureError> {
        config.validate(group.size())?;
        let gate = Network::new(&device, &config.gate_widths(), config.activation, ("gate", seed))?;
        let widths = config.expert_widths();
        let of_number = |e| Network::new(&device, &widths, config.activation, (&format!("expert {e}"), seed));
        let experts = share(config.experts, group.size(), group.rank()).map(of_number).collect::<Result<_, _>>()?;
        Ok(Self { gate, experts, device, group, config })
    }

    /// The numbers of this rank's experts.
    pub fn own(&self) -> Range<usize> {
        share(self.config.experts, self.group.size(), self.group.rank())
    }

    /// This rank's experts with their numbers, to be trained by themselves: each rank for itself, on rows of its own.
    pub fn experts_mut(&mut self) -> impl Iterator<Item = (usize, &mut Network<B>)> {
        self.own().zip(&mut self.experts)
    }

    /// This rank's replica of the gate.
    pub fn gate(&self) -> &Network<B> {
        &self.gate
    }

    /// This rank's replica of the gate, to load.
    pub fn gate_mut(&mut self) -> &mut Network<B> {
        &mut self.gate
    }

    /// Class probabilities `[T, K]` of rows `x[T, inputs]`.
    pub fn predict(&mut self, x: &[f32]) -> Result<Vec<f64>, MixtureError> {
        let pass = self.forward(x, x.len() / self.config.inputs)?;
        Ok(match self.config.form {
            Form::Cooperative => pass.outputs().cooperative_probabilities(),
            Form::Competitive => pass.outputs().competitive_probabilities(),
        })
    }

    /// Class probabilities `[T, K]` of each expert alone, by its number.
    pub fn predict_alone(&mut self, x: &[f32]) -> Result<Vec<Vec<f64>>, MixtureError> {
        let pass = self.forward(x, x.len() / self.config.inputs)?;
        Ok((0..self.config.experts).map(|e| pass.outputs().expert_probabilities(e)).collect())
    }

    /// The form's mean loss in nats a row.
    pub fn loss(&mut self, samples: Samples<'_>) -> Result<f64, MixtureError> {
        let pass = self.forward_of(samples)?;
        Ok(match self.config.form {
            Form::Cooperative => pass.outputs().cooperative(samples.labels).loss,
            Form::Competitive => pass.outputs().negative_log_likelihood(samples.labels),
        })
    }

    /// Adds the gradient of the form's mean loss to the gate's and the experts' gradients. Returns the loss.
    pub fn accumulate(&mut self, samples: Samples<'_>) -> Result<f64, MixtureError> {
        let pass = self.forward_of(samples)?;
        let gradients = match self.config.form {
            Form::Cooperative => pass.outputs().cooperative(samples.labels),
            Form::Competitive => pass.outputs().competitive(samples.labels),
        };
        self.backward(&pass, &gradients)
    }

    /// One update of the gate and the experts by the form's gradient. Returns the loss before it.
    pub fn step(&mut self, samples: Samples<'_>, update: Update) -> Result<f64, MixtureError> {
        let loss = self.accumulate(samples)?;
        self.update(update);
        Ok(loss)
    }

    /// The E step: how likely each expert is to be the one behind each row's label, `[T, E]`, under the competitive form.
    pub fn posteriors(&mut self, samples: Samples<'_>) -> Result<Vec<f64>, MixtureError> {
        Ok(self.forward_of(samples)?.outputs().posteriors(samples.labels))
    }

    /// One update of the M step, towards `posteriors[T, E]`. Returns the expected loss before it.
    pub fn maximise(&mut self, samples: Samples<'_>, posteriors: &[f64], update: Update) -> Result<f64, MixtureError> {
        let pass = self.forward_of(samples)?;
        let gradients = pass.outputs().expected(samples.labels, posteriors);
        let loss = self.backward(&pass, &gradients)?;
        self.update(update);
        Ok(loss)
    }

    /// One step of generalised expectation-maximisation: posteriors, then `updates` updates towards them. Returns the expected loss before
    /// the last of these.
    pub fn em_step(&mut self, samples: Samples<'_>, updates: usize, update: Update) -> Result<f64, MixtureError> {
        let posteriors = self.posteriors(samples)?;
        (0..updates).try_fold(f64::NAN, |_, _| self.maximise(samples, &posteriors, update))
    }

    fn update(&mut self, update: Update) {
        self.gate.update(update);
        self.experts.iter_mut().for_each(|expert| expert.update(update));
    }

    fn forward_of(&mut self, samples: Samples<'_>) -> Result<Pass<B>, MixtureError> {
        let (numbers, labels, inputs) = (samples.x.len(), samples.labels.len(), self.config.inputs);
        if numbers != labels * inputs {
            return Err(MixtureError::Rows { numbers, labels, inputs });
        }
        let classes = self.config.classes;
        if let Some((row, &label)) = samples.labels.iter().enumerate().find(|(_, label)| **label >= classes) {
            return Err(MixtureError::Label { label, row, classes });
        }
        self.forward(samples.x, labels)
    }

    /// All experts' outputs and the gate's, on every rank. Panics where the rows are not whole.
    fn forward(&mut self, x: &[f32], rows: usize) -> Result<Pass<B>, MixtureError> {
        let MixtureConfig { experts, classes, .. } = self.config;
        assert_eq!(x.len(), rows * self.config.inputs, "numbers of {rows} rows");
        let (device, dims) = (&self.device, MixingDims { rows, experts, classes });
        let x = network::upload(device, x)?;
        let (each, local) = (rows * classes, self.experts.len());
        let mut own = device.alloc::<B::Act>(local * each, "outputs of experts")?;
        for (e, expert) in self.experts.iter_mut().enumerate() {
            device.copy(expert.forward(View::of(&x))?, ViewMut::range(&mut own, e * each..(e + 1) * each));
        }
        let mut all = device.alloc::<B::Act>(experts * each, "outputs of all experts")?;
        // Ranks hold consecutive experts, so that their blocks are in the experts' order.
        let gathered = self.group.all_gather(device, View::of(&own), ViewMut::of(&mut all))?;
        let gate = widened(device, self.gate.forward(View::of(&x))?)?;
        device.wait(&gathered);
        let experts = widened(device, View::of(&all))?;
        self.group.check()?;
        Ok(Pass { x, dims, gate, experts })
    }

    /// Adds to the networks' gradients what follows from `gradients` of their outputs. Returns the loss.
    fn backward(&mut self, pass: &Pass<B>, gradients: &Gradients) -> Result<f64, MixtureError> {
        let (device, x) = (&self.device, View::of(&pass.x));
        self.gate.backward(x, View::of(&network::upload(device, &gradients.gate)?))?;
        let each = pass.dims.rows * pass.dims.classes;
        let first = self.own().start;
        let own = network::upload(device, &gradients.experts[first * each..(first + self.experts.len()) * each])?;
        for (e, expert) in self.experts.iter_mut().enumerate() {
            expert.backward(x, View::range(&own, e * each..(e + 1) * each))?;
        }
        Ok(gradients.loss)
    }
}

fn widened<B: Backend>(device: &B, view: View<'_, B, B::Act>) -> Result<Vec<f32>, DeviceError> {
    Ok(network::read(device, view)?.into_iter().map(B::Act::to_f32).collect())
}
