//! What the system says about this machine.
//!
//! Owns the reading of `/proc` and `/sys`. It judges nothing.

use std::path::Path;

/// Bytes of memory that can be used without swapping, within this process's control group; None where the system does not say.
pub(crate) fn available_memory() -> Option<u64> {
    let free = meminfo("MemAvailable:")?;
    Some(cgroup_room().map_or(free, |room| room.min(free)))
}

/// Bytes of memory in all.
pub(crate) fn total_memory() -> Option<u64> {
    meminfo("MemTotal:")
}

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

fn meminfo(name: &str) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    field_kib(&text, name).map(|kib| kib * 1024)
}

/// The number of a line `Name:   123 kB`.
fn field_kib(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok()
}

/// What is left of the limit of the control group (version 2).
fn cgroup_room() -> Option<u64> {
    let number = |name: &str| {
        let text = std::fs::read_to_string(Path::new("/sys/fs/cgroup").join(name)).ok()?;
        text.trim().parse::<u64>().ok()
    };
    Some(number("memory.max")?.saturating_sub(number("memory.current")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_of_meminfo_is_found_by_its_whole_name() {
        let text = "MemTotal:       24600000 kB\nMemAvailable:   123 kB\n";
        assert_eq!((field_kib(text, "MemAvailable:"), field_kib(text, "MemFree:")), (Some(123), None));
        assert!(available_memory().unwrap() <= total_memory().unwrap());
    }

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
