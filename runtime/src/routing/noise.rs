//! Randomness of gates: numbers that depend on the seed, the layer and the token's place in the data, never on the layout.

/// A number that no other arguments give, as far as anyone can tell (splitmix64's mixing, Steele, Lea and Flood 2014).
pub(super) fn hash(stream: u64, words: [u64; 2]) -> u64 {
    words.into_iter().fold(stream, |state, word| {
        let mut x = (state ^ word).wrapping_add(0x9e37_79b9_7f4a_7c15);
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    })
}

/// What a layer's router draws numbers for.
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
    /// Noise on logits.
    Noise,
    /// Whether a token goes to its second expert.
    SecondExpert,
}

/// The stream of numbers for a purpose of `layer` in a run of `seed`. Sample numbers never repeat, so a token's place already tells the
/// step.
pub(super) fn stream(seed: u64, layer: usize, purpose: Purpose) -> u64 {
    let purpose = match purpose {
        Purpose::Jitter => 0,
        Purpose::Experts => 1,
        Purpose::Hash => 2,
        Purpose::Hidden(number) => 3 + number as u64,
        // Far from what counts layers.
        Purpose::Noise => 1 << 32,
        Purpose::SecondExpert => (1 << 32) + 1,
    };
    hash(seed, [layer as u64, purpose])
}
