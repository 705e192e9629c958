//! `moe-launch eval`: how well a model predicts texts.
//!
//! Owns the texts' names and the table. The model runs on this process alone, whatever layout it was trained under.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use moe_kernels::{Backend, Cpu};
use moe_runtime::config::Precision;
use moe_runtime::data::{Corpus, Stream, Tokenizer};
use moe_runtime::exit::{ExitCode as Code, Failure};
use moe_runtime::training::{EvalText, TextLoss, text_loss};
use moe_runtime::worker::{Device, DeviceChoice, OnDevice, Ranked};
use serde_json::json;

use crate::out::print;
use crate::place::{Loaded, Place};

const EXAMPLES: &str = "\
Examples:
  moe-launch eval --checkpoint runs/a --data held-out.txt
  moe-launch eval --checkpoint exported/ --data prose=texts/prose --data code=src/ --tokenizer bytes --json

The loss is the mean cross-entropy in nats per token, over every token but the first of each text, each seen with what stands
before it in its window; perplexity is e to the loss. Prompts of JSONL records are given and not predicted. Texts are read as the
run's training read its own: data.text_field, data.end_of_document, train.document_mask.";

/// Sequences of a pass.
const SEQUENCES: usize = 8;

/// Measure loss and perplexity of a model on texts.
#[derive(Args)]
#[command(after_long_help = EXAMPLES)]
pub(crate) struct EvalArgs {
    /// Run directory (its newest checkpoint), one checkpoint inside it, or a Hugging Face folder.
    #[arg(long, value_name = "DIR")]
    checkpoint: PathBuf,
    /// Text file or directory, with a name before it where the path says too little; may be given several times.
    #[arg(long, value_name = "[NAME=]PATH", required = true)]
    data: Vec<String>,
    /// Tokens of a window. Default: those of the run's training, else 512.
    #[arg(long, value_name = "N")]
    sequence_length: Option<usize>,
    /// Only the first tokens of each text; 0: all.
    #[arg(long, value_name = "N", default_value_t = 0)]
    max_tokens: usize,
    /// Tokenizer: bytes, or a tokenizer.json. Default: the run's or the folder's own.
    #[arg(long, value_name = "NAME")]
    tokenizer: Option<String>,
    /// Where to compute.
    #[arg(long, value_enum, default_value_t = DeviceChoice::Auto)]
    device: DeviceChoice,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// The losses of several texts.
struct Measuring<'a> {
    place: &'a Place,
    window: usize,
    texts: Vec<(&'a str, &'a Path, EvalText)>,
}

impl<'a> OnDevice for Measuring<'a> {
    type Output = Result<Vec<(&'a str, TextLoss)>, Failure>;

    fn run<B: Ranked>(self, device: B) -> Self::Output {
        let mut loaded = self.place.load(&device, self.window, SEQUENCES)?;
        let mut measured = Vec::new();
        for (name, path, text) in self.texts {
            let loss = measure(&mut loaded, name, &text)?;
            if loss.tokens == 0 {
                let message = format!("{}: {} tokens, none of them to predict", path.display(), text.tokens);
                return Err(Failure::new(Code::BadData, message));
            }
            measured.push((name, loss));
        }
        Ok(measured)
    }
}

pub(crate) fn run(args: &EvalArgs) -> Result<ExitCode, Failure> {
    let place = Place::find(&args.checkpoint)?;
    let tokenizer = place.tokenizer(args.tokenizer.as_deref())?;
    let window = args.sequence_length.unwrap_or(place.window());
    let most = place.configs().0.max_positions;
    if window == 0 || window > most {
        let message = format!("--sequence-length {window}: must be from 1 to the model's {most} positions");
        return Err(Failure::new(Code::Usage, message));
    }
    // Every text before the first is measured: a misspelt path should not cost an hour.
    let limit = if args.max_tokens == 0 { usize::MAX } else { args.max_tokens };
    let mut texts = Vec::new();
    for given in &args.data {
        let (name, path) = named(given);
        let text = text_of(&place, path, tokenizer.as_ref())?;
        texts.push((name, path, EvalText { tokens: limit.min(text.tokens), ..text }));
    }
    let device = Device::choose_alone(args.device, Precision::Auto)?;
    device.check(place.configs())?;
    let measured = device.visit(Measuring { place: &place, window, texts })?;
    let mut out = String::new();
    if args.json {
        let text = |(name, loss): &(&str, TextLoss)| json!({"name": name, "tokens": loss.tokens, "loss": loss.mean(), "perplexity": loss.perplexity()});
        let texts: Vec<_> = measured.iter().map(text).collect();
        let object = json!({"checkpoint": place.dir(), "sequence_length": window, "texts": texts});
        out += &format!("{object}\n");
    } else {
        let widest = measured.iter().map(|(name, _)| name.len()).max().unwrap_or(0).max(4);
        out += &format!("{:<widest$}  {:>12}  {:>8}  {:>10}\n", "text", "tokens", "loss", "perplexity");
        for (name, loss) in &measured {
            out +=
                &format!("{name:<widest$}  {:>12}  {:>8.4}  {:>10.3}\n", loss.tokens, loss.mean(), loss.perplexity());
        }
    }
    print(format_args!("{out}"))?;
    Ok(ExitCode::SUCCESS)
}

/// The loss of the model at `place` on a file or directory, in windows as in its training.
pub(crate) fn loss_on_file(place: &Place, tokenizer: &dyn Tokenizer, path: &Path) -> Result<TextLoss, Failure> {
    let text = text_of(place, path, tokenizer)?;
    measure(&mut place.load(&Cpu, place.window(), SEQUENCES)?, &place.dir().to_string_lossy(), &text)
}

fn measure<B: Backend>(loaded: &mut Loaded<B>, name: &str, text: &EvalText) -> Result<TextLoss, Failure> {
    let style = ProgressStyle::with_template("{prefix} [{wide_bar}] {pos}/{len} tokens, {eta} left");
    let bar = ProgressBar::new(text.tokens as u64).with_prefix(name.to_owned());
    let bar = match style {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    };
    let loss = text_loss(&mut loaded.model, &loaded.groups, text, |done| bar.set_position(done));
    bar.finish_and_clear();
    loss.map_err(|error| Failure::new(Code::Internal, error))
}

fn text_of(place: &Place, path: &Path, tokenizer: &dyn Tokenizer) -> Result<EvalText, Failure> {
    let corpus = Corpus::read(&place.reading(&[path.to_owned()], tokenizer.vocab_size()), tokenizer)?;
    let stream = Stream::new(corpus.sources.iter().flat_map(|source| source.stream.segments().iter().cloned()));
    let tokens = stream.len();
    if tokens < 2 {
        let message = format!("{}: {tokens} tokens; a loss needs 2 or more", path.display());
        return Err(Failure::new(Code::BadData, message));
    }
    Ok(EvalText { stream, tokens, document_mask: place.document_mask() })
}

/// Name and path of `NAME=PATH`, or the path as its own name. A path that exists as it stands is one.
fn named(given: &str) -> (&str, &Path) {
    match given.split_once('=') {
        Some((name, path)) if !name.is_empty() && !Path::new(given).exists() => (name, Path::new(path)),
        _ => (given, Path::new(given)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_may_stand_before_a_path() {
        assert_eq!(named("code=src/"), ("code", Path::new("src/")));
        assert_eq!(named("a.txt"), ("a.txt", Path::new("a.txt")));
        assert_eq!(named("=a.txt"), ("=a.txt", Path::new("=a.txt")));
    }
}
