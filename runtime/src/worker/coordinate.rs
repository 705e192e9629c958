//! The worker's side of coordination: rank 0 hosts the coordinator or is told where it is, every rank joins it.
//!
//! Owns the host and the session of this process, and turns the coordinator's abort into the end of every collective's wait.

use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::settle::from_rank_0;
use super::world::World;
use crate::collectives::{AbortHandle, CollectiveError};
use crate::coordination::{
    BadToken, ContactFile, CoordinatorHandle, ErrorReport, Identity, JobSpec, JoinToken, Order, Session, SessionConfig,
};
use crate::exit::{ExitCode, Failure};
use crate::topology::{Grid, Rank};
use crate::training::Requests;

/// How long a host waits for the others to say good-bye.
const FAREWELL: Duration = Duration::from_secs(5);

/// The variable that holds the join token of a coordinator that is named on the command line.
const TOKEN_VARIABLE: &str = "MOE_JOIN_TOKEN";

/// Where the coordinator is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Seat {
    /// With rank 0.
    Rank0 {
        /// Its port; 0: one that is free.
        port: u16,
        /// `HOST:PORT` by which the others reach it; none: found out.
        addr: Option<String>,
    },
    /// Hosted by somebody else.
    Elsewhere {
        /// `HOST:PORT`.
        addr: String,
    },
}

impl Seat {
    /// The join token: the one that is `given` in the environment, or a new one where rank 0 hosts and none is.
    fn token(&self, given: Option<String>) -> Result<JoinToken, Failure> {
        match (given, self) {
            (Some(text), _) => text
                .parse()
                .map_err(|error: BadToken| Failure::new(ExitCode::Usage, format!("{TOKEN_VARIABLE}: {error}"))),
            (None, Self::Rank0 { .. }) => Ok(JoinToken::generate()),
            (None, Self::Elsewhere { addr }) => {
                let message = format!("--coordinator {addr}: its join token is missing; set {TOKEN_VARIABLE}");
                Err(Failure::new(ExitCode::Usage, message))
            }
        }
    }
}

/// This process's part in the coordination of its job.
pub(super) struct Coordination {
    session: Session,
    host: Option<CoordinatorHandle>,
}

/// Where the coordinator is.
#[derive(Serialize, Deserialize)]
struct Contact {
    addr: String,
    token: String,
}

impl Coordination {
    /// Hosts on rank 0, unless somebody else does, and joins on every rank.
    pub(super) fn start(
        world: &World,
        seat: &Seat,
        grid: &Grid,
        fingerprint: &str,
        run_dir: &Path,
        abort: AbortHandle,
    ) -> Result<Self, Failure> {
        let (rank, size) = world.place();
        let mut host = None;
        let contact = from_rank_0(&world.communicator, || {
            let token = seat.token(std::env::var(TOKEN_VARIABLE).ok())?;
            let addr = match seat {
                Seat::Elsewhere { addr } => addr.clone(),
                Seat::Rank0 { port, addr } => {
                    // A port that is named is meant to be reached from elsewhere.
                    let one_machine = addr.is_none() && world.is_one_machine();
                    let ip = if one_machine { Ipv4Addr::LOCALHOST } else { Ipv4Addr::UNSPECIFIED };
                    let handle = host.insert(serve((ip, *port), grid, fingerprint, token.clone())?);
                    addr.clone().unwrap_or_else(|| reachable(world, handle.addr().port()))
                }
            };
            let contact = Contact { addr: addr.clone(), token: token.expose() };
            ContactFile { addr, token, pid: std::process::id() }.write(run_dir)?;
            Ok(contact)
        })??;
        let token = contact.token.parse::<JoinToken>().map_err(|e| Failure::new(ExitCode::Internal, e.to_string()))?;
        let session = Session::join(SessionConfig {
            addr: contact.addr,
            token,
            identity: Identity::of_this_process(rank as u32, size as u32, fingerprint.to_owned()),
            connect_timeout: Duration::from_secs(30),
            on_abort: Box::new(move |order| {
                abort.abort(order.culprit.map(|rank| Rank(rank as usize)), order.reason.clone());
            }),
        })?;
        Ok(Self { session, host })
    }

    /// What the coordinator asks of this rank.
    pub(super) fn requests(&self) -> Requests {
        let mut requests = Requests::default();
        for order in self.session.commands() {
            match order {
                Order::Drain { .. } => requests.stop = true,
                Order::Checkpoint { .. } => requests.checkpoint = true,
            }
        }
        requests
    }

    /// The session.
    pub(super) fn session(&self) -> &Session {
        &self.session
    }

    /// Tells the coordinator of a collective that failed, so that the others learn who is missing.
    pub(super) fn report(&self, step: u64, error: &CollectiveError) {
        let (collective, missing) = match error {
            CollectiveError::Timeout { collective, missing, .. } => (*collective, missing.clone()),
            CollectiveError::PeerLost { collective, rank, .. } => (*collective, vec![*rank]),
            // Who aborted this rank knows already.
            CollectiveError::Aborted { .. } => return,
            _ => ("", Vec::new()),
        };
        self.session.report_error(ErrorReport {
            step,
            collective: collective.to_owned(),
            message: error.to_string(),
            missing: missing.into_iter().map(|rank| rank.0 as u32).collect(),
        });
    }

    /// Says good-bye; the host waits for the others to do so.
    pub(super) fn leave(self, code: ExitCode) {
        if let Err(error) = self.session.leave(i32::from(code.number())) {
            tracing::debug!(%error, "leaving without the coordinator");
        }
        if let Some(host) = self.host {
            host.wait_over(FAREWELL);
        }
    }
}

fn serve(
    (ip, port): (Ipv4Addr, u16),
    grid: &Grid,
    fingerprint: &str,
    token: JoinToken,
) -> Result<CoordinatorHandle, Failure> {
    let listener = TcpListener::bind((ip, port)).map_err(|error| {
        Failure::new(ExitCode::Io, format!("cannot listen on {ip}:{port} for the coordinator: {error}"))
    })?;
    let spec = JobSpec {
        world_size: grid.world() as u32,
        ep_size: grid.ep() as u32,
        config_fingerprint: Some(fingerprint.to_owned()),
        ..JobSpec::default()
    };
    Ok(CoordinatorHandle::serve(listener, spec, token)?)
}

/// How other ranks reach a port of this machine: by loopback where they are all here, else by its name.
fn reachable(world: &World, port: u16) -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    match name.trim() {
        name if !world.is_one_machine() && !name.is_empty() => format!("{name}:{port}"),
        _ => format!("127.0.0.1:{port}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_coordinator_elsewhere_needs_its_token_and_a_bad_one_is_refused() {
        let (mine, elsewhere) = (Seat::Rank0 { port: 0, addr: None }, Seat::Elsewhere { addr: "head:7400".into() });
        let text = "00112233445566778899aabbccddeeff";
        for seat in [&mine, &elsewhere] {
            assert_eq!(seat.token(Some(text.into())).unwrap().expose(), text);
            let failure = seat.token(Some("short".into())).unwrap_err();
            assert!(failure.to_string().starts_with("MOE_JOIN_TOKEN: the join token must be 32"), "{failure}");
        }
        assert!(mine.token(None).is_ok());
        let failure = elsewhere.token(None).unwrap_err();
        assert_eq!(failure.exit_code(), ExitCode::Usage);
        assert!(failure.to_string().contains("head:7400") && failure.to_string().contains("set MOE_JOIN_TOKEN"));
    }
}
