//! `moe-launch data`: text to token shards, and what is in shards.
//!
//! Owns the flags, the progress and the summary. The work is `moe_runtime::data`'s.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::{Args, Subcommand};
use moe_runtime::data::{
    CorpusSpec, DataError, EndOfDocument, Megatron, Prepare, PrepareSpec, SHARD_EXTENSION, Shard, tokenizer,
};
use moe_runtime::exit::{ExitCode as Code, Failure};
use moe_runtime::telemetry::TaskProgress;

use crate::out::say;

const PREPARE_EXAMPLES: &str = "\
Examples:
  moe-launch data prepare --data texts/ --out shards/
  moe-launch data prepare --data 'crawl/*.jsonl.gz' --text-field content --tokenizer tokenizer.json --out shards/
  moe-launch data prepare --data chat.jsonl --tokenizer HF_DIR --out shards/   # prompt and completion: loss on the completion

  moe-worker --data shards/ --set data.tokenizer=tokenizer.json

The same command again goes on where it stopped: finished shards are kept, half-written ones are never left. A large file that is
not compressed is cut into many shards and so prepared in parallel.";

const INSPECT_EXAMPLES: &str = "\
Examples:
  moe-launch data inspect shards/part-00000.tokens
  moe-launch data inspect --verify shards/*.tokens
  moe-launch data inspect corpus_text_document.idx";

/// Prepare text for training, and look into token shards.
#[derive(Args)]
pub(crate) struct DataArgs {
    #[command(subcommand)]
    command: DataCommand,
}

#[derive(Subcommand)]
enum DataCommand {
    /// Turn text and JSONL into token shards, in parallel; resumable.
    Prepare(PrepareArgs),
    /// Show what token shards and Megatron indexes hold.
    Inspect(InspectArgs),
}

#[derive(Args)]
#[command(after_long_help = PREPARE_EXAMPLES)]
struct PrepareArgs {
    /// Text or JSONL file (also .gz, .zst), directory or pattern; may be given several times.
    #[arg(long, value_name = "PATH", required = true)]
    data: Vec<PathBuf>,
    /// Folder of the shards; made if it does not exist.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// `bytes`, or the path of a tokenizer.json or of a folder that holds one.
    #[arg(long, value_name = "NAME", default_value = "bytes")]
    tokenizer: String,
    /// Field of JSONL records that holds their text.
    #[arg(long, value_name = "FIELD", default_value = CorpusSpec::TEXT_FIELD)]
    text_field: String,
    /// What ends a document: `auto`, the tokenizer's own token; `none`; or a token by its name.
    #[arg(long, value_name = "TOKEN", default_value = "auto")]
    end_of_document: String,
    /// Megabytes of input that make a shard. Default: a 64th of the input, at least 4 and at most 256.
    #[arg(long, value_name = "MB", value_parser = clap::value_parser!(u32).range(1..))]
    shard_mb: Option<u32>,
    /// Threads; 0: one a core.
    #[arg(long, value_name = "N", default_value_t = 0)]
    threads: usize,
}

#[derive(Args)]
#[command(after_long_help = INSPECT_EXAMPLES)]
struct InspectArgs {
    /// Token shards (.tokens) or Megatron indexes (.idx).
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Read all tokens and compare their hash with the header's.
    #[arg(long)]
    verify: bool,
}

pub(crate) fn run(args: &DataArgs) -> Result<ExitCode, Failure> {
    match &args.command {
        DataCommand::Prepare(args) => prepare(args),
        DataCommand::Inspect(args) => inspect(args),
    }
}

fn prepare(args: &PrepareArgs) -> Result<ExitCode, Failure> {
    rayon::ThreadPoolBuilder::new()
        .num_threads(args.threads)
        .build_global()
        .map_err(|error| Failure::new(Code::Internal, format!("cannot start {} threads: {error}", args.threads)))?;
    let tokenizer = tokenizer(&args.tokenizer)?;
    let spec = PrepareSpec {
        paths: args.data.clone(),
        out: args.out.clone(),
        text_field: args.text_field.clone(),
        end_of_document: EndOfDocument::of_word(&args.end_of_document),
        part_bytes: args.shard_mb.map(|mb| u64::from(mb) * 1_000_000),
    };
    let work = Prepare::plan(spec, tokenizer.as_ref())?;
    let started = Instant::now();
    let progress = TaskProgress::start("preparing", work.bytes());
    let done = work.run(&|bytes| progress.add(bytes));
    progress.finish();
    let done = done?;
    let (megabytes, seconds) = (work.bytes() as f64 / 1e6, started.elapsed().as_secs_f64());
    let kept = if done.kept > 0 { format!(" ({} kept from before)", done.kept) } else { String::new() };
    say!(
        "{} shards{kept} with {} tokens in {} documents in {}: {megabytes:.1} MB in {seconds:.1} s, {:.1} MB/s",
        done.shards,
        done.tokens,
        done.documents,
        args.out.display(),
        megabytes / seconds.max(1e-9)
    )?;
    Ok(ExitCode::SUCCESS)
}

fn inspect(args: &InspectArgs) -> Result<ExitCode, Failure> {
    for path in &args.files {
        let name = path.display();
        if path.extension().is_some_and(|ending| ending == SHARD_EXTENSION) {
            let shard = Shard::open(path)?;
            if args.verify {
                shard.verify()?;
            }
            let header = shard.header();
            let (prompts, verified) =
                (if header.prompts { ", with prompts" } else { "" }, if args.verify { ", verified" } else { "" });
            say!(
                "{name}: {} tokens of {} bytes in {} documents{prompts}, largest {} of a vocabulary of {}{verified}",
                header.tokens,
                header.token_bytes,
                header.documents,
                header.largest,
                header.vocab_size
            )?;
        } else if path.extension().is_some_and(|ending| ending == "idx") {
            let segment = Megatron::open(path)?.segment();
            let (tokens, documents) = (segment.tokens.len(), segment.documents.len());
            say!("{name}: Megatron, {tokens} tokens in {documents} documents")?;
        } else {
            let reason = "is neither a token shard (.tokens) nor a Megatron index (.idx)";
            return Err(DataError::Unsuitable { path: path.clone(), reason }.into());
        }
    }
    Ok(ExitCode::SUCCESS)
}
