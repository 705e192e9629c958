//! Collectives over TCP: the results of the other transports, and ranks that fail or do not belong.
#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in test functions, but not in their helpers")]

use std::io::Write;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use moe_kernels::Cpu;
use moe_runtime::collectives::tcp::{ConnectError, Door, SECRET_BYTES};
use moe_runtime::collectives::{CollectiveError, Context, HostCommunicator};
use moe_runtime::topology::Rank;

mod collective_bodies;

const SECRET: [u8; SECRET_BYTES] = [9; SECRET_BYTES];
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs `body` on `ranks` threads that are connected over the loopback.
fn connected<T: Send>(ranks: usize, body: impl Fn(HostCommunicator) -> T + Sync) -> Vec<T> {
    let doors = (0..ranks).map(|_| Door::open().unwrap()).collect::<Vec<_>>();
    let addrs = doors.iter().map(|door| format!("127.0.0.1:{}", door.port().unwrap())).collect::<Vec<_>>();
    std::thread::scope(|scope| {
        let threads = doors.into_iter().enumerate().map(|(rank, door)| {
            let (addrs, body) = (&addrs, &body);
            scope.spawn(move || body(door.connect(Context::new(PATIENCE), rank, addrs, SECRET, PATIENCE).unwrap()))
        });
        let threads = threads.collect::<Vec<_>>();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn every_collective_at_every_size() {
    for ranks in [1, 2, 3, 5] {
        connected(ranks, |world| collective_bodies::every_collective(&Cpu, &world));
    }
}

#[test]
fn a_rank_that_leaves_is_a_lost_peer_at_once() {
    let results = connected(2, |world| if world.rank() == 1 { Ok(()) } else { world.barrier() });
    let lost = &results[0];
    assert!(matches!(lost, Err(CollectiveError::PeerLost { rank: Rank(1), .. })), "{lost:?}");
    assert!(lost.as_ref().unwrap_err().to_string().ends_with("lost rank 1: its process has ended"), "{lost:?}");
}

#[test]
fn what_was_sent_before_leaving_still_arrives() {
    let results = connected(2, |world| {
        let mut bytes = vec![world.rank() as u8; 10_000_000];
        world.broadcast_bytes(&mut bytes, 0).map(|()| bytes[9_999_999])
    });
    assert!(matches!(results[..], [Ok(0), Ok(0)]), "{results:?}");
}

#[test]
fn who_does_not_know_the_secret_is_not_let_in() {
    let door = Door::open().unwrap();
    let addr = format!("127.0.0.1:{}", door.port().unwrap());
    let mut stranger = TcpStream::connect(&addr).unwrap();
    stranger.write_all(&[1; SECRET_BYTES]).unwrap();
    stranger.write_all(&1_u32.to_le_bytes()).unwrap();
    let began = Instant::now();
    let addrs = [addr.clone(), addr];
    let refused = door.connect(Context::default(), 0, &addrs, SECRET, Duration::from_millis(300)).unwrap_err();
    assert!(matches!(&refused, ConnectError::Missing { missing, .. } if *missing == [1]), "{refused}");
    assert!(began.elapsed() < Duration::from_secs(10));
}
