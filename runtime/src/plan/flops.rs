//! Operations that a token costs, by stage.
//!
//! Owns the model's own count: 6 a parameter and token that takes part in a matrix product, and causal attention's half square;
//! nothing is counted twice that is computed twice.

use crate::config::Config;
use crate::model::Recompute;
use crate::stages::Stage;

/// FLOPs of a token, forward and backward.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Flops {
    /// Projections and scores of all blocks.
    pub attention: f64,
    /// Router logits.
    pub route: f64,
    /// Its k experts.
    pub experts: f64,
    /// Dense feed-forward blocks and shared experts.
    pub dense: f64,
    /// The head.
    pub head: f64,
}

impl Flops {
    /// Those of a configuration.
    pub fn of(config: &Config) -> Self {
        let c = &config.model;
        let (h, layers) = (c.hidden_size as f64, c.layers as f64);
        let moe = c.moe_layers().count() as f64;
        let projections = h * c.qkv_width() as f64 + h * c.attention_width() as f64;
        // Scores and their use, 2 · 2 · S/2 · width each way; the backward pass does twice as much.
        let scores = 6.0 * config.train.sequence_length as f64 * c.attention_width() as f64;
        let feed_forward = |f: usize| 18.0 * h * f as f64;
        let (parts, width) = (c.sub_tokens as f64, c.routed_width() as f64);
        let expert = 6.0 * c.expert_activation.matrices() as f64 * width * c.expert_ffn_size as f64;
        // Two projections of a token that is cut into parts.
        let cut = if c.sub_tokens > 1 { 12.0 * h * h } else { 0.0 };
        let widths = [c.routed_width()].into_iter().chain(config.router.hidden_sizes.iter().copied());
        let heights = config.router.hidden_sizes.iter().copied().chain([config.router.rows(c.experts)]);
        let router: f64 = widths.zip(heights).map(|(width, height)| (width * height) as f64).sum();
        Self {
            attention: layers * (6.0 * projections + scores),
            route: moe * 6.0 * parts * router,
            experts: moe * c.top_k as f64 * parts * expert,
            dense: moe * (feed_forward(c.shared_expert_ffn_size) + cut) + (layers - moe) * feed_forward(c.ffn_size),
            head: 6.0 * h * c.vocab_size as f64,
        }
    }

    /// Those of a token that a configuration has computed again: part of a step's time and of no stage here.
    pub fn recomputed(config: &Config) -> f64 {
        match config.train.recompute {
            Recompute::None => 0.0,
            // The projections in front of the activation, of three products for each of an expert's matrices.
            Recompute::Experts => {
                let activation = config.model.expert_activation;
                let share = activation.projections() as f64 / (3 * activation.matrices()) as f64;
                share * Self::of(config).experts
            }
        }
    }

    /// All stages together.
    pub fn total(&self) -> f64 {
        self.attention + self.route + self.experts + self.dense + self.head
    }

    /// Those of a stage; 0 where it has no matrix products to speak of.
    pub fn of_stage(&self, stage: Stage) -> f64 {
        match stage {
            Stage::Attention => self.attention,
            Stage::Route => self.route,
            Stage::Experts => self.experts,
            Stage::Aggregate => self.dense,
            Stage::Head => self.head,
            _ => 0.0,
        }
    }
}
