//! Row movement against f64, at widths off every block and register, on poisoned buffers and on one and more threads.

use crate::cpu::testkit::{assert_close, on_threads, rng, rounding, uniform};
use crate::{CombineDims, Cpu, ExpertOps, Rows, View, ViewMut};

/// (R, slots, width, N): empty, one row, off the block of columns, off the vector, several tasks.
const SIZES: [(usize, usize, usize, usize); 6] =
    [(0, 2, 8, 4), (1, 1, 1, 1), (5, 3, 130, 17), (9, 2, 31, 20), (40, 8, 1024, 320), (700, 2, 64, 1500)];

/// Distinct slots with holes, weights with poison in the holes, y with poison where no slot points.
struct Case {
    dims: CombineDims,
    rows: usize,
    slots: Vec<i32>,
    weights: Vec<f32>,
    y: Vec<f32>,
}

fn case((rows, k, width, expanded): (usize, usize, usize, usize)) -> Case {
    let mut rng = rng(31);
    // A step without common divisor with N visits each slot once.
    let step = (1..).find(|s| s * 7919 % expanded == 1 % expanded).unwrap_or(1);
    let slots: Vec<i32> = (0..rows * k).map(|i| if i % 5 == 3 { -1 } else { (i * step % expanded) as i32 }).collect();
    let mut weights = uniform(&mut rng, rows * k, 1.0);
    let mut y = uniform(&mut rng, expanded * width, 1.0);
    for (weight, _) in weights.iter_mut().zip(&slots).filter(|(_, slot)| **slot < 0) {
        *weight = f32::NAN;
    }
    for slot in (0..expanded).filter(|slot| !slots.contains(&(*slot as i32))) {
        y[slot * width..(slot + 1) * width].fill(f32::NAN);
    }
    Case { dims: CombineDims { slots: k, width }, rows, slots, weights, y }
}

impl Case {
    fn reduce(&self, weighted: bool, out: &mut Vec<f32>) {
        let weights = weighted.then(|| View::of(&self.weights));
        let (slots, y) = (View::of(&self.slots), View::of(&self.y));
        Cpu.weighted_reduce(Rows::exactly(self.rows), self.dims, slots, weights, y, ViewMut::of(out));
    }

    /// The slots that exist: (r, choice, slot).
    fn used(&self) -> impl Iterator<Item = (usize, usize, usize)> {
        let slots = self.slots.iter().enumerate().filter(|&(_, &slot)| slot >= 0);
        slots.map(|(choice, &slot)| (choice / self.dims.slots, choice, slot as usize))
    }
}

#[test]
fn a_weighted_reduce_sums_the_slots_that_exist() {
    for size in SIZES {
        let case = case(size);
        let width = case.dims.width;
        for weighted in [true, false] {
            let mut want = vec![0.0; case.rows * width];
            for (r, choice, slot) in case.used() {
                let weight = if weighted { f64::from(case.weights[choice]) } else { 1.0 };
                for c in 0..width {
                    want[r * width + c] += weight * f64::from(case.y[slot * width + c]);
                }
            }
            let tolerance = rounding(case.dims.slots + 1, case.dims.slots as f64 + 1.0);
            let mut out = vec![f32::NAN; want.len()];
            case.reduce(weighted, &mut out);
            assert_close("sums", &out, &want, tolerance);
        }
    }
}

#[test]
fn rows_beyond_the_count_are_neither_read_nor_written() {
    let (k, width, count) = (2, 3, vec![1]);
    let rows = Rows { bound: 3, count: Some(View::of(&count)) };
    // Slots beyond the count point nowhere: reading them would panic.
    let slots = vec![1, 0, 999, 999, 999, 999];
    let (weights, y) = (vec![0.5; 6], vec![1.0, 2.0, 3.0, 10.0, 20.0, 30.0]);
    let dims = CombineDims { slots: k, width };
    let mut out = vec![7.0; 9];
    let (slots, weights, y) = (View::of(&slots), View::of(&weights), View::of(&y));
    Cpu.weighted_reduce(rows, dims, slots, Some(weights), y, ViewMut::of(&mut out));
    assert_eq!(out, [5.5, 11.0, 16.5, 7.0, 7.0, 7.0, 7.0, 7.0, 7.0]);

    let mut gathered = vec![7.0; 6];
    Cpu.gather_rows(
        rows,
        2,
        View::of(&vec![2, 999, 999]),
        View::of(&vec![0.0, 1.0, 2.0, 3.0, 4.0, 5.0]),
        ViewMut::of(&mut gathered),
    );
    assert_eq!(gathered, [4.0, 5.0, 7.0, 7.0, 7.0, 7.0]);

    let mut scattered = vec![f32::NAN; 4];
    let (choice, from) = (vec![3, -1, 999, 999, 999, 999], vec![8.0; 6]);
    Cpu.scatter_choices(rows, 2, View::of(&choice), View::of(&from), ViewMut::of(&mut scattered));
    assert_eq!(scattered, [0.0, 0.0, 0.0, 8.0]);
}

#[test]
#[should_panic(expected = "row 3 of 3")]
fn a_row_that_does_not_exist_is_named() {
    let mut dst = vec![0.0; 2];
    Cpu.gather_rows(Rows::exactly(1), 2, View::of(&vec![3]), View::of(&vec![0.0; 6]), ViewMut::of(&mut dst));
}

#[test]
fn every_thread_count_gives_the_same_bits() {
    let case = case((700, 2, 64, 1500));
    let index: Vec<i32> = (0..700).map(|i| i * 37 % 700).collect();
    let src = uniform(&mut rng(32), 700 * 64, 1.0);
    let run = |threads| {
        on_threads(threads, || {
            let (mut out, mut gathered) = (vec![f32::NAN; 700 * 64], vec![0.0; 700 * 64]);
            case.reduce(true, &mut out);
            let (index, src) = (View::of(&index), View::of(&src));
            Cpu.gather_rows(Rows::exactly(700), 64, index, src, ViewMut::of(&mut gathered));
            (out, gathered)
        })
    };
    let one = run(1);
    assert!(one.1[..64] == src[..64] && one.1[64..128] == src[37 * 64..38 * 64]);
    assert!(one == run(2) && one == run(5));
}
