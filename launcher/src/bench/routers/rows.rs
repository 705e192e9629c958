//! The gates that are compared: one row each.
//!
//! Owns names, papers and settings. A new gate or loss is one more row; the table of docs/routers.md has the same names.

/// A gate with its settings.
#[derive(Clone, Copy, Debug)]
pub(super) struct Row {
    /// What `--only` and the table call it.
    pub(super) name: &'static str,
    /// Where it was described.
    pub(super) paper: &'static str,
    /// What its choice or its losses make better.
    pub(super) optimises: &'static str,
    /// Keys and values over the preset's, as `--set` takes them.
    pub(super) set: &'static [(&'static str, &'static str)],
}

impl Row {
    /// The tags of the text that its routers look at; none: they do not.
    pub(super) fn tags(&self) -> std::ops::Range<usize> {
        let tags = self.set.iter().find(|(key, _)| *key == "router.tags").and_then(|(_, tags)| tags.parse().ok());
        0..tags.unwrap_or(0)
    }

    /// Its settings as `--set` takes them.
    pub(super) fn assignments(&self) -> impl Iterator<Item = String> + use<> {
        self.set.iter().map(|(key, value)| format!("{key}={value}"))
    }
}

/// Every gate, in the order of the table.
pub(super) const ROWS: [Row; 30] = [
    Row {
        name: "topk-softmax",
        paper: "Jiang et al. 2024 (Mixtral)",
        optimises: "the k highest logits, balanced by a loss",
        set: &[("router.kind", "topk-softmax")],
    },
    Row {
        name: "softmax-topk",
        paper: "Muennighoff et al. 2024 (OLMoE)",
        optimises: "as above, weights of all experts' softmax",
        set: &[("router.kind", "softmax-topk")],
    },
    Row {
        name: "no-balance-loss",
        paper: "-",
        optimises: "nothing but the model's own loss",
        set: &[("router.kind", "topk-softmax"), ("router.balance_coefficient", "0.0")],
    },
    Row {
        name: "sequence-balance",
        paper: "Fedus et al. 2021; scope of DeepSeek-V3",
        optimises: "load in each sequence",
        set: &[("router.kind", "topk-softmax"), ("router.balance_scope", "sequence")],
    },
    Row {
        name: "global-balance",
        paper: "Qiu et al. 2025",
        optimises: "load in the global batch",
        set: &[("router.kind", "topk-softmax"), ("router.balance_scope", "global")],
    },
    Row {
        name: "z-loss",
        paper: "Zoph et al. 2022 (ST-MoE)",
        optimises: "the size of logits",
        set: &[("router.kind", "topk-softmax"), ("router.z_coefficient", "0.001")],
    },
    Row {
        name: "capacity",
        paper: "Fedus et al. 2021; Riquelme et al. 2021",
        optimises: "a bound of 1.25 on load; least likely choices drop",
        set: &[("router.kind", "softmax-topk"), ("router.capacity_factor", "1.25"), ("router.overflow", "probability")],
    },
    Row {
        name: "switch",
        paper: "Fedus et al. 2021",
        optimises: "computation: one expert a token",
        set: &[("router.kind", "switch"), ("model.top_k", "1")],
    },
    Row {
        name: "gshard",
        paper: "Lepikhin et al. 2020",
        optimises: "computation: the second expert at random",
        set: &[("router.kind", "gshard"), ("model.top_k", "2")],
    },
    Row {
        name: "noisy-topk",
        paper: "Shazeer et al. 2017",
        optimises: "importance and load, by noise and two losses",
        set: &[("router.kind", "noisy-topk")],
    },
    Row {
        name: "sigmoid-bias",
        paper: "Wang et al. 2024; DeepSeek-V3",
        optimises: "load by a bias, no loss in the way",
        set: &[("router.kind", "sigmoid-bias"), ("router.balance_coefficient", "0.0")],
    },
    Row {
        name: "top-p",
        paper: "Huang et al. 2024",
        optimises: "computation: as many experts as a token needs",
        set: &[("router.kind", "top-p"), ("model.top_k", "4"), ("router.top_p", "0.6")],
    },
    Row {
        name: "sinkhorn",
        paper: "Clark et al. 2022",
        optimises: "a balanced assignment of each batch",
        set: &[("router.kind", "sinkhorn"), ("router.balance_coefficient", "0.0")],
    },
    Row {
        name: "switch-jitter",
        paper: "Fedus et al. 2021",
        optimises: "as switch, the router's input in a jitter",
        set: &[("router.kind", "switch"), ("model.top_k", "1"), ("router.input_jitter", "0.01")],
    },
    Row {
        name: "residual",
        paper: "Rajbhandari et al. 2022 (DeepSpeed-MoE)",
        optimises: "computation: a dense part and one expert",
        set: &[("router.kind", "switch"), ("model.top_k", "1"), ("model.shared_expert_ffn_size", "128")],
    },
    Row {
        name: "deepseek-moe",
        paper: "Dai et al. 2024",
        optimises: "a shared expert; load of experts and devices",
        set: &[
            ("router.kind", "softmax-topk"),
            ("model.shared_expert_ffn_size", "128"),
            ("router.device_coefficient", "0.05"),
            ("router.device_groups", "4"),
        ],
    },
    Row {
        name: "group-limited",
        paper: "DeepSeek-V3 2024",
        optimises: "devices a token visits, load by a bias",
        set: &[
            ("router.kind", "sigmoid-bias"),
            ("router.balance_coefficient", "0.0"),
            ("router.renormalize", "true"),
            ("router.expert_groups", "4"),
            ("router.groups_per_token", "2"),
        ],
    },
    Row {
        name: "expert-choice",
        paper: "Zhou et al. 2022",
        optimises: "load: every expert takes as many tokens",
        set: &[("router.kind", "expert-choice"), ("router.balance_coefficient", "0.0")],
    },
    Row {
        name: "hash",
        paper: "Roller et al. 2021",
        optimises: "nothing: a hash of the token decides",
        set: &[("router.kind", "hash"), ("router.balance_coefficient", "0.0")],
    },
    Row {
        name: "hierarchical",
        paper: "Jordan and Jacobs 1994",
        optimises: "a softmax over groups, one in each",
        set: &[("router.kind", "hierarchical"), ("router.expert_groups", "4"), ("router.groups_per_token", "2")],
    },
    Row {
        name: "multi-gate",
        paper: "Ma et al. 2018 (MMoE)",
        optimises: "a router for each of two tags",
        set: &[("router.kind", "multi-gate"), ("router.tags", "2")],
    },
    Row {
        name: "hidden-layer",
        paper: "-",
        optimises: "a router of two layers, with dropout",
        set: &[("router.kind", "topk-softmax"), ("router.hidden_sizes", "[64]"), ("router.dropout", "0.1")],
    },
    Row {
        name: "expert-dropout",
        paper: "-",
        optimises: "experts that are not relied on",
        set: &[("router.kind", "topk-softmax"), ("router.expert_dropout", "0.1")],
    },
    Row {
        name: "mass",
        paper: "Shazeer et al. 2017",
        optimises: "cv² of summed probabilities",
        set: &[
            ("router.kind", "topk-softmax"),
            ("router.balance_coefficient", "0.0"),
            ("router.mass_coefficient", "0.05"),
        ],
    },
    Row {
        name: "difference",
        paper: "-",
        optimises: "usage as large as importance",
        set: &[
            ("router.kind", "topk-softmax"),
            ("router.balance_coefficient", "0.0"),
            ("router.difference_coefficient", "0.1"),
        ],
    },
    Row {
        name: "limoe-entropies",
        paper: "Mustafa et al. 2022 (LIMoE)",
        optimises: "sure tokens, varied batches",
        set: &[
            ("router.kind", "softmax-topk"),
            ("router.balance_coefficient", "0.0"),
            ("router.entropy_coefficient", "0.01"),
            ("router.batch_entropy_coefficient", "0.04"),
        ],
    },
    Row {
        name: "reroute",
        paper: "-",
        optimises: "a bound of 1 on load, overflow to the next best",
        set: &[("router.kind", "softmax-topk"), ("router.capacity_factor", "1.0"), ("router.overflow", "reroute")],
    },
    Row {
        name: "capacity-schedule",
        paper: "-",
        optimises: "a bound on load from 4 down to 1",
        set: &[
            ("router.kind", "softmax-topk"),
            ("router.capacity_factor", "1.0"),
            ("router.capacity_factor_start", "4.0"),
            ("router.capacity_steps", "200"),
            ("router.capacity_factor_eval", "2.0"),
        ],
    },
    Row {
        name: "multi-head",
        paper: "Wu et al. 2024 (MH-MoE)",
        optimises: "parts of tokens, routed by themselves",
        set: &[("router.kind", "topk-softmax"), ("model.sub_tokens", "2")],
    },
    Row {
        name: "norm-behind",
        paper: "Vaswani et al. 2017",
        optimises: "norm(x + moe(x))",
        set: &[("router.kind", "topk-softmax"), ("model.block_norm", "post")],
    },
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use moe_runtime::config::{ConfigBuilder, PRESETS};

    use super::*;

    #[test]
    fn every_row_is_a_configuration_of_every_preset_and_no_two_are_the_same() {
        for (preset, _) in PRESETS {
            let configured = ROWS.map(|row| {
                let builder = row.assignments().fold(ConfigBuilder::new().preset(preset), ConfigBuilder::set);
                let tagged = |builder: ConfigBuilder, tag| {
                    let builder = builder.set(format!("data.sources.tag{tag}.paths=[\"a.txt\"]"));
                    builder.set(format!("data.sources.tag{tag}.tag={tag}"))
                };
                let builder = row.tags().fold(builder, tagged);
                let resolved = builder.build().unwrap_or_else(|error| panic!("{}: {error}", row.name));
                resolved.validate(1).unwrap_or_else(|error| panic!("{} on {preset}: {error}", row.name));
                resolved.config
            });
            for (i, a) in configured.iter().enumerate() {
                assert!(configured[..i].iter().all(|b| a != b), "{} on {preset} is another row", ROWS[i].name);
            }
        }
        let names: BTreeSet<_> = ROWS.iter().map(|row| row.name).collect();
        assert_eq!(names.len(), ROWS.len());
    }
}
