//! Collectives between processes: each test starts itself under mpirun, where the same function is the body of every rank.
#![cfg(feature = "mpi")]
#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in test functions, but not in their helpers")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::time::Duration;

use moe_kernels::{Cpu, View, ViewMut};
use moe_runtime::collectives::mpi::{MpiOptions, MpiWorld};
use moe_runtime::collectives::{
    CollectiveError, Communicator, Context, HostCommunicator, ReduceOp, consecutive, launcher,
};
use moe_runtime::topology::Rank;

mod collective_bodies;
mod support;

use support::mpirun::{available, mpirun};
use support::process::{DONE, Ended, LIMIT, Program, RETRY};

/// Counts what a thread allocates, and leaves the rest to the system.
struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: every call is the system allocator's own; counting touches no memory that is managed here.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // A thread that is ending has no counter any more, and nobody asks for it.
        let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's promise, passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise, passed on.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Runs `body` on `ranks` processes, or as one of them where this process is one. `None`: there is no mpirun here.
fn under_mpirun(
    test: &str,
    ranks: usize,
    context: Context,
    options: MpiOptions,
    body: impl FnOnce(MpiWorld, HostCommunicator),
) -> Option<Ended> {
    if let Some(facts) = launcher(|name| std::env::var(name).ok()) {
        let (mpi, world) = MpiWorld::init(&facts, context, options).unwrap();
        assert_eq!(world.size(), ranks);
        body(mpi, world);
        return None;
    }
    if !available() {
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut command = mpirun(ranks, dir.path());
    command.arg(std::env::current_exe().unwrap()).args(["--exact", test, "--nocapture"]);
    let ended = Program::start(command).wait();
    println!("{}", ended.output);
    Some(ended)
}

/// Asserts how the job of a test ended, where there was one.
fn assert_code(ended: Option<Ended>, code: i32) {
    if let Some(ended) = ended {
        ended.expect(code);
    }
}

#[test]
fn every_collective_on_four_ranks() {
    let ended =
        under_mpirun("every_collective_on_four_ranks", 4, Context::default(), MpiOptions::default(), |_mpi, world| {
            collective_bodies::every_collective(&Cpu, &world);
        });
    assert_code(ended, DONE);
}

#[test]
fn every_collective_on_three_ranks_in_small_pieces() {
    let options = MpiOptions { chunk_bytes: 1000 };
    let test = "every_collective_on_three_ranks_in_small_pieces";
    let ended = under_mpirun(test, 3, Context::default(), options, |_mpi, world| {
        collective_bodies::every_collective(&Cpu, &world);
    });
    assert_code(ended, DONE);
}

#[test]
fn a_missing_rank_is_named_and_all_leave_with_the_same_code() {
    let test = "a_missing_rank_is_named_and_all_leave_with_the_same_code";
    let deadline = Duration::from_millis(500);
    let ended = under_mpirun(test, 3, Context::default(), MpiOptions::default(), |mpi, world| {
        let expert = world.split("expert", 0, 0).unwrap();
        world.barrier().unwrap();
        if world.rank() != 2 {
            world.context().set_deadline(deadline);
            world.context().set_step(12);
            // Long enough that sending waits for the receiver, too.
            let (send, mut recv) = (vec![1_f32; 3 << 20], vec![0_f32; 3 << 20]);
            let rows: Vec<_> = consecutive([1 << 20; 3]).collect();
            let result = expert.all_to_all_v(&Cpu, 1, (View::of(&send), &rows), (ViewMut::of(&mut recv), &rows));
            let Err(CollectiveError::Timeout { collective, group, step, waited, missing }) = result else {
                panic!("{result:?}")
            };
            assert_eq!((collective, &*group, step, &*missing), ("all_to_all_v", "expert", 12, &[Rank(2)][..]));
            assert!(waited >= deadline && waited < 20 * deadline, "{waited:?}");
            world.context().set_deadline(Duration::from_secs(60));
        }
        // The group is lost, the world is not: here the missing rank waits for those that miss it.
        world.barrier().unwrap();
        mpi.abandon(RETRY);
    });
    assert_code(ended, RETRY);
}

#[test]
fn a_rank_that_leaves_early_takes_the_job_with_it() {
    let test = "a_rank_that_leaves_early_takes_the_job_with_it";
    let ended = under_mpirun(test, 3, Context::new(2 * LIMIT), MpiOptions::default(), |mpi, world| {
        if world.rank() == 1 {
            mpi.abandon(RETRY);
        }
        let waited_in_vain = world.barrier();
        panic!("{waited_in_vain:?}");
    });
    assert_code(ended, RETRY);
}

#[test]
fn nothing_is_allocated_after_the_first_calls() {
    let test = "nothing_is_allocated_after_the_first_calls";
    let ended = under_mpirun(test, 3, Context::default(), MpiOptions::default(), |_mpi, world| {
        let size = world.size();
        let (send, rows) = (vec![1_f32; 3000], consecutive(vec![100; size]).collect::<Vec<_>>());
        let (mut recv, mut sum, mut all) = (vec![0_f32; 3000], vec![1_f32; 20_000], vec![0_f32; 3000 * size]);
        let mut step = || {
            world.all_to_all_v(&Cpu, 10, (View::of(&send), &rows), (ViewMut::of(&mut recv), &rows)).unwrap();
            world.all_reduce(&Cpu, ViewMut::of(&mut sum), ReduceOp::Max).unwrap();
            world.all_gather(&Cpu, View::of(&send), ViewMut::of(&mut all)).unwrap();
            world.barrier().unwrap();
        };
        for _ in 0..3 {
            step();
        }
        let before = ALLOCATIONS.get();
        for _ in 0..5 {
            step();
        }
        assert_eq!(ALLOCATIONS.get() - before, 0);
    });
    assert_code(ended, DONE);
}
