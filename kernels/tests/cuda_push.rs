//! Rows pushed to several ranks whose memory is all on one GPU, so that one GPU is enough to see what lands where, and that waits end.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used)] // helpers may stop at the first surprise like the tests

mod cuda_support;

use std::ops::Range;
use std::time::{Duration, Instant};

use cuda_support::{assert_matches, download, filled, gpu, narrow, poisoned, random_below, upload, written};
use half::bf16;
use moe_kernels::cuda::{Cuda, CudaAct, CudaBuffer, Destination, Halt, Issued, Pushed, address};
use moe_kernels::{Device, Leaving, View};

/// What no push writes to a number that goes along.
const UNTOUCHED: i32 = -77;
/// Rows of a peer in front of those that come from here.
const BEFORE: usize = 2;
/// Numbers that go with a row.
const K: usize = 3;
/// Longer than a test is let run, for waits that must end by something else.
const FOREVER: Duration = Duration::from_secs(20);

struct Case {
    /// Rows for each rank.
    counts: Vec<usize>,
    me: usize,
    width: usize,
    /// Elements that a peer's rows are off the start of its memory.
    off: usize,
    beside: bool,
    mark: u32,
}

/// No rows, no rows for some, one rank, the most; packs and single elements, off the flight of a warp; marks that wrap, and none.
fn cases() -> Vec<Case> {
    let case = |counts: &[usize], me, width, off, beside, mark| {
        let counts = counts.to_vec();
        Case { counts, me, width, off, beside, mark }
    };
    vec![
        case(&[5], 0, 8, 0, false, 1),
        case(&[0, 0], 1, 8, 0, false, 2),
        case(&[7, 0, 700], 1, 264, 0, true, 3),
        case(&[33, 1, 20, 50], 2, 77, 0, false, 0),
        case(&[60, 250, 40], 0, 2056, 0, true, u32::MAX),
        case(&[9, 4], 0, 64, 1, false, 5),
        case(&[3; 16], 5, 40, 0, false, 6),
    ]
}

/// A rank whose memory is pushed to.
struct Peer<A: CudaAct> {
    rows: CudaBuffer<A>,
    ids: CudaBuffer<i32>,
    weights: CudaBuffer<f32>,
    marks: CudaBuffer<i32>,
}

impl<A: CudaAct> Peer<A> {
    fn new(gpu: &Cuda<A>, case: &Case, rank: usize) -> Self {
        let rows = BEFORE + case.counts[rank];
        // All others are through already, some of them with more than this push.
        let told = |from: usize| if from == case.me { 0 } else { case.mark.wrapping_add(from as u32 % 3) as i32 };
        let marks: Vec<i32> = (0..case.counts.len()).map(|from| if rank == case.me { told(from) } else { 0 }).collect();
        Self {
            rows: poisoned(gpu, case.off + rows * case.width),
            ids: filled(gpu, rows * K + 1, UNTOUCHED),
            weights: poisoned(gpu, rows * K),
            marks: upload(gpu, &marks),
        }
    }

    fn place(&self, case: &Case) -> Destination {
        let behind = |base: u64, elements: usize, bytes: usize| base + (elements * bytes) as u64;
        Destination {
            rows: behind(address::<A, A>(View::of(&self.rows)), case.off + BEFORE * case.width, A::BYTES),
            ids: behind(address::<A, i32>(View::of(&self.ids)), BEFORE * K, size_of::<i32>()),
            weights: behind(address::<A, f32>(View::of(&self.weights)), BEFORE * K, size_of::<f32>()),
            marks: address::<A, i32>(View::of(&self.marks)),
        }
    }

    /// It has `rows` and what went `along` behind [`BEFORE`] rows of NaN, and was told; `ids`: they went along too.
    fn got(&self, gpu: &Cuda<A>, what: &str, (case, rank): (&Case, usize), (rows, along): (&[f32], &[f32]), ids: bool) {
        let nan = |elements: usize, then: &[f32]| [vec![f32::NAN; elements].as_slice(), then].concat();
        let what = format!("{what} of {} to rank {rank} of {}", case.width, case.counts.len());
        assert_matches(&what, &written(gpu, &self.rows), &nan(case.off + BEFORE * case.width, rows), 0.0);
        assert_matches(&what, &written(gpu, &self.weights), &nan(BEFORE * K, along), 0.0);
        let mut expected = vec![UNTOUCHED; BEFORE * K];
        expected.extend(along.iter().map(|x| if ids { *x as i32 } else { UNTOUCHED }));
        expected.push(UNTOUCHED);
        assert_eq!(download(gpu, &self.ids), expected, "{what}");
        assert_eq!(download(gpu, &self.marks)[case.me], case.mark as i32, "{what}: what it was told");
    }
}

/// The rows of each peer, one after another.
fn ranges(counts: &[usize]) -> Vec<Range<usize>> {
    let mut end = 0;
    let next = |rows: &usize| {
        end += rows;
        end - rows..end
    };
    counts.iter().map(next).collect()
}

/// Pushes rows by an index or as they lie, and then sums to the same places.
fn lands<A: CudaAct>(case: &Case) {
    let Some(gpu) = gpu::<A>() else { return };
    let (n, width, halt) = (case.counts.iter().sum::<usize>(), case.width, gpu.halt().unwrap());
    let ranges = ranges(&case.counts);
    // Small integers: what is summed is exact in every type.
    let few = |seed, len| random_below(seed, len, 9).into_iter().map(|x| x as f32 - 4.0).collect::<Vec<_>>();
    let source = few(1, (n + 4) * width);
    let (y, numbers) = (upload(&gpu, &narrow::<A>(&source)), few(2, n * K));
    let (weights, ids) = (upload(&gpu, &numbers), upload(&gpu, &numbers.iter().map(|x| *x as i32).collect::<Vec<_>>()));
    let row = |at: usize| &source[at * width..(at + 1) * width];
    let check = |what: &str, pushed: Leaving<'_, Cuda<A>>, expected: &[f32], along_ids: bool| {
        let peers: Vec<_> = (0..ranges.len()).map(|rank| Peer::new(&gpu, case, rank)).collect();
        let places: Vec<_> = peers.iter().map(|peer| peer.place(case)).collect();
        let push = Pushed { width, what: pushed, rows: &ranges, beside: case.beside };
        // SAFETY: the places are memory of this GPU that lives until all was read from it, with room for what goes there.
        unsafe { gpu.push((&places, case.me), &push, (case.mark, &halt)) }.unwrap();
        for (rank, (peer, rows)) in peers.iter().zip(&ranges).enumerate() {
            let (came, along) =
                (&expected[rows.start * width..rows.end * width], &numbers[rows.start * K..rows.end * K]);
            peer.got(&gpu, what, (case, rank), (came, along), along_ids);
        }
    };

    let index = random_below(3, n, n + 4);
    let indexed: Vec<f32> = index.iter().flat_map(|at| row(*at)).copied().collect();
    let index = upload(&gpu, &index.iter().map(|at| *at as i32).collect::<Vec<_>>());
    let (from, k, ids, along) = (View::of(&y), K, Some(View::of(&ids)), Some(View::of(&weights)));
    let by_index = Leaving::Rows { index: Some(View::of(&index)), from, k, ids, weights: along };
    check("rows by an index", by_index, &indexed, true);
    check("rows", Leaving::Rows { index: None, from, k, ids, weights: along }, &source[..n * width], true);

    let slots: Vec<i32> = random_below(4, n * K, n + 5).into_iter().map(|at| at as i32 - 1).collect();
    let factors: Vec<f32> = random_below(5, n * K, 4).into_iter().map(|x| [0.5, 1.0, -1.0, 2.0][x]).collect();
    let sums = |factor: &dyn Fn(usize) -> f32| {
        let sum = |at: usize, column: usize| {
            let terms = (at * K..(at + 1) * K).filter(|slot| slots[*slot] >= 0);
            terms.map(|slot| factor(slot) * row(slots[slot] as usize)[column]).sum::<f32>()
        };
        (0..n)
            .flat_map(|at| (0..width).map(move |column| (at, column)))
            .map(|(at, column)| sum(at, column))
            .collect::<Vec<_>>()
    };
    let (weighted, plain) = (sums(&|slot| factors[slot]), sums(&|_| 1.0));
    let (slots, factors) = (upload(&gpu, &slots), upload(&gpu, &factors));
    let (slots, y) = (View::of(&slots), View::of(&y));
    check("weighted sums", Leaving::Sums { k, slots, weights: Some(View::of(&factors)), y, along }, &weighted, false);
    check("sums", Leaving::Sums { k, slots, weights: None, y, along }, &plain, false);
}

#[test]
fn rows_and_sums_land_where_each_rank_wants_them() {
    for case in cases() {
        lands::<f32>(&case);
        lands::<bf16>(&case);
    }
}

/// A queue with a push that waits for a rank which never comes, and one more behind it.
struct Waiting {
    queue: Cuda<f32>,
    halt: Halt,
    pushes: [Issued; 2],
    _memory: (CudaBuffer<f32>, CudaBuffer<i32>),
}

impl Waiting {
    fn beside(gpu: &Cuda<f32>) -> Self {
        let (rows, marks) = (upload(gpu, &[1.0_f32; 64]), upload(gpu, &[0_i32; 2]));
        gpu.synchronize().unwrap();
        let (queue, halt) = (gpu.fork_urgent(), gpu.halt().unwrap());
        let place = Destination {
            rows: address::<f32, f32>(View::range(&rows, 32..64)),
            marks: address::<f32, i32>(View::of(&marks)),
            ..Destination::default()
        };
        let what = Leaving::Rows { index: None, from: View::range(&rows, 0..32), k: 0, ids: None, weights: None };
        let push = |mark| {
            let pushed = Pushed { width: 8, what, rows: &[0..2, 2..4], beside: true };
            // SAFETY: both ranks' rows go to the same half of the buffer, which nothing else uses and which lives as long as this.
            unsafe { queue.push((&[place; 2], 0), &pushed, (mark, &halt)) }.unwrap()
        };
        // The driver loads a kernel when it is first launched, and waits for those that run.
        gpu.give_way(push(0), FOREVER);
        gpu.synchronize().unwrap();
        let pushes = [push(1), push(2)];
        Self { pushes, queue, halt, _memory: (rows, marks) }
    }

    /// The host ends both, and they had not ended before.
    fn end(self) {
        let over = self.queue.record();
        assert!(!self.queue.has_passed(&over).unwrap(), "a push that did not wait for its peer");
        self.halt.set();
        self.queue.synchronize().unwrap();
    }
}

impl Drop for Waiting {
    /// A test that fails ends too.
    fn drop(&mut self) {
        self.halt.set();
    }
}

#[test]
fn a_queue_gives_way_until_a_push_has_begun() {
    let Some(gpu) = gpu::<f32>() else { return };
    let waiting = Waiting::beside(&gpu);
    let began = Instant::now();
    gpu.give_way(waiting.pushes[0], FOREVER);
    gpu.synchronize().unwrap();
    assert!(began.elapsed() < FOREVER / 2, "it saw no push begin");
    waiting.end();
}

#[test]
fn a_queue_gives_way_no_longer_than_it_is_told() {
    let Some(gpu) = gpu::<f32>() else { return };
    let waiting = Waiting::beside(&gpu);
    let (began, patience) = (Instant::now(), Duration::from_millis(300));
    // The second push is behind the first in its queue.
    gpu.give_way(waiting.pushes[1], patience);
    gpu.synchronize().unwrap();
    assert!((patience..FOREVER / 2).contains(&began.elapsed()), "{:?}", began.elapsed());
    waiting.end();
}
