//! How ranks that no MPI launcher started find each other: at the coordinator that their command lines name.
//!
//! Owns the order of that start, which is another than under MPI: the coordinator comes first, since it is all that ranks know of each
//! other. There they exchange addresses, and connect. Rank 0 settles the configuration before it hosts, for a job has a grid.

use std::net::{SocketAddr, ToSocketAddrs, UdpSocket};

use serde::{Deserialize, Serialize};

use super::args::WorkerArgs;
use super::coordinate::{Seat, host_at};
use super::cores::Spot;
use super::grid_of;
use super::settle::{Kept, Plan, decide};
use super::world::World;
use crate::collectives::tcp::{Door, SECRET_BYTES};
use crate::collectives::{Context, LaunchError, LauncherFacts};
use crate::coordination::{CoordinatorHandle, Identity, JobSpec, JoinToken, Session, SessionConfig};
use crate::exit::{ExitCode, Failure};
use crate::topology::Rank;

/// What ranks say instead of their configuration's hash: rank 0 tells them the configuration later, so they cannot differ.
const SETTLED_LATER: &str = "settled by rank 0";
/// The name under which ranks tell their addresses.
const MEETING: &str = "addresses";

/// What has been done at the coordinator before the others could be talked to.
pub(super) struct Lobby {
    pub(super) addr: String,
    pub(super) token: JoinToken,
    pub(super) session: Session,
    /// Rank 0's, where it hosts.
    pub(super) handle: Option<CoordinatorHandle>,
    /// What rank 0 has decided already, where it hosts.
    pub(super) plan: Option<Plan>,
    pub(super) kept: Kept,
}

/// What a rank tells of itself.
#[derive(Serialize, Deserialize)]
struct Told {
    addr: String,
    host: String,
    cpus: String,
    /// Rank 0's: what all show each other.
    secret: Option<[u8; SECRET_BYTES]>,
}

/// Joins the world of `facts` through the coordinator of `args`, which hosts it on rank 0 if it says so.
///
/// # Errors
/// Whatever [`decide`] refuses on a rank that hosts; a coordinator that is not reached, or does not take this rank; ranks that do not
/// come within `--start-timeout`, by their numbers.
pub(super) fn enter(args: &WorkerArgs, facts: LauncherFacts) -> Result<(World, Lobby), Failure> {
    let LauncherFacts { rank, size, .. } = facts;
    let timeout = args.start_timeout();
    let mut kept = Kept::default();
    let (addr, token, hosting) = match args.seat()? {
        Seat::Rank0 => return Err(LaunchError::NeedsMpi { facts }.into()),
        Seat::Rank0At { addr, port, token } if rank == 0 => (addr, token, Some(port)),
        Seat::Rank0At { addr, token, .. } | Seat::Elsewhere { addr, token } => (addr, token, None),
    };
    let (mut handle, mut plan) = (None, None);
    if let Some(port) = hosting {
        let decided = decide(args, size, &mut kept)?;
        let grid = grid_of(&decided.config, size)?;
        let spec = JobSpec {
            world_size: size as u32,
            ep_size: grid.ep() as u32,
            forming_deadline: timeout,
            ..JobSpec::default()
        };
        handle = Some(host_at(&addr, port, spec, token.clone())?);
        plan = Some(decided);
    }
    let context = Context::new(timeout);
    let abort = context.abort_handle();
    let session = Session::join(SessionConfig {
        addr: addr.clone(),
        token: token.clone(),
        identity: Identity::of_this_process(rank as u32, size as u32, SETTLED_LATER.to_owned()),
        connect_timeout: timeout,
        on_abort: Box::new(move |order| {
            abort.abort(order.culprit.map(|rank| Rank(rank as usize)), order.reason.clone());
        }),
    })?;
    let door = Door::open()?;
    let spot = Spot::here();
    let mine = Told {
        addr: reached_at(&addr, hosting.is_some(), door.port()?)?,
        host: spot.host.clone(),
        cpus: spot.cpus.clone(),
        secret: (rank == 0).then(rand::random),
    };
    let malformed = |error: &dyn std::fmt::Display| {
        Failure::new(ExitCode::Internal, format!("what ranks told at the coordinator is not understood: {error}"))
    };
    let mine = serde_json::to_vec(&mine).map_err(|error| malformed(&error))?;
    let told = session.gather(MEETING, mine, timeout)?;
    let told = told.iter().map(|bytes| serde_json::from_slice::<Told>(bytes)).collect::<Result<Vec<_>, _>>();
    let told = told.map_err(|error| malformed(&error))?;
    let secret = told.first().and_then(|told| told.secret).ok_or_else(|| malformed(&"rank 0 gave no secret"))?;
    let addrs = told.iter().map(|told| told.addr.clone()).collect::<Vec<_>>();
    let communicator = door.connect(context, rank, &addrs, secret, timeout)?;
    let spots = told.into_iter().map(|Told { host, cpus, .. }| Spot { host, cpus }).collect();
    let world = World::connected(communicator, facts, spot, spots);
    Ok((world, Lobby { addr, token, session, handle, plan, kept }))
}

/// How others reach a port of this machine: at the address by which it reaches the coordinator, or, where it hosts that itself, at the one
/// that all were given.
fn reached_at(coordinator: &str, hosts: bool, port: u16) -> Result<String, Failure> {
    let failed = |error: std::io::Error| Failure::new(ExitCode::Io, format!("--coordinator {coordinator}: {error}"));
    if hosts {
        let host = coordinator.rsplit_once(':').map_or(coordinator, |(host, _)| host);
        return Ok(format!("{host}:{port}"));
    }
    let mut last = std::io::Error::from(std::io::ErrorKind::AddrNotAvailable);
    for place in coordinator.to_socket_addrs().map_err(failed)? {
        // Nothing is sent: connecting only chooses the interface.
        let any = if place.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let chosen = UdpSocket::bind(any).and_then(|socket| socket.connect(place).and_then(|()| socket.local_addr()));
        match chosen {
            Ok(chosen) => return Ok(SocketAddr::new(chosen.ip(), port).to_string()),
            Err(error) => last = error,
        }
    }
    Err(failed(last))
}
