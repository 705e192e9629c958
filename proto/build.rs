//! Compiles `coordination.proto` with a compiler written in Rust, so that building needs no `protoc`.

use std::error::Error;
use std::path::PathBuf;

use prost::Message;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=coordination.proto");
    let descriptors = protox::compile(["coordination.proto"], ["."])?;
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR for build scripts")?);
    // The reflection service of the coordinator serves this file.
    std::fs::write(out.join("coordination.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
