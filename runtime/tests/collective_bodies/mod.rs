//! What every transport must do: each collective against an oracle that needs no communication.
//!
//! A rank's data are a function of the rank and the index, so each rank can tell alone what it must receive.
#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in test functions, but not in their helpers")]

use std::ops::Range;

use moe_kernels::{Device, Element, View, ViewMut};
use moe_runtime::collectives::{Communicator, Groups, ReduceOp, Reducible, consecutive};
use moe_runtime::topology::{Grid, Rank};

/// A row's element on its way from one rank to another, exact in f32.
fn parcel(from: usize, to: usize, index: usize) -> f32 {
    (from * 100_000 + to * 1000 + index % 1000) as f32
}

/// Numbers whose sum depends on the order of adding.
fn addend(rank: usize, index: usize) -> f64 {
    let digits = ((index * 7919 + rank * 104_729) % 1009) as f64 - 500.0;
    digits * 0.001 * 10_f64.powi((rank % 5) as i32)
}

/// Everything that works, on one world whose ranks compute on `device`.
pub(crate) fn every_collective<D: Device>(device: &D, world: &impl Communicator<D>) {
    exchanges(device, world);
    scattered(device, world);
    reductions(device, world);
    copies(device, world);
    host_bytes(world);
    splits(device, world);
    world.barrier().unwrap();
}

/// Elements on the device.
fn on<D: Device, T: Element>(device: &D, host: &[T]) -> D::Buffer<T> {
    let mut buffer = device.alloc(host.len(), "a test's buffer").unwrap();
    device.upload(host, ViewMut::of(&mut buffer));
    buffer
}

/// Elements from the device.
fn back<D: Device, T: Element>(device: &D, buffer: &D::Buffer<T>) -> Vec<T> {
    let view = View::of(buffer);
    let mut host = vec![T::default(); view.len()];
    device.read_to_host(view, &mut host).unwrap();
    host
}

fn exchanges<D: Device>(device: &D, world: &impl Communicator<D>) {
    let (me, size) = (world.rank(), world.size());
    for block in [0, 1, 5, 3000] {
        let send = (0..size * block).map(|at| parcel(me, at / block, at % block)).collect::<Vec<_>>();
        let (send, mut recv) = (on(device, &send), on(device, &vec![f32::NAN; size * block]));
        device.wait(&world.all_to_all(device, View::of(&send), ViewMut::of(&mut recv)).unwrap());
        let expected = (0..size * block).map(|at| parcel(at / block, me, at % block)).collect::<Vec<_>>();
        assert_eq!(back(device, &recv), expected, "all_to_all of {block} by {me}/{size}");
    }

    type Counts = fn(usize, usize, usize) -> usize;
    let patterns: [(&str, Counts); 6] = [
        ("nothing at all", |_, _, _| 0),
        ("uneven", |from, to, _| (from * 3 + to * 5) % 4),
        ("rank 1 has nothing to send", |from, to, _| if from == 1 { 0 } else { to + 1 }),
        ("rank 0 gets nothing", |from, to, _| if to == 0 { 0 } else { from + 1 }),
        ("all to the last rank", |_, to, size| if to + 1 == size { 7 } else { 0 }),
        ("long", |from, to, _| 1000 + 100 * from + to),
    ];
    for (what, rows) in patterns {
        for width in [1, 3] {
            let send_rows = consecutive((0..size).map(|to| rows(me, to, size))).collect::<Vec<_>>();
            let recv_rows = consecutive((0..size).map(|from| rows(from, me, size))).collect::<Vec<_>>();
            let elements =
                |from: usize, to: usize| (0..rows(from, to, size) * width).map(move |index| parcel(from, to, index));
            let mut send = (0..size).flat_map(|to| elements(me, to)).collect::<Vec<_>>();
            let expected = (0..size).flat_map(|from| elements(from, me)).collect::<Vec<_>>();
            // Buffers are longer than what is counted, and nobody looks there.
            send.extend([f32::NAN; 2]);
            let (send, mut recv) = (on(device, &send), on(device, &vec![f32::NAN; expected.len() + 2 * width]));
            let (outgoing, incoming) = ((View::of(&send), &*send_rows), (ViewMut::of(&mut recv), &*recv_rows));
            device.wait(&world.all_to_all_v(device, width, outgoing, incoming).unwrap());
            let recv = back(device, &recv);
            let (counted, beyond) = recv.split_at(expected.len());
            assert_eq!(counted, expected, "all_to_all_v, {what}, width {width}, by {me}/{size}");
            assert!(beyond.iter().all(|value| value.is_nan()), "rows beyond the counted ones were written: {what}");
        }
    }
}

/// Rows that lie anywhere: of four blocks of three rows each rank sends the middle row of block i to rank i, to its own block in the
/// receiver's buffer, from behind.
fn scattered<D: Device>(device: &D, world: &impl Communicator<D>) {
    const WIDTH: usize = 2;
    let (me, size) = (world.rank(), world.size());
    let send = (0..size * 3).flat_map(|row| [parcel(me, row / 3, row % 3); WIDTH]).collect::<Vec<_>>();
    let (send, mut recv) = (on(device, &send), on(device, &vec![f32::NAN; size * 3 * WIDTH]));
    let from = (0..size).map(|to| to * 3 + 1..to * 3 + 2).collect::<Vec<_>>();
    let into = (0..size).map(|from| size - 1 - from).map(|block| block * 3..block * 3 + 1).collect::<Vec<_>>();
    let done = world.all_to_all_v(device, WIDTH, (View::of(&send), &from), (ViewMut::of(&mut recv), &into));
    device.wait(&done.unwrap());
    for (block, rows) in back(device, &recv).chunks_exact(3 * WIDTH).enumerate() {
        assert_eq!(rows[..WIDTH], [parcel(size - 1 - block, me, 1); WIDTH], "scattered rows, by {me}/{size}");
        assert!(rows[WIDTH..].iter().all(|value| value.is_nan()), "rows between were written, by {me}/{size}");
    }
}

fn reductions<D: Device>(device: &D, world: &impl Communicator<D>) {
    for op in [ReduceOp::Sum, ReduceOp::Max, ReduceOp::Min] {
        for len in [0, 1, 7, 1000, 6001] {
            reduces::<D, f32>(device, world, (op, len), |rank, index| addend(rank, index) as f32);
            reduces::<D, f64>(device, world, (op, len), addend);
            reduces::<D, i32>(device, world, (op, len), |rank, index| addend(rank, index) as i32);
        }
    }
}

/// The same bits as adding in ascending rank order, which each rank works out for itself: so all ranks have the same, too.
fn reduces<D: Device, T: Reducible>(
    device: &D,
    world: &impl Communicator<D>,
    (op, len): (ReduceOp, usize),
    value: impl Fn(usize, usize) -> T,
) {
    let (me, size) = (world.rank(), world.size());
    let of_rank = |rank: usize, indices: Range<usize>| indices.map(|index| value(rank, index)).collect::<Vec<_>>();
    let reduced = |indices: Range<usize>| {
        let mut sum = of_rank(0, indices.clone());
        for rank in 1..size {
            T::fold(op, &mut sum, &of_rank(rank, indices.clone()));
        }
        sum
    };

    let mut buffer = on(device, &of_rank(me, 0..len));
    device.wait(&world.all_reduce(device, ViewMut::of(&mut buffer), op).unwrap());
    let same = T::as_bytes(&back(device, &buffer)) == T::as_bytes(&reduced(0..len));
    assert!(same, "all_reduce {op:?} of {len} {} by {me}/{size}", T::NAME);

    let (send, mut recv) = (on(device, &of_rank(me, 0..len * size)), on(device, &vec![T::default(); len]));
    device.wait(&world.reduce_scatter(device, View::of(&send), ViewMut::of(&mut recv), op).unwrap());
    let same = T::as_bytes(&back(device, &recv)) == T::as_bytes(&reduced(me * len..(me + 1) * len));
    assert!(same, "reduce_scatter {op:?} of {len} {} by {me}/{size}", T::NAME);
}

fn copies<D: Device>(device: &D, world: &impl Communicator<D>) {
    let (me, size) = (world.rank(), world.size());
    for len in [0, 1, 5, 5000] {
        let send = (0..len).map(|index| parcel(me, 0, index)).collect::<Vec<_>>();
        let (send, mut recv) = (on(device, &send), on(device, &vec![f32::NAN; len * size]));
        device.wait(&world.all_gather(device, View::of(&send), ViewMut::of(&mut recv)).unwrap());
        let expected = (0..len * size).map(|at| parcel(at / len, 0, at % len)).collect::<Vec<_>>();
        assert_eq!(back(device, &recv), expected, "all_gather of {len} by {me}/{size}");

        for root in 0..size {
            let mut buffer = on(device, &(0..len).map(|index| parcel(me, root, index)).collect::<Vec<_>>());
            device.wait(&world.broadcast(device, ViewMut::of(&mut buffer), root).unwrap());
            let expected = (0..len).map(|index| parcel(root, root, index)).collect::<Vec<_>>();
            assert_eq!(back(device, &buffer), expected, "broadcast of {len} from {root} by {me}/{size}");
        }
    }
}

fn host_bytes<D: Device>(world: &impl Communicator<D>) {
    let (me, size) = (world.rank(), world.size());
    let text = |rank: usize| b"manifest".repeat(rank * rank * 50);
    assert_eq!(world.all_gather_bytes(&text(me)).unwrap(), (0..size).map(text).collect::<Vec<_>>());
    for root in [0, size - 1] {
        let mut bytes = text(me);
        world.broadcast_bytes(&mut bytes, root).unwrap();
        assert_eq!(bytes, text(root));
    }
}

fn splits<D: Device>(device: &D, world: &impl Communicator<D>) {
    let (me, size) = (world.rank(), world.size());
    // Odd and even ranks, in descending order; then each of them halved again.
    let half = world.split("half", me % 2, size - me).unwrap();
    let mut members = (0..size).filter(|rank| rank % 2 == me % 2).map(Rank).collect::<Vec<_>>();
    members.reverse();
    assert_eq!(half.members(), members);
    assert_eq!((half.members()[half.rank()], half.name()), (Rank(me), "half"));
    group_sum(device, &half);
    let quarter = half.split("quarter", half.rank() % 2, 0).unwrap();
    group_sum(device, &quarter);
    group_sum(device, world);

    for ep in (1..=size).filter(|ep| size % ep == 0) {
        let grid = Grid::new(size, ep, ep * 2).unwrap();
        let whole = world.split("world", 0, me).unwrap();
        let groups = Groups::of_grid(whole, &grid).unwrap();
        assert_eq!(groups.expert.members(), grid.expert_group(Rank(me)));
        assert_eq!(groups.replica.members(), grid.replica_group(Rank(me)));
        group_sum(device, &groups.replica);
        group_sum(device, &groups.expert);
        group_sum(device, &groups.world);
    }
}

/// Groups do not hear each other: the sum is that of the members alone.
fn group_sum<D: Device>(device: &D, group: &impl Communicator<D>) {
    let mut sum = on(device, &[group.members()[group.rank()].0 as i32; 3]);
    device.wait(&group.all_reduce(device, ViewMut::of(&mut sum), ReduceOp::Sum).unwrap());
    let expected = group.members().iter().map(|rank| rank.0 as i32).sum::<i32>();
    assert_eq!(back(device, &sum), [expected; 3], "sum over {:?}", group.members());
}
