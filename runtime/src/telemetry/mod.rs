//! What people and programs see of a run: logs, metrics, progress.
//!
//! Owns formats and where they are written: readings to stdout and `metrics.jsonl`, logs to stderr. It measures nothing itself and
//! decides nothing.

mod console;
mod logs;
mod metrics;
mod progress;
mod task;

pub use console::Console;
pub use logs::{LogError, LogFile, init_logs, log_filter};
pub use metrics::{MetricsError, MetricsFile, StageMs, StepMetrics};
pub use progress::{Progress, ProgressMode, ProgressSpec};
pub use task::TaskProgress;
