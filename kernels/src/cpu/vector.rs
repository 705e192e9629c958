//! Sixteen floats at a time, in whatever registers the processor has.
//!
//! Owns the vector types of the fused kernels, whose inner loops do not vectorise by themselves, and the one place where they are
//! chosen: a [`Task`] is written once over [`Vector`] and [`dispatch`] compiles and runs it for the best instruction set. It knows
//! no layouts and never splits work. Bits may differ between instruction sets, but never from run to run.

use super::simd;

/// Lanes of every vector: one AVX-512 register, two of AVX2.
pub(super) const LANES: usize = simd::LANES;

/// Sixteen lanes. The types are private to this module, so that the only values in existence are made below [`dispatch`], which
/// has looked at the processor: that is what makes these methods safe.
pub(super) trait Vector: Copy {
    /// Whether thirty-two registers hold sixteen sums and their operands.
    const MANY_REGISTERS: bool;
    /// The same number in every lane.
    fn splat(x: f32) -> Self;
    fn load(from: &[f32; LANES]) -> Self;
    /// The first lanes, as many as there are, and zeros; at most sixteen.
    fn load_first(from: &[f32]) -> Self;
    fn store(self, to: &mut [f32; LANES]);
    /// The first lanes, as many as there is room for.
    fn store_first(self, to: &mut [f32]);
    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    /// `self · factor + addend`.
    fn mul_add(self, factor: Self, addend: Self) -> Self;
    /// Lanes of `self` that are larger than those of `best`, else `best`: NaN is passed over.
    fn larger(self, best: Self) -> Self;
    /// The first `lanes` lanes of `self`, `rest` in the others.
    fn keep_first(self, lanes: usize, rest: f32) -> Self;
    /// eˣ as [`simd::exp`] promises it, for x below 88; infinity or NaN above.
    fn exp(self) -> Self;
    /// Σ over the lanes, in a fixed order.
    fn sum(self) -> f32;
    /// The largest lane.
    fn largest(self) -> f32;
    /// Lane c of vector r becomes lane r of vector c.
    fn transpose(rows: [Self; LANES]) -> [Self; LANES];
}

/// Work written over any [`Vector`].
pub(super) trait Task {
    /// Must be `#[inline(always)]`, and so must what it calls with vectors: code takes on an instruction set by being inlined.
    fn run<V: Vector>(self);
}

/// Runs a task with the widest vectors of this processor.
pub(super) fn dispatch(task: impl Task) {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the instruction set was detected on the line above.
            return unsafe { avx512::run(task) };
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: as above.
            return unsafe { run_avx2(task) };
        }
    }
    task.run::<Lanes<false>>();
}

/// Asks for the cache lines of `data` ahead of their use.
#[inline(always)]
pub(super) fn prefetch(data: &[f32]) {
    #[cfg(target_arch = "x86_64")]
    for line in data.chunks(LANES) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch is part of every x86-64 and reads nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = data;
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn run_avx2(task: impl Task) {
    task.run::<Lanes<true>>();
}

/// Lanes as an array, which the compiler puts into the registers it may use; `FUSED` where it may use fused multiply-add, which
/// elsewhere is a slow call.
#[derive(Clone, Copy)]
struct Lanes<const FUSED: bool>([f32; LANES]);

impl<const FUSED: bool> Lanes<FUSED> {
    #[inline(always)]
    fn zip(mut self, other: Self, combine: impl Fn(f32, f32) -> f32) -> Self {
        for lane in 0..LANES {
            self.0[lane] = combine(self.0[lane], other.0[lane]);
        }
        self
    }
}

impl<const FUSED: bool> Vector for Lanes<FUSED> {
    const MANY_REGISTERS: bool = false;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        Self([x; LANES])
    }

    #[inline(always)]
    fn load(from: &[f32; LANES]) -> Self {
        Self(*from)
    }

    #[inline(always)]
    fn load_first(from: &[f32]) -> Self {
        let mut lanes = [0.0; LANES];
        lanes[..from.len()].copy_from_slice(from);
        Self(lanes)
    }

    #[inline(always)]
    fn store(self, to: &mut [f32; LANES]) {
        *to = self.0;
    }

    #[inline(always)]
    fn store_first(self, to: &mut [f32]) {
        to.copy_from_slice(&self.0[..to.len()]);
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        self.zip(other, |a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        self.zip(other, |a, b| a * b)
    }

    #[inline(always)]
    fn mul_add(mut self, factor: Self, addend: Self) -> Self {
        for lane in 0..LANES {
            let (a, b, c) = (self.0[lane], factor.0[lane], addend.0[lane]);
            self.0[lane] = if FUSED { a.mul_add(b, c) } else { a * b + c };
        }
        self
    }

    #[inline(always)]
    fn larger(self, best: Self) -> Self {
        self.zip(best, |x, best| if x > best { x } else { best })
    }

    #[inline(always)]
    fn keep_first(mut self, lanes: usize, rest: f32) -> Self {
        for lane in 0..LANES {
            self.0[lane] = if lane < lanes { self.0[lane] } else { rest };
        }
        self
    }

    #[inline(always)]
    fn exp(self) -> Self {
        self.zip(self, |x, _| simd::exp(x))
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        simd::sum(&self.0)
    }

    #[inline(always)]
    fn largest(self) -> f32 {
        simd::max(&self.0)
    }

    #[inline(always)]
    fn transpose(rows: [Self; LANES]) -> [Self; LANES] {
        let mut columns = rows;
        for (r, row) in rows.iter().enumerate() {
            for (c, x) in row.0.iter().enumerate() {
                columns[c].0[r] = *x;
            }
        }
        columns
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512;

/// Runs a task with every kind of vector that this processor has.
#[cfg(test)]
pub(super) fn dispatch_to_each(task: impl Task + Copy) {
    task.run::<Lanes<false>>();
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        // SAFETY: the instruction set was detected on the line above.
        unsafe { run_avx2(task) };
    }
    dispatch(task);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Checks every method on numbers of all magnitudes.
    #[derive(Clone, Copy)]
    struct Check;

    impl Task for Check {
        #[inline(always)]
        fn run<V: Vector>(self) {
            let values = |from: usize| std::array::from_fn(|i| (((from + i) * 61 % 127) as f32 - 63.0) * 1.5);
            let lanes = |v: V| {
                let mut to = [0.0; LANES];
                v.store(&mut to);
                to
            };
            let (a, b): ([f32; LANES], [f32; LANES]) = (values(3), values(40));
            let (x, y) = (V::load(&a), V::load(&b));
            assert_eq!(lanes(x.add(y)), std::array::from_fn(|i| a[i] + b[i]));
            assert_eq!(lanes(x.sub(y)), std::array::from_fn(|i| a[i] - b[i]));
            assert_eq!(lanes(x.mul(y)), std::array::from_fn(|i| a[i] * b[i]));
            assert_eq!(lanes(x.mul_add(y, V::splat(1.0))), std::array::from_fn(|i| a[i] * b[i] + 1.0));
            assert_eq!(lanes(x.larger(y)), std::array::from_fn(|i| a[i].max(b[i])));
            assert_eq!(lanes(V::splat(f32::NAN).larger(y)), b);
            assert_eq!(x.largest(), a.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            assert_eq!(x.sum(), a.iter().sum::<f32>());
            for n in 0..=LANES {
                assert_eq!(lanes(x.keep_first(n, 7.0)), std::array::from_fn(|i| if i < n { a[i] } else { 7.0 }));
                assert_eq!(lanes(V::load_first(&a[..n])), std::array::from_fn(|i| if i < n { a[i] } else { 0.0 }));
                let mut to = b;
                x.store_first(&mut to[..n]);
                assert_eq!(to, std::array::from_fn(|i| if i < n { a[i] } else { b[i] }));
            }
            let rows: [[f32; LANES]; LANES] = std::array::from_fn(|r| values(17 * r));
            let mut vectors = [x; LANES];
            for (v, row) in vectors.iter_mut().zip(&rows) {
                *v = V::load(row);
            }
            for (c, column) in V::transpose(vectors).into_iter().enumerate() {
                assert_eq!(lanes(column), std::array::from_fn(|r| rows[r][c]));
            }
            for step in 0..200_000 {
                let x = 88.0 - step as f32 * 1e-3;
                let (got, exact) = (lanes(V::splat(x).exp())[0], f64::from(x).exp());
                if x < -87.33 {
                    assert_eq!(got, 0.0, "exp({x})");
                } else {
                    let ulp = (exact.log2().floor() - 23.0).exp2();
                    assert!((f64::from(got) - exact).abs() <= 2.0 * ulp, "exp({x}) = {got}, exactly {exact}");
                }
            }
            assert_eq!(lanes(V::splat(f32::NEG_INFINITY).exp())[0], 0.0);
            assert_eq!(lanes(V::splat(0.0).exp())[0], 1.0);
            assert!(lanes(V::splat(f32::NAN).exp())[0].is_nan());
        }
    }

    #[test]
    fn every_instruction_set_computes_the_same_methods() {
        dispatch_to_each(Check);
    }
}
