//! Randomness of gates: numbers that depend on the seed, the layer and the token's place in the data, never on the layout.

use rand::SeedableRng;
use rand::rand_core::Rng;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

/// A number that no other arguments give, as far as anyone can tell (splitmix64's mixing, Steele, Lea and Flood 2014).
pub(super) fn hash(stream: u64, words: [u64; 2]) -> u64 {
    words.into_iter().fold(stream, |state, word| {
        let mut x = (state ^ word).wrapping_add(0x9e37_79b9_7f4a_7c15);
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    })
}

/// What a layer's router draws numbers for, beside its noise.
#[derive(Clone, Copy, Debug)]
pub(super) enum Purpose {
    /// Jitter of its input.
    Jitter,
    /// Dropout behind hidden layer 0, 1, …
    Hidden(usize),
    /// Which experts can't be chosen.
    Experts,
    /// A token's experts.
    Hash,
}

/// The stream of numbers for a purpose of `layer` in a run of `seed`.
pub(super) fn stream(seed: u64, layer: usize, purpose: Purpose) -> u64 {
    let purpose = match purpose {
        Purpose::Jitter => 0,
        Purpose::Experts => 1,
        Purpose::Hash => 2,
        Purpose::Hidden(number) => 3 + number as u64,
    };
    hash(seed, [layer as u64, purpose])
}

/// The stream of one layer's gate. Sample numbers never repeat, so a token's place already tells the step.
pub struct GateNoise {
    rng: ChaCha8Rng,
}

impl GateNoise {
    /// The stream of `layer` for `seed`.
    pub fn new(seed: u64, layer: usize) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(layer as u64 + 1);
        Self { rng }
    }

    /// Standard normals (Box–Muller) for `[tokens, width]` from global token `first` on.
    pub fn normals(&self, first: u64, width: usize, out: &mut [f32]) {
        /// Values that one thread draws at a time.
        const PART: usize = 1 << 13;
        out.par_chunks_mut(PART).enumerate().for_each(|(part, out)| {
            let mut stream = Self { rng: self.rng.clone() };
            stream.seek(first * width as u64 + (part * PART) as u64, 1);
            for value in out {
                let (a, b) = (stream.uniform_f64(), stream.uniform_f64());
                *value = ((-2.0 * (1.0 - a).ln()).sqrt() * (std::f64::consts::TAU * b).cos()) as f32;
            }
        });
    }

    /// Uniforms in [0, 1), one a token, from global token `first` on.
    pub fn uniforms(&mut self, first: u64, out: &mut [f32]) {
        self.seek(first, 1);
        for value in out {
            *value = self.uniform_f64() as f32;
            self.rng.next_u32();
        }
    }

    /// Every value consumes two words, so that a place in the data is a place in the stream.
    fn seek(&mut self, first: u64, width: usize) {
        self.rng.set_word_pos(u128::from(first) * width as u128 * 2);
    }

    fn uniform_f64(&mut self) -> f64 {
        f64::from(self.rng.next_u32()) / (f64::from(u32::MAX) + 1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tokens_noise_is_the_same_wherever_the_batch_begins() {
        // More than one thread draws at a time.
        let (mut whole, mut tail) = (vec![0.0; 30_000], vec![0.0; 29_982]);
        GateNoise::new(7, 1).normals(100, 3, &mut whole);
        GateNoise::new(7, 1).normals(106, 3, &mut tail);
        assert_eq!(whole[18..], tail);
        let mut uniform = [0.0; 4];
        GateNoise::new(7, 1).uniforms(100, &mut uniform);
        let mut last = [0.0; 1];
        GateNoise::new(7, 1).uniforms(103, &mut last);
        assert_eq!(uniform[3], last[0]);
    }

    #[test]
    fn normals_have_the_moments_of_a_normal() {
        let mut x = vec![0.0; 100_000];
        GateNoise::new(3, 0).normals(0, 10, &mut x);
        let mean = x.iter().map(|&v| f64::from(v)).sum::<f64>() / x.len() as f64;
        let variance = x.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / x.len() as f64;
        assert!(mean.abs() < 0.02 && (variance - 1.0).abs() < 0.02, "mean {mean}, variance {variance}");
    }
}
