//! Every Hugging Face folder among the fixtures loads: all tensors accounted for, values bit for bit, under any sharding.
//!
//! `MOE_FIXTURES` names the folder of folders; without it, `../shared/fixtures` beside the workspace. Where neither is, the
//! test says so and passes, except in CI.

use std::collections::BTreeSet;
use std::path::PathBuf;

use moe_kernels::Cpu;
use moe_runtime::checkpoint::{HfFolder, names};
use moe_runtime::model::Parameters;
use moe_runtime::model::layout::Layout;
use safetensors::SafeTensors;

/// The fixture folders that hold a model; none where the fixtures are absent and may be.
fn model_folders() -> Vec<PathBuf> {
    let named = std::env::var_os("MOE_FIXTURES").map(PathBuf::from);
    let root = named
        .clone()
        .unwrap_or_else(|| [env!("CARGO_MANIFEST_DIR"), "..", "..", "shared", "fixtures"].iter().collect());
    let entries = root.read_dir().into_iter().flatten().filter_map(Result::ok).map(|entry| entry.path());
    let mut folders: Vec<_> = entries.filter(|path| path.join("config.json").is_file()).collect();
    folders.sort();
    let required = named.is_some() || std::env::var("CI").is_ok_and(|ci| ci == "true");
    assert!(!(required && folders.is_empty()), "{} holds no model", root.display());
    if folders.is_empty() {
        eprintln!("notice: {} holds no model; set MOE_FIXTURES to test with models", root.display());
    }
    folders
}

#[test]
fn every_fixture_loads_bit_for_bit_under_any_sharding() {
    for dir in model_folders() {
        let folder = HfFolder::open(&dir).unwrap_or_else(|error| panic!("{error}"));
        let (model, router) = (folder.model_config(), folder.router_config());
        // Of folders in shards only names and loading are checked here.
        let bytes = std::fs::read(dir.join("model.safetensors")).ok();
        let file = bytes.as_deref().map(|bytes| SafeTensors::deserialize(bytes).unwrap());
        for ranks in [1, 2].into_iter().filter(|ranks| model.experts % ranks == 0) {
            let mut seen = BTreeSet::new();
            for rank in 0..ranks {
                let experts = model.experts * rank / ranks..model.experts * (rank + 1) / ranks;
                let mut parameters = Parameters::new(&Cpu, Layout::new(model, router, experts)).unwrap();
                folder.load_into(&Cpu, &mut parameters).unwrap_or_else(|error| panic!("{error}"));
                for (part, _) in parameters.layout().parts() {
                    let name = names::tensor_name(model.family, part.id);
                    let tensor = file.as_ref().map(|file| file.tensor(&name).unwrap());
                    if let Some(tensor) = tensor.filter(|tensor| tensor.dtype() == safetensors::Dtype::F32) {
                        let values = parameters.read(&Cpu, part).unwrap();
                        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
                        assert!(tensor.data() == bytes, "{}: {name} was read as something else", dir.display());
                    }
                    seen.insert(name);
                }
            }
            if let Some(file) = &file {
                let all: BTreeSet<_> =
                    file.names().into_iter().filter(|name| !names::is_derived(name)).map(str::to_owned).collect();
                assert_eq!(seen, all, "{} on {ranks} ranks", dir.display());
            }
        }
    }
}
