//! What becomes of a router's input and its logits before the gate: random numbers and factors, and rows that fold into one.
//!
//! Randomness is a hash of a seed and a place, so that it is the same on every device (normals up to rounding) and under any layout, and a
//! backward pass finds it again.

use super::Accumulate;
use crate::{Device, View, ViewMut};

/// How the numbers that a router computes for a token become one logit an expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fold {
    /// Two levels of softmax (hierarchical mixtures, Jordan and Jacobs 1994): a row is the logits of this many groups, then those of the E
    /// experts, group after group; a logit is ln(group's probability · expert's probability within its group).
    Groups(usize),
    /// One of this many routers (MMoE, Ma et al. 2018): a row is the E logits of each, of which the token's tag picks one.
    Routers(usize),
}

impl Fold {
    /// Numbers in a row for `experts` experts.
    pub fn width(self, experts: usize) -> usize {
        match self {
            Self::Groups(groups) => groups + experts,
            Self::Routers(routers) => routers * experts,
        }
    }

    /// The tokens of `raw`, after a check of the lengths.
    pub(crate) fn tokens(self, experts: usize, raw: usize, logits: usize, tags: Option<usize>) -> usize {
        let tokens = logits / experts;
        assert_eq!(raw, tokens * self.width(experts), "raw logits of {tokens} tokens, {experts} experts and {self:?}");
        match self {
            Self::Groups(groups) => assert!(experts.is_multiple_of(groups), "{groups} groups of {experts} experts"),
            Self::Routers(_) => assert_eq!(tags, Some(tokens), "a tag a token"),
        }
        tokens
    }
}

/// Independent random numbers that a tensor's elements are multiplied with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RandomFactor {
    /// Uniform in [1 − spread, 1 + spread) (Switch's input jitter).
    Around1 {
        /// Half the width.
        spread: f32,
    },
    /// 0 with this probability, 1 / (1 − probability) otherwise (dropout, Srivastava et al. 2014).
    Dropout {
        /// Of 0.
        probability: f32,
    },
}

impl RandomFactor {
    /// The factor that belongs to a uniform number in [0, 1).
    pub(crate) fn of(self, uniform: f32) -> f32 {
        match self {
            Self::Around1 { spread } => 1.0 - spread + 2.0 * spread * uniform,
            Self::Dropout { probability } if uniform < probability => 0.0,
            Self::Dropout { probability } => 1.0 / (1.0 - probability),
        }
    }
}

/// Independent random numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Random {
    /// Uniform in [0, 1).
    Uniform,
    /// Normal with mean 0.
    Normal {
        /// Its standard deviation.
        deviation: f32,
    },
}

impl Random {
    /// The number of the element `index`.
    pub(crate) fn of(self, places: Places, index: usize) -> f32 {
        match self {
            Self::Uniform => places.uniform(index),
            Self::Normal { deviation } => deviation * places.normal(index),
        }
    }
}

/// Which random numbers: those of the places `first..` of the stream `seed`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Places {
    /// The stream.
    pub seed: u64,
    /// The place of the first element.
    pub first: u64,
}

impl Places {
    /// A uniform number in [0, 1) of 24 bits for the element `index`: splitmix64 (Steele, Lea and Flood 2014) of its place.
    pub fn uniform(self, index: usize) -> f32 {
        const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
        let place = self.first.wrapping_add(index as u64).wrapping_add(1);
        let mut x = self.seed.wrapping_add(place.wrapping_mul(STEP));
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ (x >> 31)) >> 40) as f32 * (1.0 / (1u64 << 24) as f32)
    }

    /// A standard normal for the element `index` (Box and Muller 1958), from two uniform numbers of its own.
    fn normal(self, index: usize) -> f32 {
        let pairs = Self { first: self.first.wrapping_mul(2), ..self };
        let (radius, angle) = (pairs.uniform(2 * index), pairs.uniform(2 * index + 1));
        (-2.0 * (1.0 - radius).ln()).sqrt() * (std::f32::consts::TAU * angle).cos()
    }
}

/// Operations between a router's input and its gate.
pub trait LogitOps: Device {
    /// `logits[T, E]` (overwritten) of `raw[T, width]`; `tags[T]`, below the number of routers, for [`Fold::Routers`].
    fn fold_logits(
        &self,
        fold: Fold,
        experts: usize,
        raw: View<'_, Self, f32>,
        tags: Option<View<'_, Self, i32>>,
        logits: ViewMut<'_, Self, f32>,
    );
    /// Backward of [`LogitOps::fold_logits`]: `draw[T, width]` (overwritten) from `dlogits[T, E]`.
    fn fold_logits_grad(
        &self,
        fold: Fold,
        experts: usize,
        raw: View<'_, Self, f32>,
        tags: Option<View<'_, Self, i32>>,
        dlogits: View<'_, Self, f32>,
        draw: ViewMut<'_, Self, f32>,
    );
    /// `y[n] (+)= x[n] · r[n]`, r being `factor` of the numbers at `places`. It is its own backward pass.
    fn random_factors(
        &self,
        factor: RandomFactor,
        places: Places,
        x: View<'_, Self, Self::Act>,
        y: ViewMut<'_, Self, Self::Act>,
        accumulate: Accumulate,
    );
    /// `y[n]` (overwritten): the numbers at `places`.
    fn random_numbers(&self, random: Random, places: Places, y: ViewMut<'_, Self, f32>);
}
