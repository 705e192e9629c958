//! Compiles cuda/*.cu to fat binaries that the `cuda` module embeds. Without the feature it does nothing.
//!
//! Looks for nvcc in `NVCC`, in `CUDA_HOME/bin`, in `.local/cuda/bin` of the workspace (where `make cuda` puts one), then on the
//! PATH. `MOE_CUDA_ARCHS` (as `90` or `80 90`) narrows the architectures of the plain kernels, for quicker builds while developing.

// A build script has nobody to return an error to.
#![allow(clippy::expect_used)]

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

/// Architectures of kernels that run anywhere; the last also as PTX, for what comes later.
const ARCHITECTURES: [&str; 4] = ["80", "89", "90", "100"];
/// Files of this suffix use instructions that only Hopper has.
const HOPPER_SUFFIX: &str = "_sm90";

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    for name in ["NVCC", "CUDA_HOME", "MOE_CUDA_ARCHS"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    println!("cargo:rerun-if-changed=cuda");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let nvcc = nvcc();
    let mut sources: Vec<PathBuf> = fs::read_dir("cuda")
        .expect("kernels/cuda is part of the source")
        .map(|entry| entry.expect("kernels/cuda can be read").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "cu"))
        .collect();
    sources.sort();
    let cores = thread::available_parallelism().map_or(1, usize::from);
    for batch in sources.chunks(cores) {
        thread::scope(|scope| {
            for source in batch {
                scope.spawn(|| compile(&nvcc, source, &out));
            }
        });
    }
    let entry = |source: &PathBuf| {
        let (hopper, file) = (is_hopper(source), fatbin(source, &out));
        format!("    Image {{ hopper: {hopper}, bytes: include_bytes!({file:?}) }},\n")
    };
    let images: String = sources.iter().map(entry).collect();
    let text = format!(
        "/// The compiled kernels, one image a source file.\npub(super) const IMAGES: &[Image] = &[\n{images}];\n"
    );
    fs::write(out.join("images.rs"), text).expect("OUT_DIR can be written");
}

fn stem(source: &Path) -> String {
    source.file_stem().expect("a .cu file has a name").to_string_lossy().into_owned()
}

fn is_hopper(source: &Path) -> bool {
    stem(source).ends_with(HOPPER_SUFFIX)
}

fn fatbin(source: &Path, out: &Path) -> PathBuf {
    out.join(stem(source)).with_extension("fatbin")
}

fn nvcc() -> PathBuf {
    let in_home = |home: PathBuf| home.join("bin/nvcc");
    let local = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.local/cuda");
    let named = env::var_os("NVCC").map(PathBuf::from);
    let home = env::var_os("CUDA_HOME").map(PathBuf::from).map(in_home);
    let found = named.or(home).into_iter().chain([in_home(local)]).find(|path| path.exists());
    found.unwrap_or_else(|| "nvcc".into())
}

fn compile(nvcc: &Path, source: &Path, out: &Path) {
    let mut command = Command::new(nvcc);
    command.args(["-std=c++17", "-O3", "-fatbin", "-lineinfo", "--expt-relaxed-constexpr", "-Icuda"]);
    if is_hopper(source) {
        command.arg("-gencode=arch=compute_90a,code=sm_90a");
    } else {
        let narrowed = env::var("MOE_CUDA_ARCHS").ok();
        let archs: Vec<&str> = match &narrowed {
            Some(list) => list.split_whitespace().collect(),
            None => ARCHITECTURES.into(),
        };
        command.args(archs.iter().map(|arch| format!("-gencode=arch=compute_{arch},code=sm_{arch}")));
        command.args(archs.last().map(|arch| format!("-gencode=arch=compute_{arch},code=compute_{arch}")));
    }
    let run = command.arg("-o").arg(fatbin(source, out)).arg(source).output();
    let output = run.unwrap_or_else(|error| {
        panic!("{}: {error}; `make cuda` fetches a compiler, or set CUDA_HOME or NVCC", nvcc.display())
    });
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "nvcc failed on {}:\n{said}", source.display());
}
