//! The memory of this machine and of this process.
//!
//! Owns the reading of `/proc` and of the control group. It judges nothing.

use std::path::Path;

/// Bytes of memory that can be used without swapping, within this process's control group; None where the system does not say.
pub fn available_memory() -> Option<u64> {
    let free = meminfo("MemAvailable:")?;
    Some(cgroup_room().map_or(free, |room| room.min(free)))
}

/// Bytes of memory in all.
pub fn total_memory() -> Option<u64> {
    meminfo("MemTotal:")
}

/// Resident memory of this process in bytes, now and at most so far; None where the system does not say.
pub fn memory_now() -> Option<(u64, u64)> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let field = |name| field_kib(&status, name).map(|kib| kib * 1024);
    Some((field("VmRSS:")?, field("VmHWM:")?))
}

/// Bytes in a unit that reads well.
pub fn readable(bytes: f64) -> String {
    // The sum of nothing is −0.
    let bytes = bytes + 0.0;
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let power = (0..units.len() - 1).find(|power| bytes < 1024_f64.powi(*power as i32 + 1)).unwrap_or(units.len() - 1);
    let value = bytes / 1024_f64.powi(power as i32);
    if power == 0 { format!("{value:.0} B") } else { format!("{value:.1} {}", units[power]) }
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
    fn memory_is_read_where_the_system_has_it() {
        let (now, most) = memory_now().unwrap();
        assert!(now > 1 << 20 && most >= now);
    }
}
