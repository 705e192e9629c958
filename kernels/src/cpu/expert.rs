//! `ExpertOps` on the CPU: unpacks views and hands slices to `shuffle` (plans), `rows` (row movement), `grouped` (GEMM) and
//! `activation`.
//!
//! Owns the checks of shapes. It computes nothing itself.

use super::rows::{self, Reduction};
use super::{activation, grouped, shuffle, slice, slice_mut};
use crate::ops::check_len;
use crate::{
    Accumulate, CombineDims, Cpu, ExpandPlan, ExpertOps, GroupedDims, Rows, ShuffleDims, ShufflePlan, View, ViewMut,
    WeightedSwiglu,
};

/// The rows that count, read from the device where only it knows.
fn live(rows: Rows<'_, Cpu>) -> usize {
    let Some(count) = rows.count else { return rows.bound };
    let count = slice(count)[0];
    assert!(count >= 0 && count as usize <= rows.bound, "{count} rows where at most {} fit", rows.bound);
    count as usize
}

fn check_at_least(what: &str, got: usize, want: usize) {
    assert!(got >= want, "`{what}` has {got} elements, needs {want}");
}

fn check_grouped(dims: GroupedDims, offsets: &[i32], matrices: usize) {
    check_len("offsets", offsets.len(), dims.experts + 1);
    check_len("weights of the groups", matrices, dims.experts * dims.n * dims.k);
    assert!(offsets[0] >= 0 && offsets.is_sorted(), "offsets of groups must ascend from 0, not {offsets:?}");
}

/// What the gradient of a weighted activation works from, and where it leaves `dh` and `a`, for `rows` rows of width `f` whose `h` are
/// `wide`.
fn weighted<'a>(
    (rows, f, wide): (usize, usize, usize),
    (origin, weights): (View<'a, Cpu, i32>, View<'a, Cpu, f32>),
    (da, h): (View<'a, Cpu, f32>, View<'a, Cpu, f32>),
    (dh, a): (ViewMut<'a, Cpu, f32>, ViewMut<'a, Cpu, f32>),
) -> (activation::Weighted<'a>, &'a mut [f32], &'a mut [f32]) {
    check_at_least("origin", origin.len(), rows);
    check_at_least("da", da.len(), rows * f);
    check_at_least("h", h.len(), rows * wide);
    check_at_least("dh", dh.len(), rows * wide);
    check_at_least("a", a.len(), rows * f);
    let given = activation::Weighted {
        f,
        origin: &slice(origin)[..rows],
        weights: slice(weights),
        da: &slice(da)[..rows * f],
        h: &slice(h)[..rows * wide],
    };
    (given, &mut slice_mut(dh)[..rows * wide], &mut slice_mut(a)[..rows * f])
}

impl ExpertOps for Cpu {
    fn shuffle_plan(
        &self,
        dims: ShuffleDims,
        ids: View<'_, Self, i32>,
        weights: View<'_, Self, f32>,
        plan: ShufflePlan<'_, Self>,
    ) {
        let mut shuffle = shuffle::Shuffle {
            send_counts: slice_mut(plan.send_counts),
            row_token: slice_mut(plan.row_token),
            row_experts: slice_mut(plan.row_experts),
            row_choice: slice_mut(plan.row_choice),
            row_weights: slice_mut(plan.row_weights),
            token_rows: slice_mut(plan.token_rows),
        };
        let rows = shuffle::plan(dims, slice(ids), slice(weights), &mut shuffle);
        slice_mut(plan.rows)[0] = rows as i32;
    }

    fn expand_plan(
        &self,
        dims: ShuffleDims,
        recv_counts: View<'_, Self, i32>,
        row_experts: View<'_, Self, i32>,
        plan: ExpandPlan<'_, Self>,
    ) {
        let mut expansion = shuffle::Expansion {
            offsets: slice_mut(plan.offsets),
            slots: slice_mut(plan.slots),
            source: slice_mut(plan.source),
            origin: slice_mut(plan.origin),
        };
        let rows = shuffle::expand(dims, slice(recv_counts), slice(row_experts), &mut expansion);
        slice_mut(plan.rows)[0] = rows as i32;
    }

    fn gather_rows(
        &self,
        rows: Rows<'_, Self>,
        width: usize,
        index: View<'_, Self, i32>,
        src: View<'_, Self, f32>,
        dst: ViewMut<'_, Self, f32>,
    ) {
        let rows = live(rows);
        check_at_least("index", index.len(), rows);
        check_at_least("dst", dst.len(), rows * width);
        rows::gather(width, &slice(index)[..rows], slice(src), &mut slice_mut(dst)[..rows * width]);
    }

    fn weighted_reduce(
        &self,
        rows: Rows<'_, Self>,
        dims: CombineDims,
        slots: View<'_, Self, i32>,
        weights: Option<View<'_, Self, f32>>,
        y: View<'_, Self, f32>,
        out: ViewMut<'_, Self, f32>,
    ) {
        let rows = live(rows);
        let choices = rows * dims.slots;
        check_at_least("slots", slots.len(), choices);
        check_at_least("out", out.len(), rows * dims.width);
        let weights = weights.map(|weights| {
            check_at_least("weights", weights.len(), choices);
            &slice(weights)[..choices]
        });
        let reduction = Reduction { dims, slots: &slice(slots)[..choices], weights, y: slice(y) };
        rows::reduce(&reduction, &mut slice_mut(out)[..rows * dims.width]);
    }

    fn weighted_swiglu_grad(
        &self,
        rows: Rows<'_, Self>,
        f: usize,
        origin: View<'_, Self, i32>,
        weights: View<'_, Self, f32>,
        da: View<'_, Self, f32>,
        h: View<'_, Self, f32>,
        dh: ViewMut<'_, Self, f32>,
        a: ViewMut<'_, Self, f32>,
        dweights: ViewMut<'_, Self, f32>,
    ) {
        let (given, dh, a) = weighted((live(rows), f, 2 * f), (origin, weights), (da, h), (dh, a));
        activation::weighted_swiglu_grad(&given, dh, a, slice_mut(dweights));
    }

    fn weighted_gelu_grad(
        &self,
        rows: Rows<'_, Self>,
        f: usize,
        origin: View<'_, Self, i32>,
        weights: View<'_, Self, f32>,
        da: View<'_, Self, f32>,
        h: View<'_, Self, f32>,
        dh: ViewMut<'_, Self, f32>,
        a: ViewMut<'_, Self, f32>,
        dweights: ViewMut<'_, Self, f32>,
    ) {
        let (given, dh, a) = weighted((live(rows), f, f), (origin, weights), (da, h), (dh, a));
        activation::weighted_gelu_grad(&given, dh, a, slice_mut(dweights));
    }

    fn scatter_choices(
        &self,
        rows: Rows<'_, Self>,
        top_k: usize,
        row_choice: View<'_, Self, i32>,
        row_dweights: View<'_, Self, f32>,
        dweights: ViewMut<'_, Self, f32>,
    ) {
        let choices = live(rows) * top_k;
        check_at_least("row_choice", row_choice.len(), choices);
        check_at_least("row_dweights", row_dweights.len(), choices);
        rows::scatter(&slice(row_choice)[..choices], &slice(row_dweights)[..choices], slice_mut(dweights));
    }

    fn grouped_linear(
        &self,
        dims: GroupedDims,
        offsets: View<'_, Self, i32>,
        x: View<'_, Self, f32>,
        w: View<'_, Self, f32>,
        y: ViewMut<'_, Self, f32>,
    ) {
        check_grouped(dims, slice(offsets), w.len());
        grouped::linear(dims, slice(offsets), slice(x), slice(w), slice_mut(y));
    }

    fn grouped_linear_swiglu(
        &self,
        rows: Rows<'_, Self>,
        dims: GroupedDims,
        offsets: View<'_, Self, i32>,
        x: View<'_, Self, f32>,
        w: View<'_, Self, f32>,
        mut h: ViewMut<'_, Self, f32>,
        a: ViewMut<'_, Self, f32>,
    ) {
        assert!(dims.n.is_multiple_of(2), "gate and up columns are as many: their sum cannot be {}", dims.n);
        self.grouped_linear(dims, offsets, x, w, h.reborrow());
        activation::swiglu(live(rows), dims.n / 2, slice(h.as_view()), slice_mut(a));
    }

    fn grouped_linear_gelu(
        &self,
        rows: Rows<'_, Self>,
        dims: GroupedDims,
        offsets: View<'_, Self, i32>,
        x: View<'_, Self, f32>,
        w: View<'_, Self, f32>,
        mut h: ViewMut<'_, Self, f32>,
        a: ViewMut<'_, Self, f32>,
    ) {
        self.grouped_linear(dims, offsets, x, w, h.reborrow());
        let elements = live(rows) * dims.n;
        activation::gelu(&slice(h.as_view())[..elements], &mut slice_mut(a)[..elements]);
    }

    fn grouped_linear_grad_input(
        &self,
        dims: GroupedDims,
        offsets: View<'_, Self, i32>,
        dy: View<'_, Self, f32>,
        w: View<'_, Self, f32>,
        dx: ViewMut<'_, Self, f32>,
    ) {
        check_grouped(dims, slice(offsets), w.len());
        grouped::grad_input(dims, slice(offsets), slice(dy), slice(w), slice_mut(dx));
    }

    fn grouped_linear_grad_swiglu(
        &self,
        rows: Rows<'_, Self>,
        dims: GroupedDims,
        offsets: View<'_, Self, i32>,
        dy: View<'_, Self, f32>,
        w: View<'_, Self, f32>,
        mut da: ViewMut<'_, Self, f32>,
        swiglu: WeightedSwiglu<'_, Self>,
    ) {
        self.grouped_linear_grad_input(dims, offsets, dy, w, da.reborrow());
        let WeightedSwiglu { origin, weights, h, dh, a, dweights } = swiglu;
        self.weighted_swiglu_grad(rows, dims.k, origin, weights, da.as_view(), h, dh, a, dweights);
    }

    fn grouped_linear_grad_weight(
        &self,
        dims: GroupedDims,
        offsets: View<'_, Self, i32>,
        dy: View<'_, Self, f32>,
        x: View<'_, Self, f32>,
        dw: ViewMut<'_, Self, f32>,
        accumulate: Accumulate,
    ) {
        check_grouped(dims, slice(offsets), dw.len());
        grouped::grad_weight(dims, slice(offsets), (slice(dy), slice(x)), slice_mut(dw), accumulate);
    }
}
