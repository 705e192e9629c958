//! What whole-run tests share: small runs inside one process, and the programs as processes.
//!
//! Owns no assertion about training; it starts things, waits with a limit and reads what they left.

#![allow(dead_code, reason = "each test binary uses its part")]
#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in test functions, but not in their helpers")]

pub(crate) mod gates;
pub(crate) mod mpirun;
pub(crate) mod process;
pub(crate) mod training;
