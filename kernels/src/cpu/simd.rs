//! Vector math: the exponential and row reductions that the op families are built from.
//!
//! Owns functions of one number and of one row, written so that they vectorise wherever they are inlined: the callers carry
//! `#[multiversion]`, which compiles them once for each instruction set and picks at run time. Nothing here multiplies and adds
//! in one rounding, so every instruction set gives the same bits. It never splits work and never looks at shapes.

/// Independent sums in a reduction: one AVX-512 register of f32. Fixed, so that the order of additions is too.
pub(super) const LANES: usize = 16;

/// eˣ within 2 units in the last place; 0 below −87.33, infinity above 88.73, NaN for NaN. What would be subnormal is zero, since
/// producing a subnormal costs a processor more than the rest of the function.
///
/// x = n·ln 2 + r with |r| ≤ ln 2 / 2; eʳ by a polynomial interpolated at Chebyshev nodes; 2ⁿ in two factors, since it may lie
/// above the range.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // Adding and taking away 1.5·2²³ rounds to the nearest integer, which then stands in the low bits.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts; the first has so few bits that n times it is exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    const LOWEST: f32 = -87.33;
    let vanishes = x < LOWEST;
    // Comparisons written so that NaN passes through; `clamp`, `min` and `max` would replace it.
    let x = if x > 89.0 { 89.0 } else { x };
    let x = if vanishes { LOWEST } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN2_HIGH) - n * LN2_LOW;
    let mut q = 1.989_108e-4;
    q = q * r + 1.393_373_1e-3;
    q = q * r + 8.333_31e-3;
    q = q * r + 4.166_646_3e-2;
    q = q * r + 1.666_666_7e-1;
    q = q * r + 0.5;
    let power = q * (r * r) + r + 1.0;
    let n = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let half = n >> 1;
    let result = power * exp2_of_integer(half) * exp2_of_integer(n.wrapping_sub(half));
    if vanishes { 0.0 } else { result }
}

/// 2ⁿ for −126 ≤ n ≤ 127.
#[inline(always)]
fn exp2_of_integer(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) as u32) << 23)
}

/// 1 / (1 + e⁻ˣ).
#[inline(always)]
pub(super) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// The hyperbolic tangent within 3 units in the last place.
///
/// Near 0 by an odd polynomial interpolated at Chebyshev nodes; further out from e⁻²ˣ, where 1 − e⁻²ˣ no longer cancels.
#[inline(always)]
pub(super) fn tanh(x: f32) -> f32 {
    const NEAR: f32 = 0.625;
    let square = x * x;
    let mut q = -6.096_714e-3;
    q = q * square + 2.099_718e-2;
    q = q * square - 5.385_090_8e-2;
    q = q * square + 1.333_277e-1;
    q = q * square - 3.333_333e-1;
    let near = x + x * (square * q);
    let e = exp(-2.0 * x.abs());
    let far = ((1.0 - e) / (1.0 + e)).copysign(x);
    if x.abs() < NEAR { near } else { far }
}

/// The standard normal distribution's function and density at x: Φ within 2e-7 (Abramowitz and Stegun 7.1.26).
#[inline(always)]
pub(super) fn normal(x: f32) -> (f32, f32) {
    let t = 1.0 / (1.0 + 0.327_591_1 * std::f32::consts::FRAC_1_SQRT_2 * x.abs());
    let e = exp(-0.5 * x * x);
    let mut p = 1.061_405_4;
    p = p * t - 1.453_152;
    p = p * t + 1.421_413_7;
    p = p * t - 0.284_496_73;
    p = p * t + 0.254_829_6;
    let tail = 0.5 * p * t * e;
    (if x < 0.0 { tail } else { 1.0 - tail }, 0.398_942_3 * e)
}

/// Combines the lanes in a fixed tree.
#[inline(always)]
fn fold(mut lanes: [f32; LANES], combine: impl Fn(f32, f32) -> f32) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] = combine(lanes[lane], lanes[lane + width]);
        }
        width /= 2;
    }
    lanes[0]
}

/// Adds the lanes up, in a fixed tree.
#[inline(always)]
fn total(lanes: [f32; LANES]) -> f32 {
    fold(lanes, |a, b| a + b)
}

/// Σ x.
#[inline(always)]
pub(super) fn sum(x: &[f32]) -> f32 {
    let (blocks, tail) = x.as_chunks::<LANES>();
    let mut lanes = [0.0; LANES];
    for block in blocks {
        for lane in 0..LANES {
            lanes[lane] += block[lane];
        }
    }
    for (lane, x) in lanes.iter_mut().zip(tail) {
        *lane += x;
    }
    total(lanes)
}

/// Σ a·b over rows of equal length.
#[inline(always)]
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let (a_blocks, a_tail) = a.as_chunks::<LANES>();
    let (b_blocks, b_tail) = b.as_chunks::<LANES>();
    let mut lanes = [0.0; LANES];
    for (a, b) in a_blocks.iter().zip(b_blocks) {
        for lane in 0..LANES {
            lanes[lane] += a[lane] * b[lane];
        }
    }
    for ((lane, a), b) in lanes.iter_mut().zip(a_tail).zip(b_tail) {
        *lane += a * b;
    }
    total(lanes)
}

/// Σ a·b·c over rows of equal length.
#[inline(always)]
pub(super) fn dot3(a: &[f32], b: &[f32], c: &[f32]) -> f32 {
    let (a_blocks, a_tail) = a.as_chunks::<LANES>();
    let (b_blocks, b_tail) = b.as_chunks::<LANES>();
    let (c_blocks, c_tail) = c.as_chunks::<LANES>();
    let mut lanes = [0.0; LANES];
    for ((a, b), c) in a_blocks.iter().zip(b_blocks).zip(c_blocks) {
        for lane in 0..LANES {
            lanes[lane] += a[lane] * b[lane] * c[lane];
        }
    }
    for (((lane, a), b), c) in lanes.iter_mut().zip(a_tail).zip(b_tail).zip(c_tail) {
        *lane += a * b * c;
    }
    total(lanes)
}

/// The largest element; −∞ of an empty row. NaN is passed over: whoever sums exponentials afterwards meets it there.
#[inline(always)]
pub(super) fn max(x: &[f32]) -> f32 {
    let (blocks, tail) = x.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for block in blocks {
        for lane in 0..LANES {
            lanes[lane] = larger(block[lane], lanes[lane]);
        }
    }
    for (lane, x) in lanes.iter_mut().zip(tail) {
        *lane = larger(*x, *lane);
    }
    fold(lanes, larger)
}

/// `x` if it is larger than `best`: one instruction, unlike `f32::max`, which looks at NaN on both sides.
#[inline(always)]
fn larger(x: f32, best: f32) -> f32 {
    if x > best { x } else { best }
}

/// Σ x in f64, from any element type that converts.
#[inline(always)]
pub(super) fn sum_f64<T: Copy>(x: &[T], value: impl Fn(T) -> f64) -> f64 {
    let (blocks, tail) = x.as_chunks::<LANES>();
    let mut lanes = [0.0; LANES];
    for block in blocks {
        for lane in 0..LANES {
            lanes[lane] += value(block[lane]);
        }
    }
    for (lane, x) in lanes.iter_mut().zip(tail) {
        *lane += value(*x);
    }
    lanes.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use multiversion::multiversion;

    #[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma"))]
    fn exp_all(x: &mut [f32]) {
        for x in x {
            *x = exp(*x);
        }
    }

    /// The distance to the exact value in units of its last place in f32.
    fn ulps(got: f32, exact: f64) -> f64 {
        (f64::from(got) - exact).abs() / (exact.log2().floor() - 23.0).exp2()
    }

    #[test]
    fn exp_is_within_two_ulp_over_its_whole_range() {
        // Every 4099th bit pattern of either sign up to where the result leaves the range: about 280 thousand numbers.
        for (last, sign) in [(88.722_83_f32, 1.0_f32), (87.33, -1.0)] {
            let inputs: Vec<f32> = (0..=last.to_bits()).step_by(4099).map(|bits| sign * f32::from_bits(bits)).collect();
            let mut outputs = inputs.clone();
            exp_all(&mut outputs);
            for (x, y) in inputs.into_iter().zip(outputs) {
                assert!(ulps(y, f64::from(x).exp()) <= 2.0, "exp({x}) = {y}, exactly {}", f64::from(x).exp());
                assert_eq!(y.to_bits(), exp(x).to_bits(), "every instruction set gives the same bits at {x}");
            }
        }
    }

    #[test]
    fn exp_at_the_edges() {
        for (x, y) in [
            (f32::NEG_INFINITY, 0.0),
            (-1e30, 0.0),
            (-87.331, 0.0),
            (-104.0, 0.0),
            (-0.0, 1.0),
            (0.0, 1.0),
            (88.8, f32::INFINITY),
            (1e30, f32::INFINITY),
            (f32::INFINITY, f32::INFINITY),
        ] {
            assert_eq!(exp(x), y, "exp({x})");
        }
        assert!(exp(f32::NAN).is_nan() && exp(-f32::NAN).is_nan());
    }

    #[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma"))]
    fn tanh_all(x: &mut [f32]) {
        for x in x {
            *x = tanh(*x);
        }
    }

    #[test]
    fn tanh_is_within_three_ulp() {
        // Normal numbers of both signs up to beyond where the result is 1.
        let range = f32::MIN_POSITIVE.to_bits()..=20.0_f32.to_bits();
        let inputs: Vec<f32> = range.step_by(4099).map(f32::from_bits).flat_map(|x| [x, -x]).collect();
        let mut outputs = inputs.clone();
        tanh_all(&mut outputs);
        for (x, y) in inputs.into_iter().zip(outputs) {
            let exact = f64::from(x).tanh();
            assert!(ulps(y.abs(), exact.abs()) <= 3.0 && (y < 0.0) == (x < 0.0), "tanh({x}) = {y}, exactly {exact}");
            assert_eq!(y.to_bits(), tanh(x).to_bits(), "every instruction set gives the same bits at {x}");
        }
        assert_eq!([0.0, f32::INFINITY, f32::NEG_INFINITY].map(tanh), [0.0, 1.0, -1.0]);
        assert!(tanh(f32::NAN).is_nan());
    }

    #[test]
    fn reductions_match_f64_at_every_length() {
        for len in 0..70 {
            let a: Vec<f32> = (0..len).map(|i| ((i * 37 % 19) as f32 - 9.0) / 7.0).collect();
            let b: Vec<f32> = (0..len).map(|i| ((i * 53 % 23) as f32 - 11.0) / 5.0).collect();
            let wide = |f: &dyn Fn(usize) -> f64| (0..len).map(f).sum::<f64>();
            let tolerance = f64::from(f32::EPSILON) * 8.0 * (len as f64 + 1.0);
            let near = |got: f32, exact: f64| (f64::from(got) - exact).abs() <= tolerance;
            assert!(near(sum(&a), wide(&|i| f64::from(a[i]))), "sum of {len}");
            assert!(near(dot(&a, &b), wide(&|i| f64::from(a[i]) * f64::from(b[i]))), "dot of {len}");
            let cubes = wide(&|i| f64::from(a[i]) * f64::from(b[i]) * f64::from(a[i]));
            assert!(near(dot3(&a, &b, &a), cubes), "dot3 of {len}");
            assert_eq!(max(&a), a.iter().copied().fold(f32::NEG_INFINITY, f32::max), "max of {len}");
        }
    }
}
