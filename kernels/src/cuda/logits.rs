//! `LogitOps` on CUDA: kernels of `logits.cu`.
//!
//! Owns the checks of shapes.

use super::launch::{Grid, launch};
use super::{Cuda, CudaAct, pointer, pointer_mut, pointer_or_null};
use crate::ops::check_len;
use crate::{Accumulate, Fold, LogitOps, Places, Random, RandomFactor, View, ViewMut};

/// Threads of a block, and tokens of it: each warp has one.
const THREADS: u32 = 256;
const TOKENS_PER_BLOCK: usize = 8;

impl<A: CudaAct> LogitOps for Cuda<A> {
    fn fold_logits(
        &self,
        fold: Fold,
        experts: usize,
        raw: View<'_, Self, f32>,
        tags: Option<View<'_, Self, i32>>,
        logits: ViewMut<'_, Self, f32>,
    ) {
        let tokens = fold.tokens(experts, raw.len(), logits.len(), tags.map(|tags| tags.len()));
        let grid = Grid::new(tokens.div_ceil(TOKENS_PER_BLOCK), THREADS);
        let (tokens, experts, raw, logits) = (tokens as i32, experts as i32, pointer(raw), pointer_mut(logits));
        match fold {
            Fold::Groups(groups) => {
                launch!(self, "fold_groups", grid; tokens, experts, groups as i32, raw, logits);
            }
            Fold::Routers(routers) => {
                let tags = pointer_or_null(tags);
                launch!(self, "fold_routers", grid; tokens, experts, routers as i32, raw, tags, logits);
            }
        }
    }

    fn fold_logits_grad(
        &self,
        fold: Fold,
        experts: usize,
        raw: View<'_, Self, f32>,
        tags: Option<View<'_, Self, i32>>,
        dlogits: View<'_, Self, f32>,
        draw: ViewMut<'_, Self, f32>,
    ) {
        let tokens = fold.tokens(experts, raw.len(), dlogits.len(), tags.map(|tags| tags.len()));
        check_len("draw", draw.len(), raw.len());
        let grid = Grid::new(tokens.div_ceil(TOKENS_PER_BLOCK), THREADS);
        let (tokens, experts) = (tokens as i32, experts as i32);
        let (dlogits, draw) = (pointer(dlogits), pointer_mut(draw));
        match fold {
            Fold::Groups(groups) => {
                launch!(self, "fold_groups_grad", grid; tokens, experts, groups as i32, pointer(raw), dlogits, draw);
            }
            Fold::Routers(routers) => {
                let tags = pointer_or_null(tags);
                launch!(self, "fold_routers_grad", grid; tokens, experts, routers as i32, tags, dlogits, draw);
            }
        }
    }

    fn random_factors(
        &self,
        factor: RandomFactor,
        places: Places,
        x: View<'_, Self, A>,
        y: ViewMut<'_, Self, A>,
        accumulate: Accumulate,
    ) {
        check_len("y", y.len(), x.len());
        let (dropout, size) = match factor {
            RandomFactor::Around1 { spread } => (0, spread),
            RandomFactor::Dropout { probability } => (1, probability),
        };
        let (n, add) = (x.len() as i64, i32::from(accumulate == Accumulate::Add));
        launch!(
            self, A::pick("random_factors_f32", "random_factors_bf16"), Grid::cover(x.len(), THREADS, self.facts());
            n, places.seed, places.first, dropout, size, add, pointer(x), pointer_mut(y)
        );
    }

    fn random_numbers(&self, random: Random, places: Places, y: ViewMut<'_, Self, f32>) {
        let (normal, deviation) = match random {
            Random::Uniform => (0, 1.0),
            Random::Normal { deviation } => (1, deviation),
        };
        let n = y.len();
        launch!(
            self, "random_numbers", Grid::cover(n, THREADS, self.facts());
            n as i64, places.seed, places.first, normal, deviation, pointer_mut(y)
        );
    }
}
