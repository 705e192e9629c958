//! Rows that leave for other ranks' memory, as whoever stores them there is told of them.
//!
//! Owns no operation: only GPUs reach each other's memory, and how they do it is theirs (`cuda`).

use crate::{Device, View};

/// What rows are made of on their way out.
pub enum Leaving<'a, D: Device> {
    /// Rows as they are, with the numbers that go along.
    Rows {
        /// `[N]`: which row of `from` each is; None: they are as they lie.
        index: Option<View<'a, D, i32>>,
        /// `[·, width]`.
        from: View<'a, D, D::Act>,
        /// Numbers that go with a row.
        k: usize,
        /// `[N, k]`.
        ids: Option<View<'a, D, i32>>,
        /// `[N, k]`.
        weights: Option<View<'a, D, f32>>,
    },
    /// Row i is `Σ_j weights[i, j] · y[slots[i, j]]`, as [`crate::ExpertOps::weighted_reduce`] has it.
    Sums {
        /// Slots of a row.
        k: usize,
        /// `[N, k]`, −1: none.
        slots: View<'a, D, i32>,
        /// `[N, k]`; None: all 1.
        weights: Option<View<'a, D, f32>>,
        /// `[·, width]`.
        y: View<'a, D, D::Act>,
        /// `[N, k]`: what goes with a row.
        along: Option<View<'a, D, f32>>,
    },
}

impl<D: Device> Clone for Leaving<'_, D> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<D: Device> Copy for Leaving<'_, D> {}

impl<D: Device> Leaving<'_, D> {
    /// k.
    pub fn numbers(&self) -> usize {
        match self {
            Self::Rows { k, .. } | Self::Sums { k, .. } => *k,
        }
    }

    /// Bytes of a row of `width` elements with what goes along.
    pub fn row_bytes(&self, width: usize) -> usize {
        use crate::Element;
        let along = match self {
            Self::Rows { k, ids, weights, .. } => {
                k * (i32::BYTES * usize::from(ids.is_some()) + f32::BYTES * usize::from(weights.is_some()))
            }
            Self::Sums { k, along, .. } => k * f32::BYTES * usize::from(along.is_some()),
        };
        width * D::Act::BYTES + along
    }
}
