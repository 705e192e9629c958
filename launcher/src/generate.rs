//! `moe-launch generate`: a trained model writes.
//!
//! Owns the prompt and the output. The model runs on this process alone, whatever layout it was trained under.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use moe_runtime::config::Precision;
use moe_runtime::data::Tokenizer;
use moe_runtime::exit::{ExitCode as Code, Failure};
use moe_runtime::training::{Sampling, generate};
use moe_runtime::worker::{Device, DeviceChoice, OnDevice, Ranked};

use crate::out::print;
use crate::place::{Loaded, Place};

const EXAMPLES: &str = "\
Examples:
  moe-launch generate --checkpoint runs/a --prompt \"ROMEO:\"
  moe-launch generate --checkpoint runs/a/checkpoints/step-00002000 --tokens 500 --temperature 0.8 --top-k 40
  moe-launch generate --checkpoint exported/ --prompt \"fn main\" --temperature 1 --top-p 0.9 --seed 7";

/// Let a trained model write.
#[derive(Args)]
#[command(after_long_help = EXAMPLES)]
pub(crate) struct GenerateArgs {
    /// Run directory (its newest checkpoint), one checkpoint inside it, or a Hugging Face folder.
    #[arg(long, value_name = "DIR")]
    checkpoint: PathBuf,
    /// Text to continue.
    #[arg(long, default_value = "\n")]
    prompt: String,
    /// Tokens to write.
    #[arg(long, value_name = "N", default_value_t = 200)]
    tokens: usize,
    /// Below 1: likelier tokens more often; 0: always the likeliest.
    #[arg(long, default_value_t = 0.8)]
    temperature: f64,
    /// Draw only from the N likeliest tokens; 0: from all.
    #[arg(long, value_name = "N", default_value_t = 0)]
    top_k: usize,
    /// Draw only from the likeliest tokens whose probabilities together first reach P; 1: from all.
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    top_p: f64,
    /// Tokenizer: bytes, or a tokenizer.json. Default: the run's or the folder's own.
    #[arg(long, value_name = "NAME")]
    tokenizer: Option<String>,
    /// Seed of the draws.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Where to compute.
    #[arg(long, value_enum, default_value_t = DeviceChoice::Auto)]
    device: DeviceChoice,
}

pub(crate) fn run(args: &GenerateArgs) -> Result<ExitCode, Failure> {
    if !(args.temperature.is_finite() && args.temperature >= 0.0) {
        return Err(Failure::new(Code::Usage, format!("--temperature {}: must be 0 or more", args.temperature)));
    }
    if !(args.top_p > 0.0 && args.top_p <= 1.0) {
        return Err(Failure::new(Code::Usage, format!("--top-p {}: must be above 0 and at most 1", args.top_p)));
    }
    let place = Place::find(&args.checkpoint)?;
    let tokenizer = place.tokenizer(args.tokenizer.as_deref())?;
    let prompt: Vec<i32> = tokenizer.encode(&args.prompt)?.into_iter().map(|id| id as i32).collect();
    if prompt.is_empty() {
        return Err(Failure::new(Code::Usage, "--prompt: give at least one character to continue"));
    }
    let device = Device::choose_alone(args.device, Precision::Auto)?;
    device.check(place.configs())?;
    device.visit(Writing { args, place: &place, tokenizer: tokenizer.as_ref(), prompt: &prompt })
}

struct Writing<'a> {
    args: &'a GenerateArgs,
    place: &'a Place,
    tokenizer: &'a dyn Tokenizer,
    prompt: &'a [i32],
}

impl OnDevice for Writing<'_> {
    type Output = Result<ExitCode, Failure>;

    fn run<B: Ranked>(self, device: B) -> Result<ExitCode, Failure> {
        let Self { args, place, tokenizer, prompt } = self;
        let Loaded { mut model, groups } = place.load(&device, place.window(), 1)?;
        let &GenerateArgs { tokens, temperature, top_k, top_p, seed, .. } = args;
        let sampling = Sampling { tokens, temperature, top_k, top_p, seed };
        let mut text = Stream::after(|ids: &[i32]| tokenizer.decode(ids), prompt);
        show(&args.prompt)?;
        let mut broken = None;
        let made = generate(&mut model, &groups, prompt, tokenizer.vocab_size(), sampling, |token| {
            broken = broken.take().or(text.push(token, false).and_then(|new| show(&new).err()));
        });
        made.map_err(|error| Failure::new(Code::Internal, error))?;
        show(&format!("{}\n", text.finish()))?;
        broken.map_or(Ok(ExitCode::SUCCESS), Err)
    }
}

fn show(text: &str) -> Result<(), Failure> {
    print(format_args!("{text}"))
}

/// Text that grows by tokens, of which some end inside a character, and some have a space in front only behind others.
struct Stream<F: Fn(&[i32]) -> String> {
    decode: F,
    ids: Vec<i32>,
    /// Tokens from which on the text is decoded.
    context: usize,
    /// Tokens already shown.
    shown: usize,
}

impl<F: Fn(&[i32]) -> String> Stream<F> {
    /// The text that follows `prompt`.
    fn after(decode: F, prompt: &[i32]) -> Self {
        Self { decode, ids: prompt.to_vec(), context: 0, shown: prompt.len() }
    }

    /// The text that `token` completes; None while a character is incomplete, but for `last`.
    fn push(&mut self, token: i32, last: bool) -> Option<String> {
        self.ids.push(token);
        self.take(last)
    }

    fn finish(&mut self) -> String {
        self.take(true).unwrap_or_default()
    }

    fn take(&mut self, last: bool) -> Option<String> {
        let before = (self.decode)(&self.ids[self.context..self.shown]);
        let all = (self.decode)(&self.ids[self.context..]);
        let text = all.get(before.len()..).unwrap_or_default().to_owned();
        // No character has more than four bytes: what stays incomplete longer is none.
        let incomplete = text.ends_with(char::REPLACEMENT_CHARACTER) && self.ids.len() - self.shown < 4;
        if text.is_empty() || (incomplete && !last) {
            return None;
        }
        (self.context, self.shown) = (self.shown, self.ids.len());
        Some(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_space_in_front_of_a_word_is_shown_though_a_text_never_begins_with_one() {
        let words = ["a", "b", "c"];
        let decode = |ids: &[i32]| ids.iter().map(|&id| words[id as usize]).collect::<Vec<_>>().join(" ");
        let mut stream = Stream::after(decode, &[0, 1]);
        assert_eq!(stream.push(2, false).as_deref(), Some(" c"));
        assert_eq!(stream.push(0, false).as_deref(), Some(" a"));
    }

    #[test]
    fn characters_of_several_tokens_are_shown_whole() {
        let decode = |ids: &[i32]| {
            let bytes: Vec<u8> = ids.iter().map(|&id| id as u8).collect();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        let mut stream = Stream::after(decode, b"x".map(i32::from).as_slice());
        let shown: Vec<_> = "aé€".bytes().map(|byte| stream.push(i32::from(byte), false)).collect();
        assert_eq!(shown, [Some("a".into()), None, Some("é".into()), None, None, Some("€".into())]);
        assert_eq!(stream.finish(), "");
    }
}
