//! The worker's side of coordination: rank 0 hosts the coordinator unless another process does, every rank joins it.
//!
//! Owns the host and the session of this process, and turns the coordinator's abort into the end of every collective's wait.

use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::lobby::Lobby;
use super::run_loop::Ending;
use super::settle::from_rank_0;
use super::world::{World, host_name};
use crate::collectives::{AbortHandle, CollectiveError};
use crate::coordination::{
    ContactFile, CoordinatorHandle, ErrorReport, Identity, JobSpec, JoinToken, Operator, Order, Session, SessionConfig,
};
use crate::exit::{ExitCode, Failure};
use crate::topology::{Grid, Rank};
use crate::training::{Requests, StepError};

/// How long rank 0 waits for the coordinator to take note of a stop.
const ANNOUNCEMENT: Duration = Duration::from_secs(5);

/// How long a host waits for the others to say good-bye.
const FAREWELL: Duration = Duration::from_secs(5);

/// Who hosts the coordinator.
#[derive(Clone, Debug)]
pub(super) enum Seat {
    /// Rank 0, on a free port, with a token of its own.
    Rank0,
    /// Rank 0, on the port of an address that is known beforehand.
    Rank0At {
        /// `HOST:PORT`, by which the others reach it.
        addr: String,
        /// The port of `addr`.
        port: u16,
        /// What they must show.
        token: JoinToken,
    },
    /// Somebody else.
    Elsewhere {
        /// `HOST:PORT`.
        addr: String,
        /// What ranks must show.
        token: JoinToken,
    },
}

/// What a job is coordinated as.
pub(super) struct Coordinated<'a> {
    /// Its grid.
    pub grid: &'a Grid,
    /// Hash of its configuration.
    pub fingerprint: &'a str,
    /// Where tools look for the contact.
    pub run_dir: &'a Path,
    /// Who hosts the coordinator.
    pub seat: Seat,
    /// What it waits for all ranks to join.
    pub start_timeout: Duration,
}

/// This process's part in the coordination of its job.
pub(super) struct Coordination {
    addr: String,
    token: JoinToken,
    session: Session,
    host: Option<Host>,
}

/// What rank 0 keeps: the coordinator, unless it is hosted elsewhere, and the file that says where it is.
struct Host {
    handle: Option<CoordinatorHandle>,
    contact: PathBuf,
}

/// Where the coordinator is.
#[derive(Serialize, Deserialize)]
struct Contact {
    addr: String,
    token: String,
}

impl Coordination {
    /// Hosts on rank 0, unless somebody else does, and joins on every rank.
    pub(super) fn start(world: &World, job: Coordinated<'_>, abort: AbortHandle) -> Result<Self, Failure> {
        let spec = job.spec();
        let Coordinated { fingerprint, run_dir, seat, .. } = job;
        let (rank, size) = world.place();
        let mut host = None;
        let contact = from_rank_0(&world.communicator, || {
            let (handle, addr, token) = match seat {
                Seat::Elsewhere { addr, token } => (None, addr, token),
                Seat::Rank0At { addr, port, token } => (Some(host_at(&addr, port, spec, token.clone())?), addr, token),
                Seat::Rank0 => {
                    let one_machine = world.is_one_machine();
                    let listener = coordinator_listener(one_machine)?;
                    let handle = CoordinatorHandle::serve(listener, spec, JoinToken::generate())?;
                    let (addr, token) = (reachable_addr(one_machine, handle.addr().port()), handle.token().clone());
                    (Some(handle), addr, token)
                }
            };
            let contact = Contact { addr: addr.clone(), token: token.expose() };
            host = Some(Host::open(handle, addr, token, run_dir)?);
            Ok(contact)
        })??;
        let token = contact.token.parse::<JoinToken>().map_err(|e| Failure::new(ExitCode::Internal, e.to_string()))?;
        let session = Session::join(SessionConfig {
            addr: contact.addr.clone(),
            token: token.clone(),
            identity: Identity::of_this_process(rank as u32, size as u32, fingerprint.to_owned()),
            connect_timeout: Duration::from_secs(30),
            on_abort: Box::new(move |order| {
                abort.abort(order.culprit.map(|rank| Rank(rank as usize)), order.reason.clone());
            }),
        })?;
        Ok(Self { addr: contact.addr, token, session, host })
    }

    /// Goes on from where ranks without MPI have met.
    pub(super) fn go_on(lobby: Lobby, run_dir: &Path) -> Result<Self, Failure> {
        let Lobby { addr, token, session, handle, .. } = lobby;
        let hosts = session.rank() == 0;
        let host = hosts.then(|| Host::open(handle, addr.clone(), token.clone(), run_dir)).transpose()?;
        Ok(Self { addr, token, session, host })
    }

    /// Tells the coordinator that all ranks stop after `step`, through rank 0 and before any of them leaves: a rank that leaves
    /// early is a failure otherwise, for which the others would be aborted while they still write the checkpoint.
    pub(super) fn announce_stop(&self, step: u64) {
        if self.session.rank() != 0 {
            return;
        }
        let told = Operator::new(&self.addr, &self.token, ANNOUNCEMENT)
            .and_then(|operator| operator.drain(&format!("all ranks stop after step {step}")));
        if let Err(error) = told {
            tracing::warn!(step, %error, "the coordinator could not be told of the stop");
        }
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

    /// Tells the coordinator why this rank cannot go on, so that the others learn it. Of several reports of a job the first counts.
    pub(super) fn report(&self, step: u64, error: &StepError) {
        let report = match error {
            StepError::Collective(error) => report_of(step, error),
            // It names the step itself.
            error @ StepError::NotFinite { .. } => {
                Some(ErrorReport { message: error.to_string(), ..ErrorReport::default() })
            }
            error => Some(ErrorReport { step, message: error.to_string(), ..ErrorReport::default() }),
        };
        if let Some(report) = report {
            self.session.report_error(report);
        }
    }

    /// As [`Coordination::report`], of what is no step's error.
    pub(super) fn report_failure(&self, failure: &Failure) {
        if !failure.is_told_elsewhere() {
            self.session.report_error(ErrorReport { message: failure.to_string(), ..ErrorReport::default() });
        }
    }

    /// As [`Coordination::report`], of collectives, for a thread that may outlive the session.
    pub(super) fn reporter(&self) -> impl Fn(u64, &CollectiveError) + Send + Sync + use<> {
        let reporter = self.session.reporter();
        move |step, error| {
            if let Some(report) = report_of(step, error) {
                reporter.report_error(report);
            }
        }
    }

    /// Says good-bye, and why where that is no good end; the host waits for the others to do so.
    pub(super) fn leave(self, ending: &Result<Ending, Failure>) {
        let code = match ending {
            Ok(Ending::Done) => ExitCode::Done,
            Ok(Ending::Stopped) => ExitCode::Temporary,
            Err(failure) => {
                self.report_failure(failure);
                failure.exit_code()
            }
        };
        if let Err(error) = self.session.leave(i32::from(code.number())) {
            tracing::debug!(%error, "leaving without the coordinator");
        }
        if let Some(Host { handle, contact }) = self.host {
            if let Some(handle) = handle {
                handle.wait_over(FAREWELL);
            }
            // What is left behind says only that nobody answers there any more.
            let _ = std::fs::remove_file(contact);
        }
    }
}

impl Host {
    /// Writes down where the coordinator is.
    fn open(
        handle: Option<CoordinatorHandle>,
        addr: String,
        token: JoinToken,
        run_dir: &Path,
    ) -> Result<Self, Failure> {
        let contact = ContactFile { addr, token, pid: std::process::id() }.write(run_dir)?;
        Ok(Self { handle, contact })
    }
}

/// Hosts a coordinator on the port of an address that is known beforehand.
pub(super) fn host_at(addr: &str, port: u16, spec: JobSpec, token: JoinToken) -> Result<CoordinatorHandle, Failure> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).map_err(|error| {
        let mend = "end what listens there, or give another port";
        Failure::new(ExitCode::Io, format!("--coordinator {addr}: cannot listen on port {port}: {error}; {mend}"))
    })?;
    Ok(CoordinatorHandle::serve(listener, spec, token)?)
}

fn report_of(step: u64, error: &CollectiveError) -> Option<ErrorReport> {
    let (collective, missing) = error.blames()?;
    let missing = missing.into_iter().map(|rank| rank.0 as u32).collect();
    Some(ErrorReport { step, collective, message: error.to_string(), missing })
}

impl Coordinated<'_> {
    fn spec(&self) -> JobSpec {
        JobSpec {
            world_size: self.grid.world() as u32,
            ep_size: self.grid.ep() as u32,
            config_fingerprint: Some(self.fingerprint.to_owned()),
            forming_deadline: self.start_timeout,
            ..JobSpec::default()
        }
    }
}

/// A free port for a coordinator: of the loopback where all ranks are on this machine.
pub fn coordinator_listener(one_machine: bool) -> Result<TcpListener, Failure> {
    let ip = if one_machine { Ipv4Addr::LOCALHOST } else { Ipv4Addr::UNSPECIFIED };
    TcpListener::bind((ip, 0))
        .map_err(|error| Failure::new(ExitCode::Io, format!("cannot listen on {ip} for the coordinator: {error}")))
}

/// How ranks reach a port of this machine: by loopback where they are all here, else by its name.
pub fn reachable_addr(one_machine: bool, port: u16) -> String {
    match host_name() {
        name if !one_machine && !name.is_empty() => format!("{name}:{port}"),
        _ => format!("127.0.0.1:{port}"),
    }
}
