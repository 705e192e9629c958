//! Ranks with a GPU each, as threads of this process; a notice where there are fewer GPUs than ranks.
#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in test functions, but not in their helpers")]

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use moe_kernels::cuda::{Cuda, CudaAct, OpenError, gpu_count};
use moe_runtime::collectives::nccl::{Meeting, NcclCommunicator};
use moe_runtime::collectives::{CollectiveError, HostCommunicator, local};
use moe_runtime::exit::Failure;

/// How long a test's collectives wait: long enough for the first, in which kernels are loaded.
const PATIENCE: Duration = Duration::from_secs(60);

/// Tests of one binary run at once, and two that wait for each other's multiprocessors would wait for ever.
static TURN: Mutex<()> = Mutex::new(());

/// GPUs of this machine.
fn count() -> usize {
    match gpu_count() {
        Ok(count) => count,
        Err(OpenError::NoDriver | OpenError::NoDevice) => 0,
        Err(error) => panic!("{error}"),
    }
}

/// Joins the GPUs of the ranks of `control`.
fn join<A: CudaAct>(gpu: &Cuda<A>, control: HostCommunicator) -> NcclCommunicator<A> {
    let talk = control.split("meeting", 0, control.rank()).unwrap();
    let gather = |mine: Vec<u8>| -> Result<_, Failure> { Ok(talk.all_gather_bytes(&mine)?) };
    let on_failure = Box::new(|step, error: &CollectiveError| println!("the watch, at step {step}: {error}"));
    let (host, ordinal) = ("here".to_owned(), control.rank());
    let (world, carried) =
        NcclCommunicator::connect(gpu, Meeting { control, host, ordinal, gather: &gather, on_failure }).unwrap();
    println!("{}", carried.join("; "));
    world
}

/// Runs `body` on `ranks` ranks with a GPU each, and returns what each returned. None, and a notice: there are fewer GPUs.
pub(crate) fn on_gpus<A: CudaAct, T: Send>(
    ranks: usize,
    body: impl Fn(&Cuda<A>, NcclCommunicator<A>) -> T + Sync,
) -> Option<Vec<T>> {
    let found = count();
    if found < ranks {
        eprintln!("notice: {ranks} ranks on GPUs were not tested: this machine has {found}");
        return None;
    }
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    Some(local::run_with(ranks, PATIENCE, |control| {
        let gpu = Cuda::open(control.rank()).unwrap();
        let world = join(&gpu, control);
        body(&gpu, world)
    }))
}
