//! Grouped GEMM against f64 for every skew, on poisoned buffers, and its sharing-out to threads.

use super::{cut_by_cost, row_cost};
use crate::cpu::testkit::{assert_close, on_threads, rng, rounding, uniform};
use crate::{Accumulate, Cpu, DenseOps, ExpertOps, GroupedDims, Rows, View, ViewMut};

/// Rows of each group: none at all, empty ones, one row, all on one, ragged, more than one register tile.
const GROUPS: [&[usize]; 8] =
    [&[0], &[0, 0, 0], &[1], &[0, 1, 0], &[200, 0, 0, 0], &[0, 0, 131], &[3, 17, 0, 64, 1, 9], &[48, 16, 40, 96]];
/// (n, k): one by one, off the tile, on it, wide and narrow.
const SHAPES: [(usize, usize); 7] = [(1, 1), (7, 5), (33, 65), (64, 48), (129, 16), (3, 200), (5, 515)];
/// Rows that no group owns, before and after, to be left alone.
const SPARE: usize = 2;

struct Case {
    dims: GroupedDims,
    offsets: Vec<i32>,
    x: Vec<f32>,
    w: Vec<f32>,
    dy: Vec<f32>,
}

/// Inputs of groups that begin at row [`SPARE`], with poison in the spare rows.
fn case(groups: &[usize], (n, k): (usize, usize)) -> Case {
    let mut rng = rng(41);
    let mut offsets = vec![SPARE as i32];
    for rows in groups {
        offsets.push(offsets[offsets.len() - 1] + *rows as i32);
    }
    let rows: usize = groups.iter().sum();
    let mut poisoned = |width: usize| {
        let mut data = vec![f32::NAN; (rows + 2 * SPARE) * width];
        data[SPARE * width..(SPARE + rows) * width].copy_from_slice(&uniform(&mut rng, rows * width, 1.0));
        data
    };
    let (x, dy) = (poisoned(k), poisoned(n));
    let w = uniform(&mut rng, groups.len() * n * k, 1.0);
    Case { dims: GroupedDims { experts: groups.len(), n, k }, offsets, x, w, dy }
}

impl Case {
    fn forward(&self) -> Vec<f32> {
        let mut y = vec![f32::NAN; self.dy.len()];
        let (x, w) = (View::of(&self.x), View::of(&self.w));
        Cpu.grouped_linear(self.dims, View::of(&self.offsets), x, w, ViewMut::of(&mut y));
        y
    }

    fn grad_input(&self) -> Vec<f32> {
        let mut dx = vec![f32::NAN; self.x.len()];
        let (dy, w) = (View::of(&self.dy), View::of(&self.w));
        Cpu.grouped_linear_grad_input(self.dims, View::of(&self.offsets), dy, w, ViewMut::of(&mut dx));
        dx
    }

    /// Added to a gradient of all ones.
    fn grad_weight(&self) -> Vec<f32> {
        self.grad_weight_from(1.0, Accumulate::Add)
    }

    fn grad_weight_from(&self, before: f32, accumulate: Accumulate) -> Vec<f32> {
        let mut dw = vec![before; self.w.len()];
        let (dy, x) = (View::of(&self.dy), View::of(&self.x));
        Cpu.grouped_linear_grad_weight(self.dims, View::of(&self.offsets), dy, x, ViewMut::of(&mut dw), accumulate);
        dw
    }

    /// (expert, row) of every row that a group owns.
    fn rows(&self) -> impl Iterator<Item = (usize, usize)> {
        self.offsets.windows(2).enumerate().flat_map(|(e, o)| (o[0] as usize..o[1] as usize).map(move |i| (e, i)))
    }
}

/// The rows that groups own must be close; the spare ones still poisoned.
fn assert_rows(what: &str, width: usize, got: &[f32], want: &[f64], tolerance: f64) {
    let owned = SPARE * width..got.len() - SPARE * width;
    assert_close(what, &got[owned.clone()], &want[owned.clone()], tolerance);
    assert!(got[..owned.start].iter().chain(&got[owned.end..]).all(|v| v.is_nan()), "{what}: spare rows were written");
}

fn check(case: &Case) {
    let GroupedDims { n, k, .. } = case.dims;
    let (mut y, mut dx, mut dw) = (vec![0.0; case.dy.len()], vec![0.0; case.x.len()], vec![1.0; case.w.len()]);
    let mut longest = vec![0; case.dims.experts];
    for (e, i) in case.rows() {
        longest[e] += 1;
        for row in 0..n {
            for column in 0..k {
                let at = (e * n + row) * k + column;
                let (x, dy, w) = (case.x[i * k + column], case.dy[i * n + row], case.w[at]);
                y[i * n + row] += f64::from(x) * f64::from(w);
                dx[i * k + column] += f64::from(dy) * f64::from(w);
                dw[at] += f64::from(dy) * f64::from(x);
            }
        }
    }
    let longest = longest.into_iter().max().unwrap_or(0) + 1;
    assert_rows("y", n, &case.forward(), &y, rounding(k, k as f64));
    assert_rows("dx", k, &case.grad_input(), &dx, rounding(n, n as f64));
    assert_close("dw", &case.grad_weight(), &dw, rounding(longest, longest as f64));
    dw.iter_mut().for_each(|dw| *dw -= 1.0);
    let replaced = case.grad_weight_from(f32::NAN, Accumulate::Overwrite);
    assert_close("dw that replaces", &replaced, &dw, rounding(longest, longest as f64));
}

#[test]
fn every_skew_and_shape_agrees_with_f64() {
    for groups in GROUPS {
        for shape in SHAPES {
            check(&case(groups, shape));
        }
    }
}

#[test]
fn any_number_of_threads_agrees_with_f64() {
    // Large enough to be cut for several threads: balanced, one hot expert, hot last, and more threads than groups.
    for groups in [&[60, 70, 50, 76][..], &[0, 256, 0, 0], &[1, 1, 1, 253], &[256]] {
        for threads in [1, 2, 3, 8] {
            on_threads(threads, || check(&case(groups, (96, 72))));
        }
    }
}

#[test]
fn a_narrow_gradient_taller_than_a_block_agrees_with_f64() {
    check(&case(&[3], (2 * crate::cpu::gemm::BLOCK_ELEMENTS / 400 + 11, 400)));
}

#[test]
fn the_first_half_of_the_experts_is_a_product_and_its_swiglu() {
    for groups in [&[0, 0][..], &[3, 0, 17, 1], &[0, 40]] {
        let case = case(groups, (14, 9));
        let rows = case.offsets[groups.len()] as usize;
        let h = case.forward();
        let (mut fused, mut a, mut want) =
            (vec![f32::NAN; h.len()], vec![f32::NAN; h.len() / 2], vec![f32::NAN; h.len() / 2]);
        let counted =
            Rows { bound: rows + SPARE, count: Some(View::range(&case.offsets, groups.len()..groups.len() + 1)) };
        let (x, w) = (View::of(&case.x), View::of(&case.w));
        let (h_view, a_view) = (ViewMut::of(&mut fused), ViewMut::of(&mut a));
        Cpu.grouped_linear_swiglu(counted, case.dims, View::of(&case.offsets), x, w, h_view, a_view);
        Cpu.swiglu(Rows::exactly(rows), 7, View::of(&h), ViewMut::of(&mut want));
        let bits = |x: &[f32]| x.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert_eq!((bits(&fused), bits(&a)), (bits(&h), bits(&want)), "{groups:?}");
    }
}

#[test]
fn the_first_half_of_experts_without_a_gate_is_a_product_and_its_gelu() {
    for groups in [&[0, 0][..], &[3, 0, 17, 1], &[0, 40]] {
        let case = case(groups, (14, 9));
        let h = case.forward();
        let (mut product, mut a) = (vec![f32::NAN; h.len()], vec![f32::NAN; h.len()]);
        let counted = Rows {
            bound: case.offsets[groups.len()] as usize + SPARE,
            count: Some(View::range(&case.offsets, groups.len()..groups.len() + 1)),
        };
        let (x, w) = (View::of(&case.x), View::of(&case.w));
        let (h_view, a_view) = (ViewMut::of(&mut product), ViewMut::of(&mut a));
        Cpu.grouped_linear_gelu(counted, case.dims, View::of(&case.offsets), x, w, h_view, a_view);
        let bits = |x: &[f32]| x.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&product), bits(&h), "{groups:?}");
        // The slope of GELU at 0 is 1/2, and its curvature at most 0.8.
        for (a, h) in a.iter().zip(&h).filter(|(_, h)| h.abs() < 1e-3) {
            assert!((a - 0.5 * h).abs() <= 0.4 * h * h + 2e-7 * h.abs(), "gelu({h}) = {a}");
        }
        for (a, h) in a.iter().zip(&h).filter(|(_, h)| h.abs() > 5.5) {
            assert!((a - h.max(0.0)).abs() < 2e-6, "gelu({h}) = {a}");
        }
    }
}

#[test]
fn an_expert_without_tokens_gets_no_weight_gradient() {
    let dw = case(&[5, 0, 3], (7, 5)).grad_weight();
    assert_eq!(dw[35..70], [1.0; 35]);
}

#[test]
fn the_same_thread_count_gives_the_same_bits() {
    let case = case(&[100, 3, 0, 190], (80, 100));
    let run = |threads| on_threads(threads, || (case.forward(), case.grad_input(), case.grad_weight()));
    let bits = |(y, dx, dw): (Vec<f32>, Vec<f32>, Vec<f32>)| {
        [y, dx, dw].concat().iter().map(|v| v.to_bits()).collect::<Vec<_>>()
    };
    for threads in [1, 2, 3] {
        assert!(bits(run(threads)) == bits(run(threads)), "{threads} threads");
    }
}

#[test]
fn weight_gradients_are_cut_by_the_rows_behind_them() {
    let cut = |groups: &[usize], n: usize, parts: u64| -> Vec<usize> {
        let costs = || groups.iter().map(|&rows| row_cost(rows));
        let total = costs().sum::<u64>() * n as u64;
        (1..parts).map(|part| cut_by_cost(costs(), n, total * part / parts)).collect()
    };
    assert_eq!(cut(&[50, 50], 64, 2), [64]);
    assert_eq!(cut(&[0, 0, 500], 64, 2), [128 + 32], "an empty expert costs nothing");
    assert_eq!(cut(&[500, 0, 0], 64, 4), [16, 32, 48]);
    assert_eq!(cut(&[100; 8], 16, 4), [32, 64, 96]);
    assert_eq!(cut(&[9], 3, 4), [0, 3, 3], "no cut beyond the last row, however few there are");
}

#[test]
#[should_panic(expected = "offsets of groups must ascend")]
fn offsets_that_descend_are_refused() {
    let mut case = case(&[3, 3], (4, 4));
    case.offsets[1] = 1;
    case.forward();
}
