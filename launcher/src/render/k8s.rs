//! `moe-launch render k8s`: a kustomize folder of one run.
//!
//! Owns which kinds there are and which values a run sets in their files. What the files ask for stands in deploy/k8s.

use std::collections::BTreeMap;

use clap::{Args, ValueEnum};
use moe_runtime::coordination::JoinToken;
use moe_runtime::exit::Failure;

use super::error::RenderError;
use super::template::{Template, fill};
use super::{Rendered, RunSpec};

/// A built-in file of deploy/k8s.
macro_rules! template {
    ($folder:literal, $name:literal) => {
        ($name, include_str!(concat!("../../../deploy/k8s/", $folder, "/", $name)))
    };
}

const COMMON: [Template; 2] = [template!("base", "network-policy.yaml"), template!("base", "storage.yaml")];
const MPIJOB: Template = template!("mpijob", "mpijob.yaml");
const MPIJOB_GPU: Template = template!("mpijob-gpu", "gpu.yaml");
const SERVICE: Template = template!("job", "service.yaml");
const JOB: Template = template!("job", "job.yaml");
const JOBSET: Template = template!("jobset", "jobset.yaml");

/// The file that a join token is handed over in.
const TOKEN_FILE: &str = "join-token.env";

const EXAMPLES: &str = "\
Examples:
  moe-launch render k8s --config run.toml -n 4 --nodes 2 --name small && kubectl apply -k small
  moe-launch render k8s --config run.toml -n 16 --nodes 2 --gpus --cpus-per-rank 8 --memory-per-rank-gib 64
  moe-launch render k8s --kind jobset --config run.toml -n 16 --gpus --image registry.example/moe-runtime:cuda";

/// Write a kustomize folder for one run: job, network, storage, configuration.
#[derive(Args)]
#[command(after_long_help = EXAMPLES)]
pub(super) struct K8sArgs {
    #[command(flatten)]
    spec: RunSpec,
    /// What runs the ranks.
    #[arg(long, value_enum, default_value_t = Kind::Mpijob)]
    kind: Kind,
    /// Image of the containers. Default: moe-runtime:cpu, with --gpus moe-runtime:cuda.
    #[arg(long)]
    image: Option<String>,
    /// Memory of a rank.
    #[arg(long, value_name = "GIB", default_value_t = 8)]
    memory_per_rank_gib: usize,
    /// Storage for run directories, as Kubernetes takes it.
    #[arg(long, value_name = "SIZE", default_value = "100Gi")]
    storage: String,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// Kubeflow's MPIJob: mpirun, several ranks a pod.
    Mpijob,
    /// A plain Indexed Job: one rank and one GPU a pod.
    Job,
    /// A JobSet: as job, and all ranks start again together.
    Jobset,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Mpijob => "mpijob",
            Self::Job => "job",
            Self::Jobset => "jobset",
        }
    }
}

pub(super) fn render(args: &K8sArgs) -> Result<(&RunSpec, Vec<Rendered>, String), Failure> {
    let K8sArgs { spec, kind, .. } = args;
    let (config, meaning) = spec.checked()?;
    if *kind != Kind::Mpijob && spec.nodes != 1 {
        return Err(RenderError::OneRankPods { kind: kind.name(), nodes: spec.nodes }.into());
    }
    if *kind != Kind::Mpijob && !spec.gpus && spec.ranks > 1 {
        return Err(RenderError::NeedsMpi { kind: kind.name(), ranks: spec.ranks }.into());
    }
    let values = values(args);
    let mut templates = COMMON.to_vec();
    templates.extend(match kind {
        Kind::Mpijob => vec![MPIJOB],
        Kind::Job => vec![SERVICE, JOB],
        Kind::Jobset => vec![JOBSET],
    });
    let resources: Vec<_> = templates.iter().map(|(name, _)| *name).collect();
    let mut kustomization = kustomization(spec, &resources);
    if *kind == Kind::Mpijob && spec.gpus {
        templates.push(MPIJOB_GPU);
        kustomization += "patches:\n  - path: gpu.yaml\n    target:\n      kind: MPIJob\n";
    }
    let mut files = Vec::new();
    if *kind != Kind::Mpijob {
        kustomization += &format!("secretGenerator:\n  - name: {}-join\n    envs:\n      - {TOKEN_FILE}\n", spec.name);
        let token = format!("MOE_JOIN_TOKEN={}\n", JoinToken::generate().expose());
        files.push(Rendered { mode: 0o600, ..Rendered::new(TOKEN_FILE, token) });
    }
    files.push(Rendered::new("kustomization.yaml", kustomization));
    files.push(Rendered::new("run.toml", config));
    for template in templates {
        files.push(Rendered::new(template.0, fill(template, &values)?));
    }
    let mut next = format!("kubectl apply -k {}", spec.out().display());
    if let Some(path) = meaning.data.paths.first() {
        next += &format!("; {} must be there in the pods", path.display());
    }
    Ok((spec, files, next))
}

/// What the files' marks mean for this run.
fn values(args: &K8sArgs) -> BTreeMap<&'static str, String> {
    let K8sArgs { spec, kind, memory_per_rank_gib, storage, .. } = args;
    let name = &spec.name;
    let per_pod = if *kind == Kind::Mpijob { spec.ranks_per_node() } else { 1 };
    let image = args.image.clone().unwrap_or_else(|| format!("moe-runtime:{}", if spec.gpus { "cuda" } else { "cpu" }));
    BTreeMap::from([
        ("name", name.clone()),
        ("image", image),
        ("ranks", spec.ranks.to_string()),
        ("ranks-per-pod", per_pod.to_string()),
        ("pods", spec.nodes.to_string()),
        ("threads", format!("run.threads={}", spec.cpus_per_rank)),
        ("cpus-per-pod", (per_pod * spec.cpus_per_rank).to_string()),
        ("gpus-per-pod", if spec.gpus { per_pod } else { 0 }.to_string()),
        ("memory-per-pod", format!("{}Gi", per_pod * memory_per_rank_gib)),
        ("storage", storage.clone()),
        ("run-dir", format!("/runs/{name}")),
        ("secret", format!("{name}-join")),
        ("coordinator", format!("{name}-0.{name}:7400")),
        ("jobset-coordinator", format!("{name}-worker-0-0.{name}:7400")),
    ])
}

/// The folder's own file, up to what only some kinds need.
fn kustomization(spec: &RunSpec, resources: &[&str]) -> String {
    let RunSpec { name, ranks, .. } = spec;
    let list: String = resources.iter().map(|file| format!("  - {file}\n")).collect();
    format!(
        "# The run {name} on {ranks} ranks.\n\
         apiVersion: kustomize.config.k8s.io/v1beta1\n\
         kind: Kustomization\n\
         resources:\n{list}\
         configMapGenerator:\n  - name: {name}\n    files:\n      - run.toml\n\
         # Names stay as they are: kustomize does not know where MPIJob and JobSet name a config map.\n\
         generatorOptions:\n  disableNameSuffixHash: true\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mark_of_every_file_is_known() {
        #[derive(clap::Parser)]
        struct Cli {
            #[command(flatten)]
            args: K8sArgs,
        }
        let cli = <Cli as clap::Parser>::try_parse_from(["render", "-n", "4", "--gpus"]).unwrap();
        for template in COMMON.into_iter().chain([MPIJOB, MPIJOB_GPU, SERVICE, JOB, JOBSET]) {
            let filled = fill(template, &values(&cli.args)).unwrap();
            assert!(!filled.contains("render:"), "{}", template.0);
        }
    }
}
