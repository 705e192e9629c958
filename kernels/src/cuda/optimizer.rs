//! AdamW, and the norm that clips it.
//!
//! Owns the launch of one fused pass. It knows no parameter by name and no schedule.

use super::shape::Cut;
use super::{Cuda, CudaAct, Grid, launch, pointer_mut};
use crate::{AdamW, OptimizerOps, View, ViewMut};

/// Elements that a thread updates together: 16 bytes of f32.
const WIDTH: usize = 4;
const THREADS: u32 = 256;

impl<A: CudaAct> OptimizerOps for Cuda<A> {
    fn adamw(
        &self,
        settings: AdamW,
        grad: ViewMut<'_, Self, f32>,
        m: ViewMut<'_, Self, f32>,
        v: ViewMut<'_, Self, f32>,
        master: Option<ViewMut<'_, Self, f32>>,
        compute: ViewMut<'_, Self, A>,
    ) {
        let n = compute.len();
        let of_master = master.as_ref().map_or(n, ViewMut::len);
        for (name, len) in [("gradient", grad.len()), ("m", m.len()), ("v", v.len()), ("master", of_master)] {
            assert_eq!(len, n, "lengths of {name} and of the compute copy");
        }
        assert!(master.is_some() || A::HOLDS_F32, "{} is no master copy: one is needed beside it", A::NAME);
        if n == 0 {
            return;
        }
        let (grad, m, v, compute) = (pointer_mut(grad), pointer_mut(m), pointer_mut(v), pointer_mut(compute));
        let master = master.map(pointer_mut);
        let operands = [(grad, 4), (m, 4), (v, 4), (master.unwrap_or(grad), 4), (compute, A::BYTES)];
        let cut = Cut::new(n, WIDTH, &operands);
        let grid = Grid::cover(cut.threads(WIDTH), THREADS, self.facts());
        let (step, master) = (settings.factors(), master.unwrap_or(0));
        launch!(self, A::pick("adamw_f32", "adamw_bf16"), grid; step, cut, grad, m, v, master, compute);
    }

    fn sum_of_squares(&self, x: View<'_, Self, f32>, total: ViewMut<'_, Self, f64>) {
        self.total("sum_squares_f32", x, total);
    }
}
