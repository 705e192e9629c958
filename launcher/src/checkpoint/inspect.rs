//! `moe-launch checkpoint inspect`: what is in it.
//!
//! Owns the table. It reads headers and the manifest only: no tensor, no hash.

use std::path::PathBuf;

use clap::Args;
use moe_runtime::checkpoint::Checkpoint;
use moe_runtime::exit::Failure;
use moe_runtime::model::layout::parameter_counts;
use serde_json::{Value, json};

use crate::out::{print, say};
use crate::place::Place;

const EXAMPLES: &str = "\
Examples:
  moe-launch checkpoint inspect runs/a
  moe-launch checkpoint inspect runs/a/checkpoints/step-00002000 --tensors
  moe-launch checkpoint inspect OLMoE/ --json";

/// Show what a checkpoint or a Hugging Face folder holds.
#[derive(Args)]
#[command(after_long_help = EXAMPLES)]
pub(super) struct InspectArgs {
    /// Run directory (its newest checkpoint), one checkpoint, or a Hugging Face folder.
    #[arg(value_name = "MODEL")]
    model: PathBuf,
    /// List every tensor.
    #[arg(long)]
    tensors: bool,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// A tensor as it is listed.
struct Listed {
    name: String,
    dtype: String,
    shape: Vec<usize>,
    file: String,
}

pub(super) fn run(args: &InspectArgs) -> Result<(), Failure> {
    let place = Place::find(&args.model)?;
    let (model, router) = place.configs();
    let (all, active) = parameter_counts(model, router);
    let tensors = listed(&place);
    let mut facts = vec![("path", json!(place.dir()))];
    match &place {
        Place::Run { checkpoint, .. } => {
            let manifest = checkpoint.manifest();
            facts.push(("kind", json!("checkpoint")));
            facts.push(("format", json!(manifest.format)));
            facts.push(("step", json!(manifest.progress.step)));
            facts.push(("optimizer updates", json!(manifest.progress.optimizer_step)));
            facts.push(("files", json!(manifest.files.len())));
            facts.push(("bytes", json!(bytes_of(checkpoint))));
        }
        Place::Folder(_) => facts.push(("kind", json!("Hugging Face folder"))),
    }
    facts.push(("family", json!(model.family)));
    facts.push(("parameters", json!(all)));
    facts.push(("active a token", json!(active)));
    facts.push(("tensors", json!(tensors.len())));
    if args.json {
        let mut object = Value::Object(facts.into_iter().map(|(key, value)| (key.replace(' ', "_"), value)).collect());
        object["model"] = json!(model);
        object["router"] = json!(router);
        if args.tensors {
            let entry = |t: &Listed| json!({"name": t.name, "dtype": t.dtype, "shape": t.shape, "file": t.file});
            object["tensor_list"] = tensors.iter().map(entry).collect();
        }
        return say!("{object}");
    }
    facts.push(("blocks", json!(model.layers)));
    facts.push(("hidden size", json!(model.hidden_size)));
    facts.push((
        "heads",
        json!(format!("{} query, {} key/value, {} wide", model.heads, model.kv_heads, model.head_width())),
    ));
    facts.push(("vocabulary", json!(model.vocab_size)));
    let moe_layers = model.moe_layers().count();
    if moe_layers > 0 {
        let text = format!(
            "{} in {moe_layers} blocks, {} a token, {} neurons each",
            model.experts, model.top_k, model.expert_ffn_size
        );
        facts.push(("experts", json!(text)));
        facts.push(("gate", json!(router.kind)));
    }
    if let Some(scaling) = &model.rope_scaling {
        facts.push(("rotary scaling", json!(format!("{scaling:?}"))));
    }
    facts.push(("tied embeddings", json!(model.tie_embeddings)));
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let mut out: String = facts.iter().map(|(key, value)| format!("{key:<18} {}\n", text(value))).collect();
    if args.tensors {
        let widest = tensors.iter().map(|tensor| tensor.name.len()).max().unwrap_or(0);
        out += &format!("\n{:<widest$}  {:<5} {:<16} file\n", "tensor", "type", "shape");
        for Listed { name, dtype, shape, file } in &tensors {
            out += &format!("{name:<widest$}  {dtype:<5} {:<16} {file}\n", format!("{shape:?}"));
        }
    }
    print(format_args!("{out}"))
}

fn bytes_of(checkpoint: &Checkpoint) -> u64 {
    checkpoint.manifest().files.iter().map(|file| file.bytes).sum()
}

fn listed(place: &Place) -> Vec<Listed> {
    match place {
        Place::Run { checkpoint, .. } => {
            let files = checkpoint.manifest().files.iter();
            let entries = files.flat_map(|file| file.tensors.iter().map(move |tensor| (file, tensor)));
            let listed = entries.map(|(file, tensor)| Listed {
                name: tensor.name.clone(),
                dtype: tensor.dtype.clone(),
                shape: tensor.shape.clone(),
                file: file.name.clone(),
            });
            listed.collect()
        }
        Place::Folder(folder) => {
            let listed = folder.tensors().map(|(name, dtype, shape)| Listed {
                name: name.to_owned(),
                dtype: dtype.to_string(),
                shape: shape.to_vec(),
                file: folder.file_of(name).unwrap_or_default(),
            });
            listed.collect()
        }
    }
}
