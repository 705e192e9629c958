//! The shapes that are measured, by name: those of well-known models.
//!
//! Owns names and sizes. Letters: T tokens, H hidden, F expert feed-forward, E experts, k experts a token; of a product E groups, M rows
//! in all, K its reduction, N its columns.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::weighted::WeightedIndex;
use rand_distr::{Distribution, StandardNormal};
use serde::Serialize;

/// A whole MoE layer.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Layer {
    pub(super) name: &'static str,
    #[serde(rename = "T")]
    pub(super) t: usize,
    #[serde(rename = "H")]
    pub(super) h: usize,
    #[serde(rename = "F")]
    pub(super) f: usize,
    #[serde(rename = "E")]
    pub(super) e: usize,
    pub(super) k: usize,
}

const fn layer(name: &'static str, t: usize, h: usize, f: usize, [e, k]: [usize; 2]) -> Layer {
    Layer { name, t, h, f, e, k }
}

/// The layers.
pub(super) const LAYERS: [Layer; 5] = [
    layer("mixtral-8x7b", 8192, 4096, 14336, [8, 2]),
    layer("qwen3-30b-a3b", 16384, 2048, 768, [128, 8]),
    layer("deepseek-moe-16b", 16384, 2048, 1408, [64, 6]),
    layer("olmoe-1b-7b", 16384, 2048, 1024, [64, 8]),
    layer("deepseek-v3-slice", 4096, 7168, 2048, [32, 8]),
];

/// A grouped product.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Grouped {
    pub(super) name: &'static str,
    #[serde(rename = "E")]
    pub(super) e: usize,
    #[serde(rename = "M")]
    pub(super) m: usize,
    #[serde(rename = "K")]
    pub(super) k: usize,
    #[serde(rename = "N")]
    pub(super) n: usize,
}

const fn grouped(name: &'static str, e: usize, m: usize, k: usize, n: usize) -> Grouped {
    Grouped { name, e, m, k, n }
}

/// The products.
pub(super) const GROUPED: [Grouped; 9] = [
    grouped("mixtral-up", 2, 16384, 4096, 28672),
    grouped("mixtral-down", 2, 16384, 14336, 4096),
    grouped("dsv3-up", 32, 32768, 7168, 4096),
    grouped("dsv3-down", 32, 32768, 2048, 7168),
    grouped("qwen3-up", 128, 131_072, 2048, 1536),
    grouped("qwen3-down", 128, 131_072, 768, 2048),
    grouped("olmoe-up", 64, 131_072, 2048, 2048),
    grouped("olmoe-down", 64, 131_072, 1024, 2048),
    grouped("deepseek-up", 64, 98304, 2048, 2816),
];

/// How uneven groups are.
pub(super) const SKEWS: [f64; 2] = [0.0, 0.5];

/// Where each group's rows begin, and their number: rows in sixteens, drawn from a softmax of `skew` · normal logits.
pub(super) fn group_offsets(e: usize, m: usize, skew: f64) -> Vec<i32> {
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let weights: Vec<f64> =
        (0..e).map(|_| (skew * Distribution::<f64>::sample(&StandardNormal, &mut rng)).exp()).collect();
    let mut sizes = vec![0; e];
    if let Ok(groups) = WeightedIndex::new(&weights) {
        for _ in 0..m / 16 {
            sizes[groups.sample(&mut rng)] += 16;
        }
    }
    let mut offsets = vec![0; e + 1];
    for (group, size) in sizes.into_iter().enumerate() {
        offsets[group + 1] = offsets[group] + size;
    }
    offsets
}

/// Of `all`, those whose name is in `names`; all where there are none. The first unknown name is the error.
pub(super) fn chosen<T: Copy>(all: &[T], name: fn(&T) -> &'static str, names: &[String]) -> Result<Vec<T>, String> {
    if names.is_empty() {
        return Ok(all.to_vec());
    }
    let find = |wanted: &String| all.iter().find(|shape| name(shape) == wanted).copied().ok_or_else(|| wanted.clone());
    names.iter().map(find).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_hold_all_rows_in_sixteens() {
        for shape in GROUPED {
            for skew in SKEWS {
                let offsets = group_offsets(shape.e, shape.m, skew);
                assert_eq!((offsets.len(), offsets[shape.e] as usize), (shape.e + 1, shape.m), "{}", shape.name);
                assert!(offsets.windows(2).all(|pair| pair[0] <= pair[1] && (pair[1] - pair[0]) % 16 == 0));
            }
        }
    }

    #[test]
    fn an_unknown_name_is_named() {
        let names = |list: &[&str]| list.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let found = |list: &[&str]| chosen(&LAYERS, |layer| layer.name, &names(list)).map(|layers| layers.len());
        assert_eq!((found(&[]), found(&["olmoe-1b-7b"])), (Ok(5), Ok(1)));
        assert_eq!(found(&["olmoe-1b-7b", "other"]), Err("other".to_owned()));
    }
}
