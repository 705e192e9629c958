//! What the system says about this machine.
//!
//! Owns the reading of `/sys` and of the process's own CPUs. It judges nothing; memory is `moe_runtime::system`'s.

/// Cores that ranks of this machine can be bound to, siblings counted once; None where CPUs are granted by time and not by number,
/// as in a container with a quota: ranks that were bound would meet others' on the same few cores.
pub(crate) fn cores() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let allowed = cpus(status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?)?;
    let granted = std::thread::available_parallelism().ok()?.get();
    let siblings = |cpu: usize| {
        std::fs::read_to_string(format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")).ok()
    };
    (granted >= allowed.len()).then(|| cores_of(&allowed, siblings))
}

/// The numbers of a list as `0-3,8`.
fn cpus(list: &str) -> Option<Vec<usize>> {
    let mut cpus = Vec::new();
    for part in list.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        cpus.extend(first.parse::<usize>().ok()?..=last.parse().ok()?);
    }
    Some(cpus)
}

/// Cores that these CPUs are of. A CPU of which nothing is known counts as one.
fn cores_of(cpus: &[usize], siblings: impl Fn(usize) -> Option<String>) -> usize {
    let core = |cpu: &usize| siblings(*cpu).unwrap_or_else(|| cpu.to_string());
    cpus.iter().map(core).collect::<std::collections::BTreeSet<_>>().len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn siblings_are_one_core() {
        assert_eq!(cpus("0-3,8\n"), Some(vec![0, 1, 2, 3, 8]));
        assert_eq!((cpus(""), cpus("0-x")), (None, None));
        // CPUs 0 to 3 are two cores of two siblings each; of CPU 8 nothing is known.
        let siblings = |cpu: usize| (cpu < 4).then(|| format!("{},{}", cpu % 2, cpu % 2 + 2));
        for (allowed, cores) in [(&[0, 1, 2, 3][..], 2), (&[0, 2], 1), (&[0, 1, 8], 3)] {
            assert_eq!(cores_of(allowed, siblings), cores, "{allowed:?}");
        }
        assert!(cores().is_none_or(|cores| cores > 0));
    }
}
