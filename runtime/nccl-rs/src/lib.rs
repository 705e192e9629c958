//! NCCL, typed: communicators whose every wait has a deadline, and that another thread can abort.
//!
//! Owns the library's symbols, handles and errors. It allocates no device memory but NCCL's own, creates no stream and knows no
//! element but its type: addresses and streams come in, and whoever makes a [`DeviceSlice`] or a [`Stream`] of them promises
//! that they are what they say.
//!
//! # How it is loaded
//!
//! [`Nccl::load`] opens `libnccl.so.2`, or `libnccl.so`, and looks up all symbols at once: what is missing is an error before
//! anything is called, and a program that is built with this crate starts where no NCCL is.
//!
//! The types are those of `cudarc::nccl::sys`; its functions are not called. They look for `libnccl.so` only, which
//! packages without headers do not install, and offer no way to name another file; a missing library or symbol is a panic at the
//! first use; and they return NCCL's codes as a Rust enumeration, where a code of a later NCCL would be undefined
//! behaviour. A table of our own has none of this, and tests of the logic above it put functions of their own in it.
//!
//! # How it is used
//!
//! ```no_run
//! use std::time::Duration;
//! use nccl_rs::{CommConfig, Communicator, DeviceSliceMut, Nccl, Progress, ReduceOp, Stream, UniqueId};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let nccl = Nccl::load()?;
//! // One process makes the id and gives its bytes to the others.
//! let id = nccl.unique_id()?;
//! let id = UniqueId::try_from(&id.as_bytes()[..])?;
//! // Each process, with its GPU current on this thread:
//! let deadline = Duration::from_secs(60);
//! let world = Communicator::connect(&nccl, &CommConfig::default(), &id, (0, 1), deadline)?;
//! // `address` and `stream` are those of device memory and of a stream that the caller keeps alive.
//! # let (address, stream) = (0, std::ptr::null_mut());
//! // SAFETY: as the constructors ask.
//! let (mut numbers, stream) = unsafe { (DeviceSliceMut::<f32>::new(address, 1024), Stream::from_raw(stream)) };
//! let mut group = world.group()?;
//! group.all_reduce(&mut numbers, ReduceOp::Sum, stream)?;
//! if group.end()? == Progress::InProgress {
//!     world.wait_ready("ncclAllReduce", deadline)?;
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # Rules that NCCL has
//!
//! - All ranks of a communicator issue the same collectives in the same order with agreeing sizes.
//! - A group is on its stream when it has ended, unless the variable `NCCL_COMM_BLOCKING` asks otherwise ([`Progress::InProgress`]): then
//!   nothing else is issued to the communicator or its stream until [`Communicator::wait_ready`] has returned.
//! - An aborted collective leaves its stream as if it had finished, with partial data: after a synchronisation ask
//!   [`Communicator::is_aborted`] before the data are trusted.

mod communicator;
mod config;
mod error;
#[cfg(test)]
mod fake;
mod group;
mod id;
mod library;
mod memory;
mod types;

pub use communicator::{AbortHandle, Communicator, Progress};
pub use config::CommConfig;
pub use error::{Code, Error, LoadError};
pub use group::Group;
pub use id::UniqueId;
pub use library::{Nccl, Version};
pub use memory::{Memory, Registration};
pub use types::{DeviceSlice, DeviceSliceMut, Element, ReduceOp, Stream};
