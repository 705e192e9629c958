//! The flat buffer's parts and regions.

use super::*;

fn config() -> ModelConfig {
    ModelConfig { vocab_size: 11, qkv_bias: true, shared_expert_ffn_size: 24, ..ModelConfig::default() }
}

#[test]
fn tensors_tile_the_flat_buffer_without_overlap() {
    let layout = Layout::new(&config(), &RouterConfig::default(), 2..4);
    let mut ranges: Vec<_> = layout.tensors().iter().map(|t| t.range.clone()).collect();
    ranges.sort_by_key(|r| r.start);
    assert!(ranges.windows(2).all(|w| w[0].end <= w[1].start && w[1].start - w[0].end < ALIGNMENT));
    assert!(layout.tensors().iter().all(|t| t.parts.iter().map(|p| p.range.len()).sum::<usize>() == t.range.len()));
}

#[test]
fn shards_of_all_ranks_together_name_what_one_rank_alone_names() {
    let whole = Layout::new(&config(), &RouterConfig::default(), 0..8);
    let mut expected: Vec<PartId> = whole.parts().map(|(part, _)| part.id).collect();
    let mut found: Vec<PartId> = (0..4)
        .flat_map(|rank| {
            let layout = Layout::new(&config(), &RouterConfig::default(), rank * 2..rank * 2 + 2);
            let keep = move |o| rank == 0 || o == Ownership::Expert;
            layout.parts().filter(|(_, o)| keep(*o)).map(|(part, _)| part.id).collect::<Vec<_>>()
        })
        .collect();
    expected.sort();
    found.sort();
    assert_eq!(found, expected);
}

#[test]
fn a_tied_head_is_the_embedding_and_no_part_of_its_own() {
    let tied = Layout::new(&ModelConfig { tie_embeddings: true, ..config() }, &RouterConfig::default(), 0..8);
    assert_eq!(tied.head, tied.embedding);
    assert!(tied.parts().all(|(part, _)| part.id.kind != PartKind::Head));
}

#[test]
fn blocks_matrices_follow_one_another() {
    let layout = Layout::new(&config(), &RouterConfig::default(), 2..4);
    for ownership in [Ownership::Replicated, Ownership::Expert] {
        let of = |block| layout.block_matrices(block).filter(|(_, o)| *o == ownership).map(|(range, _)| range);
        let stretches: Vec<_> = (0..layout.blocks.len()).flat_map(of).collect();
        assert_eq!(stretches.len(), layout.blocks.len());
        assert!(stretches.windows(2).all(|pair| pair[0].end == pair[1].start), "{stretches:?}");
    }
    let all: usize = (0..layout.blocks.len()).flat_map(|b| layout.block_matrices(b)).map(|(r, _)| r.len()).sum();
    let outside = [layout.embedding, layout.head].map(|id| layout.range(id).len()).iter().sum::<usize>();
    assert_eq!(all + outside, layout.regions.replicated.len() + layout.regions.experts.len());
}

#[test]
fn vectors_and_matrices_never_share_a_region() {
    let layout = Layout::new(&config(), &RouterConfig::default(), 0..8);
    for (part, ownership) in layout.parts() {
        let region = match (ownership, part.shape.len()) {
            (Ownership::Expert, _) => &layout.regions.experts,
            (_, 1) => &layout.regions.replicated_vectors,
            _ => &layout.regions.replicated,
        };
        assert!(region.contains(&part.range.start), "{} is outside its region", part.id);
    }
}

#[test]
fn a_token_of_the_preset_sized_model_meets_a_quarter_of_the_experts() {
    let (all, active) = parameter_counts(&config(), &RouterConfig::default());
    let experts = 2 * 8 * 3 * 64 * 128;
    assert_eq!(all - active, experts - experts * 2 / 8);
}
