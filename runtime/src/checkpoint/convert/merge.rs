//! Several models of one architecture become one: the weighted average of their tensors (LM-Cocktail, Xiao et al. 2023).
//!
//! Owns the average and the weights that follow from losses. It measures no loss itself.

use super::ModelTensors;
use crate::checkpoint::CheckpointError;
use crate::checkpoint::manifest::model_differences;
use crate::invalid::InvalidValue;
use crate::model::ModelConfig;
use crate::model::layout::Part;
use crate::routing::RouterConfig;

/// Why models are not merged.
#[derive(Debug, thiserror::Error)]
pub enum MergeError {
    /// One computes something else than the first.
    #[error("is of another architecture than the first: {}", differences.join("; "))]
    Differs {
        /// Which one, from 0.
        index: usize,
        /// Keys, and both values of each.
        differences: Vec<String>,
    },
    /// The weights are none for these models.
    #[error(transparent)]
    Weights(#[from] InvalidValue),
}

/// Models seen as their average.
pub struct Merged<'a> {
    models: Vec<&'a mut dyn ModelTensors>,
    weights: Vec<f64>,
}

impl<'a> Merged<'a> {
    /// Prepares models with a weight each; weights are divided by their sum. No tensor is read yet.
    ///
    /// # Errors
    /// There are none, a model differs from the first in what it computes, or the weights are not one a model or not numbers
    /// of at least 0 with a sum above.
    pub fn new(models: Vec<&'a mut dyn ModelTensors>, weights: &[f64]) -> Result<Self, MergeError> {
        let shown = format!("{weights:?}");
        if models.is_empty() || models.len() != weights.len() {
            let reason = format!("must be one for each of the {} models, of which there is at least one", models.len());
            return Err(InvalidValue::new("weights", shown, reason).into());
        }
        let sum: f64 = weights.iter().sum();
        if !(weights.iter().all(|weight| weight.is_finite() && *weight >= 0.0) && sum > 0.0 && sum.is_finite()) {
            return Err(InvalidValue::new("weights", shown, "must be numbers of at least 0 that are not all 0").into());
        }
        for (index, other) in models.iter().enumerate().skip(1) {
            let first = (models[0].model(), models[0].router());
            let differences = model_differences(first, (other.model(), other.router()), ("the first", "this one"));
            if !differences.is_empty() {
                return Err(MergeError::Differs { index, differences });
            }
        }
        Ok(Self { models, weights: weights.iter().map(|weight| weight / sum).collect() })
    }

    /// Σ weight · values, summed in f64 in the order of the models. A model of weight 0 is not read: it adds nothing, whatever
    /// it holds.
    fn average(
        &mut self,
        mut read: impl FnMut(&mut dyn ModelTensors) -> Result<Vec<f32>, CheckpointError>,
    ) -> Result<Vec<f32>, CheckpointError> {
        let mut sums = Vec::new();
        for (model, &weight) in self.models.iter_mut().zip(&self.weights).filter(|(_, weight)| **weight > 0.0) {
            let values = read(&mut **model)?;
            // The neutral element that keeps the sign of a zero.
            sums.resize(values.len(), -0.0);
            sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += weight * f64::from(value));
        }
        Ok(sums.into_iter().map(|sum| sum as f32).collect())
    }
}

impl ModelTensors for Merged<'_> {
    fn model(&self) -> &ModelConfig {
        self.models[0].model()
    }

    fn router(&self) -> &RouterConfig {
        self.models[0].router()
    }

    fn read(&mut self, part: &Part) -> Result<Vec<f32>, CheckpointError> {
        self.average(|model| model.read(part))
    }

    fn router_biases(&mut self) -> Result<Vec<(usize, Vec<f32>)>, CheckpointError> {
        let layers: Vec<usize> = self.models[0].router_biases()?.into_iter().map(|(layer, _)| layer).collect();
        let of_layer = |index: usize| {
            move |model: &mut dyn ModelTensors| {
                Ok(model.router_biases()?.into_iter().nth(index).map(|bias| bias.1).unwrap_or_default())
            }
        };
        layers.into_iter().enumerate().map(|(index, layer)| Ok((layer, self.average(of_layer(index))?))).collect()
    }
}

/// softmax(−loss / temperature): the lower a model's loss, the more of it. Losses are finite, the temperature is positive.
pub fn weights_from_losses(losses: &[f64], temperature: f64) -> Vec<f64> {
    let lowest = losses.iter().copied().fold(f64::INFINITY, f64::min);
    let shares: Vec<f64> = losses.iter().map(|loss| ((lowest - loss) / temperature).exp()).collect();
    let sum: f64 = shares.iter().sum();
    shares.into_iter().map(|share| share / sum).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lower_losses_weigh_more_and_temperature_evens_them_out() {
        let weights = weights_from_losses(&[2.0, 2.0 + 3f64.ln()], 1.0);
        assert!((weights[0] - 0.75).abs() < 1e-12 && (weights[1] - 0.25).abs() < 1e-12);
        let even = weights_from_losses(&[2.0, 3.0], 1e6);
        assert!((even[0] - 0.5).abs() < 1e-6);
        assert_eq!(weights_from_losses(&[1000.0, 2000.0], 1e-3), [1.0, 0.0]);
    }
}
