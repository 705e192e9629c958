//! The angles of the rotary embedding (Su et al. 2021), with the scalings that stretch a model to longer texts.
//!
//! Owns frequencies as numbers. It holds no buffer, knows no position beyond them and no file format.

use std::f64::consts::{PI, TAU};

use serde::{Deserialize, Serialize};

use super::config::ModelConfig;
use crate::invalid::InvalidValue;

/// How the angles of a model differ from the plain `position · theta^(−2i/D)`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum RopeScaling {
    /// Positions divided by a factor (Chen et al. 2023).
    Linear {
        /// The factor, at least 1.
        factor: f64,
    },
    /// Llama 3.1: long waves divided by the factor, short ones kept, a smooth step between them.
    Llama3 {
        /// The factor, at least 1.
        factor: f64,
        /// Waves longer than `original_positions` over this are divided.
        low_freq_factor: f64,
        /// Waves shorter than `original_positions` over this are kept.
        high_freq_factor: f64,
        /// Longest sequence before scaling.
        original_positions: usize,
    },
    /// YaRN (Peng et al. 2023): a linear ramp over the pairs between kept and divided, and larger logits.
    Yarn {
        /// The factor, at least 1.
        factor: f64,
        /// Longest sequence before scaling.
        original_positions: usize,
        /// Factor on cosines and sines; absent: `0.1 · ln(factor) + 1`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        attention_factor: Option<f64>,
        /// Pairs that turn more often than this over the original length are kept.
        #[serde(default = "beta_fast")]
        beta_fast: f64,
        /// Pairs that turn less often than this are divided.
        #[serde(default = "beta_slow")]
        beta_slow: f64,
        /// Whether the ramp begins and ends at whole pairs.
        #[serde(default = "truncate")]
        truncate: bool,
    },
}

fn beta_fast() -> f64 {
    32.0
}

fn beta_slow() -> f64 {
    1.0
}

fn truncate() -> bool {
    true
}

impl RopeScaling {
    /// Checks its numbers.
    ///
    /// # Errors
    /// A number for which there are no angles.
    pub fn validate(&self) -> Result<(), InvalidValue> {
        let wrong = |field: &str, value: f64, reason: &str| {
            Err(InvalidValue::new(&format!("model.rope_scaling.{field}"), value, reason))
        };
        let (Self::Linear { factor } | Self::Llama3 { factor, .. } | Self::Yarn { factor, .. }) = *self;
        if !(factor.is_finite() && factor >= 1.0) {
            return wrong("factor", factor, "must be a number of at least 1");
        }
        if let Self::Llama3 { original_positions: 0, .. } | Self::Yarn { original_positions: 0, .. } = self {
            return wrong("original_positions", 0.0, "must be at least 1");
        }
        match *self {
            Self::Linear { .. } => Ok(()),
            Self::Llama3 { low_freq_factor: low, high_freq_factor: high, .. } => {
                if !(low.is_finite() && low > 0.0) {
                    return wrong("low_freq_factor", low, "must be a positive number");
                }
                if !(high.is_finite() && high > low) {
                    return wrong("high_freq_factor", high, "must be a number above low_freq_factor");
                }
                Ok(())
            }
            Self::Yarn { attention_factor, beta_fast: fast, beta_slow: slow, .. } => {
                if let Some(factor) = attention_factor.filter(|factor| !(factor.is_finite() && *factor > 0.0)) {
                    return wrong("attention_factor", factor, "must be a positive number");
                }
                if !(slow.is_finite() && slow > 0.0) {
                    return wrong("beta_slow", slow, "must be a positive number");
                }
                if !(fast.is_finite() && fast > slow) {
                    return wrong("beta_fast", fast, "must be a number above beta_slow");
                }
                Ok(())
            }
        }
    }
}

/// Angles per position of the pairs of a head, and the factor on their cosines and sines.
#[derive(Clone, Debug, PartialEq)]
pub struct Frequencies {
    /// `[D/2]`: radians a position.
    pub radians: Vec<f64>,
    /// 1 but for YaRN.
    pub amplitude: f64,
}

impl Frequencies {
    /// Those of a valid model.
    pub fn of(config: &ModelConfig) -> Self {
        let (theta, half) = (config.rope_theta, config.head_width() / 2);
        let mut radians: Vec<f64> = (0..half).map(|pair| theta.powf(-(pair as f64) / half as f64)).collect();
        let mut amplitude = 1.0;
        match config.rope_scaling {
            None => {}
            Some(RopeScaling::Linear { factor }) => radians.iter_mut().for_each(|angle| *angle /= factor),
            Some(RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_positions }) => {
                for angle in &mut radians {
                    let turns = original_positions as f64 * *angle / TAU;
                    let kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                    *angle *= kept + (1.0 - kept) / factor;
                }
            }
            Some(RopeScaling::Yarn {
                factor,
                original_positions,
                attention_factor,
                beta_fast,
                beta_slow,
                truncate,
            }) => {
                let pair_of =
                    |turns: f64| half as f64 * (original_positions as f64 / (turns * 2.0 * PI)).ln() / theta.ln();
                let (mut first, mut last) = (pair_of(beta_fast), pair_of(beta_slow));
                if truncate {
                    (first, last) = (first.floor(), last.ceil());
                }
                (first, last) = (first.max(0.0), last.min((2 * half - 1) as f64));
                // A ramp of no width is a step.
                let width = if first == last { 1e-3 } else { last - first };
                for (pair, angle) in radians.iter_mut().enumerate() {
                    let divided = ((pair as f64 - first) / width).clamp(0.0, 1.0);
                    *angle *= (1.0 - divided) + divided / factor;
                }
                amplitude = attention_factor.unwrap_or_else(|| yarn_amplitude(factor, 1.0));
            }
        }
        Self { radians, amplitude }
    }
}

/// YaRN's factor on attention for texts `factor` times as long, weighted by `mscale`.
pub fn yarn_amplitude(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frequencies(rope_scaling: Option<RopeScaling>) -> Frequencies {
        Frequencies::of(&ModelConfig { head_dim: 16, rope_scaling, ..ModelConfig::default() })
    }

    fn close(found: &[f64], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        for (pair, (a, b)) in found.iter().zip(expected).enumerate() {
            assert!((a - b).abs() <= 1e-6 * b.abs(), "pair {pair}: {a}, expected {b}");
        }
    }

    #[test]
    fn linear_scaling_divides_every_angle() {
        let (plain, scaled) = (frequencies(None), frequencies(Some(RopeScaling::Linear { factor: 4.0 })));
        close(&scaled.radians, &plain.radians.iter().map(|angle| angle / 4.0).collect::<Vec<_>>());
        assert_eq!(scaled.amplitude, 1.0);
    }

    #[test]
    fn llama3_keeps_short_waves_divides_long_ones_and_steps_smoothly_between() {
        let scaling =
            RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_positions: 64 };
        let (plain, scaled) = (frequencies(None).radians, frequencies(Some(scaling)).radians);
        assert_eq!(scaled[0], plain[0], "a wave of 6 positions");
        close(&scaled[3..], &plain[3..].iter().map(|angle| angle / 8.0).collect::<Vec<_>>());
        assert!(scaled[1] < plain[1] && scaled[1] > plain[1] / 8.0, "a wave of 20 positions");
    }

    #[test]
    fn yarn_keeps_fast_pairs_divides_slow_ones_and_raises_the_amplitude() {
        let yarn = |attention_factor| RopeScaling::Yarn {
            factor: 4.0,
            original_positions: 32,
            attention_factor,
            beta_fast: 4.0,
            beta_slow: 1.0,
            truncate: true,
        };
        let (plain, scaled) = (frequencies(None), frequencies(Some(yarn(None))));
        assert_eq!(scaled.radians[0], plain.radians[0]);
        close(&scaled.radians[2..], &plain.radians[2..].iter().map(|angle| angle / 4.0).collect::<Vec<_>>());
        assert!((scaled.amplitude - (0.1 * 4f64.ln() + 1.0)).abs() < 1e-12);
        assert_eq!(frequencies(Some(yarn(Some(1.5)))).amplitude, 1.5);
    }

    #[test]
    fn impossible_numbers_are_refused_by_their_key() {
        for (scaling, key) in [
            (RopeScaling::Linear { factor: 0.5 }, "model.rope_scaling.factor"),
            (RopeScaling::Linear { factor: f64::NAN }, "model.rope_scaling.factor"),
            (
                RopeScaling::Llama3 {
                    factor: 8.0,
                    low_freq_factor: 4.0,
                    high_freq_factor: 4.0,
                    original_positions: 64,
                },
                "model.rope_scaling.high_freq_factor",
            ),
        ] {
            assert_eq!(scaling.validate().unwrap_err().key, key);
        }
    }
}
