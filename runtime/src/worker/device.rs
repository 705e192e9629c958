//! Which device this process computes on, and why.
//!
//! Owns the choice and its reasons. Everything else is generic over the backend: it gets the device by [`Device::visit`].

use moe_kernels::{Cpu, Device as _, DeviceError, GateDims};

use super::World;
use super::args::DeviceChoice;
use super::ranked::Ranked;
use crate::collectives::Communicator;
use crate::config::{Config, Precision};
use crate::exit::{ExitCode, Failure};
use crate::invalid::InvalidValue;
use crate::memory::Tally;
use crate::model::ModelConfig;
use crate::plan::{DoesNotFit, Job, MemoryPlan, Numbers, nearest_that_fit};
use crate::routing::{RouterConfig, RouterKind};
use crate::system::available_memory;
use crate::topology::Grid;

/// Work that is the same on every device.
pub trait OnDevice {
    /// What comes of it.
    type Output;
    /// Does it on `device`.
    fn run<B: Ranked>(self, device: B) -> Self::Output;
}

/// An opened device.
#[derive(Clone)]
enum Opened {
    Cpu(Cpu),
    #[cfg(feature = "cuda")]
    Bf16(moe_kernels::cuda::Cuda<half::bf16>),
    #[cfg(feature = "cuda")]
    F32(moe_kernels::cuda::Cuda<f32>),
}

/// What this process computes on.
#[derive(Clone)]
pub struct Device {
    opened: Opened,
    /// Why it is not the other kind, where nobody asked for this one.
    reason: Option<String>,
}

impl Device {
    /// The CPU, because it was asked for.
    pub fn cpu() -> Self {
        Self { opened: Opened::Cpu(Cpu), reason: None }
    }

    /// The device of this process among the ranks of `world`; all of them call this. A GPU for each rank, or the CPU for all.
    ///
    /// # Errors
    /// Usage: a build without GPUs, numbers that the device does not compute in, no such GPU. Input or output: no driver, or one that
    /// fails. The same on every rank.
    pub fn choose(choice: DeviceChoice, precision: Precision, world: &World) -> Result<Self, Failure> {
        match choice {
            DeviceChoice::Cpu => Self::on_cpu(precision, None),
            DeviceChoice::Cuda => {
                let (mine, first) = opened_by_all(precision, world)?;
                match (mine, first) {
                    (Ok(device), None) => Ok(device),
                    // One rank tells, the first that has none; what keeps it may keep the others.
                    (Err(refusal), Some((rank, _))) if rank == world.place().0 => Err(refusal.into_failure()),
                    (Err(refusal), _) => Err(Failure::of_another_rank(refusal.into_failure().exit_code().number())),
                    (Ok(_), Some(_)) => Err(Failure::of_another_rank(ExitCode::Usage.number())),
                }
            }
            DeviceChoice::Auto => match opened_by_all(precision, world)? {
                (Ok(device), None) => Ok(device),
                (_, first) => Self::on_cpu(precision, first.map(|(_, refusal)| refusal)),
            },
        }
    }

    /// The device of a process by itself; see [`Device::choose`].
    ///
    /// # Errors
    /// As there.
    pub fn choose_alone(choice: DeviceChoice, precision: Precision) -> Result<Self, Failure> {
        match choice {
            DeviceChoice::Cpu => Self::on_cpu(precision, None),
            DeviceChoice::Cuda => open_gpu(precision, 0).map_err(Refusal::into_failure),
            DeviceChoice::Auto => {
                open_gpu(precision, 0).or_else(|refusal| Self::on_cpu(precision, Some(refusal.to_string())))
            }
        }
    }

    fn on_cpu(precision: Precision, reason: Option<String>) -> Result<Self, Failure> {
        if precision == Precision::Bf16 {
            let why = reason.map_or(String::new(), |reason| format!(", and there is no GPU to use ({reason})"));
            let message = format!("train.precision = \"bf16\": the CPU computes in f32{why}; accepted: auto, f32");
            return Err(Failure::new(ExitCode::Usage, message));
        }
        Ok(Self { opened: Opened::Cpu(Cpu), reason })
    }

    /// Refuses a model with more experts, or more choices a token, than this device routes.
    ///
    /// # Errors
    /// Usage: the key, what was found, what would do.
    pub fn check(&self, (model, router): (&ModelConfig, &RouterConfig)) -> Result<(), Failure> {
        let (experts, choices) = GateDims::MOST_ON_GPUS;
        if matches!(self.opened, Opened::Cpu(_)) || model.moe_layers().next().is_none() {
            return Ok(());
        }
        let slots = router.slots(model.top_k, model.experts);
        if model.experts > experts {
            let reason = format!("GPUs route to at most {experts} experts; --device cpu has no bound");
            return Err(InvalidValue::new("model.experts", model.experts, reason).into());
        }
        if slots > choices {
            let (key, found) = match router.kind {
                RouterKind::ExpertChoice => ("model.experts", model.experts),
                _ => ("model.top_k", model.top_k),
            };
            let kind = router.kind.name();
            let reason =
                format!("with router.kind = {kind} a token has {slots} places for choices, on GPUs at most {choices}");
            return Err(InvalidValue::new(key, found, reason).into());
        }
        Ok(())
    }

    /// Does `work` on it.
    pub fn visit<W: OnDevice>(&self, work: W) -> W::Output {
        match &self.opened {
            Opened::Cpu(cpu) => work.run(cpu.clone()),
            #[cfg(feature = "cuda")]
            Opened::Bf16(cuda) => work.run(cuda.clone()),
            #[cfg(feature = "cuda")]
            Opened::F32(cuda) => work.run(cuda.clone()),
        }
    }

    /// The device in words, and why it is not another.
    pub fn describe(&self) -> String {
        let device = match &self.opened {
            Opened::Cpu(cpu) => cpu.describe(),
            #[cfg(feature = "cuda")]
            Opened::Bf16(cuda) => cuda.describe(),
            #[cfg(feature = "cuda")]
            Opened::F32(cuda) => cuda.describe(),
        };
        self.reason.as_ref().map_or(device.clone(), |reason| format!("{device} ({reason})"))
    }

    /// Sizes of its numbers.
    pub fn numbers(&self) -> Numbers {
        match &self.opened {
            Opened::Cpu(_) => Numbers::CPU,
            #[cfg(feature = "cuda")]
            Opened::Bf16(_) => Numbers::GPU,
            #[cfg(feature = "cuda")]
            Opened::F32(_) => Numbers::CPU,
        }
    }

    /// Bytes of its own memory; None: it is the machine's.
    pub fn memory_bytes(&self) -> Option<u64> {
        match &self.opened {
            Opened::Cpu(_) => None,
            #[cfg(feature = "cuda")]
            Opened::Bf16(cuda) => Some(cuda.facts().memory_bytes as u64),
            #[cfg(feature = "cuda")]
            Opened::F32(cuda) => Some(cuda.facts().memory_bytes as u64),
        }
    }

    /// FLOP/s of its dense matrix products by the maker's data sheet, where known for its numbers.
    pub fn peak_flops(&self) -> Option<f64> {
        match &self.opened {
            #[cfg(feature = "cuda")]
            Opened::Bf16(cuda) => peak_bf16(&cuda.facts().name),
            _ => None,
        }
    }

    /// Refuses what this machine has no memory for, which `neighbours` ranks share, and warns of what may be too much: activations and rows
    /// under way are planned with headroom, the model's state is not. A device with memory of its own says so itself, when it is asked for
    /// more than it has.
    pub fn check_memory(&self, config: &Config, grid: &Grid, neighbours: usize) -> Result<(), DoesNotFit> {
        let Some(free) = available_memory().filter(|_| self.memory_bytes().is_none()) else { return Ok(()) };
        let job = Job { config: config.clone(), grid: *grid, ranks_per_node: neighbours, numbers: self.numbers() };
        let (plan, limit_bytes) = (MemoryPlan::new(&job), free / neighbours.max(1) as u64);
        if plan.peak_bytes <= limit_bytes {
            return Ok(());
        }
        let alternatives = nearest_that_fit(&job, limit_bytes);
        let refusal = DoesNotFit { peak_bytes: plan.peak_bytes, limit_bytes, alternatives };
        let Tally { parameters, gradients, optimizer, .. } = plan.buffers;
        if parameters + gradients + optimizer > limit_bytes {
            return Err(refusal);
        }
        tracing::warn!("by the plan {refusal}");
        Ok(())
    }

    /// Out of memory, with what would fit; other failures of a device as they are.
    pub fn explain(&self, error: DeviceError, config: &Config, grid: &Grid) -> Failure {
        if !matches!(error, DeviceError::OutOfMemory { .. }) {
            return Failure::new(ExitCode::Internal, error);
        }
        let numbers = self.numbers();
        let job = Job { config: config.clone(), grid: *grid, ranks_per_node: grid.world(), numbers };
        let fits = self.memory_bytes().map(|limit| nearest_that_fit(&job, limit / 100 * 95)).unwrap_or_default();
        let mend = match fits.first() {
            Some(alternative) => format!("by the plan this fits: {}", alternative.change),
            None => "train.micro_batch can be smaller, or there can be more ranks".to_owned(),
        };
        Failure::new(ExitCode::Usage, format!("{error}; {mend}; moe-launch plan shows what needs how much"))
    }
}

/// Refuses what [`Device::choose`] would on every rank, before anything is made: numbers that the CPU does not compute in, no GPU at all.
pub(super) fn check_device(choice: DeviceChoice, precision: Precision) -> Result<(), Failure> {
    match choice {
        DeviceChoice::Cpu => Device::on_cpu(precision, None).map(drop),
        DeviceChoice::Cuda => any_gpu().map_err(Refusal::into_failure),
        DeviceChoice::Auto => {
            any_gpu().or_else(|refusal| Device::on_cpu(precision, Some(refusal.to_string())).map(drop))
        }
    }
}

/// Dense bf16 with f32 sums, without sparsity: NVIDIA's data sheets of H100 SXM, H200, H100 NVL and H100 PCIe, A100.
#[cfg_attr(not(any(feature = "cuda", test)), allow(dead_code))]
fn peak_bf16(name: &str) -> Option<f64> {
    let has = |text: &str| name.contains(text);
    let teraflops = match () {
        () if has("H100 PCIe") => 756.0,
        () if has("H100 NVL") => 835.0,
        () if has("H100") || has("H200") => 989.4,
        () if has("A100") => 312.0,
        () => return None,
    };
    Some(teraflops * 1e12)
}

/// This rank's GPU, and the first rank that has none, with the reason.
#[allow(clippy::type_complexity, reason = "two answers to one question")]
fn opened_by_all(
    precision: Precision,
    world: &World,
) -> Result<(Result<Device, Refusal>, Option<(usize, String)>), Failure> {
    let mine = open_gpu(precision, world.local_rank());
    let refusal = mine.as_ref().err().map(Refusal::to_string).unwrap_or_default();
    let all = Communicator::<Cpu>::all_gather_bytes(&world.communicator, refusal.as_bytes())?;
    let first = all.iter().enumerate().find(|(_, refusal)| !refusal.is_empty());
    Ok((mine, first.map(|(rank, text)| (rank, String::from_utf8_lossy(text).into_owned()))))
}

/// Why there is no GPU.
enum Refusal {
    /// This program cannot use any.
    #[cfg_attr(feature = "cuda", allow(dead_code))]
    Build,
    #[cfg(feature = "cuda")]
    Open(moe_kernels::cuda::OpenError),
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Build => f.write_str("built without CUDA"),
            #[cfg(feature = "cuda")]
            Self::Open(error) => error.fmt(f),
        }
    }
}

impl Refusal {
    fn into_failure(self) -> Failure {
        match self {
            Self::Build => Failure::new(
                ExitCode::Usage,
                "--device cuda: this program was built without CUDA; build with `make cuda`",
            ),
            #[cfg(feature = "cuda")]
            Self::Open(error) => {
                use moe_kernels::cuda::OpenError;
                let code = match error {
                    OpenError::NoSuchDevice { .. } | OpenError::Unsupported { .. } => ExitCode::Usage,
                    _ => ExitCode::Io,
                };
                Failure::new(code, error)
            }
        }
    }
}

#[cfg(not(feature = "cuda"))]
fn any_gpu() -> Result<(), Refusal> {
    Err(Refusal::Build)
}

/// Whether this process sees a GPU at all.
#[cfg(feature = "cuda")]
fn any_gpu() -> Result<(), Refusal> {
    moe_kernels::cuda::gpu_count().map(drop).map_err(Refusal::Open)
}

#[cfg(not(feature = "cuda"))]
fn open_gpu(_: Precision, _: usize) -> Result<Device, Refusal> {
    Err(Refusal::Build)
}

/// The GPU of a rank: that of its number on this machine, or the only one it may see.
#[cfg(feature = "cuda")]
fn open_gpu(precision: Precision, local_rank: usize) -> Result<Device, Refusal> {
    use moe_kernels::cuda::{Cuda, CudaAct, OpenError};
    fn open<A: CudaAct>(local_rank: usize) -> Result<Cuda<A>, Refusal> {
        let opened = match Cuda::open(local_rank) {
            Err(OpenError::NoSuchDevice { count: 1, .. }) => Cuda::open(0),
            other => other,
        };
        opened.map_err(Refusal::Open)
    }
    let opened = match precision {
        Precision::Auto | Precision::Bf16 => Opened::Bf16(open(local_rank)?),
        Precision::F32 => Opened::F32(open(local_rank)?),
    };
    Ok(Device { opened, reason: None })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peaks_are_those_of_the_form_factor() {
        let table = [
            ("NVIDIA H100 80GB HBM3", Some(989.4e12)),
            ("NVIDIA H200", Some(989.4e12)),
            ("NVIDIA H100 PCIe", Some(756e12)),
            ("NVIDIA GeForce RTX 4090", None),
        ];
        for (name, peak) in table {
            assert_eq!(peak_bf16(name), peak, "{name}");
        }
    }

    #[test]
    fn bf16_is_refused_on_the_cpu_with_what_is_accepted() {
        let failure = Device::on_cpu(Precision::Bf16, None).err().unwrap();
        assert_eq!(failure.exit_code(), ExitCode::Usage);
        assert!(failure.to_string().starts_with("train.precision = \"bf16\": the CPU computes in f32"), "{failure}");
    }

    #[test]
    fn a_gpu_that_this_program_or_machine_lacks_is_refused_with_the_mend() {
        let Err(refusal) = open_gpu(Precision::Auto, 0) else { return };
        let failure = refusal.into_failure();
        if cfg!(feature = "cuda") {
            assert!([ExitCode::Io, ExitCode::Usage].contains(&failure.exit_code()), "{failure:?}");
        } else {
            assert_eq!(failure.exit_code(), ExitCode::Usage);
            assert!(failure.to_string().ends_with("build with `make cuda`"), "{failure}");
        }
    }
}
