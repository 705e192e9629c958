//! Who sends how many rows to whom, and in how many rounds they come: arithmetic on counts that all ranks of the group have alike.
//!
//! Owns the cut of arriving rows into rounds. A rank takes rows in the order of their senders, as many at a time as its buffers are
//! planned for; everyone works out everyone's rounds from the same counts, so nobody has to tell. It never moves a row.

use std::ops::Range;

use moe_kernels::ShuffleDims;

use crate::collectives::consecutive;

/// The most that one chunk of one layer's tokens may bring to a rank at a time: what its buffers are planned for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Rows that arrive.
    pub rows: usize,
    /// Rows that they expand to: N.
    pub expanded: usize,
}

impl Room {
    /// The headroom of a job that asks for none: before the balance loss has worked, ranks differ by about this.
    pub const HEADROOM: f64 = 1.4;

    /// `headroom` times what `dims.tokens` tokens of each rank bring where they choose evenly; at least one row.
    pub fn planned(headroom: f64, dims: ShuffleDims) -> Self {
        let times = |expected: f64| (headroom * expected).ceil().max(1.0) as usize;
        let visits = (dims.tokens * dims.ranks) as f64 * visit_probability(dims);
        Self { rows: times(visits), expanded: times((dims.tokens * dims.top_k) as f64) }
    }
}

/// The probability that a token visits a given rank, where its choices are even and independent.
pub fn visit_probability(dims: ShuffleDims) -> f64 {
    let (e, k, local) = (dims.experts, dims.top_k, dims.local_experts());
    // C(E − E_local, k) / C(E, k) as a product of k fractions, none of them large.
    let missed: f64 = (0..k.min(e)).map(|j| (e - local).saturating_sub(j) as f64 / (e - j) as f64).product();
    1.0 - missed
}

/// What comes to a rank in a chunk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Coming {
    pub(super) rows: usize,
    pub(super) expanded: usize,
}

/// The counts of all ranks, `[W, chunks, 2, W]`: sender, chunk, rows or choices, receiver.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Traffic {
    pub(super) ranks: usize,
    pub(super) chunks: usize,
    pub(super) counts: Vec<i32>,
}

impl Traffic {
    /// An empty table of this size.
    pub(super) fn sized(ranks: usize, chunks: usize) -> Self {
        Self { ranks, chunks, counts: vec![0; Self::len(ranks, chunks)] }
    }

    /// Numbers of a table.
    pub(super) fn len(ranks: usize, chunks: usize) -> usize {
        ranks * Self::own_len(ranks, chunks)
    }

    /// Numbers that one rank brings.
    pub(super) fn own_len(ranks: usize, chunks: usize) -> usize {
        chunks * 2 * ranks
    }

    /// Of the numbers that one rank brings, those of a chunk.
    pub(super) fn own(ranks: usize, chunk: usize) -> Range<usize> {
        2 * ranks * chunk..2 * ranks * (chunk + 1)
    }

    fn count(&self, kind: usize, (from, chunk, to): (usize, usize, usize)) -> usize {
        self.counts[((from * self.chunks + chunk) * 2 + kind) * self.ranks + to] as usize
    }

    /// Rows of `chunk` that `from` sends to `to`.
    pub(super) fn rows(&self, from: usize, chunk: usize, to: usize) -> usize {
        self.count(0, (from, chunk, to))
    }

    /// Rows of `chunk` that `from` sends, those to itself included.
    pub(super) fn sent(&self, from: usize, chunk: usize) -> usize {
        (0..self.ranks).map(|to| self.rows(from, chunk, to)).sum()
    }

    /// The most rows that a rank sends in all chunks, those to itself included.
    pub(super) fn most_sent(&self) -> usize {
        (0..self.ranks).map(|rank| (0..self.chunks).map(|chunk| self.sent(rank, chunk)).sum()).max().unwrap_or(0)
    }

    /// Where rank `me`'s rows of `chunk` land at each rank: the first of those that leave it, among all that reach that rank in the
    /// chunk; and the first of those that come back, among all that that rank has sent in all chunks.
    pub(super) fn landings(&self, chunk: usize, me: usize) -> (Vec<usize>, Vec<usize>) {
        let away = |to| (0..me).map(|from| self.rows(from, chunk, to)).sum();
        let home = |from| {
            let before: usize = (0..chunk).map(|chunk| self.sent(from, chunk)).sum();
            before + (0..me).map(|to| self.rows(from, chunk, to)).sum::<usize>()
        };
        ((0..self.ranks).map(away).collect(), (0..self.ranks).map(home).collect())
    }

    /// What comes to `to` in `chunk`.
    pub(super) fn coming(&self, chunk: usize, to: usize) -> Coming {
        let sum = |kind| (0..self.ranks).map(|from| self.count(kind, (from, chunk, to))).sum();
        Coming { rows: sum(0), expanded: sum(1) }
    }

    /// Rows that `to` takes at a time of `chunk`: all, or as many as fit whatever they expand to, which is at most `most` rows each.
    fn at_a_time(&self, (chunk, to): (usize, usize), room: Room, most: usize) -> usize {
        let Coming { rows, expanded } = self.coming(chunk, to);
        if rows <= room.rows && expanded <= room.expanded {
            return rows.max(1);
        }
        room.rows.min(room.expanded / most).max(1)
    }

    /// Rounds in which `to` takes what comes in `chunk`, at least one.
    pub(super) fn rounds_of(&self, chunk: usize, to: usize, room: Room, most: usize) -> usize {
        self.coming(chunk, to).rows.div_ceil(self.at_a_time((chunk, to), room, most)).max(1)
    }

    /// Rounds of `chunk`: of the rank that needs most.
    pub(super) fn rounds(&self, chunk: usize, room: Room, most: usize) -> usize {
        (0..self.ranks).map(|to| self.rounds_of(chunk, to, room, most)).max().unwrap_or(1)
    }

    /// The rows that leave and reach `me` in one round of `chunk`.
    pub(super) fn parts(&self, (chunk, round): (usize, usize), me: usize, room: Room, most: usize) -> Parts {
        let part = |from, to| {
            let each = self.at_a_time((chunk, to), room, most);
            let before: usize = (0..from).map(|from| self.rows(from, chunk, to)).sum();
            let block = before..before + self.rows(from, chunk, to);
            let taken =
                (round * each).clamp(block.start, block.end)..((round + 1) * each).clamp(block.start, block.end);
            taken.start - before..taken.end - before
        };
        let blocks = consecutive((0..self.ranks).map(|to| self.rows(me, chunk, to)));
        let home = blocks.enumerate().map(|(to, block)| {
            let part = part(me, to);
            block.start + part.start..block.start + part.end
        });
        let away = consecutive((0..self.ranks).map(|from| part(from, me).len()));
        Parts { home: home.collect(), away: away.collect() }
    }
}

/// Rows of one round by the rank at their other end: where they lie at their token's rank, and at their experts'.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Parts {
    /// Of the rows that this rank sends.
    pub(super) home: Vec<Range<usize>>,
    /// Of the rows that come to it.
    pub(super) away: Vec<Range<usize>>,
}

impl Parts {
    /// Rows that come.
    pub(super) fn received(&self) -> usize {
        self.away.last().map_or(0, |last| last.end)
    }

    /// The same without the rows to ranks that are not in `kept`, and without those that come where this rank, `me`, is not.
    pub(super) fn only(&self, kept: impl Fn(usize) -> bool, me: usize) -> Self {
        let none = |range: &Range<usize>| range.start..range.start;
        let home = self.home.iter().enumerate().map(|(to, range)| if kept(to) { range.clone() } else { none(range) });
        let away = self.away.iter().map(|range| if kept(me) { range.clone() } else { none(range) });
        Self { home: home.collect(), away: away.collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One chunk in which rank s sends `rows[s][d]` rows of two experts each to rank d.
    fn traffic(rows: &[&[usize]]) -> Traffic {
        let mut traffic = Traffic::sized(rows.len(), 1);
        let numbers = rows.iter().flat_map(|rows| rows.iter().copied().chain(rows.iter().map(|rows| 2 * rows)));
        traffic.counts = numbers.map(|count| count as i32).collect();
        traffic
    }

    const MOST: usize = 2;
    const PLENTY: Room = Room { rows: 100, expanded: 100 };

    #[test]
    fn what_fits_comes_at_once() {
        let traffic = traffic(&[&[1, 2], &[3, 4]]);
        assert_eq!(traffic.coming(0, 1), Coming { rows: 6, expanded: 12 });
        for room in [PLENTY, Room { rows: 6, expanded: 12 }] {
            assert_eq!(traffic.rounds(0, room, MOST), 1);
            let parts = traffic.parts((0, 0), 1, room, MOST);
            assert_eq!(parts, Parts { home: vec![0..3, 3..7], away: vec![0..2, 2..6] });
        }
    }

    #[test]
    fn rounds_hold_no_more_than_there_is_room_for_and_every_row_once() {
        let all = traffic(&[&[5, 0, 7], &[9, 1, 0], &[0, 0, 11]]);
        for room in [(1, 100), (4, 100), (100, 2), (100, 9), (13, 28), (14, 29)] {
            let room = Room { rows: room.0, expanded: room.1 };
            let rounds = all.rounds(0, room, MOST);
            let parts = |round| -> Vec<_> { (0..3).map(|me| all.parts((0, round), me, room, MOST)).collect() };
            let (mut sent, mut came) = ([[0; 3]; 3], [0; 3]);
            for round in 0..rounds {
                let parts = parts(round);
                for me in 0..3 {
                    let received = parts[me].received();
                    let whole = all.rounds_of(0, me, room, MOST) == 1;
                    assert!(received <= room.rows && (whole || MOST * received <= room.expanded.max(MOST)), "{room:?}");
                    assert!(whole || round < all.rounds_of(0, me, room, MOST) || received == 0);
                    came[me] += received;
                    for to in 0..3 {
                        // What one sends the other expects, and it goes on where the last round ended.
                        assert_eq!(parts[me].home[to].len(), parts[to].away[me].len(), "{room:?}, round {round}");
                        let block: usize = (0..to).map(|to| all.rows(me, 0, to)).sum();
                        if !parts[me].home[to].is_empty() {
                            assert_eq!(parts[me].home[to].start, block + sent[me][to]);
                        }
                        sent[me][to] += parts[me].home[to].len();
                    }
                }
            }
            for me in 0..3 {
                assert_eq!(came[me], all.coming(0, me).rows, "{room:?}");
                assert_eq!(sent[me], std::array::from_fn(|to| all.rows(me, 0, to)), "{room:?}");
            }
        }
    }

    #[test]
    fn rows_land_where_their_ranks_have_them() {
        let mut all = Traffic::sized(3, 2);
        for (i, count) in all.counts.iter_mut().enumerate() {
            *count = (i * 7 % 5) as i32;
        }
        for chunk in 0..2 {
            let parts: Vec<_> = (0..3).map(|rank| all.parts((chunk, 0), rank, PLENTY, MOST)).collect();
            for me in 0..3 {
                let (away, home) = all.landings(chunk, me);
                for rank in 0..3 {
                    assert_eq!(away[rank], parts[rank].away[me].start, "from {me} to {rank}");
                    let before = if chunk == 0 { 0 } else { all.sent(rank, 0) };
                    assert_eq!(home[rank], before + parts[rank].home[me].start, "back from {me} to {rank}");
                }
            }
        }
        assert_eq!(all.most_sent(), (0..3).map(|rank| all.sent(rank, 0) + all.sent(rank, 1)).max().unwrap());
    }

    #[test]
    fn nothing_at_all_is_one_round() {
        let none = traffic(&[&[0, 0], &[0, 0]]);
        assert_eq!(none.rounds(0, Room { rows: 1, expanded: 1 }, MOST), 1);
        assert_eq!(none.parts((0, 0), 0, PLENTY, MOST).received(), 0);
    }

    #[test]
    fn parts_for_some_ranks_leave_the_others_out() {
        let parts = Parts { home: vec![0..3, 3..7], away: vec![0..2, 2..6] };
        assert_eq!(parts.only(|rank| rank == 1, 1), Parts { home: vec![0..0, 3..7], away: vec![0..2, 2..6] });
        assert_eq!(parts.only(|rank| rank == 1, 0), Parts { home: vec![0..0, 3..7], away: vec![0..0, 2..2] });
    }

    #[test]
    fn planned_room_is_never_none() {
        let dims = |tokens| ShuffleDims { tokens, top_k: 1, experts: 4, ranks: 2 };
        assert_eq!(Room::planned(1.4, dims(0)), Room { rows: 1, expanded: 1 });
        assert_eq!(Room::planned(1.4, dims(10)), Room { rows: 14, expanded: 14 });
    }
}
