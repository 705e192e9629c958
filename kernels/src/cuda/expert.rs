//! `ExpertOps` on CUDA: hands on to `shuffle` (plans), `rows` (row movement) and `grouped` (GEMM), which check shapes and launch.

use super::rows::{self, Reduction, Weighted};
use super::{Cuda, CudaAct, grouped, shuffle};
use crate::{
    Accumulate, CombineDims, DenseOps, ExpandPlan, ExpertOps, GroupedDims, Rows, ShuffleDims, ShufflePlan, View,
    ViewMut, WeightedSwiglu,
};

impl<A: CudaAct> ExpertOps for Cuda<A> {
    fn shuffle_plan(
        &self,
        dims: ShuffleDims,
        ids: View<'_, Self, i32>,
        weights: View<'_, Self, f32>,
        plan: ShufflePlan<'_, Self>,
    ) {
        shuffle::plan(self, dims, ids, weights, plan);
    }

    fn expand_plan(
        &self,
        dims: ShuffleDims,
        recv_counts: View<'_, Self, i32>,
        row_experts: View<'_, Self, i32>,
        plan: ExpandPlan<'_, Self>,
    ) {
        shuffle::expand(self, dims, recv_counts, row_experts, plan);
    }

    fn gather_rows(
        &self,
        rows: Rows<'_, Self>,
        width: usize,
        index: View<'_, Self, i32>,
        src: View<'_, Self, A>,
        dst: ViewMut<'_, Self, A>,
    ) {
        rows::gather(self, rows, width, index, src, dst);
    }

    fn expand_rows(
        &self,
        arrived: Rows<'_, Self>,
        _: Rows<'_, Self>,
        dims: CombineDims,
        slots: View<'_, Self, i32>,
        _: View<'_, Self, i32>,
        src: View<'_, Self, A>,
        dst: ViewMut<'_, Self, A>,
    ) {
        rows::expand(self, arrived, dims, slots, src, dst);
    }

    fn weighted_reduce(
        &self,
        rows: Rows<'_, Self>,
        dims: CombineDims,
        slots: View<'_, Self, i32>,
        weights: Option<View<'_, Self, f32>>,
        y: View<'_, Self, A>,
        out: ViewMut<'_, Self, A>,
    ) {
        rows::reduce(self, rows, Reduction { dims, slots, weights, y }, out);
    }

    fn weighted_swiglu_grad(
        &self,
        rows: Rows<'_, Self>,
        f: usize,
        origin: View<'_, Self, i32>,
        weights: View<'_, Self, f32>,
        da: View<'_, Self, A>,
        h: View<'_, Self, A>,
        dh: ViewMut<'_, Self, A>,
        a: ViewMut<'_, Self, A>,
        dweights: ViewMut<'_, Self, f32>,
    ) {
        rows::weighted_swiglu_grad(self, rows, Weighted { f, origin, weights, da, h }, dh, a, dweights);
    }

    fn weighted_gelu_grad(
        &self,
        rows: Rows<'_, Self>,
        f: usize,
        origin: View<'_, Self, i32>,
        weights: View<'_, Self, f32>,
        da: View<'_, Self, A>,
        h: View<'_, Self, A>,
        dh: ViewMut<'_, Self, A>,
        a: ViewMut<'_, Self, A>,
        dweights: ViewMut<'_, Self, f32>,
    ) {
        rows::weighted_gelu_grad(self, rows, Weighted { f, origin, weights, da, h }, dh, a, dweights);
    }

    fn scatter_choices(
        &self,
        rows: Rows<'_, Self>,
        top_k: usize,
        row_choice: View<'_, Self, i32>,
        row_dweights: View<'_, Self, f32>,
        dweights: ViewMut<'_, Self, f32>,
    ) {
        rows::scatter_choices(self, rows, top_k, row_choice, row_dweights, dweights);
    }

    fn grouped_linear(
        &self,
        dims: GroupedDims,
        offsets: View<'_, Self, i32>,
        x: View<'_, Self, A>,
        w: View<'_, Self, A>,
        y: ViewMut<'_, Self, A>,
    ) {
        grouped::linear(self, dims, offsets, x, w, y);
    }

    fn grouped_linear_swiglu(
        &self,
        rows: Rows<'_, Self>,
        dims: GroupedDims,
        offsets: View<'_, Self, i32>,
        x: View<'_, Self, A>,
        w: View<'_, Self, A>,
        mut h: ViewMut<'_, Self, A>,
        mut a: ViewMut<'_, Self, A>,
    ) {
        assert!(dims.n.is_multiple_of(2), "gate and up columns are as many: their sum cannot be {}", dims.n);
        if !grouped::linear_swiglu(self, dims, offsets, (x, w), (h.reborrow(), a.reborrow())) {
            grouped::linear(self, dims, offsets, x, w, h.reborrow());
            self.swiglu(rows, dims.n / 2, h.as_view(), a);
        }
    }

    fn grouped_linear_gelu(
        &self,
        rows: Rows<'_, Self>,
        dims: GroupedDims,
        offsets: View<'_, Self, i32>,
        x: View<'_, Self, A>,
        w: View<'_, Self, A>,
        mut h: ViewMut<'_, Self, A>,
        mut a: ViewMut<'_, Self, A>,
    ) {
        if !grouped::linear_gelu(self, dims, offsets, (x, w), (h.reborrow(), a.reborrow())) {
            grouped::linear(self, dims, offsets, x, w, h.reborrow());
            rows::gelu(self, rows, dims.n, h.as_view(), a);
        }
    }

    fn grouped_linear_grad_input(
        &self,
        dims: GroupedDims,
        offsets: View<'_, Self, i32>,
        dy: View<'_, Self, A>,
        w: View<'_, Self, A>,
        dx: ViewMut<'_, Self, A>,
    ) {
        grouped::grad_input(self, dims, offsets, dy, w, dx);
    }

    fn grouped_linear_grad_swiglu(
        &self,
        rows: Rows<'_, Self>,
        dims: GroupedDims,
        offsets: View<'_, Self, i32>,
        dy: View<'_, Self, A>,
        w: View<'_, Self, A>,
        mut da: ViewMut<'_, Self, A>,
        mut swiglu: WeightedSwiglu<'_, Self>,
    ) {
        if !grouped::grad_swiglu(self, rows, dims, offsets, (dy, w), &mut swiglu) {
            let WeightedSwiglu { origin, weights, h, dh, a, dweights } = swiglu;
            self.grouped_linear_grad_input(dims, offsets, dy, w, da.reborrow());
            self.weighted_swiglu_grad(rows, dims.k, origin, weights, da.as_view(), h, dh, a, dweights);
        }
    }

    fn grouped_linear_grad_weight(
        &self,
        dims: GroupedDims,
        offsets: View<'_, Self, i32>,
        dy: View<'_, Self, A>,
        x: View<'_, Self, A>,
        dw: ViewMut<'_, Self, f32>,
        accumulate: Accumulate,
    ) {
        grouped::grad_weight(self, dims, offsets, (dy, x), dw, accumulate);
    }
}
