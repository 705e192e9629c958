//! The shuffle's plans on a GPU against the CPU's, to the last entry: integers and copied weights have one right value.
#![cfg(feature = "cuda")]

mod cuda_support;

use cuda_support::{download, filled, gpu, random_below, random_within, upload};
use moe_kernels::cuda::Cuda;
use moe_kernels::{Cpu, ExpandPlan, ExpertOps, ShuffleDims, ShufflePlan, View, ViewMut};

/// What no plan may leave in a place it owns, and must leave everywhere else.
const UNTOUCHED: i32 = -77;
/// Rows beyond the bound, to see that they stay as they are.
const SPARE: usize = 2;

/// (T, k, E, W): none, one, one rank, more ranks than choices, all ranks and experts there may be, several tiles and several blocks.
const SIZES: [(usize, usize, usize, usize); 12] = [
    (0, 2, 8, 2),
    (1, 1, 1, 1),
    (3, 2, 4, 2),
    (63, 8, 64, 1),
    (64, 6, 64, 64),
    (65, 8, 512, 1),
    (257, 3, 24, 8),
    (1000, 32, 128, 4),
    (2049, 8, 512, 64),
    (4096, 8, 128, 8),
    (20_000, 8, 128, 1),
    (40_000, 2, 16, 4),
];

/// How tokens choose.
#[derive(Clone, Copy, Debug)]
enum Routing {
    Spread,
    OneExpert,
    NothingSent,
    MostDropped,
}
const ROUTINGS: [Routing; 4] = [Routing::Spread, Routing::OneExpert, Routing::NothingSent, Routing::MostDropped];

/// Distinct experts for each token.
fn choices(routing: Routing, dims: ShuffleDims) -> Vec<i32> {
    let ShuffleDims { tokens, top_k, experts, .. } = dims;
    let draws = random_below(1, tokens * top_k, experts);
    let mut ids = vec![-1; tokens * top_k];
    for (t, ids) in ids.chunks_exact_mut(top_k).enumerate() {
        match routing {
            Routing::NothingSent => {}
            Routing::OneExpert => ids[top_k / 2] = experts as i32 - 1,
            Routing::Spread | Routing::MostDropped => {
                for j in 0..top_k {
                    let mut id = draws[t * top_k + j] as i32;
                    while ids[..j].contains(&id) {
                        id = (id + 1) % experts as i32;
                    }
                    ids[j] = id;
                }
            }
        }
    }
    if matches!(routing, Routing::MostDropped) {
        ids.iter_mut().enumerate().filter(|(i, _)| i % 9 != 4).for_each(|(_, id)| *id = -1);
    }
    ids
}

/// [`ShufflePlan`] on the host.
#[derive(Debug, PartialEq)]
struct Planned {
    send_counts: Vec<i32>,
    row_token: Vec<i32>,
    row_experts: Vec<i32>,
    row_choice: Vec<i32>,
    row_weights: Vec<f32>,
    token_rows: Vec<i32>,
    rows: Vec<i32>,
}

fn on_cpu(dims: ShuffleDims, ids: &Vec<i32>, weights: &Vec<f32>) -> Planned {
    let bound = dims.tokens * dims.rows_per_token();
    let per_choice = (bound + SPARE) * dims.top_k;
    let mut plan = Planned {
        send_counts: vec![UNTOUCHED; 2 * dims.ranks],
        row_token: vec![UNTOUCHED; bound + SPARE],
        row_experts: vec![UNTOUCHED; per_choice],
        row_choice: vec![UNTOUCHED; per_choice],
        row_weights: vec![UNTOUCHED as f32; per_choice],
        token_rows: vec![UNTOUCHED; bound],
        rows: vec![UNTOUCHED],
    };
    let views = ShufflePlan {
        send_counts: ViewMut::of(&mut plan.send_counts),
        row_token: ViewMut::of(&mut plan.row_token),
        row_experts: ViewMut::of(&mut plan.row_experts),
        row_choice: ViewMut::of(&mut plan.row_choice),
        row_weights: ViewMut::of(&mut plan.row_weights),
        token_rows: ViewMut::of(&mut plan.token_rows),
        rows: ViewMut::of(&mut plan.rows),
    };
    Cpu.shuffle_plan(dims, View::of(ids), View::of(weights), views);
    plan
}

fn on_gpu(gpu: &Cuda<f32>, dims: ShuffleDims, ids: &[i32], weights: &[f32]) -> Planned {
    let bound = dims.tokens * dims.rows_per_token();
    let per_choice = (bound + SPARE) * dims.top_k;
    let untouched = |len: usize| filled(gpu, len, UNTOUCHED);
    let (ids, weights) = (upload(gpu, ids), upload(gpu, weights));
    let (mut send_counts, mut row_token, mut row_experts) =
        (untouched(2 * dims.ranks), untouched(bound + SPARE), untouched(per_choice));
    let (mut row_choice, mut token_rows, mut rows) = (untouched(per_choice), untouched(bound), untouched(1));
    let mut row_weights = filled(gpu, per_choice, UNTOUCHED as f32);
    let views = ShufflePlan {
        send_counts: ViewMut::of(&mut send_counts),
        row_token: ViewMut::of(&mut row_token),
        row_experts: ViewMut::of(&mut row_experts),
        row_choice: ViewMut::of(&mut row_choice),
        row_weights: ViewMut::of(&mut row_weights),
        token_rows: ViewMut::of(&mut token_rows),
        rows: ViewMut::of(&mut rows),
    };
    gpu.shuffle_plan(dims, View::of(&ids), View::of(&weights), views);
    Planned {
        send_counts: download(gpu, &send_counts),
        row_token: download(gpu, &row_token),
        row_experts: download(gpu, &row_experts),
        row_choice: download(gpu, &row_choice),
        row_weights: download(gpu, &row_weights),
        token_rows: download(gpu, &token_rows),
        rows: download(gpu, &rows),
    }
}

/// That two long plans are equal, without printing them.
#[track_caller]
fn assert_equal<T: PartialEq + std::fmt::Debug>(what: &str, got: &[T], want: &[T]) {
    assert_eq!(got.len(), want.len(), "{what}: lengths");
    if let Some(i) = (0..got.len()).find(|&i| got[i] != want[i]) {
        panic!("{what}[{i}] = {:?}, not {:?}", got[i], want[i]);
    }
}

#[test]
fn shuffle_plans_are_the_cpus() {
    let Some(gpu) = gpu::<f32>() else { return };
    for (tokens, top_k, experts, ranks) in SIZES {
        let dims = ShuffleDims { tokens, top_k, experts, ranks };
        for routing in ROUTINGS {
            let (ids, weights) = (choices(routing, dims), random_within(2, tokens * top_k, 1.0));
            let (got, want) = (on_gpu(&gpu, dims, &ids, &weights), on_cpu(dims, &ids, &weights));
            let what = |name: &str| format!("{dims:?}, {routing:?}: {name}");
            assert_equal(&what("rows"), &got.rows, &want.rows);
            assert_equal(&what("send_counts"), &got.send_counts, &want.send_counts);
            assert_equal(&what("row_token"), &got.row_token, &want.row_token);
            assert_equal(&what("row_experts"), &got.row_experts, &want.row_experts);
            assert_equal(&what("row_choice"), &got.row_choice, &want.row_choice);
            assert_equal(&what("row_weights"), &got.row_weights, &want.row_weights);
            assert_equal(&what("token_rows"), &got.token_rows, &want.token_rows);
        }
    }
}

/// Arrivals as the plan of `routing` makes them for one rank: its local experts ascending, then −1; garbage beyond the rows.
fn arrivals(routing: Routing, dims: ShuffleDims) -> (Vec<i32>, Vec<i32>) {
    let plan = on_cpu(dims, &choices(routing, dims), &random_within(2, dims.tokens * dims.top_k, 1.0));
    let busiest = (0..dims.ranks).max_by_key(|&rank| plan.send_counts[rank]).unwrap_or(0);
    let first: i32 = plan.send_counts[..busiest].iter().sum();
    let arrived = plan.send_counts[busiest] as usize;
    let from = first as usize * dims.top_k;
    let mut experts = plan.row_experts[from..from + arrived * dims.top_k].to_vec();
    experts.resize((arrived + SPARE) * dims.top_k, 1 << 30);
    // As if they came from all ranks, unevenly.
    let mut counts = vec![(arrived / dims.ranks / 2) as i32; dims.ranks];
    counts[dims.ranks / 2] += arrived as i32 - counts.iter().sum::<i32>();
    (counts, experts)
}

#[test]
fn expansion_plans_are_the_cpus() {
    let Some(gpu) = gpu::<f32>() else { return };
    for (tokens, top_k, experts, ranks) in SIZES {
        let dims = ShuffleDims { tokens, top_k, experts, ranks };
        for routing in ROUTINGS {
            let (counts, row_experts) = arrivals(routing, dims);
            let untouched = |len: usize| vec![UNTOUCHED; len];
            let (mut rows, mut offsets) = (untouched(1), untouched(dims.local_experts() + 1));
            let [mut slots, mut source, mut origin] = [row_experts.len(); 3].map(untouched);
            let plan = ExpandPlan {
                rows: ViewMut::of(&mut rows),
                offsets: ViewMut::of(&mut offsets),
                slots: ViewMut::of(&mut slots),
                source: ViewMut::of(&mut source),
                origin: ViewMut::of(&mut origin),
            };
            Cpu.expand_plan(dims, View::of(&counts), View::of(&row_experts), plan);

            let filled = |len: usize| filled(&gpu, len, UNTOUCHED);
            let (mut got_rows, mut got_offsets) = (filled(1), filled(offsets.len()));
            let [mut got_slots, mut got_source, mut got_origin] = [row_experts.len(); 3].map(filled);
            let plan = ExpandPlan {
                rows: ViewMut::of(&mut got_rows),
                offsets: ViewMut::of(&mut got_offsets),
                slots: ViewMut::of(&mut got_slots),
                source: ViewMut::of(&mut got_source),
                origin: ViewMut::of(&mut got_origin),
            };
            let (counts, row_experts) = (upload(&gpu, &counts), upload(&gpu, &row_experts));
            gpu.expand_plan(dims, View::of(&counts), View::of(&row_experts), plan);
            let what = |name: &str| format!("{dims:?}, {routing:?}: {name}");
            assert_equal(&what("rows"), &download(&gpu, &got_rows), &rows);
            assert_equal(&what("offsets"), &download(&gpu, &got_offsets), &offsets);
            assert_equal(&what("slots"), &download(&gpu, &got_slots), &slots);
            assert_equal(&what("source"), &download(&gpu, &got_source), &source);
            assert_equal(&what("origin"), &download(&gpu, &got_origin), &origin);
        }
    }
}
