//! Collectives between GPUs: results, and every way in which a peer can fail. Ranks are threads with a GPU each; skipped with a notice
//! where there are fewer GPUs than ranks.

#![cfg(feature = "cuda")]
// Helpers of tests may stop at the first surprise like the tests themselves.
#![allow(clippy::unwrap_used)]

use std::sync::Barrier;
use std::time::{Duration, Instant};

use moe_kernels::cuda::{Cuda, CudaBuffer};
use moe_kernels::{Device, View, ViewMut};
use moe_runtime::collectives::{CollectiveError, Communicator, ReduceOp};
use moe_runtime::topology::Rank;

mod collective_bodies;
mod gpus;

const SHORT: Duration = Duration::from_secs(2);

fn buffer(gpu: &Cuda<f32>, len: usize, value: f32) -> CudaBuffer<f32> {
    let mut buffer = gpu.alloc(len, "a test's buffer").unwrap();
    gpu.fill(ViewMut::of(&mut buffer), value);
    buffer
}

fn first_and_last(gpu: &Cuda<f32>, buffer: &CudaBuffer<f32>, len: usize) -> [f32; 2] {
    let mut ends = [[0.0]; 2];
    gpu.read_to_host(View::range(buffer, 0..1), &mut ends[0]).unwrap();
    gpu.read_to_host(View::range(buffer, len - 1..len), &mut ends[1]).unwrap();
    [ends[0][0], ends[1][0]]
}

#[test]
fn every_collective_at_every_size() {
    for ranks in [1, 2, 3, 4, 8] {
        let tested = gpus::on_gpus::<f32, _>(ranks, |gpu, world| collective_bodies::every_collective(gpu, &world));
        if tested.is_some() {
            println!("every collective on {ranks} GPUs");
        }
    }
}

#[test]
fn a_buffer_of_several_segments_is_reduced_whole() {
    const LEN: usize = 40_000_003;
    gpus::on_gpus(2, |gpu, world| {
        let me = world.rank() as f32;
        let mut whole = buffer(gpu, LEN, me + 1.0);
        gpu.wait(&world.all_reduce(gpu, ViewMut::of(&mut whole), ReduceOp::Sum).unwrap());
        assert_eq!(first_and_last(gpu, &whole, LEN), [3.0; 2]);
        let (all, mut mine) = (buffer(gpu, 2 * LEN, me + 1.0), buffer(gpu, LEN, 0.0));
        gpu.wait(&world.reduce_scatter(gpu, View::of(&all), ViewMut::of(&mut mine), ReduceOp::Max).unwrap());
        assert_eq!(first_and_last(gpu, &mine, LEN), [2.0; 2]);
    });
}

#[test]
fn collectives_run_in_the_order_of_the_callers_queues() {
    gpus::on_gpus(2, |gpu, world| {
        let (other, mut sum) = (gpu.fork(), buffer(gpu, 1 << 20, 0.0));
        for round in 1..=50 {
            let (queue, next) = if round % 2 == 0 { (gpu, &other) } else { (&other, gpu) };
            queue.fill(ViewMut::of(&mut sum), round as f32);
            let done = world.all_reduce(queue, ViewMut::of(&mut sum), ReduceOp::Sum).unwrap();
            next.wait(&done);
            assert_eq!(first_and_last(next, &sum, 1 << 20), [2.0 * round as f32; 2]);
        }
    });
}

#[test]
fn what_is_computed_meanwhile_runs_beside_a_collective() {
    gpus::on_gpus(2, |gpu, world| {
        let (mut sums, mut other) = (buffer(gpu, 1 << 24, 1.0), buffer(gpu, 1 << 20, 0.0));
        let mut last = None;
        for round in 1..=20 {
            let done = world.all_reduce(gpu, ViewMut::of(&mut sums), ReduceOp::Sum).unwrap();
            // Nothing here waits for the collective, so that the end of the last one is all that is known of them.
            gpu.fill(ViewMut::of(&mut other), round as f32);
            last = Some(done);
        }
        gpu.wait(&last.unwrap());
        assert_eq!(first_and_last(gpu, &sums, 1 << 24), [(1 << 20) as f32; 2]);
        assert_eq!(first_and_last(gpu, &other, 1 << 20), [20.0; 2]);
    });
}

#[test]
fn a_rank_that_never_arrives_is_given_up_and_named() {
    let over = Barrier::new(2);
    let errors = gpus::on_gpus(2, |gpu, world| {
        let mut sum = buffer(gpu, 100_000, 1.0);
        // The first exchange connects; it is a later one that the peer stays away from.
        gpu.wait(&world.all_reduce(gpu, ViewMut::of(&mut sum), ReduceOp::Sum).unwrap());
        gpu.synchronize().unwrap();
        world.context().set_deadline(SHORT);
        world.context().set_step(12);
        world.context().set_layer(Some(3));
        let began = Instant::now();
        let error = (world.rank() == 0).then(|| {
            let issued = world.all_reduce(gpu, ViewMut::of(&mut sum), ReduceOp::Sum).map(|done| gpu.wait(&done));
            // On the queue or not: the queue ends, and what it holds is not to be trusted.
            gpu.synchronize().unwrap();
            issued.and_then(|()| world.check()).unwrap_err()
        });
        assert!(began.elapsed() < 5 * SHORT);
        over.wait();
        let later = world.rank() == 0 && world.all_reduce(gpu, ViewMut::of(&mut sum), ReduceOp::Sum).is_ok();
        assert!(!later, "a group that was given up goes on");
        error
    });
    let Some(errors) = errors else { return };
    let error = errors.into_iter().flatten().next().unwrap();
    println!("{error}");
    assert!(matches!(&error, CollectiveError::Stalled { missing, .. } if *missing == [Rank(1)]), "{error:?}");
    let text = "all_reduce of 400000 bytes at step 12, layer 3, in the world group was not done within ";
    assert!(error.to_string().starts_with(text), "{error}");
}

#[test]
fn a_rank_that_stays_away_from_the_first_exchange_is_given_up_and_named() {
    let over = Barrier::new(2);
    let errors = gpus::on_gpus(2, |gpu, world| {
        let mut sum = buffer(gpu, 100_000, 1.0);
        world.context().set_deadline(SHORT);
        let began = Instant::now();
        // The call itself waits, inside of NCCL, for the peer to connect.
        let error = (world.rank() == 0).then(|| {
            let issued = world.all_reduce(gpu, ViewMut::of(&mut sum), ReduceOp::Sum).map(|done| gpu.wait(&done));
            gpu.synchronize().unwrap();
            issued.and_then(|()| world.check()).unwrap_err()
        });
        assert!(began.elapsed() < 5 * SHORT);
        over.wait();
        error
    });
    let Some(errors) = errors else { return };
    let error = errors.into_iter().flatten().next().unwrap();
    println!("{error}");
    assert!(matches!(&error, CollectiveError::Stalled { missing, .. } if *missing == [Rank(1)]), "{error:?}");
}

#[test]
fn another_thread_ends_a_collective_and_its_reason_is_told() {
    let over = Barrier::new(2);
    gpus::on_gpus(2, |gpu, world| {
        let mut sum = buffer(gpu, 100_000, 1.0);
        gpu.wait(&world.all_reduce(gpu, ViewMut::of(&mut sum), ReduceOp::Sum).unwrap());
        gpu.synchronize().unwrap();
        if world.rank() == 0 {
            let abort = world.context().abort_handle();
            let aborting = std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(300));
                abort.abort(Some(Rank(1)), "lease expired");
            });
            let began = Instant::now();
            let issued = world.all_reduce(gpu, ViewMut::of(&mut sum), ReduceOp::Sum).map(|done| gpu.wait(&done));
            gpu.synchronize().unwrap();
            let error = issued.and_then(|()| world.check()).unwrap_err();
            assert!(began.elapsed() < SHORT, "{:?}", began.elapsed());
            println!("{error}");
            assert!(error.to_string().ends_with("because of rank 1: lease expired"), "{error}");
            aborting.join().unwrap();
        }
        over.wait();
    });
}

#[test]
fn rows_beyond_the_buffer_are_refused() {
    gpus::on_gpus(2, |gpu, world| {
        let (send, mut recv) = (buffer(gpu, 8, 1.0), buffer(gpu, 8, 0.0));
        let rows = [0..3, 3..5];
        let refused = world.all_to_all_v(gpu, 2, (View::of(&send), &rows), (ViewMut::of(&mut recv), &rows));
        let refused = refused.map(drop).unwrap_err();
        assert!(refused.to_string().contains("the send rows [0..3, 3..5] do not fit a buffer of 4 rows"), "{refused}");
    });
}
