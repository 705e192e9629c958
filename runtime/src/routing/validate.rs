//! Which routing settings go together.
//!
//! Owns the refusals: a number out of its range, a key that belongs to another gate, sizes that do not divide.

use moe_kernels::GroupLimit;

use super::config::{Overflow, RouterConfig, RouterKind};
use crate::invalid::InvalidValue;

use RouterKind::*;

/// Every gate.
const ALL: [RouterKind; 13] = [
    SoftmaxTopk,
    TopkSoftmax,
    Switch,
    Gshard,
    NoisyTopk,
    SigmoidBias,
    TopP,
    Sinkhorn,
    ExpertChoice,
    Hash,
    Hierarchical,
    MultiGate,
    Custom,
];

/// A key, whether it is set to anything but what it is by itself, and whether a gate has it.
type Owned = (&'static str, fn(&RouterConfig, &RouterConfig) -> bool, fn(RouterKind) -> bool);

/// Which gates a key belongs to. Keys that all gates have are not listed.
const OWNED: [Owned; 25] = [
    // Some divide by the sum whatever is said.
    (
        "router.renormalize",
        |c, d| c.renormalize != d.renormalize,
        |kind| !matches!(kind, Switch | ExpertChoice | Hash | Custom),
    ),
    ("router.weight_scale", |c, d| c.weight_scale != d.weight_scale, |kind| kind == SigmoidBias),
    ("router.bias_update_rate", |c, d| c.bias_update_rate != d.bias_update_rate, |kind| kind == SigmoidBias),
    ("router.load_coefficient", |c, d| c.load_coefficient != d.load_coefficient, |kind| kind == NoisyTopk),
    ("router.expert_groups", |c, d| c.expert_groups != d.expert_groups, takes_groups),
    ("router.groups_per_token", |c, d| c.groups_per_token != d.groups_per_token, takes_groups),
    ("router.top_p", |c, d| c.top_p != d.top_p, |kind| kind == TopP),
    ("router.least_choices", |c, d| c.least_choices != d.least_choices, |kind| kind == TopP),
    ("router.sinkhorn_iterations", |c, d| c.sinkhorn_iterations != d.sinkhorn_iterations, |kind| kind == Sinkhorn),
    ("router.tags", |c, d| c.tags != d.tags, |kind| kind == MultiGate),
    ("router.noise_steps", |c, d| c.noise_steps != d.noise_steps, learns),
    ("router.hidden_sizes", |c, d| c.hidden_sizes != d.hidden_sizes, learns),
    ("router.hidden_activation", |c, d| c.hidden_activation != d.hidden_activation, learns),
    ("router.dropout", |c, d| c.dropout != d.dropout, learns),
    ("router.input_jitter", |c, d| c.input_jitter != d.input_jitter, learns),
    (
        "router.importance_coefficient",
        |c, d| c.importance_coefficient != d.importance_coefficient,
        |kind| kind == NoisyTopk,
    ),
    (
        "router.mass_coefficient",
        |c, d| c.mass_coefficient != d.mass_coefficient,
        |kind| !matches!(kind, Hash | NoisyTopk),
    ),
    ("router.device_coefficient", |c, d| c.device_coefficient != d.device_coefficient, learns),
    ("router.difference_coefficient", |c, d| c.difference_coefficient != d.difference_coefficient, learns),
    ("router.entropy_coefficient", |c, d| c.entropy_coefficient != d.entropy_coefficient, learns),
    ("router.batch_entropy_coefficient", |c, d| c.batch_entropy_coefficient != d.batch_entropy_coefficient, learns),
    // The logits of two levels sum to one probability as they are: nothing is left for a z-loss.
    ("router.z_coefficient", |c, d| c.z_coefficient != d.z_coefficient, |kind| !matches!(kind, Hash | Hierarchical)),
    ("router.capacity_factor", |c, d| c.capacity_factor != d.capacity_factor, |kind| kind != ExpertChoice),
    // GShard drops its second choice on purpose, and a hash has no next best.
    (
        "router.overflow",
        |c, _| c.overflow == Overflow::Reroute,
        |kind| !matches!(kind, Gshard | Hash | ExpertChoice | Custom),
    ),
    (
        "router.expert_dropout",
        |c, d| c.expert_dropout != d.expert_dropout,
        // The load of a noisy gate counts on every expert.
        |kind| !matches!(kind, Hash | ExpertChoice | NoisyTopk | Custom),
    ),
];

/// Whether groups can limit the experts of the gate.
fn takes_groups(kind: RouterKind) -> bool {
    matches!(kind, SoftmaxTopk | TopkSoftmax | SigmoidBias | TopP | Hierarchical)
}

/// Whether the gate has weights.
fn learns(kind: RouterKind) -> bool {
    kind != Hash
}

impl RouterKind {
    /// Its name in a configuration.
    pub fn name(self) -> String {
        serde_json::to_value(self).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
    }
}

impl RouterConfig {
    /// Checks the settings for `experts` of which a token chooses `top_k`.
    pub fn validate(&self, experts: usize, top_k: usize) -> Result<(), InvalidValue> {
        self.validate_numbers()?;
        self.validate_owners()?;
        self.validate_capacity()?;
        self.validate_groups(experts, top_k)?;
        self.validate_hidden()?;
        if self.kind == TopP && !(1..=top_k).contains(&self.least_choices) {
            let reason = format!("a token takes 1 to model.top_k = {top_k} experts");
            return Err(InvalidValue::new("router.least_choices", self.least_choices, reason));
        }
        if self.sinkhorn_iterations == 0 {
            let reason = "must be at least 1; another router.kind assigns without";
            return Err(InvalidValue::new("router.sinkhorn_iterations", 0, reason));
        }
        if self.kind == MultiGate && self.tags == 0 {
            let reason =
                "how many tags does the data have? Each gets a router; data.sources.NAME.tag counts them from 0";
            return Err(InvalidValue::new("router.tags", 0, reason));
        }
        if self.device_groups == 0 || !experts.is_multiple_of(self.device_groups) {
            let fit: Vec<usize> = (1..=experts).filter(|n| experts.is_multiple_of(*n)).collect();
            let reason = format!("must divide model.experts = {experts}; those that do: {fit:?}");
            return Err(InvalidValue::new("router.device_groups", self.device_groups, reason));
        }
        let needed = match self.kind {
            Switch => Some((1, "switch sends a token to one expert")),
            Gshard => Some((2, "gshard sends a token to two experts")),
            _ => None,
        };
        match needed {
            Some((k, why)) if top_k != k => {
                Err(InvalidValue::new("model.top_k", top_k, format!("router.kind: {why}; set model.top_k = {k}")))
            }
            _ => {
                debug_assert!(top_k <= experts, "the model checks this first");
                Ok(())
            }
        }
    }

    fn validate_numbers(&self) -> Result<(), InvalidValue> {
        for (key, value) in [
            ("router.balance_coefficient", self.balance_coefficient),
            ("router.z_coefficient", self.z_coefficient),
            ("router.importance_coefficient", self.importance_coefficient),
            ("router.mass_coefficient", self.mass_coefficient),
            ("router.load_coefficient", self.load_coefficient),
            ("router.device_coefficient", self.device_coefficient),
            ("router.difference_coefficient", self.difference_coefficient),
            ("router.entropy_coefficient", self.entropy_coefficient),
            ("router.batch_entropy_coefficient", self.batch_entropy_coefficient),
            ("router.batch_entropy_target", self.batch_entropy_target.unwrap_or(0.0)),
            ("router.bias_update_rate", self.bias_update_rate),
        ] {
            if !(value.is_finite() && value >= 0.0) {
                return Err(InvalidValue::new(key, value, "must be a number of at least 0"));
            }
        }
        for (key, value) in [
            ("router.input_jitter", self.input_jitter),
            ("router.dropout", self.dropout),
            ("router.expert_dropout", self.expert_dropout),
        ] {
            if !(0.0..1.0).contains(&value) {
                return Err(InvalidValue::new(key, value, "must be at least 0 and below 1"));
            }
        }
        if !(self.weight_scale.is_finite() && self.weight_scale > 0.0) {
            return Err(InvalidValue::new("router.weight_scale", self.weight_scale, "must be a positive number"));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(InvalidValue::new("router.top_p", self.top_p, "must be above 0 and at most 1"));
        }
        Ok(())
    }

    /// Refuses keys of other gates.
    fn validate_owners(&self) -> Result<(), InvalidValue> {
        let by_itself = Self::default();
        for (key, is_set, owners) in OWNED {
            if is_set(self, &by_itself) && !owners(self.kind) {
                let others: Vec<_> = ALL.into_iter().filter(|&kind| owners(kind)).map(RouterKind::name).collect();
                let kind = self.kind.name();
                let reason = format!("router.kind = {kind} has no such thing; it belongs to {}", others.join(", "));
                // By way of a text, in which an f32 has no more digits than were given.
                let all = serde_json::to_string(self).and_then(|text| serde_json::from_str::<serde_json::Value>(&text));
                let found = &all.unwrap_or_default()[key.trim_start_matches("router.")];
                return Err(InvalidValue::new(key, found, reason));
            }
        }
        Ok(())
    }

    fn validate_capacity(&self) -> Result<(), InvalidValue> {
        for (key, factor) in [
            ("router.capacity_factor", self.capacity_factor),
            ("router.capacity_factor_start", self.capacity_factor_start),
            ("router.capacity_factor_eval", self.capacity_factor_eval),
        ] {
            let Some(factor) = factor else { continue };
            if !(factor.is_finite() && factor > 0.0) {
                let reason = "must be a positive number; leave the key out for dropless routing";
                return Err(InvalidValue::new(key, factor, reason));
            }
            if self.capacity_factor.is_none() {
                return Err(InvalidValue::new(key, factor, "needs router.capacity_factor, which is not set"));
            }
        }
        if self.capacity_factor_start.is_some() != (self.capacity_steps > 0) {
            let reason = "router.capacity_factor_start and the steps it takes to router.capacity_factor go together";
            return Err(InvalidValue::new("router.capacity_steps", self.capacity_steps, reason));
        }
        let limited = self.expert_groups > 1 || self.expert_dropout > 0.0;
        if self.overflow == Overflow::Reroute && limited {
            let reason = "asks any expert that has room: set router.expert_groups = 1 and router.expert_dropout = 0";
            return Err(InvalidValue::new("router.overflow", "reroute", reason));
        }
        if self.expert_dropout > 0.0 && self.expert_groups > 1 {
            let reason = "a group could be left without experts: set router.expert_groups = 1";
            return Err(InvalidValue::new("router.expert_dropout", self.expert_dropout, reason));
        }
        if self.overflow == Overflow::Reroute && self.capacity_factor.is_none() {
            let reason = "nothing overflows without router.capacity_factor";
            return Err(InvalidValue::new("router.overflow", "reroute", reason));
        }
        Ok(())
    }

    fn validate_groups(&self, experts: usize, top_k: usize) -> Result<(), InvalidValue> {
        let (groups, chosen) = (self.expert_groups, self.groups_per_token);
        if self.kind == Hierarchical && groups == 1 {
            let reason = "router.kind = hierarchical chooses a group first: there must be at least 2";
            return Err(InvalidValue::new("router.expert_groups", 1, reason));
        }
        if groups == 1 && chosen == 1 {
            return Ok(());
        }
        if groups == 0 || groups > GroupLimit::MOST || !experts.is_multiple_of(groups) {
            let fit: Vec<usize> = (1..=GroupLimit::MOST).filter(|n| experts.is_multiple_of(*n)).collect();
            let reason = format!("must divide model.experts = {experts}; those that do: {fit:?}");
            return Err(InvalidValue::new("router.expert_groups", groups, reason));
        }
        let least = top_k.div_ceil(experts / groups);
        if !(least..=groups).contains(&chosen) {
            let reason = format!(
                "model.top_k = {top_k} experts come from {least} to {groups} groups of {} experts",
                experts / groups
            );
            return Err(InvalidValue::new("router.groups_per_token", chosen, reason));
        }
        Ok(())
    }

    fn validate_hidden(&self) -> Result<(), InvalidValue> {
        let shown = format!("{:?}", self.hidden_sizes);
        if self.hidden_sizes.len() > Self::MOST_HIDDEN || self.hidden_sizes.contains(&0) {
            let reason = format!("at most {} layers of at least 1", Self::MOST_HIDDEN);
            return Err(InvalidValue::new("router.hidden_sizes", shown, reason));
        }
        if self.dropout > 0.0 && self.hidden_sizes.is_empty() {
            let reason = "drops what comes out of hidden layers: set router.hidden_sizes";
            return Err(InvalidValue::new("router.dropout", self.dropout, reason));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_other_gates_are_refused_by_name_and_say_whose_they_are() {
        type Set = fn(&mut RouterConfig);
        let table: [(RouterKind, &str, Set); 12] = [
            (TopkSoftmax, "router.top_p", |c| c.top_p = 0.1),
            (TopkSoftmax, "router.tags", |c| c.tags = 2),
            (SoftmaxTopk, "router.weight_scale", |c| c.weight_scale = 2.5),
            (SoftmaxTopk, "router.bias_update_rate", |c| c.bias_update_rate = 0.1),
            (SoftmaxTopk, "router.load_coefficient", |c| c.load_coefficient = 0.1),
            (Gshard, "router.expert_groups", |c| c.expert_groups = 2),
            (Switch, "router.renormalize", |c| c.renormalize = true),
            (Hash, "router.input_jitter", |c| c.input_jitter = 0.01),
            (Hash, "router.hidden_sizes", |c| c.hidden_sizes = vec![8]),
            (ExpertChoice, "router.capacity_factor", |c| c.capacity_factor = Some(1.0)),
            (ExpertChoice, "router.expert_dropout", |c| c.expert_dropout = 0.1),
            (TopP, "router.sinkhorn_iterations", |c| c.sinkhorn_iterations = 3),
        ];
        for (kind, key, set) in table {
            let mut config = RouterConfig { kind, ..RouterConfig::default() };
            let top_k = if kind == Switch { 1 } else { 2 };
            config.validate(8, top_k).unwrap();
            set(&mut config);
            let error = config.validate(8, top_k).unwrap_err();
            assert_eq!(error.key, key);
            assert!(error.reason.contains(&kind.name()), "{error}");
            // What was found is the value, under the name that the key has.
            assert_ne!(error.value, "null", "{error}");
            if key == "router.top_p" {
                assert_eq!(error.value, "0.1");
            }
        }
    }

    #[test]
    fn what_does_not_go_together_is_refused() {
        type Set = fn(&mut RouterConfig);
        let table: [(&str, Set); 13] = [
            ("router.expert_groups", |c| c.kind = Hierarchical),
            ("router.tags", |c| c.kind = MultiGate),
            ("router.groups_per_token", |c| (c.kind, c.expert_groups) = (Hierarchical, 8)),
            ("router.device_groups", |c| c.device_groups = 3),
            ("router.dropout", |c| c.dropout = 0.1),
            ("router.dropout", |c| c.dropout = 1.0),
            ("router.hidden_sizes", |c| c.hidden_sizes = vec![4; 4]),
            ("router.capacity_factor_eval", |c| c.capacity_factor_eval = Some(2.0)),
            ("router.capacity_steps", |c| (c.capacity_factor, c.capacity_steps) = (Some(1.0), 10)),
            ("router.overflow", |c| c.overflow = Overflow::Reroute),
            ("router.input_jitter", |c| c.input_jitter = f32::NAN),
            ("router.expert_dropout", |c| (c.expert_groups, c.expert_dropout) = (4, 0.1)),
            ("router.overflow", |c| {
                (c.overflow, c.capacity_factor, c.expert_dropout) = (Overflow::Reroute, Some(1.0), 0.1);
            }),
        ];
        for (key, set) in table {
            let mut config = RouterConfig::default();
            set(&mut config);
            assert_eq!(config.validate(8, 2).unwrap_err().key, key);
        }
    }

    #[test]
    fn capacity_goes_from_its_first_factor_to_its_last_and_evaluation_has_its_own() {
        let config = RouterConfig {
            capacity_factor: Some(1.0),
            capacity_factor_start: Some(2.0),
            capacity_steps: 10,
            capacity_factor_eval: Some(4.0),
            ..RouterConfig::default()
        };
        let at = |step| config.capacity(100, (2, 8), step).unwrap();
        assert_eq!([at(Some(0)), at(Some(5)), at(Some(10)), at(Some(99)), at(None)], [50, 38, 25, 25, 100]);
        let steady = RouterConfig { capacity_factor: Some(1.0), ..RouterConfig::default() };
        assert_eq!(steady.capacity(100, (2, 8), None), Some(25));
    }

    #[test]
    fn noise_goes_down_evenly_and_stays_at_nothing() {
        let config = RouterConfig { noise_steps: 4, ..RouterConfig::default() };
        assert_eq!([0, 1, 4, 9].map(|step| config.noise_at(step)), [1.0, 0.75, 0.0, 0.0]);
        assert_eq!(RouterConfig::default().noise_at(1000), 1.0);
    }
}
