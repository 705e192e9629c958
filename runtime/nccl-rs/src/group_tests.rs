//! Groups on a library of fakes: what is issued, in which order, and what an early end does.

use super::*;
use crate::fake::{self, Call};

fn stream() -> Stream {
    // SAFETY: the fake library looks at no stream.
    unsafe { Stream::from_raw(std::ptr::null_mut()) }
}

fn source(address: u64, len: usize) -> DeviceSlice<f32> {
    // SAFETY: the fake library looks at no memory.
    unsafe { DeviceSlice::new(address, len) }
}

fn target(address: u64, len: usize) -> DeviceSliceMut<f32> {
    // SAFETY: as above.
    unsafe { DeviceSliceMut::new(address, len) }
}

#[test]
fn an_exchange_sends_to_each_rank_its_part_and_nothing_where_there_is_none() {
    let communicator = fake::communicator(1, 3);
    let mut group = communicator.group().unwrap();
    let (send, mut recv) = (source(0x1000, 7), target(0x8000, 10));
    group.all_to_all_v((send, &[2, 0, 5]), (&mut recv, &[0, 4, 1]), stream()).unwrap();
    assert_eq!(group.end().unwrap(), Progress::Done);
    let exchanged = [
        Call::GroupStart,
        Call::Send(0, 0x1000, 2),
        Call::Recv(1, 0x8000, 4),
        Call::Send(2, 0x1008, 5),
        Call::Recv(2, 0x8010, 1),
        Call::GroupEnd,
    ];
    assert_eq!(fake::calls(), exchanged);
}

#[test]
fn counts_that_cannot_be_right_issue_nothing() {
    let communicator = fake::communicator(0, 2);
    let table: [(&[usize], &[usize], &str); 4] = [
        (&[1], &[1, 1], "all_to_all_v: the list of send counts has 1 elements, not 2"),
        (&[1, 1], &[1, 1, 1], "all_to_all_v: the list of receive counts has 3 elements, not 2"),
        (&[4, 5], &[1, 1], "all_to_all_v: send has 8 elements, not 9"),
        (&[1, 1], &[usize::MAX, 2], &format!("all_to_all_v: recv has 8 elements, not {}", usize::MAX)),
    ];
    for (send_counts, recv_counts, expected) in table {
        let mut group = communicator.group().unwrap();
        let mut recv = target(0x8000, 8);
        let error = group.all_to_all_v((source(0x1000, 8), send_counts), (&mut recv, recv_counts), stream());
        assert_eq!(error.unwrap_err().to_string(), expected);
        // An empty group harms nobody.
        drop(group);
        assert_eq!(fake::calls(), [Call::GroupStart, Call::GroupEnd]);
    }
    assert!(!communicator.is_aborted());
}

#[test]
fn lengths_and_ranks_are_checked() {
    let communicator = fake::communicator(0, 2);
    let mut group = communicator.group().unwrap();
    let scattered = group.reduce_scatter(source(0, 5), &mut target(0, 3), ReduceOp::Sum, stream()).unwrap_err();
    assert_eq!(scattered.to_string(), "ncclReduceScatter: send has 5 elements, not 6");
    let gathered = group.all_gather(source(0, 5), &mut target(0, 3), stream()).unwrap_err();
    assert_eq!(gathered.to_string(), "ncclAllGather: recv has 3 elements, not 10");
    let lost = group.broadcast(&mut target(0, 3), 2, stream()).unwrap_err();
    assert_eq!(lost.to_string(), "ncclBroadcast: there is no rank 2 among 2");
    assert!(group.send(source(0, 1), 9, stream()).is_err());
    assert_eq!(group.end().unwrap(), Progress::Done);
    assert_eq!(fake::calls(), [Call::GroupStart, Call::GroupEnd]);
}

#[test]
fn a_group_says_what_is_still_under_way() {
    let communicator = fake::communicator(0, 2);
    fake::answer_group_end(7);
    let mut group = communicator.group().unwrap();
    group.all_reduce(&mut target(0x1000, 16), ReduceOp::Sum, stream()).unwrap();
    assert_eq!(group.end().unwrap(), Progress::InProgress);
    assert_eq!(fake::calls(), [Call::GroupStart, Call::AllReduce(16), Call::GroupEnd]);
    fake::answer_group_end(0);
}

#[test]
fn the_first_failure_of_a_group_is_the_one_reported() {
    let communicator = fake::communicator(0, 2);
    fake::answer_send(4);
    fake::answer_group_end(3);
    let mut group = communicator.group().unwrap();
    let _ = group.send(source(0x1000, 1), 1, stream());
    let error = group.end().unwrap_err().to_string();
    assert_eq!(error, "ncclSend: text of the code (ncclInvalidArgument): last words");
    fake::answer_send(0);
    fake::answer_group_end(0);
}

#[test]
fn a_second_group_or_a_wait_inside_of_one_is_refused() {
    let (one, other) = (fake::communicator(0, 2), fake::communicator(1, 2));
    let group = one.group().unwrap();
    assert!(matches!(one.group(), Err(Error::InsideGroup { call: "ncclGroupStart" })));
    assert!(matches!(other.group(), Err(Error::InsideGroup { .. })));
    assert!(matches!(one.wait_ready("ncclSend", std::time::Duration::ZERO), Err(Error::InsideGroup { .. })));
    assert_eq!(group.end().unwrap(), Progress::Done);
    assert_eq!(other.group().unwrap().end().unwrap(), Progress::Done);
}

#[test]
fn half_an_exchange_aborts_the_communicator() {
    let communicator = fake::communicator(0, 2);
    let mut group = communicator.group().unwrap();
    group.send(source(0x1000, 1), 1, stream()).unwrap();
    drop(group);
    assert_eq!(fake::calls(), [Call::GroupStart, Call::Send(1, 0x1000, 1), Call::GroupEnd, Call::Abort]);
    assert!(matches!(communicator.group(), Err(Error::Aborted { .. })));
}
