//! Communicators on a library of fakes: readiness, deadlines, abort and the end.

use super::*;
use crate::fake::{self, Call};

const SOON: Duration = Duration::from_millis(5);

#[test]
fn connecting_waits_until_the_communicator_is_ready() {
    fake::answer(3, 0);
    let communicator = fake::communicator(1, 4);
    assert_eq!((communicator.rank(), communicator.size()), (1, 4));
    drop(communicator);
    assert_eq!(fake::calls(), [Call::Finalize, Call::Destroy, Call::Finalize, Call::Destroy]);
}

#[test]
fn a_rank_that_does_not_come_ends_the_connecting() {
    fake::answer(usize::MAX, 0);
    let id = UniqueId::from([0; UniqueId::BYTES]);
    let result = Communicator::connect(&fake::nccl(), &CommConfig::default(), &id, (0, 2), SOON);
    let error = result.unwrap_err();
    assert!(matches!(error, Error::Deadline { call: "ncclCommInitRankConfig", .. }) && error.is_peers(), "{error}");
    assert_eq!(fake::calls(), [Call::Connect, Call::Abort]);
}

#[test]
fn a_refusal_is_told_in_nccls_words() {
    fake::answer(1, 5);
    let id = UniqueId::from([0; UniqueId::BYTES]);
    let result = Communicator::connect(&fake::nccl(), &CommConfig::default(), &id, (0, 2), SOON);
    let text = "ncclCommInitRankConfig: text of the code (ncclInvalidUsage): last words";
    assert_eq!(result.unwrap_err().to_string(), text);
}

#[test]
fn ranks_beyond_the_size_are_refused_before_nccl_is_asked() {
    let id = UniqueId::from([0; UniqueId::BYTES]);
    let result = Communicator::connect(&fake::nccl(), &CommConfig::default(), &id, (2, 2), SOON);
    assert_eq!(result.unwrap_err().to_string(), "ncclCommInitRankConfig: there is no rank 2 among 2");
    assert_eq!(fake::calls(), []);
}

#[test]
fn a_split_gives_a_communicator_to_those_with_a_color() {
    let world = fake::communicator(0, 2);
    fake::answer(2, 0);
    let child = world.split(Some(3), 1, &CommConfig::default(), SOON).unwrap();
    assert_eq!(fake::calls(), [Call::Split(3), Call::Split(0)]);
    assert_eq!(child.as_ref().map(Communicator::size), Some(2));
    assert!(world.split(None, 0, &CommConfig::default(), SOON).unwrap().is_none());
    let error = world.split(Some(usize::MAX), 0, &CommConfig::default(), SOON).unwrap_err();
    assert!(matches!(error, Error::TooLarge { what: "the color", .. }), "{error}");
    assert_eq!(fake::calls(), [Call::Split(NO_COLOR)]);
}

#[test]
fn an_abort_from_another_thread_ends_a_wait() {
    let communicator = fake::communicator(0, 2);
    fake::answer(usize::MAX, 0);
    let abort = communicator.abort_handle();
    let aborting = std::thread::spawn(move || {
        std::thread::sleep(SOON);
        abort.abort().unwrap();
        abort.abort().unwrap();
        fake::calls()
    });
    let error = communicator.wait_ready("ncclAllReduce", Duration::from_secs(60)).unwrap_err();
    assert!(matches!(error, Error::Aborted { call: "ncclAllReduce" }), "{error}");
    assert!(communicator.is_aborted());
    assert_eq!(aborting.join().unwrap(), [Call::Abort, Call::Abort]);
    drop(communicator);
    assert_eq!(fake::calls(), []);
}

#[test]
fn an_abort_ends_a_call_that_waits_for_a_peer() {
    let communicator = fake::communicator(0, 2);
    let ended = fake::hang_group_end();
    let abort = communicator.abort_handle();
    let aborting = std::thread::spawn(move || {
        std::thread::sleep(SOON);
        fake::aborts_end(ended);
        abort.abort().unwrap();
        fake::calls()
    });
    let group = communicator.group().unwrap();
    assert_eq!(group.end().unwrap(), Progress::Done);
    assert_eq!(aborting.join().unwrap(), [Call::Abort, Call::Abort]);
    assert!(communicator.is_aborted());
}

#[test]
fn an_abort_after_the_end_does_nothing() {
    let communicator = fake::communicator(0, 2);
    let abort = communicator.abort_handle();
    drop(communicator);
    abort.abort().unwrap();
    assert_eq!(fake::calls(), [Call::Finalize, Call::Destroy, Call::Finalize, Call::Destroy]);
}

#[test]
fn a_failed_communicator_is_aborted_at_its_end() {
    let communicator = fake::communicator(0, 2);
    fake::answer(0, 6);
    let error = communicator.state("ncclAllReduce").unwrap_err();
    assert!(matches!(error, Error::Nccl { call: "ncclAllReduce", code: Code::REMOTE, .. }) && error.is_peers());
    drop(communicator);
    assert_eq!(fake::calls(), [Call::Finalize, Call::Abort, Call::Finalize, Call::Abort]);
}
