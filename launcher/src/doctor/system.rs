//! CPU, memory, limits, clock and disk.
//!
//! Owns the judgement of what `/proc`, `/sys` and the file system say.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use moe_runtime::system::{available_memory, total_memory};
use rustix::fs::statvfs;

use super::Finding;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// Below this little more than the built-in preset fits.
const LITTLE_MEMORY: u64 = 2 * GIB;
/// Open files that a rank with many peers, shards and log files may need.
const OPEN_FILES: u64 = 1024;
/// Shared memory through which MPI ranks of one machine talk; what Docker gives a container is just this.
const SHARED_MEMORY: u64 = 64 * MIB;
/// Memory that InfiniBand has to pin.
const LOCKED_MEMORY: u64 = 64 * MIB;
/// A few checkpoints of a small model.
const LITTLE_DISK: u64 = GIB;
/// Start of 2025: a clock before it was never set.
const CLOCK_SET: u64 = 1_735_689_600;

pub(super) fn findings(run_dir: &Path) -> Vec<Finding> {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let limits = read("/proc/self/limits");
    let infiniband = Path::new("/sys/class/infiniband").exists();
    let mut findings = vec![
        cpu(&read("/proc/cpuinfo")),
        cores(std::thread::available_parallelism().map_or(1, usize::from)),
        memory(total_memory(), available_memory()),
        open_files(limit(&limits, "Max open files")),
        shared_memory(statvfs("/dev/shm").ok().map(|fs| fs.f_frsize * fs.f_bavail)),
        locked_memory(limit(&limits, "Max locked memory"), infiniband),
    ];
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    findings.push(clock(now, read("/sys/devices/system/clocksource/clocksource0/current_clocksource").trim()));
    findings.push(disk(run_dir));
    findings
}

fn cpu(cpuinfo: &str) -> Finding {
    let field = |name: &str| {
        let line = cpuinfo.lines().find(|line| line.starts_with(name))?;
        line.split_once(':').map(|(_, value)| value.trim())
    };
    let model = field("model name").unwrap_or("of unknown model");
    let flags: Vec<&str> = field("flags").unwrap_or_default().split_whitespace().collect();
    let has = |flag: &str| flags.contains(&flag);
    let known: Vec<&str> =
        ["avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16"].into_iter().filter(|f| has(f)).collect();
    let extensions = if known.is_empty() { "no AVX2".to_owned() } else { known.join(" ") };
    let found = format!("{model}: {extensions}");
    if has("avx2") && has("fma") {
        return Finding::ok("cpu", found);
    }
    Finding::warning(
        "cpu",
        found,
        "computes several times slower without AVX2 and FMA: use another machine for more than trials",
    )
}

fn cores(cores: usize) -> Finding {
    Finding::ok("cores", format!("{cores} for this process"))
}

fn memory(total: Option<u64>, available: Option<u64>) -> Finding {
    let (Some(total), Some(available)) = (total, available) else {
        return Finding::warning("memory", "/proc/meminfo does not say", "give moe-launch plan --memory GIB");
    };
    let found = format!("{:.1} of {:.1} GiB available", gib(available), gib(total));
    match available {
        available if available < LITTLE_MEMORY => {
            Finding::warning("memory", found, "only small models fit; moe-launch plan says which")
        }
        _ => Finding::ok("memory", found),
    }
}

fn gib(bytes: u64) -> f64 {
    bytes as f64 / GIB as f64
}

/// The soft limit of a line of `/proc/self/limits`; `u64::MAX` where there is none.
fn limit(limits: &str, name: &str) -> Option<u64> {
    let line = limits.lines().find_map(|line| line.strip_prefix(name))?;
    match line.split_whitespace().next()? {
        "unlimited" => Some(u64::MAX),
        number => number.parse().ok(),
    }
}

fn open_files(soft: Option<u64>) -> Finding {
    match soft {
        Some(u64::MAX) => Finding::ok("open files", "unlimited"),
        Some(soft) if soft < OPEN_FILES => {
            let mend = format!("ulimit -n {OPEN_FILES}, or LimitNOFILE of the service that starts it");
            Finding::warning("open files", soft.to_string(), mend)
        }
        Some(soft) => Finding::ok("open files", soft.to_string()),
        None => Finding::warning("open files", "the limit is not known", "look at ulimit -n"),
    }
}

fn shared_memory(free: Option<u64>) -> Finding {
    match free {
        None => Finding::problem(
            "shared memory",
            "/dev/shm is missing",
            "mount a tmpfs at /dev/shm: MPI ranks of one machine talk through it",
        ),
        Some(free) if free < SHARED_MEMORY => {
            let found = format!("{} MiB free in /dev/shm", free / MIB);
            Finding::warning(
                "shared memory",
                found,
                "docker run --shm-size=1g, or a memory-backed emptyDir at /dev/shm in Kubernetes",
            )
        }
        Some(free) => Finding::ok("shared memory", format!("{} MiB free in /dev/shm", free / MIB)),
    }
}

fn locked_memory(soft: Option<u64>, infiniband: bool) -> Finding {
    let found = match soft {
        Some(u64::MAX) => "unlimited".to_owned(),
        Some(soft) => format!("{} KiB", soft / 1024),
        None => "the limit is not known".to_owned(),
    };
    if infiniband && soft.is_none_or(|soft| soft < LOCKED_MEMORY) {
        let mend = "ulimit -l unlimited (limits.conf: memlock): InfiniBand pins the memory it sends from";
        return Finding::warning("locked memory", found, mend);
    }
    Finding::ok("locked memory", found)
}

fn clock(now: u64, source: &str) -> Finding {
    if now < CLOCK_SET {
        return Finding::problem(
            "clock",
            "it was never set",
            "start chrony or systemd-timesyncd: certificates and logs need the time",
        );
    }
    match source {
        "" => Finding::ok("clock", "set"),
        "hpet" | "acpi_pm" | "jiffies" | "refined-jiffies" => {
            let found = format!("set, source {source}");
            Finding::warning(
                "clock",
                found,
                "reading it is slow and stages are timed often; boot with clocksource=tsc if the CPU's is stable",
            )
        }
        source => Finding::ok("clock", format!("set, source {source}")),
    }
}

/// Space and a trial write where runs will be, or in the nearest directory above that exists.
fn disk(run_dir: &Path) -> Finding {
    let absolute = std::path::absolute(run_dir).unwrap_or_else(|_| run_dir.to_owned());
    let Some(existing) = absolute.ancestors().find(|dir| dir.is_dir()) else {
        return Finding::problem(
            "disk",
            format!("{}: no directory above it exists", run_dir.display()),
            "give another --run-dir",
        );
    };
    let trial = existing.join(format!(".moe-launch-doctor-{}", std::process::id()));
    if let Err(error) = std::fs::write(&trial, b"trial") {
        return Finding::problem(
            "disk",
            format!("{}: {error}", existing.display()),
            "give a --run-dir that can be written",
        );
    }
    // A trial file that stays is a nuisance, not a finding.
    let _ = std::fs::remove_file(&trial);
    let free = statvfs(existing).ok().map(|fs| fs.f_frsize * fs.f_bavail);
    let Some(free) = free else { return Finding::ok("disk", format!("{} can be written", existing.display())) };
    let found = format!("{:.1} GiB free at {}", gib(free), existing.display());
    if free < LITTLE_DISK {
        return Finding::warning(
            "disk",
            found,
            "checkpoints hold three numbers a parameter: make room, or give another --run-dir",
        );
    }
    Finding::ok("disk", found)
}

#[cfg(test)]
mod tests {
    use super::super::Level;
    use super::*;

    #[test]
    fn each_shortage_is_found_with_its_mend() {
        let limits = "Limit  Soft Limit  Hard Limit  Units\nMax open files            256                  4096                 files\n\
                      Max locked memory         unlimited            unlimited            bytes\n";
        assert_eq!((limit(limits, "Max open files"), limit(limits, "Max locked memory")), (Some(256), Some(u64::MAX)));
        #[rustfmt::skip]
        let table = [
            (cpu("model name\t: X\nflags\t\t: sse2 avx2 fma avx512f\n"), Level::Ok, "X: avx2 fma avx512f"),
            (cpu("model name\t: Y\nflags\t\t: sse2\n"), Level::Warning, "Y: no AVX2"),
            (memory(Some(8 * GIB), Some(4 * GIB)), Level::Ok, "4.0 of 8.0 GiB available"),
            (memory(Some(8 * GIB), Some(GIB)), Level::Warning, "1.0 of 8.0 GiB available"),
            (open_files(Some(256)), Level::Warning, "256"),
            (open_files(Some(u64::MAX)), Level::Ok, "unlimited"),
            (shared_memory(None), Level::Problem, "/dev/shm is missing"),
            (shared_memory(Some(8 * MIB)), Level::Warning, "8 MiB free"),
            (locked_memory(Some(64 * 1024), false), Level::Ok, "64 KiB"),
            (locked_memory(Some(64 * 1024), true), Level::Warning, "64 KiB"),
            (clock(0, "tsc"), Level::Problem, "never set"),
            (clock(CLOCK_SET, "hpet"), Level::Warning, "source hpet"),
            (clock(CLOCK_SET, "tsc"), Level::Ok, "source tsc"),
        ];
        for (finding, level, found) in table {
            assert!(finding.level == level && finding.found.contains(found), "{finding:?}");
            assert_eq!(finding.mend.is_some(), level != Level::Ok, "{finding:?}");
        }
    }

    #[test]
    fn the_disk_is_tried_where_runs_will_be() {
        let folder = tempfile::tempdir().unwrap();
        let finding = disk(&folder.path().join("runs/a"));
        assert!(finding.found.contains(&folder.path().display().to_string()), "{finding:?}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "nothing stays");
        assert_eq!(disk(Path::new("/proc/runs")).level, Level::Problem);
    }
}
