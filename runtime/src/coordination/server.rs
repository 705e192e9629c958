//! Hosting the coordinator: its thread, its listener, its clock.
//!
//! Owns starting and stopping. Whoever hosts it chooses the address, draws the token and hands both on.

use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use moe_proto::v1::coordinator_server::CoordinatorServer;
use tokio::sync::oneshot;
use tokio::time::MissedTickBehavior;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Server;
use tonic::transport::server::{Router, TcpIncoming};

use super::error::CoordinationError;
use super::event::Event;
use super::host::Shared;
use super::job::JobSpec;
use super::service::{RequireToken, Service};
use super::status::JobStatus;
use super::token::JoinToken;

/// How long open calls may finish once the coordinator stops.
const STOP_GRACE: Duration = Duration::from_millis(500);
/// How long dropping the handle waits for the thread, more than the grace.
const STOP_WAIT: Duration = Duration::from_secs(2);

/// A running coordinator. Dropping it stops the coordinator, in bounded time.
#[derive(Debug)]
pub struct CoordinatorHandle {
    addr: SocketAddr,
    token: JoinToken,
    shared: Arc<Shared>,
    stop: Option<oneshot::Sender<()>>,
    stopped: mpsc::Receiver<()>,
    thread: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Shared")
    }
}

impl CoordinatorHandle {
    /// Serves `spec` on `listener` from an own thread, to whoever shows `token`. Health answers without it, since the probes of
    /// Kubernetes cannot carry one; reflection needs it.
    ///
    /// Errors: a job that cannot be ([`CoordinationError::Job`]), a listener or thread the system refuses ([`CoordinationError::Start`]).
    pub fn serve(listener: TcpListener, spec: JobSpec, token: JoinToken) -> Result<Self, CoordinationError> {
        spec.validate()?;
        let start = |reason: String| CoordinationError::Start { what: "the coordinator".to_owned(), reason };
        let addr = listener.local_addr().map_err(|error| start(error.to_string()))?;
        listener.set_nonblocking(true).map_err(|error| start(error.to_string()))?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| start(error.to_string()))?;
        let listener = {
            let _inside = runtime.enter();
            tokio::net::TcpListener::from_std(listener).map_err(|error| start(error.to_string()))?
        };
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        let lease = spec.lease;
        let shared = Arc::new(Shared::new(spec));
        let (stop, stopping) = oneshot::channel();
        let (done, stopped) = mpsc::channel();
        let (service, guard) = (Service(Arc::clone(&shared)), RequireToken(token.clone()));
        let thread = std::thread::Builder::new().name("coordinator".to_owned()).spawn(move || {
            runtime.block_on(serve_until(stopping, incoming, service, guard, lease));
            // Not waiting for tasks that read from workers which are gone.
            runtime.shutdown_background();
            let _ = done.send(());
        });
        let thread = thread.map_err(|error| start(error.to_string()))?;
        Ok(Self { addr, token, shared, stop: Some(stop), stopped, thread: Some(thread) })
    }

    /// The address it listens at, with the port that was given or chosen. The IP may be the unspecified one: what workers on
    /// other machines should call is the host's matter.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// The token workers must show.
    pub fn token(&self) -> &JoinToken {
        &self.token
    }

    /// What the coordinator knows now.
    pub fn status(&self) -> JobStatus {
        let host = self.shared.lock();
        host.state().status(host.now())
    }

    /// Whether the job was asked to stop, by an operator or through one of its ranks.
    pub fn is_asked_to_stop(&self) -> bool {
        self.shared.lock().state().is_asked_to_stop()
    }

    /// Waits until the job is over (done, or aborted with every rank gone), at most `timeout`. Returns whether it is. A rank
    /// that hosts the coordinator calls this after its own [`super::Session::leave`], so that the others can say good-bye.
    pub fn wait_over(&self, timeout: Duration) -> bool {
        self.shared.wait_over(timeout)
    }

    /// Stops the coordinator: streams end, waiting barriers fail, the port is free when this returns.
    pub fn shutdown(self) {}
}

impl Drop for CoordinatorHandle {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            // Fails only when the thread has ended already.
            let _ = stop.send(());
        }
        let ended = !matches!(self.stopped.recv_timeout(STOP_WAIT), Err(mpsc::RecvTimeoutError::Timeout));
        if let Some(thread) = self.thread.take().filter(|_| ended) {
            // A panic was printed by its thread; there is no more to say about it here.
            let _ = thread.join();
        }
    }
}

async fn serve_until(
    stopping: oneshot::Receiver<()>,
    incoming: TcpIncoming,
    service: Service,
    guard: RequireToken,
    lease: Duration,
) {
    let shared = Arc::clone(&service.0);
    let ticks = tokio::spawn(tick(Arc::clone(&shared), lease));
    let (begin, begun) = oneshot::channel::<()>();
    let router = router(service, guard, lease).await;
    let serving = router.serve_with_incoming_shutdown(incoming, async {
        let _ = begun.await;
    });
    tokio::pin!(serving);
    tokio::select! {
        result = &mut serving => if let Err(error) = result {
            tracing::error!(%error, "the coordinator stopped serving");
        },
        _ = stopping => {
            shared.lock().close_all();
            drop(begin);
            // What does not finish in time is cut off.
            let _ = tokio::time::timeout(STOP_GRACE, serving).await;
        }
    }
    ticks.abort();
}

async fn router(service: Service, guard: RequireToken, lease: Duration) -> Router {
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<CoordinatorServer<Service>>().await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(moe_proto::FILE_DESCRIPTOR_SET)
        .build_v1()
        .map(|service| InterceptedService::new(service, guard.clone()));
    if let Err(error) = &reflection {
        // The job does not need it.
        tracing::warn!(%error, "reflection is not available");
    }
    Server::builder()
        .http2_keepalive_interval(Some(lease / 2))
        .http2_keepalive_timeout(Some(lease / 2))
        .add_service(CoordinatorServer::with_interceptor(service, guard))
        .add_service(health_service)
        .add_optional_service(reflection.ok())
}

/// Time passes for the state machine: often enough that a lease is found expired within a sixteenth of it.
async fn tick(shared: Arc<Shared>, lease: Duration) {
    let pace = (lease / 16).clamp(Duration::from_millis(2), Duration::from_millis(500));
    let mut interval = tokio::time::interval(pace);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        // A tick is never refused.
        let _ = shared.apply(Event::Tick);
    }
}
