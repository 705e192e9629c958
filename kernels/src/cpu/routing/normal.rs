//! The standard normal distribution in f64.
//!
//! Owns Φ and its density, to about 1e-14 absolute; nothing about gates.

use std::f64::consts::{FRAC_1_SQRT_2, PI};

/// Beyond this |x| the series for erf needs more terms than the continued fraction for erfc.
const SERIES_LIMIT: f64 = 2.5;
/// Levels of the continued fraction: 5e-15 absolute at [`SERIES_LIMIT`], less beyond.
const FRACTION_LEVELS: u32 = 20;
/// The series ends at a term of this share of its sum.
const SERIES_PRECISION: f64 = 1e-15;

/// Density of the standard normal distribution.
pub(super) fn density(z: f64) -> f64 {
    (-0.5 * z * z).exp() / (2.0 * PI).sqrt()
}

/// Φ, the standard normal distribution function.
pub(super) fn cumulative(z: f64) -> f64 {
    0.5 * erfc(-z * FRAC_1_SQRT_2)
}

/// 1 − erf(x), without cancellation where erf is close to 1. NaN gives NaN.
fn erfc(x: f64) -> f64 {
    if x.abs() < SERIES_LIMIT {
        1.0 - erf_series(x)
    } else if x > 0.0 {
        erfc_fraction(x)
    } else {
        2.0 - erfc_fraction(-x)
    }
}

/// erf(x) = 2/√π · exp(−x²) · Σ_n 2ⁿ x^(2n+1) / (1·3·…·(2n+1)) (DLMF 7.6.2): all terms have one sign, so nothing cancels.
fn erf_series(x: f64) -> f64 {
    let (mut term, mut sum, mut odd) = (x, x, 1.0);
    while term.abs() > SERIES_PRECISION * sum.abs() {
        odd += 2.0;
        term *= 2.0 * x * x / odd;
        sum += term;
    }
    2.0 / PI.sqrt() * (-x * x).exp() * sum
}

/// erfc(x) = exp(−x²)/√π · 1/(x + (1/2)/(x + 1/(x + (3/2)/(x + …)))) for x > 0 (DLMF 7.9.1), from the inside out.
fn erfc_fraction(x: f64) -> f64 {
    let tail = (1..=FRACTION_LEVELS).rev().fold(x, |tail, level| x + 0.5 * f64::from(level) / tail);
    (-x * x).exp() / (PI.sqrt() * tail)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// erfc to 17 digits, from tables of the function.
    const ERFC: [(f64, f64); 7] = [
        (0.0, 1.0),
        (0.5, 0.479_500_122_186_953_5),
        (1.0, 0.157_299_207_050_285_13),
        (2.0, 0.004_677_734_981_047_266),
        (3.0, 2.209_049_699_858_544e-5),
        (4.0, 1.541_725_790_028_002e-8),
        (5.0, 1.537_459_794_428_035e-12),
    ];

    #[test]
    fn erfc_agrees_with_tabulated_values() {
        for (x, want) in ERFC {
            assert!((erfc(x) - want).abs() <= 1e-14, "erfc({x}) = {}, not {want}", erfc(x));
            assert!((erfc(-x) - (2.0 - want)).abs() <= 1e-14, "erfc({}) = {}", -x, erfc(-x));
        }
    }

    #[test]
    fn series_and_fraction_meet_where_they_change_over() {
        let (series, fraction) = (1.0 - erf_series(SERIES_LIMIT), erfc_fraction(SERIES_LIMIT));
        assert!((series - fraction).abs() < 1e-14, "{series} and {fraction}");
    }

    #[test]
    fn the_density_is_the_slope_of_the_distribution() {
        for i in -40..=40 {
            let (z, h) = (f64::from(i) * 0.1, 1e-4);
            let slope = (cumulative(z + h) - cumulative(z - h)) / (2.0 * h);
            assert!((slope - density(z)).abs() < 1e-8, "at {z}: {slope} and {}", density(z));
        }
        assert_eq!(cumulative(f64::INFINITY), 1.0);
        assert_eq!(cumulative(f64::NEG_INFINITY), 0.0);
        assert!(cumulative(f64::NAN).is_nan());
    }
}
