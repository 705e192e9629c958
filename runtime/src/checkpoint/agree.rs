//! How the ranks of a world come to one outcome of work on files.
//!
//! Owns the exchange of results: when one rank fails, all do, with the failing rank's reason. It touches no file itself.

use std::time::Duration;

use moe_kernels::Device;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::CheckpointError;
use crate::collectives::{Communicator, Context};
use crate::exit::Classified;
use crate::topology::Rank;

/// What a collective waits for peers that write or hash gigabytes, each at the speed of its own storage. A rank that dies
/// meanwhile is noticed by other means than this deadline.
const DEADLINE: Duration = Duration::from_secs(30 * 60);

/// Lets collectives wait longer, until it is dropped.
pub(super) struct SlowPhase<'a> {
    context: &'a Context,
    before: Duration,
}

impl<'a> SlowPhase<'a> {
    pub(super) fn begin(context: &'a Context) -> Self {
        let before = context.deadline();
        context.set_deadline(before.max(DEADLINE));
        Self { context, before }
    }
}

impl Drop for SlowPhase<'_> {
    fn drop(&mut self) {
        self.context.set_deadline(self.before);
    }
}

/// What one rank tells the others.
#[derive(Serialize, Deserialize)]
enum Report<T> {
    Done(T),
    /// The error of world rank `rank`.
    Failed {
        rank: usize,
        exit_code: u8,
        message: String,
    },
}

/// What every rank brought, in rank order; where any rank failed, the error of the first that did: its own there,
/// [`CheckpointError::Peer`] on the others. All ranks of the world call this, whether they failed or not.
///
/// # Errors
/// Any rank's, or the collective's.
pub(super) fn gather<B, C, T>(world: &C, mine: Result<T, CheckpointError>) -> Result<Vec<T>, CheckpointError>
where
    B: Device,
    C: Communicator<B>,
    T: Serialize + DeserializeOwned,
{
    let me = world.members()[world.rank()];
    let (report, own_error) = match mine {
        Ok(value) => (Report::Done(value), None),
        // What another rank was told of before is still that rank's.
        Err(CheckpointError::Peer { rank, exit_code, message }) => {
            (Report::Failed { rank: rank.0, exit_code, message }, None)
        }
        Err(error) => {
            let (exit_code, message) = (error.exit_code().number(), error.to_string());
            (Report::Failed { rank: me.0, exit_code, message }, Some(error))
        }
    };
    let bytes = serde_json::to_vec(&report).map_err(CheckpointError::Exchange)?;
    let gathered = match world.all_gather_bytes(&bytes) {
        Ok(gathered) => gathered,
        // Its own reason tells a rank more than that the others are gone.
        Err(error) => return Err(own_error.unwrap_or(error.into())),
    };
    let mut values = Vec::with_capacity(world.size());
    for bytes in gathered {
        match serde_json::from_slice(&bytes).map_err(CheckpointError::Exchange)? {
            Report::Done(value) => values.push(value),
            Report::Failed { rank, exit_code, message } => {
                let own = own_error.filter(|_| Rank(rank) == me);
                return Err(own.unwrap_or(CheckpointError::Peer { rank: Rank(rank), exit_code, message }));
            }
        }
    }
    Ok(values)
}

/// [`gather`] of an outcome without a value.
///
/// # Errors
/// As [`gather`].
pub(super) fn agree<B: Device, C: Communicator<B>>(
    world: &C,
    mine: Result<(), CheckpointError>,
) -> Result<(), CheckpointError> {
    gather(world, mine).map(|_: Vec<()>| ())
}
