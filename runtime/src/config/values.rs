//! How single values read and write: `"auto"`, one path or a list, and serde's words for a reader.
//!
//! Owns no key and no default.

use std::fmt;
use std::path::PathBuf;

use serde::de::{self, Deserializer, SeqAccess, Visitor};

/// An optional whole number whose absence is written `"auto"`, so that a resolved file shows every key and `--set` can go back
/// to it.
pub(super) mod automatic {
    use std::marker::PhantomData;

    use serde::de::{Deserializer, Unexpected, Visitor};
    use serde::{Serialize, Serializer};

    /// The word.
    const AUTO: &str = "auto";

    pub(in crate::config) fn serialize<S: Serializer, N: Serialize>(
        value: &Option<N>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match value {
            Some(number) => number.serialize(serializer),
            None => serializer.serialize_str(AUTO),
        }
    }

    pub(in crate::config) fn deserialize<'de, D: Deserializer<'de>, N: TryFrom<u64>>(
        deserializer: D,
    ) -> Result<Option<N>, D::Error> {
        deserializer.deserialize_any(AutoVisitor(PhantomData))
    }

    struct AutoVisitor<N>(PhantomData<N>);

    impl<N: TryFrom<u64>> Visitor<'_> for AutoVisitor<N> {
        type Value = Option<N>;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("\"auto\" or a whole number of at least 1")
        }

        fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<Self::Value, E> {
            let number = N::try_from(value).ok().filter(|_| value > 0);
            number.map(Some).ok_or_else(|| E::invalid_value(Unexpected::Unsigned(value), &self))
        }

        fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<Self::Value, E> {
            match u64::try_from(value) {
                Ok(value) => self.visit_u64(value),
                Err(_) => Err(E::invalid_value(Unexpected::Signed(value), &self)),
            }
        }

        fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<Self::Value, E> {
            if value == AUTO { Ok(None) } else { Err(E::invalid_value(Unexpected::Str(value), &self)) }
        }
    }
}

/// Paths: one in quotes, or a list of them.
pub(super) fn one_or_many<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<PathBuf>, D::Error> {
    struct PathsVisitor;

    impl<'de> Visitor<'de> for PathsVisitor {
        type Value = Vec<PathBuf>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a path in quotes or a list of them")
        }

        fn visit_str<E: de::Error>(self, value: &str) -> Result<Self::Value, E> {
            Ok(vec![value.into()])
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
            let mut paths = Vec::new();
            while let Some(path) = list.next_element()? {
                paths.push(path);
            }
            Ok(paths)
        }
    }

    deserializer.deserialize_any(PathsVisitor)
}

/// Says for a person what serde expected: its message ends in type names of Rust, which are no help in a TOML file.
pub(super) fn plain_reason(serde_message: &str) -> String {
    let expected = serde_message.rsplit_once("expected ").map_or(serde_message, |(_, expected)| expected);
    match expected {
        "u8" | "u16" | "u32" | "u64" | "usize" => "must be a whole number of at least 0".into(),
        "i8" | "i16" | "i32" | "i64" | "isize" => "must be a whole number".into(),
        "f32" | "f64" => "must be a number".into(),
        "a boolean" => "must be true or false".into(),
        "a string" => "must be text in quotes".into(),
        "path string" => "must be a path in quotes".into(),
        "a sequence" => "must be a list in brackets".into(),
        other if serde_message.starts_with("unknown variant") => format!("must be {}", other.replace('`', "\"")),
        other if serde_message.contains("expected ") => format!("must be {other}"),
        other => other.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::plain_reason;

    #[test]
    fn type_names_of_rust_become_words() {
        let table = [
            ("invalid type: string \"x\", expected usize", "must be a whole number of at least 0"),
            ("invalid value: integer `-1`, expected u64", "must be a whole number of at least 0"),
            ("unknown variant `a`, expected `b` or `c`", "must be \"b\" or \"c\""),
            ("unknown variant `a`, expected one of `b`, `c`, `d`", "must be one of \"b\", \"c\", \"d\""),
            ("invalid type: string \"1\", expected f64", "must be a number"),
            ("something else", "something else"),
        ];
        for (message, reason) in table {
            assert_eq!(plain_reason(message), reason);
        }
    }
}
