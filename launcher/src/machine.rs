//! What the system says about this machine.
//!
//! Owns the reading of `/proc`. It judges nothing.

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
}
