//! Ranks that measure together.
//!
//! Owns their coming together and the time of what they do at once: all begin a run together, and the slowest rank's median counts. They
//! begin as their devices come out of a small sum: a barrier between hosts lets ranks go up to a tenth of a millisecond apart.

use std::process::ExitCode;
use std::time::Duration;

use moe_kernels::{Backend, Cpu, Device as _, View, ViewMut};
use moe_runtime::collectives::{Communicator, ReduceOp};
use moe_runtime::exit::{ExitCode as Code, Failure};
use moe_runtime::worker::{Arrival, Ranked, World};

use super::measure::{failed, median_ms_between};

/// How long ranks wait for each other to start.
const START: Duration = Duration::from_secs(120);

/// Has all ranks do `work`, and rank 0 `show` what came of it.
pub(super) fn together<R>(
    work: impl FnOnce(&World) -> Result<R, Failure>,
    show: impl FnOnce(&R) -> Result<(), Failure>,
) -> Result<ExitCode, Failure> {
    let world = World::join(START)?;
    match work(&world) {
        Ok(report) => {
            if world.place().0 == 0 {
                show(&report)?;
            }
            world.leave(Code::Done)
        }
        Err(failure) => {
            eprintln!("error: {failure}");
            world.abandon(failure.exit_code())
        }
    }
}

/// The ranks of `world`, connected on the devices of `queue`.
pub(super) fn connect<B: Ranked>(world: &World, queue: &B) -> Result<B::Group, Failure> {
    let control = Communicator::<Cpu>::split(&world.communicator, "world", 0, world.place().0)?;
    let arrival = Arrival {
        control,
        local_rank: world.local_rank(),
        gather: &|mine| Ok(Communicator::<Cpu>::all_gather_bytes(&world.communicator, &mine)?),
        on_failure: Box::new(|_, error| eprintln!("error: {error}")),
    };
    Ok(queue.connect(arrival)?.0)
}

/// Milliseconds of `work` on the slowest rank of `group`, which are all of `world`.
pub(super) fn slowest_ms<B: Backend>(
    world: &World,
    device: &B,
    group: &impl Communicator<B>,
    work: impl FnMut() -> Result<(), Failure>,
) -> Result<f64, Failure> {
    let mut met = device.alloc::<f32>(1, "a sum to meet at").map_err(failed)?;
    let begin = || {
        device.wait(&group.all_reduce(device, ViewMut::of(&mut met), ReduceOp::Sum)?);
        device.synchronize().map_err(failed)
    };
    reduced(world, median_ms_between(device, begin, work)?, ReduceOp::Max)
}

/// A number of all ranks.
pub(super) fn reduced(world: &World, value: f64, op: ReduceOp) -> Result<f64, Failure> {
    let mut values = vec![value];
    Cpu.wait(&Communicator::<Cpu>::all_reduce(&world.communicator, &Cpu, ViewMut::of(&mut values), op)?);
    let mut value = [0.0];
    Cpu.read_to_host(View::of(&values), &mut value).map_err(failed)?;
    Ok(value[0])
}
