//! `balance.jsonl`: how the experts of each MoE layer were used, one JSON object every `run.balance_every` steps.
//!
//! Owns the keys, which stay since scripts read them, and what is read off them: spread, percentiles. Lines are written and cut off as those of
//! `metrics.jsonl` are.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::MetricsError;
use crate::routing::BalanceReport;

/// One step's use of all experts.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct BalanceReading {
    /// Steps done, this one included.
    pub step: u64,
    /// Tokens of the global batch.
    pub tokens: u64,
    /// The MoE layers, from below.
    pub layers: Vec<LayerBalance>,
}

/// One layer's use of its experts; lists have a number an expert.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LayerBalance {
    /// Choices, before capacity.
    pub load: Vec<u64>,
    /// Mean probability.
    pub mass: Vec<f32>,
    /// Choices that capacity dropped; empty: none of any expert.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub dropped: Vec<u64>,
    /// Mean entropy of a token's probabilities, in nats: ln E where the gate does not decide at all.
    pub entropy: f32,
}

/// Five decimals are enough for a mean over tokens.
fn rounded(x: f64) -> f32 {
    ((x * 1e5).round() / 1e5) as f32
}

impl BalanceReading {
    /// What `report`, summed over all ranks, says of a step of `tokens` tokens.
    pub fn of(step: u64, tokens: u64, report: &BalanceReport, experts: &[usize]) -> Self {
        let most = experts.iter().copied().max().unwrap_or(0);
        let share = |sum: f64| rounded(sum / tokens.max(1) as f64);
        let counts = |values: &[f64]| values.iter().map(|&count| count as u64).collect::<Vec<_>>();
        let layer = |(index, &entropy): (usize, &f64)| {
            let own = index * most..index * most + experts[index];
            let dropped = &report.dropped[own.clone()];
            LayerBalance {
                load: counts(&report.loads[own.clone()]),
                mass: report.mass[own].iter().map(|&sum| share(sum)).collect(),
                dropped: if dropped.iter().any(|&count| count > 0.0) { counts(dropped) } else { Vec::new() },
                entropy: share(entropy),
            }
        };
        Self { step, tokens, layers: report.entropy.iter().enumerate().map(layer).collect() }
    }

    /// The reading of `step` in the file at `path`, or the last one; None: there is none.
    ///
    /// # Errors
    /// The file cannot be read, or a line that was asked for is damaged. A last line that a crash left unfinished is passed over.
    pub fn read(path: &Path, step: Option<u64>) -> Result<Option<Self>, MetricsError> {
        let failed = |reason| MetricsError::Io { path: path.into(), action: "read", reason };
        let text = match fs::read_to_string(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            read => read.map_err(failed)?,
        };
        let lines: Vec<&str> = text.split_inclusive('\n').collect();
        for (index, line) in lines.iter().enumerate().rev().filter(|(_, line)| line.ends_with('\n')) {
            let reading: Self = serde_json::from_str(line).map_err(|error| MetricsError::Line {
                path: path.into(),
                line: index + 1,
                reason: error.to_string(),
            })?;
            if step.is_none_or(|step| step == reading.step) {
                return Ok(Some(reading));
            }
        }
        Ok(None)
    }
}

impl LayerBalance {
    /// Loads as multiples of their mean; 0 each where nothing was chosen.
    pub fn relative_loads(&self) -> Vec<f64> {
        let total: u64 = self.load.iter().sum();
        let mean = total as f64 / self.load.len().max(1) as f64;
        self.load.iter().map(|&load| if total > 0 { load as f64 / mean } else { 0.0 }).collect()
    }

    /// The load below which a share `p` of the experts lies, as a multiple of the mean: the nearest rank.
    pub fn percentile(&self, p: f64) -> f64 {
        let mut loads = self.relative_loads();
        loads.sort_by(f64::total_cmp);
        let rank = (p * loads.len() as f64).ceil() as usize;
        loads.get(rank.saturating_sub(1)).copied().unwrap_or(0.0)
    }

    /// Standard deviation of the loads over their mean.
    pub fn variation(&self) -> f64 {
        let loads = self.relative_loads();
        let n = loads.len().max(1) as f64;
        let mean = loads.iter().sum::<f64>() / n;
        (loads.iter().map(|load| (load - mean).powi(2)).sum::<f64>() / n).sqrt()
    }

    /// Experts that no token chose.
    pub fn idle(&self) -> usize {
        self.load.iter().filter(|&&load| load == 0).count()
    }

    /// Share of the choices that capacity dropped.
    pub fn dropped_fraction(&self) -> f64 {
        let (dropped, all): (u64, u64) = (self.dropped.iter().sum(), self.load.iter().sum());
        if all > 0 { dropped as f64 / all as f64 } else { 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::MetricsFile;

    fn report() -> BalanceReport {
        BalanceReport {
            loads: vec![6.0, 2.0, 0.0, 0.0, 2.0, 2.0, 2.0, 2.0],
            mass: vec![2.0, 1.0, 0.5, 0.5, 1.0, 1.0, 1.0, 1.0],
            dropped: vec![3.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
            entropy: vec![4.0, 5.545_177],
            ..BalanceReport::default()
        }
    }

    #[test]
    fn a_reading_says_how_uneven_each_layer_is() {
        let reading = BalanceReading::of(7, 4, &report(), &[4, 4]);
        let [first, second] = &reading.layers[..] else { panic!("{reading:?}") };
        assert_eq!((first.load.as_slice(), first.mass.as_slice()), (&[6, 2, 0, 0][..], &[0.5, 0.25, 0.125, 0.125][..]));
        assert_eq!(first.relative_loads(), [3.0, 1.0, 0.0, 0.0]);
        assert_eq!([0.1, 0.5, 0.75, 1.0].map(|p| first.percentile(p)), [0.0, 0.0, 1.0, 3.0]);
        assert_eq!((first.idle(), first.dropped_fraction(), first.entropy), (2, 0.375, 1.0));
        assert!((first.variation() - 1.5f64.sqrt()).abs() < 1e-12);
        assert_eq!((second.variation(), second.idle(), second.entropy), (0.0, 0, 1.386_29));
        assert!(second.dropped.is_empty());
    }

    #[test]
    fn what_is_written_is_read_by_step_and_a_damaged_line_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("balance.jsonl");
        assert_eq!(BalanceReading::read(&path, None).unwrap(), None);
        let mut file = MetricsFile::open(&path).unwrap();
        let at = |step| BalanceReading::of(step, 4, &report(), &[4, 4]);
        (1..=3).for_each(|step| file.append(&at(step)).unwrap());
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, format!("{text}{{\"step\":4,\"tok")).unwrap();
        assert_eq!(BalanceReading::read(&path, None).unwrap(), Some(at(3)));
        assert_eq!(BalanceReading::read(&path, Some(2)).unwrap(), Some(at(2)));
        assert_eq!(BalanceReading::read(&path, Some(9)).unwrap(), None);
        fs::write(&path, format!("{text}nonsense\n")).unwrap();
        let error = BalanceReading::read(&path, None).unwrap_err().to_string();
        assert!(error.contains("balance.jsonl:4: is no JSON object"), "{error}");
        let layer = r#"{"load":[6,2,0,0],"mass":[0.5,0.25,0.125,0.125],"dropped":[3,0,0,0],"entropy":1.0}"#;
        assert!(text.starts_with(&format!("{{\"step\":1,\"tokens\":4,\"layers\":[{layer},{{")), "{text}");
    }
}
