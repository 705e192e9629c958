//! Rows stored straight into other ranks' memory, where devices reach each other.
//!
//! Owns the vocabulary. Who has such a way says so by [`super::Communicator::landing`]; nobody has to.

use std::ops::Range;

use moe_kernels::{Backend, Leaving, View};

use super::CollectiveError;

/// Buffers of a berth are whole multiples of this, in bytes: a device shares its memory in such pages.
pub const BERTH_PAGE: usize = 2 << 20;

/// Buffers of this rank that the others of a group store into: rows, and what may come with each.
pub struct Berth<'a, B: Backend> {
    /// `[·, width]`.
    pub rows: View<'a, B, B::Act>,
    /// `[·, k]`.
    pub ids: Option<View<'a, B, i32>>,
    /// `[·, k]`.
    pub weights: Option<View<'a, B, f32>>,
}

/// Rows that leave for the berths of a group.
pub struct Push<'a, B: Backend> {
    /// Elements of a row.
    pub width: usize,
    /// What they are. The berths have room for what goes along.
    pub what: Leaving<'a, B>,
    /// `[W]`: the rows for each rank, one after another from 0 to N.
    pub rows: &'a [Range<usize>],
    /// `[W]`: the row of each rank's berth where the first of them lands. It and those behind it are in the berth, which the caller sees
    /// to.
    pub at: &'a [usize],
    /// Whether something else computes meanwhile, and should keep the device.
    pub beside: bool,
}

/// The berths of all ranks of a group, as one of them reaches them. Buffers must stay where they are while there is a landing. Who moves
/// them gives it up first, on all ranks; at the end of a job each rank goes on its own, since memory stays while another process has it
/// mapped.
pub trait Landing<B: Backend>: Send + Sync {
    /// A collective: stores this rank's rows, and has come to its event when all ranks' rows for this one are there. A rank whose berth
    /// is still read by what was issued before must not be pushed to: the caller's own messages have to order that.
    ///
    /// Panics where rows would land beyond a berth.
    ///
    /// # Errors
    /// As any collective's.
    fn push(&self, queue: &B, push: &Push<'_, B>) -> Result<B::Event, CollectiveError>;

    /// The same stores, all into this rank's own berth and without a word to others: what a push costs but for the way.
    ///
    /// # Errors
    /// The device's.
    fn rehearse(&self, queue: &B, push: &Push<'_, B>) -> Result<B::Event, CollectiveError>;
}
