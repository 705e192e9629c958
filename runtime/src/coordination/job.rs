//! What the host of a coordinator fixes about a job before any rank arrives: size, grid, leases.
//!
//! Pure values and arithmetic.

use std::time::Duration;

use super::event::Epoch;

/// The job as its host knows it. `Default` is one rank with the intervals for production; fill in the rest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobSpec {
    /// Number of this attempt at running the job, from 1. A host that restarts a job counts on, so that workers of the earlier
    /// attempt are told apart and refused.
    pub epoch: Epoch,
    /// Ranks of the job, W.
    pub world_size: u32,
    /// Expert-parallel size, EP; W = EP·DP.
    pub ep_size: u32,
    /// Hash of the resolved configuration that every rank must have. `None`: the first rank to register sets it.
    pub config_fingerprint: Option<String>,
    /// A rank that is not heard of for this long is lost.
    pub lease: Duration,
    /// How often a rank says something. At most a third of the lease, so that one lost message costs nothing.
    pub heartbeat: Duration,
    /// How long ranks may take to arrive, counted from the start of the coordinator.
    pub forming_deadline: Duration,
}

impl Default for JobSpec {
    fn default() -> Self {
        Self {
            epoch: Epoch(1),
            world_size: 1,
            ep_size: 1,
            config_fingerprint: None,
            // A lost rank's peers between GPUs learn of it here first, and are to be gone ten seconds after it.
            lease: Duration::from_secs(8),
            heartbeat: Duration::from_secs(2),
            forming_deadline: Duration::from_secs(300),
        }
    }
}

/// A job that cannot be hosted as described.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JobError {
    /// A size of zero.
    #[error("{what} is 0; it must be at least 1")]
    Zero {
        /// Which size.
        what: &'static str,
    },
    /// EP does not divide W.
    #[error("{world_size} ranks cannot form expert groups of {ep_size}; sizes that work: {divisors:?}")]
    GridDoesNotFit {
        /// Ranks of the job.
        world_size: u32,
        /// The asked-for expert-parallel size.
        ep_size: u32,
        /// Every size that divides the world.
        divisors: Vec<u32>,
    },
    /// The heartbeat is too slow for the lease.
    #[error("a heartbeat every {heartbeat:?} is too slow for a lease of {lease:?}; it must be at most a third of it")]
    HeartbeatTooSlow {
        /// Interval asked for.
        heartbeat: Duration,
        /// Lease asked for.
        lease: Duration,
    },
}

impl JobSpec {
    /// Checks that the sizes fit together. Errors: a size of zero, EP that does not divide W, a heartbeat slower than a third of the lease.
    pub fn validate(&self) -> Result<(), JobError> {
        let sizes = [
            ("epoch", self.epoch.0 == 0),
            ("world size", self.world_size == 0),
            ("expert-parallel size", self.ep_size == 0),
            ("heartbeat", self.heartbeat.is_zero()),
            ("forming deadline", self.forming_deadline.is_zero()),
        ];
        if let Some((what, _)) = sizes.into_iter().find(|(_, zero)| *zero) {
            return Err(JobError::Zero { what });
        }
        if !self.world_size.is_multiple_of(self.ep_size) {
            let divisors = (1..=self.world_size).filter(|size| self.world_size.is_multiple_of(*size)).collect();
            return Err(JobError::GridDoesNotFit { world_size: self.world_size, ep_size: self.ep_size, divisors });
        }
        if self.heartbeat * 3 > self.lease {
            return Err(JobError::HeartbeatTooSlow { heartbeat: self.heartbeat, lease: self.lease });
        }
        Ok(())
    }

    /// The grid of a valid job.
    pub fn grid(&self) -> Grid {
        Grid::new(self.ep_size, self.world_size / self.ep_size.max(1))
    }
}

/// The EP×DP grid with its groups spelled out, as a lease carries it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grid {
    /// Expert-parallel size.
    pub ep_size: u32,
    /// Data-parallel size.
    pub dp_size: u32,
    /// `[dp]` → the ranks that together hold all experts, by ascending expert-parallel index.
    pub expert_groups: Vec<Vec<u32>>,
    /// `[ep]` → the ranks that hold the same experts, by ascending data-parallel index.
    pub replica_groups: Vec<Vec<u32>>,
}

impl Grid {
    /// The grid of `rank = dp * ep_size + ep`.
    pub fn new(ep_size: u32, dp_size: u32) -> Self {
        Self {
            ep_size,
            dp_size,
            expert_groups: (0..dp_size).map(|dp| (0..ep_size).map(|ep| dp * ep_size + ep).collect()).collect(),
            replica_groups: (0..ep_size).map(|ep| (0..dp_size).map(|dp| dp * ep_size + ep).collect()).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_follow_the_rank_order_of_the_grid() {
        let grid = JobSpec { world_size: 6, ep_size: 2, ..JobSpec::default() }.grid();
        assert_eq!(grid.expert_groups, vec![vec![0, 1], vec![2, 3], vec![4, 5]]);
        assert_eq!(grid.replica_groups, vec![vec![0, 2, 4], vec![1, 3, 5]]);
    }

    #[test]
    fn jobs_that_cannot_be_hosted_are_refused_with_what_would_work() {
        let base = JobSpec::default();
        assert_eq!(base.validate(), Ok(()));
        let table = [
            (JobSpec { world_size: 0, ..base.clone() }, "world size is 0"),
            (JobSpec { epoch: Epoch(0), ..base.clone() }, "epoch is 0"),
            (JobSpec { world_size: 6, ep_size: 4, ..base.clone() }, "sizes that work: [1, 2, 3, 6]"),
            (JobSpec { heartbeat: base.lease / 2, ..base.clone() }, "at most a third"),
        ];
        for (spec, message) in table {
            let error = spec.validate().unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
    }
}
