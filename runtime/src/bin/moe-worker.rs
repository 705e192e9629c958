//! `moe-worker`: one rank of a training run.
#![forbid(unsafe_code)]

fn main() {
    moe_runtime::worker::main()
}
