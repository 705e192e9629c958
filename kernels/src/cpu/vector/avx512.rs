//! Vectors as AVX-512 registers.
//!
//! Owns the intrinsics, and nothing else does. Every method here runs below [`run`], whose caller has detected AVX-512F.

use std::arch::x86_64::*;

use super::{LANES, Task, Vector};

#[target_feature(enable = "avx512f")]
pub(super) fn run(task: impl Task) {
    task.run::<Avx512>();
}

#[derive(Clone, Copy)]
struct Avx512(__m512);

/// A mask of the first `lanes` lanes.
#[inline(always)]
fn first(lanes: usize) -> __mmask16 {
    ((1_u32 << lanes.min(LANES)) - 1) as __mmask16
}

/// Lane numbers of a butterfly of `step`: which lanes of two rows (the second from 16 on) make up the new first row, and the new
/// second one.
const fn butterfly(step: usize) -> [[i32; LANES]; 2] {
    let mut index = [[0; LANES]; 2];
    let mut lane = 0;
    while lane < LANES {
        let upper = lane & step != 0;
        index[0][lane] = if upper { LANES + lane - step } else { lane } as i32;
        index[1][lane] = if upper { LANES + lane } else { lane + step } as i32;
        lane += 1;
    }
    index
}

const BUTTERFLIES: [[[i32; LANES]; 2]; 4] = [butterfly(8), butterfly(4), butterfly(2), butterfly(1)];

// SAFETY (of every block below): the type is private to `vector` and instantiated by `run` alone, so AVX-512F is there; loads and
// stores go through references to sixteen floats or are masked to the length of a slice.
#[allow(clippy::undocumented_unsafe_blocks)] // one reason for all, above
impl Vector for Avx512 {
    const MANY_REGISTERS: bool = true;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        Self(unsafe { _mm512_set1_ps(x) })
    }

    #[inline(always)]
    fn load(from: &[f32; LANES]) -> Self {
        Self(unsafe { _mm512_loadu_ps(from.as_ptr()) })
    }

    #[inline(always)]
    fn load_first(from: &[f32]) -> Self {
        Self(unsafe { _mm512_maskz_loadu_ps(first(from.len()), from.as_ptr()) })
    }

    #[inline(always)]
    fn store(self, to: &mut [f32; LANES]) {
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), self.0) };
    }

    #[inline(always)]
    fn store_first(self, to: &mut [f32]) {
        unsafe { _mm512_mask_storeu_ps(to.as_mut_ptr(), first(to.len()), self.0) };
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Self(unsafe { _mm512_add_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        Self(unsafe { _mm512_sub_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        Self(unsafe { _mm512_mul_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        Self(unsafe { _mm512_fmadd_ps(self.0, factor.0, addend.0) })
    }

    #[inline(always)]
    fn larger(self, best: Self) -> Self {
        // The second operand is the result where either is NaN.
        Self(unsafe { _mm512_max_ps(self.0, best.0) })
    }

    #[inline(always)]
    fn keep_first(self, lanes: usize, rest: f32) -> Self {
        Self(unsafe { _mm512_mask_blend_ps(first(lanes), _mm512_set1_ps(rest), self.0) })
    }

    /// The reduction and polynomial of `simd::exp`, with fused steps and 2ⁿ by the instruction for it.
    #[inline(always)]
    fn exp(self) -> Self {
        const ROUND: f32 = 12_582_912.0;
        let x = self.0;
        unsafe {
            // NaN is not less, so it stays.
            let visible = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, _mm512_set1_ps(-87.33));
            let shifted = _mm512_fmadd_ps(x, _mm512_set1_ps(std::f32::consts::LOG2_E), _mm512_set1_ps(ROUND));
            let n = _mm512_sub_ps(shifted, _mm512_set1_ps(ROUND));
            let r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693_359_4), x);
            let r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.121_944_4e-4), r);
            let mut q = _mm512_set1_ps(1.989_108e-4);
            for c in [1.393_373_1e-3, 8.333_31e-3, 4.166_646_3e-2, 1.666_666_7e-1, 0.5, 1.0, 1.0] {
                q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(c));
            }
            Self(_mm512_maskz_scalef_ps(visible, q, n))
        }
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        unsafe { _mm512_reduce_add_ps(self.0) }
    }

    #[inline(always)]
    fn largest(self) -> f32 {
        unsafe { _mm512_reduce_max_ps(self.0) }
    }

    #[inline(always)]
    fn transpose(mut rows: [Self; LANES]) -> [Self; LANES] {
        for (stage, index) in BUTTERFLIES.iter().enumerate() {
            let step = (LANES / 2) >> stage;
            unsafe {
                let index =
                    [_mm512_loadu_si512(index[0].as_ptr().cast()), _mm512_loadu_si512(index[1].as_ptr().cast())];
                for r in 0..LANES {
                    if r & step == 0 {
                        let (a, b) = (rows[r].0, rows[r + step].0);
                        rows[r].0 = _mm512_permutex2var_ps(a, index[0], b);
                        rows[r + step].0 = _mm512_permutex2var_ps(a, index[1], b);
                    }
                }
            }
        }
        rows
    }
}
