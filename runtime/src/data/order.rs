//! The order of samples: a seeded permutation per epoch that is computed, not stored.
//!
//! Owns nothing but arithmetic. A balanced Feistel network (Luby and Rackoff 1988) permutes the numbers of the next even number
//! of bits; numbers beyond the range are sent through again until they fall into it (Black and Rogaway 2002), at most three more
//! times in the mean.

/// Rounds of the network: four make a pseudo-random permutation of pseudo-random rounds.
const ROUNDS: u64 = 4;

/// A permutation of `0..count`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Permutation {
    count: u64,
    half_bits: u32,
    key: u64,
}

impl Permutation {
    /// The permutation of `0..count` under `key`; `count` is at least 1 and at most 2⁶².
    pub(super) fn new(count: u64, key: u64) -> Self {
        debug_assert!((1..=1 << 62).contains(&count), "{count} numbers");
        let bits = u64::BITS - (count - 1).leading_zeros();
        Self { count, half_bits: bits.div_ceil(2).max(1), key }
    }

    /// Where `index`, below `count`, goes.
    pub(super) fn at(&self, index: u64) -> u64 {
        debug_assert!(index < self.count, "{index} of {}", self.count);
        let mut number = self.network(index);
        while number >= self.count {
            number = self.network(number);
        }
        number
    }

    fn network(&self, number: u64) -> u64 {
        let mask = (1 << self.half_bits) - 1;
        let (mut left, mut right) = (number >> self.half_bits, number & mask);
        for round in 0..ROUNDS {
            (left, right) = (right, left ^ (mix(self.key ^ mix(right << 3 | round)) & mask));
        }
        left << self.half_bits | right
    }
}

/// A number that follows from `parts` and looks unrelated to that of any others.
pub(super) fn key(parts: [u64; 3]) -> u64 {
    parts.into_iter().fold(0x6d6f_6573_616d_706c, |state, part| mix(state ^ mix(part)))
}

/// The finalizer of SplitMix64 (Steele, Lea and Flood 2014) after its increment: a bijection that spreads every bit.
fn mix(number: u64) -> u64 {
    let mut x = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_permutation_spreads_neighbours() {
        let permutation = Permutation::new(1000, key([1, 2, 3]));
        let far = (0..999).filter(|&i| permutation.at(i).abs_diff(permutation.at(i + 1)) > 50).count();
        // Of random pairs 90 % are more than 50 apart; 999 of them by at least 85 % is five standard deviations.
        assert!(far > 850, "{far}");
        let fixed = (0..1000).filter(|&i| permutation.at(i) == i).count();
        assert!(fixed < 10, "{fixed}");
    }

    proptest! {
        #[test]
        fn every_number_is_hit_exactly_once(count in 1u64..2000, key in any::<u64>()) {
            let permutation = Permutation::new(count, key);
            let mut hit = vec![false; count as usize];
            for index in 0..count {
                let to = permutation.at(index) as usize;
                prop_assert!(!hit[to]);
                hit[to] = true;
            }
        }

        #[test]
        fn large_ranges_stay_in_range(count in 1u64..1 << 62, key in any::<u64>(), index in any::<u64>()) {
            prop_assert!(Permutation::new(count, key).at(index % count) < count);
        }
    }
}
