//! Rows stored straight into other GPUs' memory: they land where they are wanted, ranks wait for each other, and a peer that stays away is
//! given up and named. Ranks are threads with a GPU each; skipped with a notice where there are fewer GPUs than ranks.

#![cfg(feature = "cuda")]
// Helpers of tests may stop at the first surprise like the tests themselves.
#![allow(clippy::unwrap_used)]

use std::sync::Barrier;
use std::time::{Duration, Instant};

use half::bf16;
use moe_kernels::cuda::{Cuda, CudaAct, CudaBuffer};
use moe_kernels::{Device, Element, Leaving, View, ViewMut};
use moe_runtime::collectives::nccl::NcclCommunicator;
use moe_runtime::collectives::{BERTH_PAGE, Berth, CollectiveError, Communicator, Landing, Push, consecutive};
use moe_runtime::topology::Rank;

mod gpus;

const K: usize = 3;

fn whole_pages<A: CudaAct, T: Element>(gpu: &Cuda<A>, len: usize) -> CudaBuffer<T> {
    gpu.alloc(len.next_multiple_of(BERTH_PAGE / T::BYTES), "a berth").unwrap()
}

fn on<A: CudaAct, T: Element>(gpu: &Cuda<A>, host: &[T]) -> CudaBuffer<T> {
    let mut buffer = gpu.alloc(host.len(), "a test's buffer").unwrap();
    gpu.upload(host, ViewMut::of(&mut buffer));
    buffer
}

fn back<A: CudaAct, T: Element>(gpu: &Cuda<A>, buffer: &CudaBuffer<T>, len: usize) -> Vec<T> {
    let mut host = vec![T::default(); len];
    gpu.read_to_host(View::range(buffer, 0..len), &mut host).unwrap();
    host
}

/// Rows that `from` sends to `to` in push number `time`.
fn count(time: usize, from: usize, to: usize) -> usize {
    match time % 4 {
        0 => 5 + from + 2 * to,
        // Ranks that nothing leaves, and ranks that nothing comes to.
        1 => usize::from(from == 0) * (1000 * to),
        2 => usize::from(to == 1) * 700,
        _ => (from * 37 + to * 11 + time) % 300,
    }
}

/// A value of a row, exact in bf16: 8 bits.
fn value(time: usize, from: usize, to: usize, row: usize, column: usize) -> f32 {
    ((time * 3 + from * 50 + to * 17 + row * 5 + column) % 251) as f32
}

fn lands<A: CudaAct>(gpu: &Cuda<A>, world: &NcclCommunicator<A>, width: usize) {
    let (me, size) = (world.rank(), world.size());
    // The same on all ranks.
    let comes = |time, to| (0..size).map(|from| count(time, from, to)).sum::<usize>();
    let room = (0..8).flat_map(|time| (0..size).map(move |to| comes(time, to))).max().unwrap() + 2;
    let rows = whole_pages::<A, A>(gpu, room * width);
    let (ids, weights) = (whole_pages::<A, i32>(gpu, room * K), whole_pages::<A, f32>(gpu, room * K));
    let berth = Berth { rows: View::of(&rows), ids: Some(View::of(&ids)), weights: Some(View::of(&weights)) };
    let landing = world.landing(gpu, &berth).unwrap().unwrap();
    for time in 0..8 {
        let counts: Vec<_> = (0..size).map(|to| count(time, me, to)).collect();
        let ranges: Vec<_> = consecutive(counts.iter().copied()).collect();
        let n = ranges.last().unwrap().end;
        let at: Vec<_> = (0..size).map(|to| (0..me).map(|from| count(time, from, to)).sum()).collect();
        let place: Vec<(usize, usize)> = (0..size).flat_map(|to| (0..counts[to]).map(move |row| (to, row))).collect();
        // Even times take rows in reverse by an index, odd ones as they lie.
        let indexed = time % 2 == 0;
        let lies = |i: usize| if indexed { n - 1 - i } else { i };
        let mut host = vec![A::default(); n * width];
        for (i, (to, row)) in place.iter().enumerate() {
            for column in 0..width {
                host[lies(i) * width + column] = A::from_f32(value(time, me, *to, *row, column));
            }
        }
        let list = |i: usize, j: usize| value(time, me, place[i].0, place[i].1, 1000 + j);
        let numbers: Vec<f32> = (0..n * K).map(|at| list(at / K, at % K)).collect();
        let (from, index) = (on(gpu, &host), on(gpu, &(0..n).map(|i| lies(i) as i32).collect::<Vec<_>>()));
        let (own_ids, own_weights) =
            (on(gpu, &numbers.iter().map(|x| *x as i32).collect::<Vec<_>>()), on(gpu, &numbers));
        let push = Push {
            width,
            what: Leaving::Rows {
                index: indexed.then(|| View::of(&index)),
                from: View::of(&from),
                k: K,
                ids: Some(View::of(&own_ids)),
                weights: Some(View::of(&own_weights)),
            },
            rows: &ranges,
            at: &at,
            beside: time % 3 == 0,
        };
        gpu.wait(&landing.push(gpu, &push).unwrap());
        let expected: Vec<(usize, usize)> =
            (0..size).flat_map(|from| (0..count(time, from, me)).map(move |row| (from, row))).collect();
        let came = back(gpu, &rows, expected.len() * width);
        let (came_ids, came_weights) = (back(gpu, &ids, expected.len() * K), back(gpu, &weights, expected.len() * K));
        for (i, (from, row)) in expected.iter().enumerate() {
            for column in 0..width {
                let came = came[i * width + column].to_f32();
                assert_eq!(
                    came,
                    value(time, *from, me, *row, column),
                    "row {row} of {from} to {me} at {time}, {column}"
                );
            }
            for j in 0..K {
                let number = value(time, *from, me, *row, 1000 + j);
                let came = (came_ids[i * K + j], came_weights[i * K + j]);
                assert_eq!(came, (number as i32, number), "{from} to {me} at {time}");
            }
        }
        // Nobody overwrites what another is about to look at.
        world.barrier().unwrap();
        // The same rows as sums: each is once what it was and twice a row of zeroes.
        let mut with_zero = host;
        with_zero.extend(vec![A::default(); width]);
        let (y, zero) = (on(gpu, &with_zero), n as i32);
        let slots: Vec<i32> =
            (0..n).flat_map(|i| [[zero, lies(i) as i32, zero], [lies(i) as i32, -1, -1]][i % 2]).collect();
        let factors: Vec<f32> = (0..n).flat_map(|i| [[1.0, 0.5, 1.0], [0.5, 7.0, 7.0]][i % 2]).collect();
        let (slots, factors) = (on(gpu, &slots), on(gpu, &factors));
        let along = Some(View::of(&own_weights));
        let what =
            Leaving::Sums { k: K, slots: View::of(&slots), weights: Some(View::of(&factors)), y: View::of(&y), along };
        gpu.wait(&landing.push(gpu, &Push { what, ..push }).unwrap());
        let came = back(gpu, &rows, expected.len() * width);
        for (i, (from, row)) in expected.iter().enumerate() {
            for column in 0..width {
                let came = came[i * width + column].to_f32();
                assert_eq!(came, 0.5 * value(time, *from, me, *row, column), "half of row {row} of {from} to {me}");
            }
        }
        world.barrier().unwrap();
    }
    gpu.synchronize().unwrap();
    world.check().unwrap();
}

#[test]
fn rows_land_where_they_are_wanted() {
    for ranks in [2, 3, 4, 8] {
        // The last is no multiple of 16 bytes.
        for width in [8, 2048, 77] {
            gpus::on_gpus::<f32, _>(ranks, |gpu, world| lands(gpu, &world, width));
            if gpus::on_gpus::<bf16, _>(ranks, |gpu, world| lands(gpu, &world, width)).is_some() {
                println!("rows of {width} on {ranks} GPUs");
            }
        }
    }
}

#[test]
fn groups_of_a_split_land_apart() {
    gpus::on_gpus::<bf16, _>(4, |gpu, world| {
        let group = world.split("half", world.rank() % 2, world.rank()).unwrap();
        lands(gpu, &group, 256);
        lands(gpu, &world, 256);
        lands(gpu, &group, 128);
    });
}

#[test]
fn a_rank_that_does_not_push_is_given_up_and_named() {
    let over = Barrier::new(2);
    let errors = gpus::on_gpus::<f32, _>(2, |gpu, world| {
        let rows = whole_pages::<f32, f32>(gpu, 64);
        let landing: Box<dyn Landing<_>> =
            world.landing(gpu, &Berth { rows: View::of(&rows), ids: None, weights: None }).unwrap().unwrap();
        let from = on(gpu, &[1.0_f32; 64]);
        let push = || {
            let push = Push {
                width: 8,
                what: Leaving::Rows { index: None, from: View::of(&from), k: 0, ids: None, weights: None },
                rows: &[0..2, 2..4],
                at: &[2 * world.rank(); 2],
                beside: false,
            };
            landing.push(gpu, &push).map(|done| gpu.wait(&done))
        };
        push().unwrap();
        gpu.synchronize().unwrap();
        world.context().set_deadline(Duration::from_secs(2));
        world.context().set_step(12);
        let began = Instant::now();
        let error = (world.rank() == 0).then(|| {
            let issued = push();
            gpu.synchronize().unwrap();
            issued.and_then(|()| world.check()).unwrap_err()
        });
        assert!(began.elapsed() < Duration::from_secs(10));
        over.wait();
        error
    });
    let Some(errors) = errors else { return };
    let error = errors.into_iter().flatten().next().unwrap();
    println!("{error}");
    assert!(matches!(&error, CollectiveError::Stalled { missing, .. } if *missing == [Rank(1)]), "{error:?}");
    assert!(error.to_string().starts_with("all_to_all_v of 128 bytes at step 12"), "{error}");
}
