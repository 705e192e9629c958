//! What people and programs see of a run: logs, metrics, progress.
//!
//! Owns formats and where they are written: readings to stdout, `metrics.jsonl` and `balance.jsonl`, logs to stderr. It measures nothing itself and
//! decides nothing.

mod balance;
mod console;
mod logs;
mod metrics;
mod progress;
mod task;
mod tensorboard;
mod trace;

pub use balance::{BalanceReading, LayerBalance};
pub use console::Console;
pub use logs::{LogError, LogFile, init_logs, log_filter};
pub use metrics::{MetricsError, MetricsFile, StageMs, StepMetrics};
pub use progress::{Progress, ProgressMode, ProgressSpec};
pub use task::TaskProgress;
pub use tensorboard::EventFile;
pub use trace::{TraceError, TraceFile, merge_traces};
