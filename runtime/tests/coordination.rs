//! The coordinator and its sessions over real gRPC on the loopback interface, with ephemeral ports and short leases.

// Helpers of tests may stop at the first surprise like the tests themselves.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::net::TcpListener;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use moe_proto::v1;
use moe_proto::v1::coordinator_client::CoordinatorClient;
use moe_runtime::coordination::{
    Abort, AbortKind, Activity, CoordinationError, CoordinatorHandle, Epoch, ErrorReport, Identity, JobSpec, JoinToken,
    Operator, Order, Phase, Progress, RankState, Session, SessionConfig,
};
use moe_runtime::exit::Classified;
use tonic::transport::Channel;
use tonic::{Code, Request};

/// Longer than anything here takes; reached only by a test that fails.
const PATIENCE: Duration = Duration::from_secs(20);
const LEASE: Duration = Duration::from_millis(600);

fn spec(world_size: u32) -> JobSpec {
    JobSpec {
        epoch: Epoch(3),
        world_size,
        ep_size: if world_size.is_multiple_of(2) { 2 } else { 1 },
        lease: LEASE,
        heartbeat: LEASE / 6,
        forming_deadline: Duration::from_secs(10),
        ..JobSpec::default()
    }
}

/// A lease that a busy machine does not run out of: for tests in which nobody is meant to be lost.
fn patient(world_size: u32) -> JobSpec {
    JobSpec { lease: PATIENCE, heartbeat: Duration::from_millis(40), ..spec(world_size) }
}

fn host(spec: JobSpec) -> CoordinatorHandle {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    CoordinatorHandle::serve(listener, spec, JoinToken::generate()).unwrap()
}

fn config(host: &CoordinatorHandle, rank: u32, world_size: u32) -> (SessionConfig, mpsc::Receiver<Abort>) {
    let (sender, aborts) = mpsc::channel();
    let config = SessionConfig {
        addr: host.addr().to_string(),
        token: host.token().clone(),
        identity: Identity::of_this_process(rank, world_size, "cafe".to_owned()),
        connect_timeout: PATIENCE,
        on_abort: Box::new(move |abort| sender.send(abort).unwrap()),
    };
    (config, aborts)
}

/// All ranks of a job, joined.
fn join_all(host: &CoordinatorHandle, world_size: u32) -> Vec<(Session, mpsc::Receiver<Abort>)> {
    let joining: Vec<_> = (0..world_size)
        .map(|rank| {
            let (config, aborts) = config(host, rank, world_size);
            thread::spawn(move || (Session::join(config).unwrap(), aborts))
        })
        .collect();
    joining.into_iter().map(|thread| thread.join().unwrap()).collect()
}

fn operator(host: &CoordinatorHandle) -> Operator {
    Operator::new(&host.addr().to_string(), host.token(), PATIENCE).unwrap()
}

/// Asks until the answer is there.
fn eventually<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(started.elapsed() < PATIENCE, "{what} did not happen");
        thread::yield_now();
    }
}

/// One call with a stub that shows `token`.
fn with_stub<T>(
    host: &CoordinatorHandle,
    token: Option<&str>,
    call: impl AsyncFnOnce(CoordinatorClient<tonic::service::interceptor::InterceptedService<Channel, Show>>) -> T,
) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let channel = channel(host).await;
        call(CoordinatorClient::with_interceptor(channel, Show(token.map(str::to_owned)))).await
    })
}

async fn channel(host: &CoordinatorHandle) -> Channel {
    Channel::from_shared(format!("http://{}", host.addr())).unwrap().connect().await.unwrap()
}

#[derive(Clone)]
struct Show(Option<String>);

impl tonic::service::Interceptor for Show {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, tonic::Status> {
        if let Some(text) = &self.0 {
            request.metadata_mut().insert("authorization", text.parse().unwrap());
        }
        Ok(request)
    }
}

#[test]
fn four_ranks_meet_work_and_part() {
    let host = host(patient(4));
    let sessions = join_all(&host, 4);
    for (rank, (session, _)) in (0..).zip(&sessions) {
        assert_eq!((session.rank(), session.epoch()), (rank, Epoch(3)));
        assert_eq!(session.peers().iter().map(|peer| peer.rank).collect::<Vec<_>>(), [0, 1, 2, 3]);
        assert!(session.peers().iter().all(|peer| peer.pid == std::process::id()));
        assert_eq!(session.grid().expert_groups, [[0, 1], [2, 3]]);
        assert_eq!(session.grid().replica_groups, [[0, 2], [1, 3]]);
    }
    thread::scope(|scope| {
        for (session, _) in &sessions {
            scope.spawn(|| {
                for _meeting in 0..3 {
                    session.barrier("epoch-end", PATIENCE).unwrap();
                }
            });
        }
    });
    for (session, _) in &sessions {
        let loss = 4.5 - f64::from(session.rank());
        for step in 0..=7 + u64::from(session.rank()) {
            session.progress(Progress { step, loss, tokens_per_s: 1e5, activity: Activity::Training });
        }
    }
    let operator = operator(&host);
    let status = eventually("progress of all ranks", || {
        let status = operator.status().unwrap();
        let arrived = |(rank, entry): (u64, &moe_runtime::coordination::RankStatus)| {
            entry.progress.is_some_and(|progress| progress.step == 7 + rank)
        };
        (0..).zip(&status.ranks).all(arrived).then_some(status)
    });
    assert_eq!((status.epoch, status.phase, status.step), (Epoch(3), Phase::Running, 7));
    assert_eq!((status.ep_size, status.dp_size), (2, 2));
    assert_eq!(status.ranks[1].progress.unwrap().loss, 3.5);
    assert!(status.ranks.iter().all(|rank| rank.state == RankState::Live && rank.heartbeat_age_ms.is_some()));

    for (session, _) in sessions {
        session.leave(0).unwrap();
    }
    assert!(host.wait_over(PATIENCE));
    let status = operator.status().unwrap();
    assert_eq!(status.phase, Phase::Done);
    assert!(status.ranks.iter().all(|rank| rank.state == RankState::Left && rank.exit_code == Some(0)));
}

#[test]
fn drains_and_checkpoint_orders_reach_every_rank_once() {
    let host = host(patient(2));
    let sessions = join_all(&host, 2);
    let operator = operator(&host);
    assert_eq!(operator.checkpoint("test").unwrap(), 1);
    assert_eq!(operator.drain("maintenance").unwrap(), Phase::Draining);
    assert_eq!(operator.drain("again").unwrap(), Phase::Draining);
    let refused = operator.checkpoint("too late").unwrap_err();
    assert!(refused.to_string().contains("not possible while the job is draining"), "{refused}");
    for (session, aborts) in sessions {
        let mut orders = Vec::new();
        eventually("both orders", || {
            orders.extend(session.commands());
            (orders.len() == 2).then_some(())
        });
        assert_eq!(orders[0], Order::Checkpoint { order: 1, reason: "test".to_owned() });
        assert_eq!(orders[1], Order::Drain { reason: "maintenance".to_owned() });
        assert_eq!(session.commands(), []);
        session.leave(75).unwrap();
        assert!(aborts.try_recv().is_err(), "a drain is no abort");
    }
    assert_eq!(host.status().phase, Phase::Done);
}

#[test]
fn a_session_that_vanishes_is_named_to_the_others_when_its_lease_has_run_out() {
    let host = host(spec(3));
    let mut sessions = join_all(&host, 3);
    let vanished = Instant::now();
    drop(sessions.remove(1));
    for (session, aborts) in sessions {
        let abort = aborts.recv_timeout(PATIENCE).unwrap();
        assert!(vanished.elapsed() >= LEASE / 2, "the others were told before its lease ran out");
        assert_eq!((abort.culprit, abort.kind, abort.epoch), (Some(1), AbortKind::Ordered, Epoch(3)));
        assert!(abort.reason.contains("rank 1") && abort.reason.contains("did not come back"), "{abort}");
        assert_eq!(session.aborted(), Some(abort.clone()));
        let error = session.barrier("after", PATIENCE).unwrap_err();
        assert_eq!(error.exit_code().number(), 75);
        session.leave(75).unwrap();
        assert!(aborts.recv_timeout(PATIENCE).is_err(), "told once, then the callback is gone");
    }
    assert!(host.wait_over(PATIENCE));
    assert_eq!(host.status().culprit, Some(1));
}

#[test]
fn a_report_breaks_the_barriers_of_the_others_and_names_the_missing_rank() {
    let host = host(patient(3));
    let sessions = join_all(&host, 3);
    let (reporter, other) = (&sessions[0].0, &sessions[1].0);
    thread::scope(|scope| {
        let waiting = scope.spawn(|| other.barrier("never", PATIENCE).unwrap_err());
        reporter.report_error(ErrorReport {
            step: 12,
            collective: "combine of layer 3".to_owned(),
            message: "no data for 5 s".to_owned(),
            missing: vec![2],
        });
        let error = waiting.join().unwrap();
        assert!(matches!(&error, CoordinationError::Aborted(abort) if abort.culprit == Some(2)), "{error}");
        assert!(error.to_string().contains("combine of layer 3, step 12: no data for 5 s"), "{error}");
    });
    for (_, aborts) in &sessions {
        assert_eq!(aborts.recv_timeout(PATIENCE).unwrap().culprit, Some(2));
    }
}

#[test]
fn a_barrier_that_is_not_met_names_the_missing_ranks_and_may_be_tried_again() {
    let host = host(patient(2));
    let sessions = join_all(&host, 2);
    let error = sessions[0].0.barrier("save", Duration::from_millis(50)).unwrap_err();
    assert!(matches!(&error, CoordinationError::BarrierTimeout { missing, .. } if *missing == [1]), "{error}");
    assert_eq!(error.exit_code().number(), 75);
    thread::scope(|scope| {
        for (session, _) in &sessions {
            scope.spawn(|| session.barrier("save", PATIENCE).unwrap());
        }
    });
}

#[test]
fn what_ranks_bring_to_a_meeting_all_of_them_get() {
    let host = host(patient(3));
    let sessions = join_all(&host, 3);
    for round in 1..=2_u8 {
        thread::scope(|scope| {
            for (session, _) in &sessions {
                scope.spawn(move || {
                    let rank = session.rank() as u8;
                    let brought = session.gather("ids", vec![rank; usize::from(rank * round)], PATIENCE).unwrap();
                    assert_eq!(brought, [vec![], vec![1; usize::from(round)], vec![2; usize::from(2 * round)]]);
                });
            }
        });
    }
}

#[test]
fn a_lost_coordinator_is_told_through_the_callback_after_the_lease() {
    let host = host(spec(1));
    let (session, aborts) = join_all(&host, 1).remove(0);
    let lost = Instant::now();
    host.shutdown();
    let abort = aborts.recv_timeout(PATIENCE).unwrap();
    assert!(lost.elapsed() >= LEASE / 2, "gave up without trying");
    assert_eq!(abort.kind, AbortKind::CoordinatorLost);
    let error = session.barrier("after", PATIENCE).unwrap_err();
    assert!(matches!(error, CoordinationError::Aborted(_)), "{error}");
    assert!(matches!(session.leave(75), Err(CoordinationError::LeaveUnconfirmed { .. })));
}

#[test]
fn a_job_that_does_not_form_ends_with_the_names_of_who_never_came() {
    let host = host(JobSpec { forming_deadline: Duration::from_millis(100), ..patient(3) });
    let (config, _aborts) = config(&host, 1, 3);
    let error = Session::join(config).unwrap_err();
    assert_eq!(error.exit_code().number(), 75);
    assert!(error.to_string().contains("2 of 3 ranks did not arrive within 100ms: [0, 2]"), "{error}");
}

#[test]
fn workers_that_do_not_fit_end_with_the_exit_code_for_it() {
    let host = host(JobSpec { config_fingerprint: Some("cafe".to_owned()), ..patient(2) });
    type Change = fn(&mut SessionConfig);
    let table: [(Change, u8, &str); 6] = [
        (|config| config.token = JoinToken::generate(), 77, "refused the join token"),
        (|config| config.identity.world_size = 5, 64, "launched for 5 ranks, but this job has 2"),
        (|config| config.identity.rank = 2, 64, "rank 2 does not exist in a job of 2 ranks"),
        (
            |config| config.identity.config_fingerprint = "beef".to_owned(),
            64,
            "configuration beef, but this job runs cafe",
        ),
        (|config| config.addr = "nowhere".to_owned(), 64, "not an address"),
        (
            |config| {
                // A port that was free a moment ago; nothing answers.
                config.addr = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
                config.connect_timeout = Duration::from_millis(50);
            },
            75,
            "no coordinator answered",
        ),
    ];
    for (change, exit_code, message) in table {
        let (mut config, _aborts) = config(&host, 0, 2);
        change(&mut config);
        let error = Session::join(config).unwrap_err();
        assert_eq!(error.exit_code().number(), exit_code, "{error}");
        assert!(error.to_string().contains(message), "{error}");
    }
    assert!(host.status().ranks.iter().all(|rank| rank.state == RankState::Awaited), "none of them took a rank");
}

#[test]
fn every_call_needs_the_token_but_health() {
    let host = host(patient(1));
    for token in [None, Some("Bearer 00112233445566778899aabbccddeeff"), Some("hello")] {
        with_stub(&host, token, async |mut stub| {
            let answers = [
                stub.register(v1::RegisterRequest::default()).await.map(drop),
                stub.session(tokio_stream::iter([v1::WorkerMessage::default()])).await.map(drop),
                stub.barrier(v1::BarrierRequest::default()).await.map(drop),
                stub.request_drain(v1::DrainRequest::default()).await.map(drop),
                stub.request_checkpoint(v1::CheckpointRequest::default()).await.map(drop),
                stub.status(v1::StatusRequest::default()).await.map(drop),
            ];
            for answer in answers {
                assert_eq!(answer.unwrap_err().code(), Code::Unauthenticated, "{token:?}");
            }
        });
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        use tonic_health::pb::health_check_response::ServingStatus;
        let mut health = tonic_health::pb::health_client::HealthClient::new(channel(&host).await);
        let service = "moe.coordination.v1.Coordinator".to_owned();
        let request = tonic_health::pb::HealthCheckRequest { service };
        assert_eq!(health.check(request).await.unwrap().into_inner().status(), ServingStatus::Serving);
    });
}

#[test]
fn a_stale_epoch_is_refused_with_both_epochs() {
    let host = host(patient(1));
    let token = format!("Bearer {}", host.token().expose());
    with_stub(&host, Some(&token), async |mut stub| {
        let attach = v1::WorkerMessage {
            epoch: 2,
            rank: 0,
            body: Some(v1::worker_message::Body::Attach(v1::Attach::default())),
        };
        let answers = [
            stub.register(v1::RegisterRequest { epoch: 2, ..Default::default() }).await.map(drop),
            stub.session(tokio_stream::iter([attach])).await.map(drop),
            stub.barrier(v1::BarrierRequest { epoch: 2, ..Default::default() }).await.map(drop),
            stub.request_drain(v1::DrainRequest { epoch: 2, ..Default::default() }).await.map(drop),
            stub.request_checkpoint(v1::CheckpointRequest { epoch: 2, ..Default::default() }).await.map(drop),
            stub.status(v1::StatusRequest { epoch: 2 }).await.map(drop),
        ];
        for answer in answers {
            let status = answer.unwrap_err();
            assert_eq!(status.code(), Code::FailedPrecondition);
            assert!(status.message().contains("epoch 2, but this job is in epoch 3"), "{status}");
        }
    });
    assert_eq!(host.status().phase, Phase::Forming);
}

#[test]
fn reflection_lists_the_service() {
    use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
    use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
    use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
    let host = host(patient(1));
    let token = format!("Bearer {}", host.token().expose());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let ask = |token: Option<String>| {
            let host = &host;
            async move {
                let mut client = ServerReflectionClient::with_interceptor(channel(host).await, Show(token));
                let message_request = Some(MessageRequest::ListServices(String::new()));
                let request =
                    tonic_reflection::pb::v1::ServerReflectionRequest { message_request, ..Default::default() };
                let mut answers = client.server_reflection_info(tokio_stream::iter([request])).await?.into_inner();
                Ok::<_, tonic::Status>(answers.message().await?.unwrap().message_response.unwrap())
            }
        };
        assert_eq!(ask(None).await.unwrap_err().code(), Code::Unauthenticated);
        let MessageResponse::ListServicesResponse(list) = ask(Some(token)).await.unwrap() else { panic!("no list") };
        assert!(list.service.iter().any(|service| service.name == "moe.coordination.v1.Coordinator"), "{list:?}");
    });
}
