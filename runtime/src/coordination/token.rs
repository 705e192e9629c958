//! The join token: what a process must show to take part in a job.
//!
//! Owns drawing, parsing and comparing it. It never prints one: there is no `Display`, and `Debug` is redacted.

use std::fmt;
use std::str::FromStr;

/// A random 128-bit secret, written as 32 hexadecimal digits. Whoever hosts the coordinator draws it and hands it to the workers
/// (over MPI, or in the variable `MOE_JOIN_TOKEN`).
#[derive(Clone)]
pub struct JoinToken([u8; 16]);

/// The text was not a join token. The text itself is not repeated: it may be most of a secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the join token must be 32 hexadecimal digits; this one has {length} characters, of which {wrong} are no such digit"
)]
pub struct BadToken {
    /// Characters of the text.
    pub length: usize,
    /// How many of them are not hexadecimal digits.
    pub wrong: usize,
}

impl JoinToken {
    /// A new token from the operating system's randomness.
    pub fn generate() -> Self {
        Self(rand::random())
    }

    /// The token in clear, 32 lower-case digits, for handing it on. Never log it.
    pub fn expose(&self) -> String {
        use fmt::Write as _;
        self.0.iter().fold(String::with_capacity(32), |mut text, byte| {
            // Writing to a String cannot fail.
            let _ = write!(text, "{byte:02x}");
            text
        })
    }

    /// Whether both are the same, in a time that does not depend on where they differ.
    pub fn matches(&self, other: &JoinToken) -> bool {
        let difference = self.0.iter().zip(&other.0).fold(0u8, |found, (a, b)| found | (a ^ b));
        // The barrier keeps the compiler from turning the fold into an early return.
        std::hint::black_box(difference) == 0
    }
}

impl FromStr for JoinToken {
    type Err = BadToken;

    fn from_str(text: &str) -> Result<Self, BadToken> {
        let text = text.trim();
        let digits: Vec<u8> =
            text.chars().filter_map(|c| c.to_digit(16)).filter_map(|d| u8::try_from(d).ok()).collect();
        let length = text.chars().count();
        let mut bytes = [0; 16];
        if length != 32 || digits.len() != 32 {
            return Err(BadToken { length, wrong: length - digits.len() });
        }
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            *byte = pair[0] << 4 | pair[1];
        }
        Ok(Self(bytes))
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JoinToken(redacted)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_survives_its_text_and_no_other_token_matches() {
        let token = JoinToken::generate();
        let again: JoinToken = format!(" {}\n", token.expose().to_uppercase()).parse().unwrap();
        assert!(token.matches(&again));
        for bit in 0..128 {
            let mut other = token.clone();
            other.0[bit / 8] ^= 1 << (bit % 8);
            assert!(!token.matches(&other), "bit {bit}");
        }
        assert!(!token.matches(&JoinToken::generate()));
    }

    #[test]
    fn debug_output_holds_no_digit_of_the_token() {
        assert_eq!(format!("{:?}", JoinToken::generate()), "JoinToken(redacted)");
    }

    #[test]
    fn malformed_tokens_are_refused_without_repeating_them() {
        for (text, length, wrong) in
            [("", 0, 0), ("abc", 3, 0), ("zz5e6f708192a3b4c5d6e7f8091a2b3c", 32, 2), ("é", 1, 1)]
        {
            assert_eq!(text.parse::<JoinToken>().unwrap_err(), BadToken { length, wrong });
        }
    }
}
