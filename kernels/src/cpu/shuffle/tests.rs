//! The plans against definitions that sort, and whole shuffles of several ranks in one process: dispatch, identity experts, combine.

use proptest::prelude::*;

use crate::cpu::testkit::{assert_close, rng, rounding, uniform};
use crate::{CombineDims, Cpu, ExpandPlan, ExpertOps, Rows, ShuffleDims, ShufflePlan, View, ViewMut};

/// What no plan may leave in a place it owns, and must leave everywhere else.
const UNTOUCHED: i32 = -77;
/// Rows beyond the bound, to see that they stay as they are.
const SPARE: usize = 2;

/// [`ShufflePlan`] with its memory.
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

fn shuffle_plan(dims: ShuffleDims, ids: &Vec<i32>, weights: &Vec<f32>) -> Planned {
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

/// A choice in the order of the plan: (rank, token, expert on that rank, choice).
type Sent = (usize, usize, usize, usize);

/// The same plan from its documentation, by sorting.
fn reference_plan(dims: ShuffleDims, ids: &[i32], weights: &[f32]) -> Planned {
    let (k, local, per_token) = (dims.top_k, dims.local_experts(), dims.rows_per_token());
    let bound = dims.tokens * per_token;
    let mut choices: Vec<Sent> = (0..ids.len())
        .filter(|&choice| ids[choice] >= 0)
        .map(|choice| (ids[choice] as usize / local, choice / k, ids[choice] as usize % local, choice))
        .collect();
    choices.sort_unstable();
    let rows: Vec<_> = choices.chunk_by(|a, b| (a.0, a.1) == (b.0, b.1)).collect();
    let padded = |of: &dyn Fn(&Sent) -> i32| {
        let mut out = vec![UNTOUCHED; (bound + SPARE) * k];
        for (r, row) in rows.iter().enumerate() {
            for j in 0..k {
                out[r * k + j] = row.get(j).map_or(-1, of);
            }
        }
        out
    };
    let row_choice = padded(&|choice| choice.3 as i32);
    let weight = |&choice: &i32| match choice {
        UNTOUCHED => UNTOUCHED as f32,
        -1 => 0.0,
        choice => weights[choice as usize],
    };
    let mut plan = Planned {
        send_counts: vec![0; 2 * dims.ranks],
        row_token: vec![UNTOUCHED; bound + SPARE],
        row_experts: padded(&|choice| choice.2 as i32),
        row_weights: row_choice.iter().map(weight).collect(),
        row_choice,
        token_rows: vec![-1; bound],
        rows: vec![rows.len() as i32],
    };
    for (r, row) in rows.iter().enumerate() {
        let (rank, token, ..) = row[0];
        plan.send_counts[rank] += 1;
        plan.send_counts[dims.ranks + rank] += row.len() as i32;
        plan.row_token[r] = token as i32;
        let free = plan.token_rows[token * per_token..].iter().position(|&row| row == -1).unwrap();
        plan.token_rows[token * per_token + free] = r as i32;
    }
    plan
}

#[test]
fn a_small_plan_by_hand() {
    // Experts 0, 1 on rank 0 and 2, 3 on rank 1. Token 1 has both experts of rank 1, token 2 nothing.
    let dims = ShuffleDims { tokens: 3, top_k: 2, experts: 4, ranks: 2 };
    let plan = shuffle_plan(dims, &vec![2, 0, 3, 2, -1, -1], &vec![0.1, 0.2, 0.3, 0.4, 0.5, 0.6]);
    assert_eq!((plan.rows[0], plan.send_counts.as_slice()), (3, [1, 2, 1, 3].as_slice()));
    assert_eq!(plan.row_token[..3], [0, 0, 1]);
    assert_eq!(plan.row_experts[..6], [0, -1, 0, -1, 0, 1]);
    assert_eq!(plan.row_choice[..6], [1, -1, 0, -1, 3, 2]);
    assert_eq!(plan.row_weights[..6], [0.2, 0.0, 0.1, 0.0, 0.4, 0.3]);
    assert_eq!(plan.token_rows, [0, 1, 2, -1, -1, -1]);
}

#[test]
#[should_panic(expected = "expert 4 of 4")]
fn an_expert_that_does_not_exist_is_named() {
    shuffle_plan(ShuffleDims { tokens: 1, top_k: 1, experts: 4, ranks: 2 }, &vec![4], &vec![1.0]);
}

/// One rank's routing.
#[derive(Clone, Debug)]
struct Routed {
    dims: ShuffleDims,
    ids: Vec<i32>,
    weights: Vec<f32>,
}

/// Each rank's routing: any number of tokens, distinct experts a token, some choices dropped; now and then all on one expert.
fn ranks() -> impl Strategy<Value = Vec<Routed>> {
    (1usize..5, 1usize..4).prop_flat_map(|(ranks, local)| {
        let experts = ranks * local;
        (1..=experts.min(5)).prop_flat_map(move |top_k| prop::collection::vec(one_rank(ranks, experts, top_k), ranks))
    })
}

fn one_rank(ranks: usize, experts: usize, top_k: usize) -> impl Strategy<Value = Routed> {
    let order = Just((0..experts as i32).collect::<Vec<_>>()).prop_shuffle();
    let token = (order, prop::collection::vec(prop::bool::weighted(0.2), top_k), prop::bool::weighted(0.1));
    (prop::collection::vec(token, 0..12), prop::bool::weighted(0.15), any::<u64>()).prop_map(
        move |(tokens, one_expert, seed)| {
            let dims = ShuffleDims { tokens: tokens.len(), top_k, experts, ranks };
            let id = |order: &[i32], gone: &[bool], j: usize, all_gone: bool| match (one_expert, j) {
                (true, 0) => experts as i32 - 1,
                (true, _) => -1,
                (false, _) if gone[j] || all_gone => -1,
                (false, _) => order[j],
            };
            let ids: Vec<i32> = tokens
                .iter()
                .flat_map(|(order, gone, all_gone)| (0..top_k).map(move |j| id(order, gone, j, *all_gone)))
                .collect();
            let weights = uniform(&mut rng(seed), ids.len(), 1.0);
            Routed { dims, ids, weights }
        },
    )
}

/// What one rank received: rows by source rank, and how many from each.
struct Arrived {
    counts: Vec<i32>,
    rows: usize,
    experts: Vec<i32>,
    weights: Vec<f32>,
    x: Vec<f32>,
    dout: Vec<f32>,
}

/// Cuts the rows of source `from` for `to` out of a `[R, width]` array.
fn rows_for<'a, T>(plan: &Planned, to: usize, width: usize, of: &'a [T]) -> &'a [T] {
    let start: i32 = plan.send_counts[..to].iter().sum();
    &of[start as usize * width..(start + plan.send_counts[to]) as usize * width]
}

fn gather(rows: Rows<'_, Cpu>, width: usize, index: &Vec<i32>, src: &Vec<f32>, len: usize) -> Vec<f32> {
    let mut dst = vec![f32::NAN; len];
    Cpu.gather_rows(rows, width, View::of(index), View::of(src), ViewMut::of(&mut dst));
    dst
}

fn all_to_all(to: usize, ranks: &[Routed], plans: &[Planned], sent: &[(Vec<f32>, Vec<f32>)], width: usize) -> Arrived {
    let k = ranks[0].dims.top_k;
    let mut arrived = Arrived {
        counts: plans.iter().map(|plan| plan.send_counts[to]).collect(),
        rows: 0,
        experts: vec![],
        weights: vec![],
        x: vec![],
        dout: vec![],
    };
    for (plan, (x, dout)) in plans.iter().zip(sent) {
        arrived.rows += plan.send_counts[to] as usize;
        arrived.experts.extend(rows_for(plan, to, k, &plan.row_experts));
        arrived.weights.extend(rows_for(plan, to, k, &plan.row_weights));
        arrived.x.extend(rows_for(plan, to, width, x));
        arrived.dout.extend(rows_for(plan, to, width, dout));
    }
    // The receive buffer is larger than what arrived; the rest is poison.
    let bound = arrived.rows + SPARE;
    arrived.experts.resize(bound * k, UNTOUCHED);
    arrived.weights.resize(bound * k, f32::NAN);
    arrived.x.resize(bound * width, f32::NAN);
    arrived.dout.resize(bound * width, f32::NAN);
    arrived
}

fn assert_poisoned(what: &str, rest: &[f32]) {
    assert!(rest.iter().all(|v| v.is_nan()), "{what}: rows beyond the count were written");
}

/// What goes home from one rank, by arrived row: output, input gradient, weights' gradients.
struct Homeward {
    out: Vec<f32>,
    dx: Vec<f32>,
    dweights: Vec<f32>,
}

/// Expansion, identity experts, reduction, and the same backwards.
fn on_arrival(dims: ShuffleDims, arrived: &Arrived, width: usize) -> Homeward {
    let (k, bound) = (dims.top_k, arrived.rows + SPARE);
    let expanded_bound = bound * k;
    let (mut rows, mut offsets) = (vec![UNTOUCHED], vec![UNTOUCHED; dims.local_experts() + 1]);
    let mut slots = vec![UNTOUCHED; bound * k];
    let (mut source, mut origin) = (vec![UNTOUCHED; expanded_bound], vec![UNTOUCHED; expanded_bound]);
    let plan = ExpandPlan {
        rows: ViewMut::of(&mut rows),
        offsets: ViewMut::of(&mut offsets),
        slots: ViewMut::of(&mut slots),
        source: ViewMut::of(&mut source),
        origin: ViewMut::of(&mut origin),
    };
    Cpu.expand_plan(dims, View::of(&arrived.counts), View::of(&arrived.experts), plan);
    check_expansion(arrived, k, &rows, &offsets, &slots, &[&source, &origin]);

    let last = View::range(&offsets, dims.local_experts()..dims.local_experts() + 1);
    let expanded = Rows { bound: expanded_bound, count: Some(last) };
    let count = offsets[dims.local_experts()] as usize;
    let y = gather(expanded, width, &source, &arrived.x, expanded_bound * width);
    assert_poisoned("expanded rows", &y[count * width..]);

    let counted = Rows { bound, count: Some(View::of(&rows)) };
    let combine = CombineDims { slots: k, width };
    let (slots, weights) = (View::of(&slots), View::of(&arrived.weights));
    let mut home = Homeward {
        out: vec![f32::NAN; bound * width],
        dx: vec![f32::NAN; bound * width],
        dweights: vec![f32::NAN; bound * k],
    };
    let out = ViewMut::of(&mut home.out);
    Cpu.weighted_reduce(counted, combine, slots, Some(weights), View::of(&y), out);

    let dout = gather(expanded, width, &source, &arrived.dout, expanded_bound * width);
    let dy = identity_grad(expanded, (width, count), &origin, arrived, (&y, &dout), &mut home.dweights);
    let dx = ViewMut::of(&mut home.dx);
    Cpu.weighted_reduce(counted, combine, slots, None, View::of(&dy), dx);
    assert_poisoned("out", &home.out[arrived.rows * width..]);
    assert_poisoned("dweights", &home.dweights[arrived.rows * k..]);
    home
}

/// silu of it is 1.
const UNIT_GATE: f32 = 1.278_464_5;

/// Backward of identity experts, that is of SwiGLU with the rows as up projection and a gate that lets them through, weighted: the
/// gradient of the rows; the weights' goes to `dweights`.
fn identity_grad(
    expanded: Rows<'_, Cpu>,
    (width, count): (usize, usize),
    origin: &Vec<i32>,
    arrived: &Arrived,
    (y, dout): (&Vec<f32>, &Vec<f32>),
    dweights: &mut Vec<f32>,
) -> Vec<f32> {
    let h: Vec<f32> = y.chunks(width).flat_map(|up| [vec![UNIT_GATE; width], up.to_vec()].concat()).collect();
    let (mut dh, mut a) = (vec![f32::NAN; h.len()], vec![f32::NAN; y.len()]);
    Cpu.weighted_swiglu_grad(
        expanded,
        width,
        View::of(origin),
        View::of(&arrived.weights),
        View::of(dout),
        View::of(&h),
        ViewMut::of(&mut dh),
        ViewMut::of(&mut a),
        ViewMut::of(dweights),
    );
    let up: Vec<f32> = dh.chunks(2 * width).flat_map(|row| row[width..].to_vec()).collect();
    assert_poisoned("dh", &dh[2 * count * width..]);
    assert_poisoned("a", &a[count * width..]);
    for (i, (a, y)) in a.chunks(width).zip(y.chunks(width)).enumerate().take(count) {
        let weight = f64::from(arrived.weights[origin[i] as usize]);
        let want: Vec<f64> = y.iter().map(|y| weight * f64::from(*y)).collect();
        assert_close("weighted activations", a, &want, rounding(4, 1.0));
    }
    up
}

/// Expanded rows ascend by (expert, arrived row), and each slot finds its own.
fn check_expansion(
    arrived: &Arrived,
    k: usize,
    rows: &[i32],
    offsets: &[i32],
    slots: &[i32],
    [source, origin]: &[&Vec<i32>; 2],
) {
    let used = arrived.rows * k;
    assert_eq!(rows[0] as usize, arrived.rows);
    let mut want: Vec<(i32, usize)> =
        (0..used).filter(|&i| arrived.experts[i] >= 0).map(|i| (arrived.experts[i], i)).collect();
    want.sort_unstable();
    for (expert, range) in offsets.windows(2).enumerate() {
        let held = want.iter().filter(|(e, _)| *e == expert as i32).count();
        assert_eq!((range[1] - range[0]) as usize, held, "rows of expert {expert}");
    }
    assert_eq!((offsets[0], offsets[offsets.len() - 1] as usize), (0, want.len()));
    for (expanded, &(_, choice)) in want.iter().enumerate() {
        assert_eq!((source[expanded] as usize, slots[choice] as usize), (choice / k, expanded));
        assert_eq!(origin[expanded] as usize, choice);
    }
    assert!((0..used).all(|i| (slots[i] == -1) == (arrived.experts[i] == -1)));
    let spare = slots[used..].iter().chain(&source[want.len()..]).chain(&origin[want.len()..]);
    assert!(spare.copied().all(|v| v == UNTOUCHED), "beyond the rows");
}

/// All homeward rows of `width` that belong to `source`, in the order in which it sent them.
fn bring_home<'a>(source: usize, plans: &[Planned], width: usize, of: impl Fn(usize) -> &'a [f32]) -> Vec<f32> {
    let from = |rank: usize| {
        let before: i32 = plans[..source].iter().map(|plan| plan.send_counts[rank]).sum();
        let start = before as usize * width;
        of(rank)[start..start + plans[source].send_counts[rank] as usize * width].to_vec()
    };
    (0..plans.len()).flat_map(from).collect()
}

/// Σ over a token's rows of what came home.
fn reduce_at_home(dims: ShuffleDims, plan: &Planned, width: usize, rows: &Vec<f32>) -> Vec<f32> {
    let mut out = vec![f32::NAN; dims.tokens * width];
    let combine = CombineDims { slots: dims.rows_per_token(), width };
    let (slots, out_view) = (View::of(&plan.token_rows), ViewMut::of(&mut out));
    Cpu.weighted_reduce(Rows::exactly(dims.tokens), combine, slots, None, View::of(rows), out_view);
    out
}

fn shuffle_with_identity_experts(ranks: &[Routed], width: usize) {
    let draw = |seed: u64, rank: usize| uniform(&mut rng(seed + rank as u64), ranks[rank].dims.tokens * width, 1.0);
    let tokens: Vec<(Vec<f32>, Vec<f32>)> = (0..ranks.len()).map(|rank| (draw(100, rank), draw(200, rank))).collect();
    let plans: Vec<Planned> = ranks.iter().map(|r| shuffle_plan(r.dims, &r.ids, &r.weights)).collect();
    let sent: Vec<_> = (0..ranks.len())
        .map(|rank| {
            let plan = &plans[rank];
            let bound = plan.row_token.len();
            let rows = Rows { bound, count: Some(View::of(&plan.rows)) };
            let (x, dout) = &tokens[rank];
            let send = |of: &Vec<f32>| gather(rows, width, &plan.row_token, of, bound * width);
            (send(x), send(dout))
        })
        .collect();
    let home: Vec<Homeward> = (0..ranks.len())
        .map(|to| on_arrival(ranks[to].dims, &all_to_all(to, ranks, &plans, &sent, width), width))
        .collect();
    for (rank, Routed { dims, ids, weights }) in ranks.iter().enumerate() {
        let (k, plan) = (dims.top_k, &plans[rank]);
        let out = reduce_at_home(*dims, plan, width, &bring_home(rank, &plans, width, |r| &home[r].out));
        let dx = reduce_at_home(*dims, plan, width, &bring_home(rank, &plans, width, |r| &home[r].dx));
        let row_dweights = bring_home(rank, &plans, k, |r| &home[r].dweights);
        let mut dweights = vec![f32::NAN; ids.len()];
        let rows = Rows { bound: plan.row_token.len(), count: Some(View::of(&plan.rows)) };
        let (choice, home) = (View::of(&plan.row_choice), View::of(&row_dweights));
        Cpu.scatter_choices(rows, k, choice, home, ViewMut::of(&mut dweights));

        let (x, dout) = &tokens[rank];
        for t in 0..dims.tokens {
            let (row, choices) = (t * width..(t + 1) * width, t * k..(t + 1) * k);
            let kept = choices.clone().filter(|&choice| ids[choice] >= 0);
            let weight: f64 = kept.map(|choice| f64::from(weights[choice])).sum();
            let scaled = |of: &[f32]| of[row.clone()].iter().map(|v| weight * f64::from(*v)).collect::<Vec<_>>();
            assert_close("combined output", &out[row.clone()], &scaled(x), rounding(2 * k, k as f64));
            assert_close("input gradient", &dx[row.clone()], &scaled(dout), rounding(2 * k + 4, k as f64));
            let dot: f64 = row.map(|i| f64::from(x[i]) * f64::from(dout[i])).sum();
            let want: Vec<f64> = choices.clone().map(|c| if ids[c] >= 0 { dot } else { 0.0 }).collect();
            assert_close("weights' gradient", &dweights[choices], &want, rounding(width + 4, width as f64));
        }
    }
}

proptest! {
    #[test]
    fn plans_agree_with_the_definition(ranks in ranks()) {
        for Routed { dims, ids, weights } in &ranks {
            prop_assert_eq!(shuffle_plan(*dims, ids, weights), reference_plan(*dims, ids, weights));
        }
    }

    #[test]
    fn dispatch_then_combine_with_identity_experts_is_the_weighted_token(ranks in ranks()) {
        shuffle_with_identity_experts(&ranks, 5);
    }
}

#[test]
fn one_rank_many_ranks_idle_ranks_and_a_single_hot_expert() {
    let routed = |dims: ShuffleDims, id: &dyn Fn(usize, usize) -> i32| {
        let ids: Vec<i32> = (0..dims.tokens * dims.top_k).map(|c| id(c / dims.top_k, c % dims.top_k)).collect();
        Routed { weights: uniform(&mut rng(1), ids.len(), 1.0), dims, ids }
    };
    let dims = |tokens, top_k, experts, ranks| ShuffleDims { tokens, top_k, experts, ranks };
    let spread = |t: usize, j: usize| ((t * 3 + j) % 8) as i32;
    // Expert parallelism of one; more choices than ranks; every rank idle; one source only; all tokens to one expert.
    shuffle_with_identity_experts(&[routed(dims(9, 3, 8, 1), &spread)], 130);
    shuffle_with_identity_experts(&[routed(dims(9, 6, 8, 2), &spread), routed(dims(4, 6, 8, 2), &spread)], 33);
    shuffle_with_identity_experts(&[routed(dims(0, 2, 8, 2), &spread), routed(dims(0, 2, 8, 2), &spread)], 4);
    shuffle_with_identity_experts(&[routed(dims(0, 2, 8, 2), &spread), routed(dims(7, 2, 8, 2), &spread)], 4);
    let hot = |_: usize, _: usize| 5;
    shuffle_with_identity_experts(&[routed(dims(20, 1, 8, 2), &hot), routed(dims(30, 1, 8, 2), &hot)], 16);
    let dropped = |_: usize, _: usize| -1;
    shuffle_with_identity_experts(&[routed(dims(5, 2, 8, 2), &dropped), routed(dims(3, 2, 8, 2), &spread)], 16);
}
