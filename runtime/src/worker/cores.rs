//! How many threads a rank computes with.
//!
//! Owns the division of CPUs among the ranks that may use the same ones. It binds nobody: launchers do, each in its own way, and
//! what counts is what a rank is allowed in the end.

use super::world::host_name;

/// Where a rank computes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Spot {
    /// Its machine; empty where the system tells no name.
    pub host: String,
    /// The CPUs that it is allowed there, in the system's own words, as `0-3,8`; empty where it does not say.
    pub cpus: String,
}

impl Spot {
    /// That of this process.
    pub(super) fn here() -> Self {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
        Self { host: host_name(), cpus: allowed.unwrap_or_default().trim().to_owned() }
    }

    /// For other ranks.
    #[cfg(feature = "mpi")]
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        format!("{}\n{}", self.host, self.cpus).into_bytes()
    }

    /// As another rank has sent it.
    #[cfg(feature = "mpi")]
    pub(super) fn from_bytes(bytes: &[u8]) -> Self {
        let text = String::from_utf8_lossy(bytes);
        let (host, cpus) = text.split_once('\n').unwrap_or((&text, ""));
        Self { host: host.to_owned(), cpus: cpus.to_owned() }
    }
}

/// Threads of the rank at `mine`, to which the system grants `available` CPUs at once: all of them where the launcher gave it CPUs
/// of its own, its share where others of `all` ranks are allowed the very same.
pub(super) fn threads(available: usize, mine: &Spot, all: &[Spot]) -> usize {
    let sharing = all.iter().filter(|other| *other == mine).count();
    (available / sharing.max(1)).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is tried, host and CPUs of each rank, CPUs that the system grants each of them, threads of each of them.
    type Case = (&'static str, &'static [(&'static str, &'static str)], usize, usize);

    #[test]
    fn ranks_divide_the_cpus_they_share_and_keep_those_they_were_bound_to() {
        #[rustfmt::skip]
        let table: [Case; 8] = [
            ("alone", &[("a", "0-7")], 8, 8),
            ("two unbound", &[("a", "0-7"), ("a", "0-7")], 8, 4),
            ("two bound to a core each", &[("a", "0"), ("a", "1")], 1, 1),
            ("two bound to halves", &[("a", "0-3"), ("a", "4-7")], 4, 4),
            ("four bound to two sockets", &[("a", "0-3"), ("a", "4-7"), ("a", "0-3"), ("a", "4-7")], 4, 2),
            ("one a machine", &[("a", "0-7"), ("b", "0-7")], 8, 8),
            ("more ranks than CPUs", &[("a", "0-1"), ("a", "0-1"), ("a", "0-1")], 2, 1),
            ("a control group grants fewer than it allows", &[("a", "0-63"), ("a", "0-63")], 4, 2),
        ];
        for (what, spots, available, expected) in table {
            let spot = |(host, cpus): &(&str, &str)| Spot { host: (*host).to_owned(), cpus: (*cpus).to_owned() };
            let all: Vec<Spot> = spots.iter().map(spot).collect();
            for mine in &all {
                assert_eq!(threads(available, mine, &all), expected, "{what}");
            }
        }
    }

    #[cfg(feature = "mpi")]
    #[test]
    fn a_spot_survives_the_way_to_another_rank() {
        let here = Spot::here();
        assert!(!here.cpus.is_empty(), "{here:?}");
        for spot in [here, Spot::default()] {
            assert_eq!(Spot::from_bytes(&spot.to_bytes()), spot);
        }
    }
}
