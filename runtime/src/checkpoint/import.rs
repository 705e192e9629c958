//! Hugging Face folders: config.json and safetensors, whole or in shards, into this rank's parameters.
//!
//! Owns the accounting: every tensor of the model is in the files, and every tensor in the files is of the model. It writes
//! nothing, and initialises nothing: what it does not find is an error.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use moe_kernels::Device;
use safetensors::Dtype;
use serde::Deserialize;

use super::error::{TensorFault, TensorFaults};
use super::hf_config::HfConfig;
use super::tensor_file::{TensorFile, plain_file, readable};
use super::{CheckpointError, names};
use crate::model::layout::{Layout, Part};
use crate::model::{ModelConfig, Parameters};
use crate::routing::RouterConfig;

const CONFIG: &str = "config.json";
const WHOLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// A folder whose config.json is understood and whose tensors are exactly those of its model. None of them is read yet.
#[derive(Debug)]
pub struct HfFolder {
    dir: PathBuf,
    config: HfConfig,
    files: Vec<TensorFile>,
    /// Which file has a tensor.
    places: BTreeMap<String, usize>,
}

/// model.safetensors.index.json.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl HfFolder {
    /// Opens a folder: reads config.json and the headers of all files, and checks names, shapes and types.
    ///
    /// # Errors
    /// No such folder or no model in it; a config.json that is refused; a file that is missing or broken; tensors that are
    /// missing, too many, misshapen or of a type that cannot be read, all of them in one error.
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        let none = |reason: &str| CheckpointError::NoModel { dir: dir.to_owned(), reason: reason.to_owned() };
        if !dir.is_dir() {
            return Err(none("there is no such folder"));
        }
        if !dir.join(CONFIG).is_file() {
            return Err(none("it has no config.json"));
        }
        let config = HfConfig::read(&dir.join(CONFIG))?;
        let (paths, promised) = if dir.join(WHOLE).is_file() {
            (BTreeSet::from([dir.join(WHOLE)]), BTreeMap::new())
        } else if dir.join(INDEX).is_file() {
            read_index(&dir.join(INDEX))?
        } else {
            return Err(none("it has neither model.safetensors nor model.safetensors.index.json"));
        };
        let files = paths.iter().map(|path| TensorFile::open(path)).collect::<Result<Vec<_>, _>>()?;
        let mut folder = Self { dir: dir.to_owned(), config, files, places: BTreeMap::new() };
        let layout = Layout::new(&folder.config.model, &folder.config.router, 0..folder.config.model.experts);
        let mut faults = folder.place_tensors();
        let parts = layout.parts().map(|(part, _)| part);
        faults.extend(folder.faults_of(parts, &promised));
        faults.extend(folder.extra(&layout));
        faults.extend(folder.untied()?);
        folder.refuse(faults)?;
        Ok(folder)
    }

    /// The model that config.json describes.
    pub fn model_config(&self) -> &ModelConfig {
        &self.config.model
    }

    /// Its routing.
    pub fn router_config(&self) -> &RouterConfig {
        &self.config.router
    }

    /// Reads the parts that `parameters` holds: on each rank its experts and everything that is replicated. Ranks do not wait
    /// for each other.
    ///
    /// # Errors
    /// A file cannot be read, or the parameters are of another model than the folder's: the parts that do not fit.
    pub fn load_into<B: Device>(&self, device: &B, parameters: &mut Parameters<B>) -> Result<(), CheckpointError> {
        let parts: Vec<Part> = parameters.layout().parts().map(|(part, _)| part.clone()).collect();
        // All of them before the first is set: a half-filled model helps nobody.
        self.refuse(self.faults_of(parts.iter(), &BTreeMap::new()))?;
        for part in &parts {
            parameters.set(device, part, &self.read(part)?);
        }
        Ok(())
    }

    /// The values of a part.
    ///
    /// # Errors
    /// The file cannot be read, or the part is of another model.
    pub(super) fn read(&self, part: &Part) -> Result<Vec<f32>, CheckpointError> {
        self.refuse(self.faults_of(std::iter::once(part), &BTreeMap::new()))?;
        let name = self.name(part);
        self.files[self.places[&name]].read(&name)
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its tensors in the order of their names, with type and shape.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, Dtype, &[usize])> {
        self.places.iter().filter_map(|(name, &file)| {
            let info = self.files[file].info(name)?;
            Some((name.as_str(), info.dtype, info.shape.as_slice()))
        })
    }

    /// The file that has a tensor.
    pub fn file_of(&self, name: &str) -> Option<String> {
        self.places.get(name).map(|&file| file_name(self.files[file].path()))
    }

    /// The tensors with a value that is not a finite number. `on_tensor` hears how many of all are read.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn not_finite(&self, on_tensor: &mut dyn FnMut(usize, usize)) -> Result<Vec<String>, CheckpointError> {
        let mut names = Vec::new();
        for (done, (name, &file)) in self.places.iter().enumerate() {
            if self.files[file].read(name)?.iter().any(|value| !value.is_finite()) {
                names.push(name.clone());
            }
            on_tensor(done + 1, self.places.len());
        }
        Ok(names)
    }

    /// The bytes of a tensor as they are stored.
    ///
    /// # Errors
    /// There is no such tensor, or its file cannot be read.
    pub(super) fn stored(&self, name: &str) -> Result<Vec<u8>, CheckpointError> {
        let missing = TensorFault::Missing { name: name.to_owned(), expected: Vec::new(), promised: None };
        let file = self.places.get(name).map(|&file| &self.files[file]);
        match file.and_then(|file| Some((file, file.info(name)?))) {
            Some((file, info)) => file.bytes_of(info),
            None => self.refuse(vec![missing]).map(|()| Vec::new()),
        }
    }

    fn name(&self, part: &Part) -> String {
        names::tensor_name(self.config.model.family, part.id)
    }

    fn refuse(&self, faults: Vec<TensorFault>) -> Result<(), CheckpointError> {
        if faults.is_empty() {
            return Ok(());
        }
        Err(CheckpointError::Tensors { dir: self.dir.clone(), faults: TensorFaults(faults) })
    }

    /// Notes which file has which tensor; a tensor in two files is a fault.
    fn place_tensors(&mut self) -> Vec<TensorFault> {
        let mut faults = Vec::new();
        for (index, file) in self.files.iter().enumerate() {
            for name in file.names() {
                if let Some(first) = self.places.insert(name.clone(), index) {
                    let files = [first, index].map(|file| file_name(self.files[file].path()));
                    faults.push(TensorFault::Twice { name, files });
                }
            }
        }
        faults
    }

    /// What is wrong with the tensors that `parts` are read from. `promised` says which file an index names for a tensor.
    fn faults_of<'a>(
        &self,
        parts: impl Iterator<Item = &'a Part>,
        promised: &BTreeMap<String, String>,
    ) -> Vec<TensorFault> {
        let fault = |part: &Part| {
            let name = self.name(part);
            let file = self.places.get(&name).map(|&file| &self.files[file]);
            let Some((file, info)) = file.and_then(|file| Some((file, file.info(&name)?))) else {
                let promised = promised.get(&name).cloned();
                return Some(TensorFault::Missing { name, expected: part.shape.clone(), promised });
            };
            let file = file_name(file.path());
            if info.shape != part.shape {
                return Some(TensorFault::Shape {
                    name,
                    file,
                    found: info.shape.clone(),
                    expected: part.shape.clone(),
                });
            }
            let found = info.dtype;
            (!readable(found)).then(|| TensorFault::Dtype { name, file, found: found.to_string() })
        };
        parts.filter_map(fault).collect()
    }

    /// Tensors in the files that the model does not have.
    fn extra(&self, layout: &Layout) -> Vec<TensorFault> {
        let known: BTreeSet<String> = layout.parts().map(|(part, _)| self.name(part)).collect();
        let copied = |name: &str| self.config.model.tie_embeddings && name == names::HEAD;
        let extra =
            self.places.iter().filter(|(name, _)| !known.contains(*name) && !names::is_derived(name) && !copied(name));
        let fault = |(name, &file): (&String, &usize)| {
            let file = &self.files[file];
            let shape = file.info(name).map(|info| info.shape.clone()).unwrap_or_default();
            TensorFault::Extra { name: name.clone(), file: file_name(file.path()), shape }
        };
        extra.map(fault).collect()
    }
}

impl HfFolder {
    /// A head that config.json calls the embedding and that is another matrix.
    fn untied(&self) -> Result<Option<TensorFault>, CheckpointError> {
        let written = [names::EMBEDDING, names::HEAD].map(|name| self.places.contains_key(name));
        if !self.config.model.tie_embeddings || written != [true, true] {
            return Ok(None);
        }
        let same = self.stored(names::EMBEDDING)? == self.stored(names::HEAD)?;
        let file = file_name(self.files[self.places[names::HEAD]].path());
        Ok((!same).then(|| TensorFault::Untied { name: names::HEAD.to_owned(), file }))
    }
}

/// The files that an index names, and which tensor it says is where.
fn read_index(path: &Path) -> Result<(BTreeSet<PathBuf>, BTreeMap<String, String>), CheckpointError> {
    let text = std::fs::read_to_string(path).map_err(CheckpointError::io("read", path))?;
    let index: Index =
        serde_json::from_str(&text).map_err(|source| CheckpointError::Json { path: path.to_owned(), source })?;
    let mut files = BTreeSet::new();
    for name in index.weight_map.values() {
        files.insert(plain_file(path, name)?);
    }
    Ok((files, index.weight_map))
}

/// A file's name without its folder, for messages that name the folder already.
fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use moe_kernels::Cpu;
    use safetensors::tensor::TensorView;
    use serde_json::json;

    use super::*;
    use crate::checkpoint::tensor_file::encode;

    /// A dense model of one block, small enough to write out.
    const TENSORS: [(&str, &[usize]); 12] = [
        ("model.embed_tokens.weight", &[3, 4]),
        ("model.norm.weight", &[4]),
        ("lm_head.weight", &[3, 4]),
        ("model.layers.0.input_layernorm.weight", &[4]),
        ("model.layers.0.post_attention_layernorm.weight", &[4]),
        ("model.layers.0.self_attn.q_proj.weight", &[4, 4]),
        ("model.layers.0.self_attn.k_proj.weight", &[2, 4]),
        ("model.layers.0.self_attn.v_proj.weight", &[2, 4]),
        ("model.layers.0.self_attn.o_proj.weight", &[4, 4]),
        ("model.layers.0.mlp.gate_proj.weight", &[6, 4]),
        ("model.layers.0.mlp.up_proj.weight", &[6, 4]),
        ("model.layers.0.mlp.down_proj.weight", &[4, 6]),
    ];

    struct Folder(tempfile::TempDir);

    impl Folder {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let config = json!({
                "model_type": "llama", "hidden_size": 4, "intermediate_size": 6, "num_attention_heads": 2,
                "num_key_value_heads": 1, "num_hidden_layers": 1, "max_position_embeddings": 8, "vocab_size": 3,
            });
            std::fs::write(dir.path().join(CONFIG), config.to_string()).unwrap();
            Self(dir)
        }

        /// Writes a file of tensors; value i of a tensor is i.
        fn write(&self, file: &str, tensors: &[(&str, &[usize])]) {
            let data: Vec<_> = tensors.iter().map(|(_, shape)| encode(&ramp(shape.iter().product()))).collect();
            let views = tensors
                .iter()
                .zip(&data)
                .map(|((name, shape), data)| (*name, TensorView::new(Dtype::F32, shape.to_vec(), data).unwrap()));
            std::fs::write(self.0.path().join(file), safetensors::serialize(views, None).unwrap()).unwrap();
        }

        fn index(&self, files: [&str; 2]) {
            let map: BTreeMap<_, _> =
                TENSORS.iter().enumerate().map(|(at, (name, _))| (name, files[usize::from(at >= 5)])).collect();
            let text = json!({"metadata": {"total_size": 0}, "weight_map": map}).to_string();
            std::fs::write(self.0.path().join(INDEX), text).unwrap();
        }

        fn open(&self) -> Result<HfFolder, CheckpointError> {
            HfFolder::open(self.0.path())
        }

        fn faults(&self) -> Vec<TensorFault> {
            match self.open() {
                Err(CheckpointError::Tensors { faults, .. }) => faults.0,
                other => panic!("{other:?}"),
            }
        }
    }

    fn ramp(len: usize) -> Vec<f32> {
        (0..len).map(|i| i as f32).collect()
    }

    fn holds_ramps(folder: &HfFolder) {
        let layout = Layout::new(folder.model_config(), folder.router_config(), 0..0);
        let mut parameters = Parameters::new(&Cpu, layout).unwrap();
        folder.load_into(&Cpu, &mut parameters).unwrap();
        for (part, _) in parameters.layout().parts() {
            assert_eq!(parameters.read(&Cpu, part).unwrap(), ramp(part.range.len()), "{}", part.id);
        }
    }

    #[test]
    fn one_file_and_two_shards_load_alike() {
        let folder = Folder::new();
        folder.write(WHOLE, &TENSORS);
        holds_ramps(&folder.open().unwrap());

        let folder = Folder::new();
        folder.write("a.safetensors", &TENSORS[..5]);
        folder.write("b.safetensors", &TENSORS[5..]);
        folder.index(["a.safetensors", "b.safetensors"]);
        holds_ramps(&folder.open().unwrap());
    }

    #[test]
    fn every_tensor_that_is_wrong_is_named_with_what_was_expected() {
        let folder = Folder::new();
        let mut tensors = TENSORS[1..].to_vec();
        tensors[0].1 = &[2, 2];
        tensors.push(("model.layers.1.input_layernorm.weight", &[4]));
        tensors.push(("model.layers.0.self_attn.rotary_emb.inv_freq", &[1]));
        folder.write(WHOLE, &tensors);
        let file = || WHOLE.to_owned();
        let expected = [
            TensorFault::Missing { name: "model.embed_tokens.weight".into(), expected: vec![3, 4], promised: None },
            TensorFault::Shape { name: "model.norm.weight".into(), file: file(), found: vec![2, 2], expected: vec![4] },
            TensorFault::Extra { name: "model.layers.1.input_layernorm.weight".into(), file: file(), shape: vec![4] },
        ];
        let mut found = folder.faults();
        found.sort_by_key(|fault| expected.iter().position(|other| other == fault));
        assert_eq!(found, expected);
        let text = folder.open().unwrap_err().to_string();
        assert!(
            text.contains("model.norm.weight in model.safetensors has the shape [2, 2], the model needs [4]"),
            "{text}"
        );
    }

    #[test]
    fn a_tensor_of_integers_is_refused_by_its_type() {
        let folder = Folder::new();
        let data: Vec<_> = TENSORS.iter().map(|(_, shape)| vec![0; shape.iter().product::<usize>() * 4]).collect();
        let views = TENSORS.iter().zip(&data).enumerate().map(|(at, ((name, shape), data))| {
            let dtype = if at == 1 { Dtype::I32 } else { Dtype::F32 };
            (*name, TensorView::new(dtype, shape.to_vec(), data).unwrap())
        });
        std::fs::write(folder.0.path().join(WHOLE), safetensors::serialize(views, None).unwrap()).unwrap();
        let (name, file, found) = ("model.norm.weight".into(), WHOLE.into(), "I32".into());
        assert_eq!(folder.faults(), [TensorFault::Dtype { name, file, found }]);
    }

    #[test]
    fn shards_that_contradict_their_index_are_refused() {
        let folder = Folder::new();
        folder.write("a.safetensors", &TENSORS[..5]);
        folder.index(["a.safetensors", "b.safetensors"]);
        assert!(matches!(folder.open(), Err(CheckpointError::FileName { name, .. }) if name == "b.safetensors"));

        folder.write("b.safetensors", &TENSORS[6..]);
        let promised = Some("b.safetensors".to_owned());
        let (name, expected) = (TENSORS[5].0.to_owned(), TENSORS[5].1.to_vec());
        assert_eq!(folder.faults(), [TensorFault::Missing { name, expected, promised }]);

        folder.write("b.safetensors", &TENSORS[4..]);
        let files = ["a.safetensors", "b.safetensors"].map(str::to_owned);
        assert_eq!(folder.faults(), [TensorFault::Twice { name: TENSORS[4].0.into(), files }]);

        folder.index(["a.safetensors", "../b.safetensors"]);
        assert!(matches!(folder.open(), Err(CheckpointError::FileName { name, .. }) if name == "../b.safetensors"));
    }

    #[test]
    fn folders_without_a_model_say_what_is_not_there() {
        let folder = Folder::new();
        assert!(matches!(folder.open(), Err(CheckpointError::NoModel { .. })));
        let missing = HfFolder::open(&folder.0.path().join("nothing")).unwrap_err();
        assert!(missing.to_string().ends_with("there is no such folder"), "{missing}");
    }

    #[test]
    fn parameters_of_another_model_are_not_filled() {
        let folder = Folder::new();
        folder.write(WHOLE, &TENSORS);
        let folder = folder.open().unwrap();
        let model = ModelConfig { layers: 2, ..folder.model_config().clone() };
        let mut parameters = Parameters::new(&Cpu, Layout::new(&model, folder.router_config(), 0..0)).unwrap();
        assert!(matches!(folder.load_into(&Cpu, &mut parameters), Err(CheckpointError::Tensors { .. })));
    }
}
