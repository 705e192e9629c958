//! `moe-launch status`: how a running job stands.
//!
//! Owns finding the coordinator (by run directory or by address) and showing what it says, as a table or as JSON. It changes
//! nothing in the job.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use moe_runtime::coordination::{
    BadToken, ContactError, ContactFile, CoordinationError, JobStatus, JoinToken, Operator, RankStatus,
};
use moe_runtime::exit::{Classified, ExitCode};
use moe_runtime::telemetry::{MetricsError, MetricsFile};
use moe_runtime::worker::RunDir;

/// Which running job is meant.
#[derive(Debug, clap::Args)]
pub(crate) struct JobArgs {
    /// Directory of the run; its coordinator.json says where the coordinator is
    #[arg(long, value_name = "DIR", required_unless_present = "coordinator", conflicts_with = "coordinator")]
    run_dir: Option<PathBuf>,
    /// Address of the coordinator; the join token is taken from MOE_JOIN_TOKEN
    #[arg(long, value_name = "HOST:PORT", requires = "join_token")]
    coordinator: Option<String>,
    /// Join token of the job; better given by the variable, which other users of the machine do not see
    #[arg(long, value_name = "HEX", env = "MOE_JOIN_TOKEN", hide_env_values = true)]
    join_token: Option<String>,
    /// Seconds to wait for an answer
    #[arg(long, value_name = "SECONDS", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    timeout: u32,
}

/// Options of `moe-launch status`.
#[derive(Debug, clap::Args)]
pub(crate) struct StatusArgs {
    #[command(flatten)]
    job: JobArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Why a job could not be asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StatusError {
    /// The coordinator could not be found or did not answer.
    #[error(transparent)]
    Coordination(#[from] CoordinationError),
    /// The options name no coordinator; clap refuses that before.
    #[error("name the job: --run-dir DIR, or --coordinator HOST:PORT with MOE_JOIN_TOKEN")]
    NoJob,
    /// Nothing runs in the run directory.
    #[error(transparent)]
    Ended(#[from] Ended),
    /// What the run has left cannot be read.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// The output could not be written.
    #[error("cannot write the answer: {0}")]
    Output(#[from] io::Error),
}

/// A run that no job works on.
#[derive(Debug, thiserror::Error, serde::Serialize)]
#[error("{}", self.told())]
pub(crate) struct Ended {
    /// Always "ended", where the status of a running job has its phase.
    phase: &'static str,
    run_dir: PathBuf,
    /// The last step done; None: there was none.
    step: Option<u64>,
    /// What it was to reach.
    steps: Option<u64>,
    metrics: PathBuf,
}

impl Ended {
    /// The run in `dir`, if there is one.
    fn of(dir: &Path) -> Result<Option<Self>, MetricsError> {
        let run = RunDir::at(dir);
        if !run.config().exists() {
            return Ok(None);
        }
        let (step, metrics) = (MetricsFile::last_step(&run.metrics())?, run.metrics());
        // A configuration of another version is no reason to say nothing.
        let steps = run.saved_config().ok().flatten().map(|config| config.train.steps);
        Ok(Some(Self { phase: "ended", run_dir: dir.to_owned(), step, steps, metrics }))
    }

    /// Whether nothing is left to do.
    fn is_done(&self) -> bool {
        self.step.is_some() && self.step == self.steps
    }

    fn told(&self) -> String {
        let dir = self.run_dir.display();
        let Some(step) = self.step else {
            return format!("{dir}: no job runs here, and none has done a step; what it said is in {dir}/logs");
        };
        let of = self.steps.map_or_else(String::new, |steps| format!(" of {steps}"));
        let metrics = self.metrics.display();
        format!(
            "{dir}: the job has ended, after step {step}{of}; {metrics} has a line of JSON a step: tail -n 1 {metrics}"
        )
    }
}

impl From<ContactError> for StatusError {
    fn from(error: ContactError) -> Self {
        Self::Coordination(error.into())
    }
}

impl From<BadToken> for StatusError {
    fn from(error: BadToken) -> Self {
        Self::Coordination(error.into())
    }
}

impl Classified for StatusError {
    fn exit_code(&self) -> ExitCode {
        match self {
            Self::Coordination(error) => error.exit_code(),
            Self::NoJob => ExitCode::Usage,
            // As where nobody answers: probes ask until a job runs, and this one can be started again.
            Self::Ended(_) => ExitCode::Temporary,
            Self::Metrics(error) => error.exit_code(),
            Self::Output(_) => ExitCode::Io,
        }
    }
}

impl JobArgs {
    /// A client of the job's coordinator.
    pub(crate) fn operator(&self) -> Result<Operator, StatusError> {
        let (addr, token) = match self {
            Self { run_dir: Some(dir), .. } => {
                let contact = match ContactFile::read(dir) {
                    Err(missing @ ContactError::Missing { .. }) => {
                        return Err(Ended::of(dir)?.map_or_else(|| missing.into(), StatusError::from));
                    }
                    read => read?,
                };
                (contact.addr, contact.token)
            }
            Self { coordinator: Some(addr), join_token: Some(token), .. } => {
                (addr.clone(), token.parse::<JoinToken>()?)
            }
            _ => return Err(StatusError::NoJob),
        };
        Ok(Operator::new(&addr, &token, Duration::from_secs(self.timeout.into()))?)
    }
}

/// Asks the coordinator and writes its answer to `out`.
pub(crate) fn run(args: &StatusArgs, out: &mut impl Write) -> Result<(), StatusError> {
    let operator = args.job.operator();
    if let Err(StatusError::Ended(ended)) = &operator {
        if args.json {
            write_json(ended, out)?;
        }
        if ended.is_done() {
            if !args.json {
                writeln!(out, "{ended}")?;
            }
            return Ok(out.flush()?);
        }
    }
    let status = operator?.status()?;
    if args.json {
        write_json(&status, out)?
    } else {
        write_table(&status, out)?
    }
    Ok(out.flush()?)
}

fn write_json(answer: &impl serde::Serialize, out: &mut impl Write) -> io::Result<()> {
    serde_json::to_writer(&mut *out, answer)?;
    writeln!(out)
}

const HEAD: [&str; 8] = ["rank", "host", "pid", "state", "step", "loss", "tokens/s", "last heartbeat"];
/// Columns of numbers, which line up on the right.
const NUMBERS: [usize; 5] = [0, 2, 4, 5, 6];

fn write_table(status: &JobStatus, out: &mut impl Write) -> io::Result<()> {
    let JobStatus { epoch, phase, step, ep_size, dp_size, reason, .. } = status;
    writeln!(out, "{phase} · step {step} · epoch {epoch} · EP {ep_size} × DP {dp_size}")?;
    writeln!(out, "{reason}")?;
    if let Some(rank) = status.culprit {
        writeln!(out, "culprit: rank {rank}")?;
    }
    writeln!(out)?;
    let rows: Vec<[String; 8]> =
        std::iter::once(HEAD.map(str::to_owned)).chain(status.ranks.iter().map(cells)).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; 8] = std::array::from_fn(width);
    for row in &rows {
        let padded = row.iter().enumerate().map(|(column, cell)| {
            let width = widths[column];
            if NUMBERS.contains(&column) { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
        });
        writeln!(out, "{}", padded.collect::<Vec<_>>().join("  ").trim_end())?;
    }
    Ok(())
}

fn cells(rank: &RankStatus) -> [String; 8] {
    let known = |text: String| if text.is_empty() { "-".to_owned() } else { text };
    let state = match (rank.exit_code, rank.progress) {
        (Some(code), _) => format!("left with {code}"),
        (None, Some(progress)) => format!("{}, {}", rank.state.name(), progress.activity.name()),
        (None, None) => rank.state.name().to_owned(),
    };
    let of_progress = |show: fn(&moe_runtime::coordination::Progress) -> String| {
        rank.progress.as_ref().map_or_else(|| "-".to_owned(), show)
    };
    [
        rank.rank.to_string(),
        known(rank.host.clone()),
        if rank.pid == 0 { "-".to_owned() } else { rank.pid.to_string() },
        state,
        of_progress(|progress| progress.step.to_string()),
        of_progress(|progress| format!("{:.4}", progress.loss)),
        of_progress(|progress| format!("{:.0}", progress.tokens_per_s)),
        rank.heartbeat_age_ms.map_or_else(|| "-".to_owned(), age),
    ]
}

/// Milliseconds in words: tenths of a second while that matters.
fn age(age_ms: u64) -> String {
    match age_ms / 1000 {
        0..60 => format!("{}.{} s ago", age_ms / 1000, age_ms % 1000 / 100),
        seconds @ 60..3600 => format!("{} min {} s ago", seconds / 60, seconds % 60),
        seconds => format!("{} h {} min ago", seconds / 3600, seconds % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use moe_runtime::coordination::{
        Activity, CoordinatorHandle, Epoch, Identity, JobSpec, Phase, Progress, RankState, Session, SessionConfig,
    };

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        status: StatusArgs,
    }

    fn parse(args: &[&str]) -> Result<StatusArgs, clap::Error> {
        Ok(Cli::try_parse_from(std::iter::once(&"status").chain(args))?.status)
    }

    fn rank(rank: u32, state: RankState) -> RankStatus {
        RankStatus {
            rank,
            state,
            host: "node07".to_owned(),
            pid: 4242,
            version: "0.1.0".to_owned(),
            progress: None,
            heartbeat_age_ms: Some(1234),
            exit_code: None,
        }
    }

    #[test]
    fn the_table_has_one_line_a_rank_and_says_why_the_job_stands_where_it_does() {
        let progress = Progress { step: 41, loss: 2.73464, tokens_per_s: 123_456.7, activity: Activity::Training };
        let awaited = RankStatus { host: String::new(), pid: 0, heartbeat_age_ms: None, ..rank(3, RankState::Awaited) };
        let status = JobStatus {
            epoch: Epoch(2),
            phase: Phase::Aborted,
            reason: "nothing was heard of rank 1".to_owned(),
            culprit: Some(1),
            step: 0,
            ep_size: 2,
            dp_size: 2,
            ranks: vec![
                RankStatus { progress: Some(progress), ..rank(0, RankState::Live) },
                RankStatus { heartbeat_age_ms: Some(3_725_000), ..rank(1, RankState::Lost) },
                RankStatus { exit_code: Some(75), heartbeat_age_ms: Some(61_000), ..rank(2, RankState::Left) },
                awaited,
            ],
        };
        let mut out = Vec::new();
        write_table(&status, &mut out).unwrap();
        let expected = "\
aborted · step 0 · epoch 2 · EP 2 × DP 2
nothing was heard of rank 1
culprit: rank 1

rank  host     pid  state           step    loss  tokens/s  last heartbeat
   0  node07  4242  live, training    41  2.7346    123457  1.2 s ago
   1  node07  4242  lost               -       -         -  1 h 2 min ago
   2  node07  4242  left with 75       -       -         -  1 min 1 s ago
   3  -          -  awaited            -       -         -  -
";
        assert_eq!(String::from_utf8(out).unwrap(), expected);
    }

    #[test]
    fn a_run_directory_is_enough_to_find_a_running_job() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let token = JoinToken::generate();
        let spec = JobSpec { world_size: 1, ..JobSpec::default() };
        let host = CoordinatorHandle::serve(listener, spec, token.clone()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let addr = host.addr().to_string();
        ContactFile { addr: addr.clone(), token: token.clone(), pid: std::process::id() }.write(dir.path()).unwrap();
        let session = Session::join(SessionConfig {
            addr: addr.clone(),
            token: token.clone(),
            identity: Identity::of_this_process(0, 1, String::new()),
            connect_timeout: Duration::from_secs(20),
            on_abort: Box::new(|abort| panic!("{abort}")),
        })
        .unwrap();

        let dir = dir.path().to_str().unwrap();
        for args in
            [vec!["--run-dir", dir, "--json"], vec!["--coordinator", &addr, "--join-token", &token.expose(), "--json"]]
        {
            let mut out = Vec::new();
            run(&parse(&args).unwrap(), &mut out).unwrap();
            let object: serde_json::Value = serde_json::from_slice(&out).unwrap();
            assert_eq!(object["phase"], "running");
            assert_eq!(object["ranks"][0]["pid"], std::process::id());
            assert_eq!(object["ranks"][0]["state"], "live");
        }
        session.leave(0).unwrap();
        let mut out = Vec::new();
        run(&parse(&["--run-dir", dir]).unwrap(), &mut out).unwrap();
        let table = String::from_utf8(out).unwrap();
        assert!(table.starts_with("done · step 0 · epoch 1") && table.contains("left with 0"), "{table}");
    }

    #[test]
    fn wrong_use_and_absent_jobs_have_their_messages_and_exit_codes() {
        assert!(parse(&[]).is_err() && parse(&["--run-dir", "a", "--coordinator", "b:1"]).is_err());
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().to_str().unwrap();
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let token = JoinToken::generate().expose();
        let table: [(&[&str], u8, &str); 4] = [
            (&["--run-dir", dir], 74, "coordinator.json does not exist"),
            (&["--coordinator", "nowhere", "--join-token", &token], 64, "give HOST:PORT"),
            (&["--coordinator", "a:1", "--join-token", "xyz"], 64, "32 hexadecimal digits"),
            (&["--coordinator", &port, "--join-token", &token], 75, "no coordinator answered"),
        ];
        for (args, exit_code, message) in table {
            let error = run(&parse(args).unwrap(), &mut Vec::new()).unwrap_err();
            assert_eq!(error.exit_code().number(), exit_code, "{error}");
            assert!(error.to_string().contains(message), "{error}");
        }
    }
}
