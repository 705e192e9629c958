//! What ranks must agree on before they connect: NCCL, its version, a GPU for each.
//!
//! Owns what each rank tells the others of itself, and the verdict, which all ranks work out alike from what all have told. How it
//! travels is the caller's: the coordinator's, or any that gathers bytes.

use std::sync::Arc;

use moe_kernels::cuda::{Cuda, CudaAct, Facts};
use nccl_rs::{CommConfig, Nccl, UniqueId, Version};
use serde::{Deserialize, Serialize};

use super::plane::Plane;
use super::{Link, NcclCommunicator};
use crate::collectives::{CollectiveError, HostCommunicator, Place};
use crate::exit::{Classified, ExitCode};
use crate::topology::Rank;

/// Told, on another thread, of the first collective that fails: its step, and how.
pub type OnFailure = Box<dyn Fn(u64, &CollectiveError) + Send>;

/// How ranks meet.
pub struct Meeting<'a, E> {
    /// The same ranks, for what they exchange in host memory.
    pub control: HostCommunicator,
    /// The name of this machine.
    pub host: String,
    /// Number of the GPU on this machine, as this process counts.
    pub ordinal: usize,
    /// Brings bytes to all ranks: what each brought, by ascending rank.
    pub gather: &'a dyn Fn(Vec<u8>) -> Result<Vec<Vec<u8>>, E>,
    /// See [`OnFailure`].
    pub on_failure: OnFailure,
}

/// Why ranks cannot be connected; the same on all of them.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MeetError {
    /// A rank has no NCCL, or none that will do.
    #[error("rank {rank} on {host}: {reason}")]
    NoNccl {
        /// The first such rank.
        rank: Rank,
        /// Its machine.
        host: String,
        /// What is missing, with the mend.
        reason: String,
    },
    /// Two ranks would talk different dialects.
    #[error(
        "rank {} on {} has NCCL {}, rank {} on {} has NCCL {}: install one version on all machines",
        one.0, one.1, one.2, other.0, other.1, other.2
    )]
    Versions {
        /// Rank 0, its machine, its version.
        one: (Rank, String, String),
        /// The first with another version.
        other: (Rank, String, String),
    },
    /// Two ranks of one machine have the same GPU.
    #[error(
        "ranks {one} and {other} on {host} have the same GPU ({gpu}): start at most as many ranks on a machine as it has GPUs, and let \
         each process see all of them or one of its own"
    )]
    SharedGpu {
        /// A rank.
        one: Rank,
        /// Another.
        other: Rank,
        /// Their machine.
        host: String,
        /// The GPU's name.
        gpu: String,
    },
    /// Ranks would wait for the slower kind, and do not have the same memory.
    #[error("rank {one} has a GPU of kind {kind}, rank {other} one of kind {other_kind}: use GPUs of one kind")]
    Kinds {
        /// Rank 0.
        one: Rank,
        /// Its kind.
        kind: String,
        /// The first of another kind.
        other: Rank,
        /// That kind.
        other_kind: String,
    },
    /// What a rank told is not understood: it runs another program.
    #[error("rank {rank} told nothing that is understood of its GPU: {reason}")]
    Malformed {
        /// The rank.
        rank: Rank,
        /// Why not.
        reason: String,
    },
}

impl Classified for MeetError {
    fn exit_code(&self) -> ExitCode {
        match self {
            Self::NoNccl { .. } | Self::Versions { .. } => ExitCode::Io,
            Self::SharedGpu { .. } | Self::Kinds { .. } => ExitCode::Usage,
            Self::Malformed { .. } => ExitCode::Internal,
        }
    }
}

/// What a rank tells of itself.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Told {
    host: String,
    ordinal: usize,
    gpu: String,
    uuid: [u8; 16],
    nccl: Result<i32, String>,
    /// Rank 0's.
    id: Option<Vec<u8>>,
}

impl Told {
    fn new(host: String, ordinal: usize, facts: &Facts, nccl: Result<i32, String>) -> Self {
        Self { host, ordinal, gpu: facts.name.clone(), uuid: facts.uuid, nccl, id: None }
    }
}

/// The id of the ranks' communicator and their NCCL's version, if all of them can be in it.
fn agree(told: &[Told]) -> Result<(UniqueId, Version), MeetError> {
    let ranks = || told.iter().enumerate().map(|(rank, told)| (Rank(rank), told));
    let mut versions = Vec::new();
    for (rank, told) in ranks() {
        match &told.nccl {
            Ok(code) => versions.push((rank, told.host.clone(), Version::from_code(*code))),
            Err(reason) => {
                return Err(MeetError::NoNccl { rank, host: told.host.clone(), reason: reason.clone() });
            }
        }
    }
    let of = |(rank, host, version): &(Rank, String, Version)| (*rank, host.clone(), version.to_string());
    let Some((first, version)) = told.first().zip(versions.first()) else {
        return Err(MeetError::Malformed { rank: Rank(0), reason: "nobody came".into() });
    };
    if let Some(other) = versions.iter().find(|other| other.2 != version.2) {
        return Err(MeetError::Versions { one: of(version), other: of(other) });
    }
    for (rank, told) in ranks() {
        if let Some((one, _)) = ranks().take(rank.0).find(|(_, before)| before.uuid == told.uuid) {
            let (host, gpu) = (told.host.clone(), told.gpu.clone());
            return Err(MeetError::SharedGpu { one, other: rank, host, gpu });
        }
        if told.gpu != first.gpu {
            let (kind, other_kind) = (first.gpu.clone(), told.gpu.clone());
            return Err(MeetError::Kinds { one: Rank(0), kind, other: rank, other_kind });
        }
    }
    let id = UniqueId::try_from(first.id.as_deref().unwrap_or_default())
        .map_err(|error| MeetError::Malformed { rank: Rank(0), reason: error.to_string() })?;
    Ok((id, version.2))
}

impl<A: CudaAct> NcclCommunicator<A> {
    /// Connects the ranks of `meeting`, with the GPU of `queue` for this one, and says in words what came about. All ranks call this.
    /// A rank alone needs no NCCL.
    ///
    /// # Errors
    /// [`MeetError`], the same on all ranks; those of `meeting.gather`; [`CollectiveError`] where a rank does not come or NCCL fails.
    pub fn connect<E>(queue: &Cuda<A>, meeting: Meeting<'_, E>) -> Result<(Self, Vec<String>), E>
    where
        E: From<MeetError> + From<CollectiveError>,
    {
        let Meeting { control, host, ordinal, gather, on_failure } = meeting;
        let size = control.size();
        if size == 1 {
            return Ok((Self { control, link: None }, Vec::new()));
        }
        let nccl = Nccl::load().map_err(|error| error.to_string());
        let mut mine = Told::new(
            host,
            ordinal,
            queue.facts(),
            nccl.as_ref().map(|nccl| nccl.version().code()).map_err(Clone::clone),
        );
        if let Ok(nccl) = &nccl
            && control.rank() == 0
        {
            match nccl.unique_id() {
                Ok(id) => mine.id = Some(id.as_bytes().to_vec()),
                Err(error) => mine.nccl = Err(error.to_string()),
            }
        }
        let told = gather(serde_json::to_vec(&mine).unwrap_or_default())?;
        let told = told.iter().enumerate().map(|(rank, bytes)| {
            let malformed =
                |error: serde_json::Error| MeetError::Malformed { rank: Rank(rank), reason: error.to_string() };
            serde_json::from_slice::<Told>(bytes).map_err(malformed)
        });
        let told = told.collect::<Result<Vec<_>, _>>()?;
        let (id, version) = agree(&told)?;
        let Ok(nccl) = nccl else {
            // Not reached: this rank's own word is among those that were agreed on.
            return Err(MeetError::Malformed { rank: Rank(control.rank()), reason: "no NCCL".into() }.into());
        };
        let context = control.context().clone();
        let config = CommConfig::default();
        let step_of = context.clone();
        let on_failure = Box::new(move |error: &CollectiveError| on_failure(step_of.step(), error));
        let plane = Arc::new(Plane::new(queue, context.clone(), config.clone(), on_failure)?);
        plane.queue().make_current().map_err(CollectiveError::from)?;
        let connected = nccl_rs::Communicator::connect(&nccl, &config, &id, (control.rank(), size), context.deadline());
        let communicator = connected.map_err(|error| {
            let place = Place { collective: "connect", group: "world".into(), step: 0, layer: None, bytes: 0 };
            let missing = if error.is_peers() { others(&control) } else { Vec::new() };
            CollectiveError::Nccl { place: Box::new(place), reason: error.to_string(), missing }
        })?;
        let described = describe(&told, version);
        let link = Link::new(plane, communicator, &control);
        Ok((Self { control, link: Some(Arc::new(link)) }, described))
    }
}

fn others(control: &HostCommunicator) -> Vec<Rank> {
    let me = control.rank();
    control.members().iter().enumerate().filter(|(rank, _)| *rank != me).map(|(_, member)| *member).collect()
}

/// A line for each machine: which rank computes on which GPU.
fn describe(told: &[Told], version: Version) -> Vec<String> {
    let mut lines = vec![format!("NCCL {version}")];
    let mut rest = told.iter().enumerate().peekable();
    while let Some((rank, first)) = rest.next() {
        let mut placed = format!("{}: rank {rank} on GPU {}", first.host, first.ordinal);
        while let Some((rank, next)) = rest.next_if(|(_, next)| next.host == first.host) {
            placed += &format!(", rank {rank} on GPU {}", next.ordinal);
        }
        lines.push(placed);
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(rank: u8, host: &str) -> Told {
        Told {
            host: host.into(),
            ordinal: rank.into(),
            gpu: "NVIDIA H200".into(),
            uuid: [rank; 16],
            nccl: Ok(22_803),
            id: (rank == 0).then(|| vec![7; UniqueId::BYTES]),
        }
    }

    #[test]
    fn ranks_with_one_version_and_a_gpu_each_agree_on_rank_0s_id() {
        let all = [told(0, "a"), told(1, "a"), told(2, "b")];
        let (id, version) = agree(&all).unwrap();
        assert_eq!((id.as_bytes()[0], version), (7, Version::new(2, 28, 3)));
        assert_eq!(
            describe(&all, version),
            ["NCCL 2.28.3", "a: rank 0 on GPU 0, rank 1 on GPU 1", "b: rank 2 on GPU 2"]
        );
    }

    #[test]
    fn what_keeps_ranks_apart_is_named() {
        let with = |change: fn(&mut Told)| {
            let mut all = [told(0, "a"), told(1, "a")];
            change(&mut all[1]);
            agree(&all).unwrap_err().to_string()
        };
        assert_eq!(with(|told| told.nccl = Err("no NCCL: …".into())), "rank 1 on a: no NCCL: …");
        let versions = with(|told| told.nccl = Ok(22_705));
        let text = "rank 0 on a has NCCL 2.28.3, rank 1 on a has NCCL 2.27.5: install one version on all machines";
        assert_eq!(versions, text);
        let shared = with(|told| told.uuid = [0; 16]);
        assert!(shared.starts_with("ranks 0 and 1 on a have the same GPU (NVIDIA H200): start at most"), "{shared}");
        let kinds = with(|told| told.gpu = "NVIDIA H100".into());
        assert!(kinds.ends_with("rank 1 one of kind NVIDIA H100: use GPUs of one kind"), "{kinds}");
    }
}
