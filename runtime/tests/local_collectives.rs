//! Collectives between threads: results, and every way in which a peer can fail.

use std::sync::{Barrier, Mutex};
use std::time::{Duration, Instant};

use moe_kernels::{Cpu, View, ViewMut};
use moe_runtime::collectives::{
    CollectiveError, Communicator, Context, HostCommunicator, ReduceOp, consecutive, local,
};
use moe_runtime::topology::Rank;

mod collective_bodies;

const SHORT: Duration = Duration::from_millis(200);

#[test]
fn every_collective_at_every_size() {
    for size in [1, 2, 3, 4, 8, 16] {
        local::run(size, |world| collective_bodies::every_collective(&Cpu, &world));
    }
}

#[test]
fn a_buffer_of_several_segments_is_reduced_whole() {
    // 20 MB; no more than 4 MiB are under way at a time.
    local::run(3, |world| {
        let mut buffer = vec![world.rank() as i32 + 1; 5_000_000];
        world.all_reduce(&Cpu, ViewMut::of(&mut buffer), ReduceOp::Sum).unwrap();
        assert!(buffer.iter().all(|value| *value == 6));
        world.broadcast(&Cpu, ViewMut::of(&mut buffer), 1).unwrap();
        let mut all = vec![0; 15_000_000];
        world.all_gather(&Cpu, View::of(&buffer), ViewMut::of(&mut all)).unwrap();
        assert!(all.iter().all(|value| *value == 6));
    });
}

#[test]
fn a_rank_alone_needs_no_peers() {
    collective_bodies::every_collective(&Cpu, &local::solo(Context::default()));
}

/// One collective of each kind that waits for peers.
fn one_of_each(group: &HostCommunicator, which: usize) -> Result<(), CollectiveError> {
    let size = group.size();
    let (mut long, mut all) = (vec![1_f32; 20_000], vec![0_f32; 20_000 * size]);
    let rows: Vec<_> = consecutive(vec![1; size]).collect();
    match which {
        0 => group.barrier(),
        1 => group.all_reduce(&Cpu, ViewMut::of(&mut long), ReduceOp::Sum),
        2 => group.all_gather(&Cpu, View::of(&long), ViewMut::of(&mut all)),
        3 => group.all_to_all_v(&Cpu, 1, (View::of(&long), &rows), (ViewMut::of(&mut all), &rows)),
        4 => group.all_gather_bytes(b"x").map(drop),
        5 => group.broadcast(&Cpu, ViewMut::of(&mut long), 0),
        _ => group.split("next", 0, 0).map(drop),
    }
}

#[test]
fn a_rank_that_never_arrives_is_named_by_all_others() {
    let names = ["barrier", "all_reduce", "all_gather", "all_to_all_v", "all_gather_bytes", "broadcast", "split"];
    for (which, name) in names.into_iter().enumerate() {
        let over = Barrier::new(4);
        let errors = local::run(4, |world| {
            // Starting threads takes its time; the short deadline is for ranks that run.
            world.barrier().unwrap();
            world.context().set_deadline(SHORT);
            world.context().set_step(12);
            // Alive, and somewhere else.
            let result = if world.rank() == 2 { Ok(()) } else { one_of_each(&world, which) };
            over.wait();
            result
        });
        for (rank, result) in errors.into_iter().enumerate().filter(|(rank, _)| *rank != 2) {
            if name == "broadcast" && rank == 0 {
                // The root has nothing to wait for.
                result.unwrap();
                continue;
            }
            let Err(CollectiveError::Timeout { collective, group, step, waited, missing }) = result else {
                panic!("rank {rank} in {name}: {result:?}")
            };
            assert_eq!(missing, [Rank(2)], "rank {rank} in {name}");
            assert_eq!(collective, name);
            assert_eq!((&*group, step), ("world", 12));
            assert!(waited >= SHORT && waited < SHORT * 10, "waited {waited:?} in {name}");
        }
    }
}

#[test]
fn a_missing_rank_is_named_by_its_number_in_the_world() {
    let over = Barrier::new(6);
    let results = local::run(6, |world| {
        let odd = world.split("expert", world.rank() % 2, 0).unwrap();
        odd.barrier().unwrap();
        world.context().set_deadline(SHORT);
        let result = if world.rank() == 3 { Ok(()) } else { odd.barrier() };
        over.wait();
        result.map_err(|error| error.to_string())
    });
    assert!(results[0].is_ok() && results[2].is_ok() && results[4].is_ok(), "{results:?}");
    for rank in [1, 5] {
        let message = results[rank].as_ref().unwrap_err();
        assert!(message.starts_with("barrier at step 0 in the expert group waited 0."), "{message}");
        assert!(message.ends_with(" s for rank 3"), "{message}");
    }
}

#[test]
fn another_thread_breaks_a_wait() {
    let context = Context::new(Duration::from_secs(60));
    let handle = context.abort_handle();
    let mut world = local::world([context, Context::default()]);
    let _absent = world.pop();
    let waiting = world.pop().unwrap();
    let began = Instant::now();
    let thread = std::thread::spawn(move || (waiting.barrier(), waiting.barrier()));
    handle.abort(Some(Rank(1)), "lease expired");
    let (first, second) = thread.join().unwrap();
    for result in [first, second] {
        let Err(CollectiveError::Aborted { culprit, reason }) = result else { panic!("{result:?}") };
        assert_eq!((culprit, &*reason), (Some(Rank(1)), "lease expired"));
    }
    assert!(began.elapsed() < Duration::from_secs(10));
}

#[test]
fn a_rank_that_leaves_is_a_lost_peer_at_once() {
    let results = local::run(3, |world| if world.rank() == 1 { Ok(()) } else { world.barrier() });
    for rank in [0, 2] {
        // Who notices first leaves as well, and may be what the other notices.
        assert!(matches!(&results[rank], Err(CollectiveError::PeerLost { .. })), "{:?}", results[rank]);
    }
    assert!(
        results.iter().any(|result| matches!(result, Err(CollectiveError::PeerLost { rank: Rank(1), .. }))),
        "{results:?}"
    );
}

#[test]
fn what_was_sent_before_leaving_still_arrives() {
    let results = local::run(2, |world| {
        let mut buffer = vec![world.rank() as i32];
        world.broadcast(&Cpu, ViewMut::of(&mut buffer), 0).map(|()| buffer[0])
    });
    assert!(matches!(results[..], [Ok(0), Ok(0)]), "{results:?}");
}

#[test]
fn a_panic_ends_the_others_waits_and_is_the_callers() {
    let seen = Mutex::new(Vec::new());
    let outcome = std::panic::catch_unwind(|| {
        local::run(4, |world| {
            if world.rank() == 2 {
                panic!("the third rank had enough");
            }
            let result = world.barrier();
            seen.lock().unwrap().push(result.clone());
            result.unwrap();
        })
    });
    let panic = outcome.unwrap_err();
    assert_eq!(panic.downcast_ref::<&str>(), Some(&"the third rank had enough"));
    let seen = seen.into_inner().unwrap();
    assert_eq!(seen.len(), 3);
    for result in seen {
        assert!(matches!(result, Err(CollectiveError::Aborted { culprit: Some(Rank(2)), .. })), "{result:?}");
    }
}

#[test]
fn counts_that_disagree_are_an_error_and_not_a_hang() {
    let results = local::run(2, |world| {
        let (sends, expects) = if world.rank() == 0 { ([0, 3], [0, 2]) } else { ([1, 0], [3, 0]) };
        let [sends, expects] = [sends, expects].map(|counts| consecutive(counts).collect::<Vec<_>>());
        let (send, mut recv) = (vec![1_f32; 8], vec![0_f32; 8]);
        world.all_to_all_v(&Cpu, 2, (View::of(&send), &sends), (ViewMut::of(&mut recv), &expects))
    });
    let Err(CollectiveError::Disagreement { rank, expected_bytes, sent_bytes, .. }) = &results[0] else {
        panic!("{results:?}")
    };
    assert_eq!((*rank, *expected_bytes, *sent_bytes), (Rank(1), 16, Some(8)));
}

#[test]
fn rows_beyond_the_buffer_are_refused_and_the_group_stays_broken() {
    // The second begins after its end.
    for (start, end) in [(0, 5), (3, 2)] {
        let world = local::solo(Context::default());
        let (send, mut recv) = (vec![0_f32; 8], vec![0_f32; 8]);
        let (from, into) = (vec![0..1; 1], vec![start..end; 1]);
        let refused =
            world.all_to_all_v(&Cpu, 2, (View::of(&send), &from), (ViewMut::of(&mut recv), &into)).unwrap_err();
        let reason = format!("the receive rows [{start}..{end}] do not fit a buffer of 4 rows");
        assert!(refused.to_string().contains(&reason), "{refused}");
        assert!(matches!(world.barrier(), Err(CollectiveError::Rows { what: "receive", .. })));
    }
}

#[test]
fn ranks_that_call_different_collectives_do_not_mix_up_their_data() {
    let over = Barrier::new(2);
    let results = local::run_with(2, SHORT, |world| {
        let mut buffer = vec![7_i32];
        let result = match world.rank() {
            0 => world.broadcast(&Cpu, ViewMut::of(&mut buffer), 1),
            _ => world.all_reduce(&Cpu, ViewMut::of(&mut buffer), ReduceOp::Sum),
        };
        over.wait();
        result
    });
    assert!(results.iter().all(|result| matches!(result, Err(CollectiveError::Timeout { .. }))), "{results:?}");
}
