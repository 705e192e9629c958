//! What a checkpoint says of itself: manifest.json.
//!
//! Owns its form, its version and the seal that shows a change of any of its bytes. It opens no tensor file.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::CheckpointError;
use crate::data::hexadecimal;
use crate::model::ModelConfig;
use crate::routing::RouterConfig;

/// The manifest's name in a checkpoint's directory.
pub const MANIFEST: &str = "manifest.json";

/// The version that is written, and the newest that is read.
pub const FORMAT: u64 = 1;

/// Stands for the seal while it is computed.
const UNSEALED: &str = "0000000000000000000000000000000000000000000000000000000000000000";

/// How far a run has come.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Progress {
    /// Steps that are finished.
    pub step: u64,
    /// Updates that the optimizer has made: the t of AdamW's bias correction.
    pub optimizer_step: u64,
    /// Where the data goes on; the loader's own, not understood here.
    pub cursor: Value,
}

/// A tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorEntry {
    /// Its name, as in [`super::names`].
    pub name: String,
    /// "F32".
    pub dtype: String,
    /// Its logical shape.
    pub shape: Vec<usize>,
}

/// A file beside the manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Its name, without a directory.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// Hash of its bytes, in hexadecimal.
    pub sha256: String,
    /// Its tensors, in the order of their data.
    pub tensors: Vec<TensorEntry>,
}

/// The whole manifest. It never says on how many ranks it was written.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// The seal: hash of the manifest's own text with these 64 digits as zeros. First, so that it is found without parsing.
    sha256: String,
    /// [`FORMAT`].
    pub format: u64,
    /// How far the run had come.
    pub progress: Progress,
    /// Sizes of the model.
    pub model: ModelConfig,
    /// Its routing.
    pub router: RouterConfig,
    /// The files, by name.
    pub files: Vec<FileEntry>,
}

impl Manifest {
    /// A manifest of these files.
    pub(super) fn new(progress: Progress, model: ModelConfig, router: RouterConfig, mut files: Vec<FileEntry>) -> Self {
        files.sort_by(|a, b| a.name.cmp(&b.name));
        Self { sha256: UNSEALED.to_owned(), format: FORMAT, progress, model, router, files }
    }

    /// The text to write: the same bytes for the same content.
    ///
    /// # Errors
    /// The cursor has what JSON cannot hold.
    pub(super) fn to_text(&self) -> Result<String, serde_json::Error> {
        let unsealed = Self { sha256: UNSEALED.to_owned(), ..self.clone() };
        let text = serde_json::to_string_pretty(&unsealed)? + "\n";
        Ok(text.replacen(UNSEALED, &hex_sha256(text.as_bytes()), 1))
    }

    /// Reads and checks a manifest.
    ///
    /// # Errors
    /// It is of a later version, not of the form it should have, or one of its bytes was changed.
    pub(super) fn parse(path: &Path, text: &str) -> Result<Self, CheckpointError> {
        let json = |source| CheckpointError::Json { path: path.to_owned(), source };
        // Before anything else: what a later version looks like is not known here.
        let any: Value = serde_json::from_str(text).map_err(json)?;
        if let Some(found) = any["format"].as_u64().filter(|format| *format > FORMAT) {
            return Err(CheckpointError::FutureFormat { path: path.to_owned(), found, known: FORMAT });
        }
        let manifest: Self = serde_json::from_str(text).map_err(json)?;
        let found = hex_sha256(text.replacen(&manifest.sha256, UNSEALED, 1).as_bytes());
        if found != manifest.sha256 {
            let expected = manifest.sha256;
            return Err(CheckpointError::Hash { path: path.to_owned(), expected, found });
        }
        Ok(manifest)
    }

    /// Where the model of the checkpoint and that of a run differ: `model.heads: 4 in the checkpoint, 8 in this run`. Compared
    /// is what decides which function the parameters compute; how they were initialised and the losses' coefficients may change.
    pub(super) fn differences(&self, model: &ModelConfig, router: &RouterConfig) -> Vec<String> {
        model_differences((&self.model, &self.router), (model, router), ("the checkpoint", "this run"))
    }
}

/// Where two models differ in which function their parameters compute: key and both values, each with where it is from.
pub(super) fn model_differences(
    (model, router): (&ModelConfig, &RouterConfig),
    (other_model, other_router): (&ModelConfig, &RouterConfig),
    places: (&str, &str),
) -> Vec<String> {
    let model_key = |key: &str| key != "init_std";
    let mut differences = compare("model", (model, other_model), model_key, places);
    let router_key = |key: &str| matches!(key, "kind" | "renormalize" | "weight_scale");
    differences.extend(compare("router", (router, other_router), router_key, places));
    differences
}

fn compare<T: Serialize>(
    table: &str,
    (ours, theirs): (&T, &T),
    matters: impl Fn(&str) -> bool,
    (here, there): (&str, &str),
) -> Vec<String> {
    let mut differences = Vec::new();
    let (Ok(Value::Object(ours)), Ok(Value::Object(theirs))) =
        (serde_json::to_value(ours), serde_json::to_value(theirs))
    else {
        unreachable!("a configuration is an object");
    };
    for (key, ours) in ours.iter().filter(|(key, _)| matters(key)) {
        if let Some(theirs) = theirs.get(key).filter(|theirs| *theirs != ours) {
            differences.push(format!("{table}.{key}: {ours} in {here}, {theirs} in {there}"));
        }
    }
    differences
}

fn hex_sha256(bytes: &[u8]) -> String {
    hexadecimal(&Sha256::digest(bytes))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn manifest() -> Manifest {
        let progress = Progress { step: 40, optimizer_step: 39, cursor: json!({"sample": 1280, "seed": u64::MAX}) };
        let tensors = vec![TensorEntry { name: "lm_head.weight".into(), dtype: "F32".into(), shape: vec![3, 4] }];
        let file =
            |name: &str| FileEntry { name: name.into(), bytes: 7, sha256: "ab".into(), tensors: tensors.clone() };
        let files = vec![file("b"), file("a")];
        Manifest::new(progress, ModelConfig::default(), RouterConfig::default(), files)
    }

    fn parse(text: &str) -> Result<Manifest, CheckpointError> {
        Manifest::parse(Path::new("manifest.json"), text)
    }

    #[test]
    fn what_is_written_is_read_again() {
        let written = manifest();
        let read = parse(&written.to_text().unwrap()).unwrap();
        assert_eq!(read, Manifest { sha256: read.sha256.clone(), ..written });
        assert_eq!(read.to_text().unwrap(), manifest().to_text().unwrap());
    }

    #[test]
    fn no_bit_of_it_can_be_changed_unseen() {
        let text = manifest().to_text().unwrap();
        for at in 0..text.len() {
            let mut bytes = text.clone().into_bytes();
            bytes[at] ^= 1;
            if let Ok(changed) = String::from_utf8(bytes) {
                assert!(parse(&changed).is_err(), "byte {at}: {changed}");
            }
        }
    }

    #[test]
    fn a_later_version_is_named_whatever_else_it_holds() {
        let later = json!({"format": 2, "shards": []}).to_string();
        assert!(matches!(parse(&later), Err(CheckpointError::FutureFormat { found: 2, known: 1, .. })));
    }

    #[test]
    fn differences_name_key_and_both_values() {
        let here = ModelConfig { heads: 8, init_std: 0.5, ..ModelConfig::default() };
        let router = RouterConfig { renormalize: true, balance_coefficient: 0.5, ..RouterConfig::default() };
        let expected = [
            "model.heads: 4 in the checkpoint, 8 in this run",
            "router.renormalize: false in the checkpoint, true in this run",
        ];
        assert_eq!(manifest().differences(&here, &router), expected);
    }
}
