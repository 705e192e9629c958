//! Which source each sample comes from.
//!
//! Owns nothing but arithmetic: the source of a sample, and how many samples that source gave before it, are a pure function of
//! the sample's number. After any number of samples a source's part differs from its share by less than the number of sources.

/// The bits of a share's fraction.
const BITS: u32 = 32;
/// A share of everything.
const WHOLE: u64 = 1 << BITS;

/// Shares of sources.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mixture {
    /// Of what the sources before it leave, the part of each source, in units of 2⁻³². The last one takes the rest.
    shares: Vec<u64>,
}

impl Mixture {
    /// Sources with these `weights`: positive, finite, at least one.
    pub(super) fn new(weights: &[f64]) -> Self {
        let mut left: f64 = weights.iter().sum();
        let share = |(index, weight): (usize, &f64)| {
            let share = (weight / left * WHOLE as f64).round() as u64;
            left -= weight;
            // A source that was asked for is never left out.
            if index + 1 == weights.len() { WHOLE } else { share.clamp(1, WHOLE - 1) }
        };
        Self { shares: weights.iter().enumerate().map(share).collect() }
    }

    /// The source of sample `number`, and how many samples it gave before.
    pub(super) fn at(&self, number: u64) -> (usize, u64) {
        let mut number = u128::from(number);
        for (source, &share) in self.shares.iter().enumerate() {
            // Samples of this source among the first n that those before it leave: n · share, rounded.
            let given = |n: u128| (n * u128::from(share) + u128::from(WHOLE / 2)) >> BITS;
            let before = given(number);
            if given(number + 1) > before {
                return (source, before as u64);
            }
            number -= before;
        }
        unreachable!("the last source takes everything")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn one_source_has_every_sample() {
        for number in [0, 1, 77, u64::MAX] {
            assert_eq!(Mixture::new(&[0.3]).at(number), (0, number));
        }
    }

    #[test]
    fn equal_sources_take_turns() {
        let sources: Vec<_> = (0..6).map(|number| Mixture::new(&[2.0, 2.0]).at(number)).collect();
        assert_eq!(sources, [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)]);
    }

    proptest! {
        #[test]
        fn each_source_counts_on_by_one_and_keeps_its_share(weights in proptest::collection::vec(0.01f64..10.0, 1..6)) {
            let mixture = Mixture::new(&weights);
            let mut given = vec![0u64; weights.len()];
            let total: f64 = weights.iter().sum();
            for number in 0..2000 {
                let (source, index) = mixture.at(number);
                prop_assert_eq!(index, given[source]);
                given[source] += 1;
                for (given, weight) in given.iter().zip(&weights) {
                    let share = weight / total * (number + 1) as f64;
                    prop_assert!((*given as f64 - share).abs() < weights.len() as f64 + 1e-3, "{given} of {share}");
                }
            }
        }

        #[test]
        fn far_samples_are_found_at_once(number in any::<u64>(), weight in 0.001f64..1000.0) {
            let (source, index) = Mixture::new(&[weight, 1.0, 5.0]).at(number);
            prop_assert!(source < 3 && index <= number);
        }
    }
}
