//! The learning rate of each step, as a pure function of the step.

use crate::config::{ScheduleConfig, ScheduleKind};

/// A learning-rate schedule.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    peak: f64,
    total: u64,
    config: ScheduleConfig,
}

impl Schedule {
    /// The schedule that rises to `peak`; `total` is its length where the configuration names none.
    pub fn new(peak: f64, total: u64, config: &ScheduleConfig) -> Self {
        Self { peak, total: config.steps.unwrap_or(total), config: config.clone() }
    }

    /// The learning rate of step `step`, counted from 1. Warm-up is linear and reaches the peak at its last step; after the end
    /// of the schedule the rate stays where it ended.
    pub fn lr(&self, step: u64) -> f64 {
        let warmup = self.config.warmup_steps;
        if step <= warmup {
            return self.peak * step as f64 / warmup as f64;
        }
        let floor = self.config.min_ratio;
        let ratio = match self.config.kind {
            ScheduleKind::Constant => 1.0,
            ScheduleKind::Cosine => {
                let progress = fraction(step - warmup, self.total.saturating_sub(warmup));
                floor + (1.0 - floor) * 0.5 * (1.0 + (std::f64::consts::PI * progress).cos())
            }
            ScheduleKind::Wsd => {
                let decay = (self.total as f64 * self.config.decay_fraction).round() as u64;
                let start = self.total.saturating_sub(decay).max(warmup);
                1.0 - (1.0 - floor) * fraction(step.saturating_sub(start), self.total.saturating_sub(start))
            }
        };
        self.peak * ratio
    }
}

fn fraction(done: u64, of: u64) -> f64 {
    if of == 0 { 1.0 } else { (done as f64 / of as f64).min(1.0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(kind: ScheduleKind) -> Schedule {
        let config = ScheduleConfig { kind, steps: Some(100), warmup_steps: 10, min_ratio: 0.1, decay_fraction: 0.2 };
        Schedule::new(2.0, 7, &config)
    }

    #[test]
    fn golden_rates() {
        let table = [
            (ScheduleKind::Cosine, [(1, 0.2), (10, 2.0), (55, 1.1), (100, 0.2), (500, 0.2)]),
            (ScheduleKind::Wsd, [(5, 1.0), (10, 2.0), (80, 2.0), (90, 1.1), (100, 0.2)]),
            (ScheduleKind::Constant, [(5, 1.0), (10, 2.0), (80, 2.0), (100, 2.0), (500, 2.0)]),
        ];
        for (kind, rates) in table {
            for (step, rate) in rates {
                assert!((schedule(kind).lr(step) - rate).abs() < 1e-9, "{kind:?} at step {step}");
            }
        }
    }

    #[test]
    fn without_a_length_of_its_own_the_schedule_lasts_as_long_as_training() {
        let config = ScheduleConfig { steps: None, warmup_steps: 0, min_ratio: 0.5, ..ScheduleConfig::default() };
        assert_eq!(Schedule::new(1.0, 40, &config).lr(40), 0.5);
    }
}
