//! Text in, batches out.
//!
//! Owns tokenizers, the formats of data, corpora and the order of samples. Text is read once, by whoever calls (rank 0); token
//! shards are mapped by every rank. From then on a batch is arithmetic on tokens: a pure function of the seed and the sample's
//! number. It knows no device, no transport and no model. docs/data.md describes the formats for users.

mod batch;
mod bpe;
mod corpus;
mod default_corpus;
mod encode;
mod error;
mod generated;
mod inputs;
mod loader;
mod megatron;
mod mixture;
mod order;
mod prepare;
mod reader;
mod records;
mod shard;
mod shard_writer;
mod stream;
mod tokenizer;
mod tokenizer_file;
mod wire;

use std::fmt::Write;

pub use batch::Batch;
pub use bpe::{BpeSpec, Trained, train_bpe};
pub use corpus::{Corpus, CorpusSpec, Source, SourceSpec};
pub use default_corpus::{DEFAULT_CORPUS_LIMIT_BYTES, cargo_registry, default_corpus};
pub use error::DataError;
pub use generated::generated_corpus;
pub use inputs::{COMPRESSED_EXTENSIONS, RECORD_EXTENSIONS, SHARD_EXTENSION, TEXT_EXTENSIONS};
pub use loader::{Cursor, Loader, LoaderSpec};
pub use megatron::{Megatron, MegatronFault};
pub use prepare::{Prepare, PrepareSpec, Prepared};
pub use shard::{SHARD_VERSION, Shard, ShardFault, ShardHeader};
pub use shard_writer::{ShardSource, ShardWriter};
pub use stream::{Documents, MappedTokens, Segment, Stream, Tokens};
pub use tokenizer::{ByteTokenizer, EndOfDocument, TOKENIZERS, Tokenizer, check_vocabulary, is_path, tokenizer};
pub use tokenizer_file::FileTokenizer;

pub(crate) use batch::Window;
use reader::Piece;

/// Bytes in hexadecimal, as hashes are printed.
pub(crate) fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}
