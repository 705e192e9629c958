//! What a collective reports when it cannot finish.
//!
//! Owns the errors and their wording: each names the collective, the group, the step and the ranks concerned. It never decides
//! what to do about them.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use moe_kernels::DeviceError;

use crate::exit::{Classified, ExitCode};
use crate::topology::Rank;

/// Why a collective did not finish. After any of these the group is out of step with its peers: every later collective on it
/// returns the same error, and receive buffers hold partial data.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CollectiveError {
    /// Some ranks were not heard from before the deadline. A rank that is held up elsewhere by the absent one is missed here
    /// too: the culprit is the one that is named by others and reports nothing itself.
    #[error("{collective} at step {step} in the {group} group waited {} for {}", seconds(*waited), ranks(missing))]
    Timeout {
        /// The collective, by its name in [`super::Communicator`].
        collective: &'static str,
        /// The group's name.
        group: String,
        /// The training step, as last set in the [`super::Context`].
        step: u64,
        /// Time since the collective began on this rank.
        waited: Duration,
        /// World ranks not heard from, ascending.
        missing: Vec<Rank>,
    },
    /// A peer has left, so waiting for it is in vain.
    #[error("{collective} at step {step} in the {group} group lost rank {rank}: {reason}")]
    PeerLost {
        /// The collective.
        collective: &'static str,
        /// The group's name.
        group: String,
        /// The training step.
        step: u64,
        /// World rank of the peer.
        rank: Rank,
        /// What is known of its end.
        reason: String,
    },
    /// Another thread ended all waits of this worker through its [`super::AbortHandle`].
    #[error("collectives were aborted{}: {reason}", culprit.map_or(String::new(), |rank| format!(" because of rank {rank}")))]
    Aborted {
        /// World rank that is to blame, where known.
        culprit: Option<Rank>,
        /// Why, in words.
        reason: String,
    },
    /// Two ranks do not agree on the size of a message: their arguments differ.
    #[error(
        "{collective} at step {step} in the {group} group expected {expected_bytes} bytes from rank {rank}, which sent {sent}",
        sent = sent_bytes.map_or("more".to_owned(), |bytes| format!("{bytes} bytes"))
    )]
    Disagreement {
        /// The collective.
        collective: &'static str,
        /// The group's name.
        group: String,
        /// The training step.
        step: u64,
        /// World rank of the peer.
        rank: Rank,
        /// Bytes this rank was waiting for.
        expected_bytes: usize,
        /// Bytes that came; none where the transport says only that it was more.
        sent_bytes: Option<usize>,
    },
    /// Rows that reach beyond their buffer.
    #[error(
        "{collective} at step {step} in the {group} group: the {what} rows {ranges:?} do not fit a buffer of {rows} rows"
    )]
    Rows {
        /// The collective.
        collective: &'static str,
        /// The group's name.
        group: String,
        /// The training step.
        step: u64,
        /// "send" or "receive".
        what: &'static str,
        /// Rows of each peer.
        ranges: Vec<Range<usize>>,
        /// Rows the buffer holds.
        rows: usize,
    },
    /// More groups were split off than messages can be told apart for.
    #[error("cannot split off the {group} group: {limit} groups have been made already")]
    TooManyGroups {
        /// Name of the refused group.
        group: String,
        /// Groups a worker can make in its life.
        limit: u32,
    },
    /// A collective between GPUs was not done before the deadline. The GPUs do not say for whom they wait: every other rank of the
    /// group may be the one, and the coordinator knows which of them was not heard from.
    #[error("{place} was not done within {}", seconds(*waited))]
    Stalled {
        /// The collective.
        place: Box<Place>,
        /// Time since the GPU came to it.
        waited: Duration,
        /// World ranks that may be missing.
        missing: Vec<Rank>,
    },
    /// A collective between GPUs was under way when all waits of this worker were ended.
    #[error("{place} was given up{}: {reason}", culprit.map_or(String::new(), |rank| format!(" because of rank {rank}")))]
    GivenUp {
        /// The collective.
        place: Box<Place>,
        /// World rank that is to blame, where known.
        culprit: Option<Rank>,
        /// Why, in words.
        reason: String,
    },
    /// NCCL failed.
    #[error("{place}: {reason}")]
    Nccl {
        /// The collective.
        place: Box<Place>,
        /// NCCL's own words.
        reason: String,
        /// World ranks that may be the cause; empty where the cause is here.
        missing: Vec<Rank>,
    },
    /// The device failed under the collective.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The MPI library failed, in its own words.
    #[error("MPI: {0}")]
    Mpi(String),
}

/// Which collective it was, for errors of collectives that outlive the call that issued them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The collective, by its name in [`super::Communicator`].
    pub collective: &'static str,
    /// The group's name.
    pub group: Arc<str>,
    /// The training step.
    pub step: u64,
    /// The model's layer, where the collective belongs to one.
    pub layer: Option<usize>,
    /// Bytes this rank puts into it; 0 where it is not about any.
    pub bytes: u64,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { collective, group, step, layer, bytes } = self;
        f.write_str(collective)?;
        if *bytes > 0 {
            write!(f, " of {bytes} bytes")?;
        }
        write!(f, " at step {step}")?;
        if let Some(layer) = layer {
            write!(f, ", layer {layer},")?;
        }
        write!(f, " in the {group} group")
    }
}

impl CollectiveError {
    /// The collective's name and the world ranks it may have waited for in vain; None where the coordinator has nothing to learn of it.
    pub fn blames(&self) -> Option<(String, Vec<Rank>)> {
        match self {
            Self::Timeout { collective, missing, .. } => Some(((*collective).to_owned(), missing.clone())),
            Self::PeerLost { collective, rank, .. } => Some(((*collective).to_owned(), vec![*rank])),
            Self::Stalled { place, missing, .. } | Self::Nccl { place, missing, .. } => {
                let layer = place.layer.map_or(String::new(), |layer| format!(" of layer {layer}"));
                Some((format!("{}{layer}", place.collective), missing.clone()))
            }
            // Who aborted this rank knows already.
            Self::Aborted { .. } | Self::GivenUp { .. } => None,
            _ => Some((String::new(), Vec::new())),
        }
    }
}

impl Classified for CollectiveError {
    fn exit_code(&self) -> ExitCode {
        match self {
            Self::Timeout { .. }
            | Self::PeerLost { .. }
            | Self::Aborted { .. }
            | Self::Stalled { .. }
            | Self::GivenUp { .. } => ExitCode::Temporary,
            Self::Nccl { missing, .. } if !missing.is_empty() => ExitCode::Temporary,
            Self::Disagreement { .. }
            | Self::Rows { .. }
            | Self::TooManyGroups { .. }
            | Self::Nccl { .. }
            | Self::Device(_)
            | Self::Mpi(_) => ExitCode::Internal,
        }
    }
}

/// The most ranks one message lists; a world of thousands would fill the screen.
const MOST_LISTED: usize = 16;

/// "rank 3", "ranks 1 and 3", "ranks 0, 1, … and 40 more".
fn ranks(list: &[Rank]) -> String {
    let shown = list.iter().take(MOST_LISTED).map(Rank::to_string).collect::<Vec<_>>();
    match (&*shown, list.len() - shown.len()) {
        ([], _) => "no rank".into(),
        ([only], _) => format!("rank {only}"),
        ([first @ .., last], 0) => format!("ranks {} and {last}", first.join(", ")),
        (shown, more) => format!("ranks {} and {more} more", shown.join(", ")),
    }
}

/// "60 s", "0.2 s": to the tenth.
fn seconds(time: Duration) -> String {
    let tenths = format!("{:.1}", time.as_secs_f64());
    format!("{} s", tenths.strip_suffix(".0").unwrap_or(&tenths))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timeout_reads_as_a_sentence() {
        let error = |waited, missing: &[usize]| {
            let missing = missing.iter().copied().map(Rank).collect();
            CollectiveError::Timeout { collective: "all_to_all_v", group: "expert".into(), step: 12, waited, missing }
                .to_string()
        };
        assert_eq!(
            error(Duration::from_secs(60), &[3]),
            "all_to_all_v at step 12 in the expert group waited 60 s for rank 3"
        );
        let short = error(Duration::from_millis(203), &[0, 2, 5]);
        assert_eq!(short, "all_to_all_v at step 12 in the expert group waited 0.2 s for ranks 0, 2 and 5");
        let many = error(Duration::from_secs(1), &(0..100).collect::<Vec<_>>());
        assert!(many.ends_with("14, 15 and 84 more"), "{many}");
    }

    #[test]
    fn a_stall_names_step_layer_collective_group_and_bytes() {
        let place = |layer| {
            let (collective, group) = ("all_to_all_v", Arc::from("expert"));
            Box::new(Place { collective, group, step: 12, layer, bytes: 4096 })
        };
        let stalled =
            CollectiveError::Stalled { place: place(Some(3)), waited: Duration::from_secs(60), missing: vec![] };
        assert_eq!(
            stalled.to_string(),
            "all_to_all_v of 4096 bytes at step 12, layer 3, in the expert group was not done within 60 s"
        );
        let reason = "lease expired".to_owned();
        let given_up = CollectiveError::GivenUp { place: place(None), culprit: Some(Rank(1)), reason };
        assert_eq!(
            given_up.to_string(),
            "all_to_all_v of 4096 bytes at step 12 in the expert group was given up because of rank 1: lease expired"
        );
        assert_eq!(given_up.exit_code(), ExitCode::Temporary);
    }

    #[test]
    fn an_abort_names_the_culprit_where_it_is_known() {
        let aborted = |culprit| CollectiveError::Aborted { culprit, reason: "lease expired".into() }.to_string();
        assert_eq!(aborted(Some(Rank(2))), "collectives were aborted because of rank 2: lease expired");
        assert_eq!(aborted(None), "collectives were aborted: lease expired");
    }
}
