//! A corpus out of nothing, whose entropy rate is known exactly.
//!
//! Owns a seeded Markov source of order two. Each pair of symbols is followed by one of five, with probabilities 1/2, 1/4, 1/8,
//! 1/16 and 1/16; which five, and in which order, differs from pair to pair and is what a model has to learn. Since every pair
//! has the same five probabilities p, the entropy rate is −Σ p·ln p = 15/8 · ln 2 ≈ 1.2997 nats a byte, whatever the pairs'
//! frequencies are: no model's expected loss is below it.

use std::f64::consts::LN_2;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use sha2::{Digest, Sha256};

use super::{Corpus, Tokens, hexadecimal};

/// The symbols.
const ALPHABET: &[u8; 16] = b"etaoinshrdlu ,.\n";
/// Symbols that can follow a pair.
const FOLLOWERS: usize = 5;
/// Length in bytes, which are tokens.
const LENGTH: usize = 2_000_000;
/// Nats a byte.
const ENTROPY: f64 = 1.875 * LN_2;
/// The seed; fixed, so that everyone has the same text.
const SEED: u64 = 2;

/// The generated corpus: 2 MB, the same everywhere.
pub fn generated_corpus() -> Corpus {
    let text = generate(LENGTH);
    let description = format!("generated, Markov source of order 2 ({:.2} MB, {LENGTH} tokens)", LENGTH as f64 / 1e6);
    let sha256 = hexadecimal(&Sha256::digest(&text));
    Corpus { entropy: Some(ENTROPY), ..Corpus::of_tokens(Tokens::U8(text.into()), description, sha256) }
}

/// Its text.
pub(super) fn generated_text() -> String {
    // The alphabet is ASCII: each byte is a character.
    generate(LENGTH).into_iter().map(char::from).collect()
}

fn generate(length: usize) -> Vec<u8> {
    let mut rng = ChaCha8Rng::seed_from_u64(SEED);
    let symbols = ALPHABET.len();
    let followers: Vec<[u8; FOLLOWERS]> = (0..symbols * symbols).map(|_| draw_followers(&mut rng)).collect();
    let mut pair = 0;
    (0..length)
        .map(|_| {
            // Zeros before the first one bit: 0 with probability 1/2, 1 with 1/4, … and 4 of 4 bits with the last 1/16.
            let choice = (rng.next_u32() | 1 << (FOLLOWERS - 1)).trailing_zeros() as usize;
            let next = followers[pair][choice];
            pair = (pair * symbols + usize::from(next)) % (symbols * symbols);
            ALPHABET[usize::from(next)]
        })
        .collect()
}

/// Five different symbols in random order: the head of a Fisher-Yates shuffle.
fn draw_followers(rng: &mut impl Rng) -> [u8; FOLLOWERS] {
    let mut symbols: [u8; ALPHABET.len()] = std::array::from_fn(|index| index as u8);
    for index in 0..FOLLOWERS {
        // The remainder favours some symbols by 2⁻²⁸ or less, which changes the text and not its entropy.
        let other = index + rng.next_u32() as usize % (symbols.len() - index);
        symbols.swap(index, other);
    }
    std::array::from_fn(|index| symbols[index])
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    #[test]
    fn the_stated_entropy_is_that_of_the_text() {
        let text = generate(400_000);
        let mut counts: HashMap<&[u8], HashMap<u8, f64>> = HashMap::new();
        for window in text.windows(3) {
            *counts.entry(&window[..2]).or_default().entry(window[2]).or_default() += 1.0;
        }
        let nats: f64 = counts
            .values()
            .map(|next| {
                let total: f64 = next.values().sum();
                next.values().map(|count| -count * (count / total).ln()).sum::<f64>()
            })
            .sum();
        let measured = nats / (text.len() - 2) as f64;
        // Counting 4 free frequencies for each of 256 pairs underestimates by about 1024 / 2 / 400 000 nats; the spread of
        // −ln p around its mean adds 0.95 / √400 000.
        assert!((measured - ENTROPY).abs() < 0.006, "{measured} against {ENTROPY}");
        assert!(counts.len() > 200, "the pairs are used: {}", counts.len());
    }

    #[test]
    fn everyone_has_the_same_text() {
        assert_eq!(generate(3_000)[..1_000], generate(1_000));
        let corpus = generated_corpus();
        assert_eq!(corpus.tokens(), LENGTH);
        assert_eq!(corpus.sha256, "fd794d7abd36ef6e1a6652745b6906e2d6317043beb4d780500e35c05a6e5c46");
    }
}
