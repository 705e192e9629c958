//! What cannot be rendered, and why.

use std::path::PathBuf;

use moe_runtime::exit::{Classified, ExitCode};

/// A run for which no job files can be written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RenderError {
    /// No ranks.
    #[error("-n 0: a job has at least 1 rank")]
    NoRanks,
    /// No CPUs.
    #[error("--cpus-per-rank 0: must be at least 1")]
    NoCpus,
    /// Ranks that nodes cannot share.
    #[error("--nodes {nodes}: cannot share {ranks} ranks evenly; numbers that can: {fits:?}")]
    Uneven {
        /// Ranks of the run.
        ranks: usize,
        /// Nodes asked for.
        nodes: usize,
        /// Every number of nodes that works.
        fits: Vec<usize>,
    },
    /// A name that Kubernetes does not take.
    #[error(
        "--name {name:?}: must be 1 to 40 lower-case letters, digits and hyphens, begin with a letter and not end with a hyphen"
    )]
    Name {
        /// The name.
        name: String,
    },
    /// Several CPU ranks without mpirun.
    #[error(
        "--kind {kind}: its ranks start without MPI, which {ranks} CPU ranks need for their data; use --kind mpijob or --gpus"
    )]
    NeedsMpi {
        /// The kind.
        kind: &'static str,
        /// Ranks of the run.
        ranks: usize,
    },
    /// Several ranks in a pod of a kind that has one in each.
    #[error("--nodes {nodes}: a {kind} has one rank in each pod; leave --nodes out")]
    OneRankPods {
        /// The kind.
        kind: &'static str,
        /// Pods asked for.
        nodes: usize,
    },
    /// A file is there already.
    #[error("{}: exists; give another --out, or --force to write over it", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// The system refuses.
    #[error("{}: cannot be {action}: {reason}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// The system's reason.
        #[source]
        reason: std::io::Error,
    },
    /// A template asks for a value that there is none of: a fault of this program.
    #[error("the built-in {template} asks for {key}, which is not known")]
    Template {
        /// The template.
        template: &'static str,
        /// What it asks for.
        key: String,
    },
}

impl Classified for RenderError {
    fn exit_code(&self) -> ExitCode {
        match self {
            Self::Io { .. } => ExitCode::Io,
            Self::Template { .. } => ExitCode::Internal,
            _ => ExitCode::Usage,
        }
    }
}
