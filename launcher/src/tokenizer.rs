//! `moe-launch tokenizer`: a tokenizer of one's own.
//!
//! Owns the flags, the progress and the file. Training is `moe_runtime::data`'s.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;
use std::{fs, io::IsTerminal};

use clap::{Args, Subcommand};
use moe_runtime::data::{BpeSpec, CorpusSpec, DataError, train_bpe};
use moe_runtime::exit::Failure;
use moe_runtime::telemetry::TaskProgress;

use crate::out::say;

const EXAMPLES: &str = "\
Examples:
  moe-launch tokenizer train --data texts/ --vocab-size 8192 --out tokenizer.json
  moe-launch tokenizer train --data 'crawl/*.jsonl.zst' --text-field content --vocab-size 32000 --out tokenizer.json

  moe-worker --data texts/ --set data.tokenizer=tokenizer.json
  moe-launch data prepare --data texts/ --tokenizer tokenizer.json --out shards/

The file is a Hugging Face tokenizer.json: byte-level BPE, so that every text can be encoded and comes back as it was.";

/// Make a tokenizer.
#[derive(Args)]
pub(crate) struct TokenizerArgs {
    #[command(subcommand)]
    command: TokenizerCommand,
}

#[derive(Subcommand)]
enum TokenizerCommand {
    /// Train a byte-level BPE tokenizer on text.
    Train(TrainArgs),
}

#[derive(Args)]
#[command(after_long_help = EXAMPLES)]
struct TrainArgs {
    /// Text or JSONL file (also .gz, .zst), directory or pattern; may be given several times.
    #[arg(long, value_name = "PATH", required = true)]
    data: Vec<PathBuf>,
    /// Tokens of the vocabulary: the 256 bytes, the token after documents, and merges.
    #[arg(long, value_name = "N")]
    vocab_size: usize,
    /// File to write; one that exists is replaced.
    #[arg(long, value_name = "FILE", default_value = "tokenizer.json")]
    out: PathBuf,
    /// Field of JSONL records that holds their text.
    #[arg(long, value_name = "FIELD", default_value = CorpusSpec::TEXT_FIELD)]
    text_field: String,
    /// The token that ends documents.
    #[arg(long, value_name = "TOKEN", default_value = "<|endoftext|>")]
    end_token: String,
    /// Pairs that occur less often are not merged.
    #[arg(long, value_name = "N", default_value_t = 2)]
    min_frequency: u64,
}

pub(crate) fn run(args: &TokenizerArgs) -> Result<ExitCode, Failure> {
    let TokenizerCommand::Train(args) = &args.command;
    let spec = BpeSpec {
        paths: args.data.clone(),
        text_field: args.text_field.clone(),
        vocab_size: args.vocab_size,
        end_token: args.end_token.clone(),
        min_frequency: args.min_frequency,
        show_progress: std::io::stderr().is_terminal(),
    };
    let started = Instant::now();
    let progress = TaskProgress::start("counting", spec.bytes()?);
    // As a whole or not at all; made before the work, since a misspelt path should not cost an hour.
    let partial = args.out.with_extension("json.partial");
    let unwritable = |reason| DataError::Unwritable { path: args.out.clone(), reason };
    fs::write(&partial, "").map_err(unwritable)?;
    let trained = train_bpe(&spec, &|bytes| progress.add(bytes));
    progress.finish();
    let written = trained.map_err(Failure::from).and_then(|trained| {
        fs::write(&partial, &trained.json).and_then(|()| fs::rename(&partial, &args.out)).map_err(unwritable)?;
        Ok(trained)
    });
    if written.is_err() {
        // The first error is the one to report.
        let _ = fs::remove_file(&partial);
    }
    let trained = written?;
    let short = match trained.vocab_size {
        size if size < args.vocab_size => format!(" (the text has no more pairs to merge than for {size})"),
        _ => String::new(),
    };
    say!(
        "{}: {} tokens{short}, trained in {:.1} s",
        args.out.display(),
        trained.vocab_size,
        started.elapsed().as_secs_f64()
    )?;
    Ok(ExitCode::SUCCESS)
}
