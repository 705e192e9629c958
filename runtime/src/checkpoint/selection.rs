//! Which tensors are trained, by patterns of their names.
//!
//! Owns the patterns and what they meet. It freezes nothing itself: the optimizer leaves out the ranges it is given.

use std::ops::Range;

use glob::Pattern;

use super::names;
use crate::invalid::InvalidValue;
use crate::model::Family;
use crate::model::layout::{Layout, PartId, PartKind};

/// The key of the patterns that freeze.
const FREEZE: &str = "train.freeze";
/// The key of the patterns that train.
const TRAINABLE: &str = "train.trainable";

/// Patterns of names as they are on disk: `*` stands for any characters, `?` for one, `[ab]` for one of several.
#[derive(Clone, Debug)]
pub struct Selection {
    freeze: Vec<Pattern>,
    trainable: Vec<Pattern>,
}

impl Selection {
    /// Trained is what a pattern of `trainable` meets (all where there are none) and no pattern of `freeze`.
    ///
    /// # Errors
    /// A pattern that is none, with its key.
    pub fn new(freeze: &[String], trainable: &[String]) -> Result<Self, InvalidValue> {
        let parse = |key, patterns: &[String]| {
            let wrong = |text: &String, error: glob::PatternError| {
                InvalidValue::new(key, format!("{text:?}"), format!("is no pattern: {}", error.msg))
            };
            patterns.iter().map(|text| Pattern::new(text).map_err(|error| wrong(text, error))).collect::<Result<_, _>>()
        };
        Ok(Self { freeze: parse(FREEZE, freeze)?, trainable: parse(TRAINABLE, trainable)? })
    }

    /// Whether everything is trained.
    pub fn is_all(&self) -> bool {
        self.freeze.is_empty() && self.trainable.is_empty()
    }

    /// Whether a tensor is left as it is.
    pub fn is_frozen(&self, name: &str) -> bool {
        let meets = |patterns: &[Pattern]| patterns.iter().any(|pattern| pattern.matches(name));
        meets(&self.freeze) || !(self.trainable.is_empty() || meets(&self.trainable))
    }

    /// Checks the patterns against the whole model.
    ///
    /// # Errors
    /// A pattern that meets no tensor, or nothing that is left to train.
    pub fn check(&self, family: Family, layout: &Layout) -> Result<(), InvalidValue> {
        let names: Vec<String> = layout.parts().map(|(part, _)| names::tensor_name(family, part.id)).collect();
        for (key, pattern) in [(FREEZE, &self.freeze), (TRAINABLE, &self.trainable)]
            .into_iter()
            .flat_map(|(key, patterns)| patterns.iter().map(move |pattern| (key, pattern)))
        {
            if !names.iter().any(|name| pattern.matches(name)) {
                let example = names.iter().find(|name| name.contains("layers.")).or(names.first());
                let reason = format!(
                    "meets no tensor of this model; a name is, for example, {:?}",
                    example.map_or("", String::as_str)
                );
                return Err(InvalidValue::new(key, format!("{:?}", pattern.as_str()), reason));
            }
        }
        if names.iter().all(|name| self.is_frozen(name)) {
            let (key, patterns) =
                if self.freeze.is_empty() { (TRAINABLE, &self.trainable) } else { (FREEZE, &self.freeze) };
            let shown: Vec<_> = patterns.iter().map(Pattern::as_str).collect();
            return Err(InvalidValue::new(key, format!("{shown:?}"), "leaves nothing to train; freeze fewer tensors"));
        }
        Ok(())
    }

    /// Elements of the flat buffer that are frozen, ascending; what touches is one range.
    pub fn frozen_ranges(&self, family: Family, layout: &Layout) -> Vec<Range<usize>> {
        if self.is_all() {
            return Vec::new();
        }
        let frozen = layout.parts().filter(|(part, _)| self.is_frozen(&names::tensor_name(family, part.id)));
        let mut ranges: Vec<Range<usize>> = frozen.map(|(part, _)| part.range.clone()).collect();
        ranges.sort_by_key(|range| range.start);
        ranges.dedup_by(|next, before| {
            let touches = before.end == next.start;
            if touches {
                before.end = next.end;
            }
            touches
        });
        ranges
    }

    /// Whether the selection bias of a block, which no gradient moves, stays as well.
    pub fn freezes_bias(&self, family: Family, layer: usize) -> bool {
        let id = PartId { kind: PartKind::RouterBias, layer: Some(layer), expert: None };
        !self.is_all() && self.is_frozen(&names::tensor_name(family, id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ModelConfig;
    use crate::routing::RouterConfig;

    fn layout() -> Layout {
        let config = ModelConfig { vocab_size: 16, ..ModelConfig::default() };
        Layout::new(&config, &RouterConfig::default(), 0..8)
    }

    fn selection(freeze: &[&str], trainable: &[&str]) -> Selection {
        let owned = |patterns: &[&str]| patterns.iter().map(|&text| text.to_owned()).collect::<Vec<_>>();
        Selection::new(&owned(freeze), &owned(trainable)).unwrap()
    }

    #[test]
    fn trained_is_what_one_list_names_and_the_other_does_not() {
        let chosen = selection(&["*.experts.0.*"], &["*.experts.*", "lm_head.*"]);
        for (name, frozen) in [
            ("lm_head.weight", false),
            ("model.layers.1.block_sparse_moe.experts.3.w1.weight", false),
            ("model.layers.1.block_sparse_moe.experts.0.w1.weight", true),
            ("model.norm.weight", true),
        ] {
            assert_eq!(chosen.is_frozen(name), frozen, "{name}");
        }
        chosen.check(Family::Mixtral, &layout()).unwrap();
        assert!(selection(&[], &[]).frozen_ranges(Family::Mixtral, &layout()).is_empty());
    }

    #[test]
    fn ranges_cover_what_is_frozen_and_nothing_else() {
        let (layout, chosen) = (layout(), selection(&["*.q_proj.*", "*.k_proj.*", "model.embed_tokens.weight"], &[]));
        let ranges = chosen.frozen_ranges(Family::Mixtral, &layout);
        assert!(ranges.windows(2).all(|pair| pair[0].end < pair[1].start));
        for (part, _) in layout.parts() {
            let frozen = chosen.is_frozen(&names::tensor_name(Family::Mixtral, part.id));
            let covered = |range: &Range<usize>| range.start <= part.range.start && part.range.end <= range.end;
            let apart = |range: &Range<usize>| range.end <= part.range.start || part.range.end <= range.start;
            assert!(if frozen { ranges.iter().any(covered) } else { ranges.iter().all(apart) }, "{}", part.id);
        }
    }

    #[test]
    fn patterns_that_do_nothing_or_leave_nothing_are_refused_by_their_key() {
        let refused = |freeze: &[&str], trainable: &[&str]| {
            selection(freeze, trainable).check(Family::Mixtral, &layout()).unwrap_err().to_string()
        };
        assert!(
            refused(&["model.layers.9.*"], &[]).starts_with("train.freeze = \"model.layers.9.*\": meets no tensor")
        );
        assert!(refused(&[], &["heads"]).starts_with("train.trainable = \"heads\": meets no tensor"));
        assert!(refused(&["*"], &[]).contains("leaves nothing to train"));
        assert_eq!(Selection::new(&["[".into()], &[]).unwrap_err().key, "train.freeze");
    }
}
