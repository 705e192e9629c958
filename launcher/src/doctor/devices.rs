//! GPUs, their driver, NCCL, and the links between machines.
//!
//! Owns the judgement of what `nvidia-smi`, `/proc`, `/sys` and the linker say. A machine without GPUs is an ordinary one.

use std::path::Path;
use std::process::{Command, Stdio};

use nccl_rs::{LoadError, Nccl, Version};

use super::Finding;

pub(super) fn findings() -> Vec<Finding> {
    let gpus = said("nvidia-smi", &["-L"]);
    let driver = std::fs::read_to_string("/proc/driver/nvidia/version").ok();
    let mut findings = vec![gpu(gpus.as_deref(), driver.as_deref())];
    if gpus.is_some() || driver.is_some() {
        findings.push(driver_of(driver.as_deref()));
        findings.push(nccl(Nccl::load()));
        if let Some(matrix) = said("nvidia-smi", &["topo", "-m"]) {
            findings.push(gpu_links(&matrix));
        }
    }
    findings.push(network());
    findings
}

/// What a program prints where it exists and succeeds.
fn said(program: &str, args: &[&str]) -> Option<String> {
    let output = Command::new(program).args(args).stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

fn gpu(gpus: Option<&str>, driver: Option<&str>) -> Finding {
    let names: Vec<&str> = gpus.unwrap_or_default().lines().filter(|line| line.starts_with("GPU ")).collect();
    match (names.first(), driver) {
        (Some(first), _) => {
            let name = first.split_once(": ").map_or(*first, |(_, name)| name.split(" (").next().unwrap_or(name));
            Finding::ok(
                "gpu",
                format!(
                    "{} x {name}{}",
                    names.len(),
                    if cfg!(feature = "cuda") { "" } else { "; this program was built without CUDA" }
                ),
            )
        }
        (None, Some(_)) => {
            let mend = "run nvidia-smi to see why; in a container give it the GPUs (--gpus all)";
            Finding::warning("gpu", "none, though its driver is loaded", mend)
        }
        (None, None) => Finding::ok("gpu", "none; computes on the CPU"),
    }
}

/// The version of the loaded kernel module, whose text begins `NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  …`.
fn driver_of(module: Option<&str>) -> Finding {
    let line = module.and_then(|text| text.lines().next()).unwrap_or_default();
    let is_version = |word: &&str| word.contains('.') && word.chars().all(|c| c.is_ascii_digit() || c == '.');
    match line.split_whitespace().find(is_version) {
        Some(version) => Finding::ok("driver", version),
        None => Finding::warning(
            "driver",
            "/proc/driver/nvidia/version does not say which",
            "run nvidia-smi; in a container the host's driver must be visible",
        ),
    }
}

/// The library as a worker would load it.
fn nccl(library: Result<Nccl, LoadError>) -> Finding {
    match library {
        Ok(nccl) => Finding::ok("nccl", format!("{} ({})", nccl.version(), nccl.path().display())),
        Err(error) => Finding::warning(
            "nccl",
            error.to_string(),
            format!("several GPUs need NCCL {} or later; set LD_LIBRARY_PATH to where it is", Version::NEEDED),
        ),
    }
}

/// The slowest kind of path between two GPUs in the matrix of `nvidia-smi topo -m`.
fn gpu_links(matrix: &str) -> Finding {
    let rows = matrix.lines().filter(|line| line.starts_with("GPU"));
    let paths: Vec<&str> = rows.flat_map(|row| row.split_whitespace().skip(1)).collect();
    let has = |kind: &str| paths.iter().any(|path| path.starts_with(kind));
    match (has("NV"), ["SYS", "NODE", "PHB", "PXB"].into_iter().find(|kind| has(kind))) {
        (_, Some(kind)) => {
            let mend = "an expert group over these pairs is slow: keep parallel.ep within GPUs joined by NVLink";
            Finding::warning("gpu links", format!("some pairs are joined by {kind} only"), mend)
        }
        (true, None) => Finding::ok("gpu links", "NVLink between all pairs"),
        (false, None) => Finding::ok("gpu links", "one GPU"),
    }
}

/// Network interfaces that are up, and InfiniBand.
fn network() -> Finding {
    let names = |folder: &str| -> Vec<String> {
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        let mut names: Vec<_> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    };
    let describe = |name: &String| {
        let read = |file: &str| std::fs::read_to_string(Path::new("/sys/class/net").join(name).join(file)).ok();
        let up = read("operstate").is_some_and(|state| state.trim() != "down");
        let speed = read("speed").and_then(|speed| speed.trim().parse::<i64>().ok()).filter(|speed| *speed > 0);
        let speed = speed.map_or(String::new(), |megabits| format!(" {:.1} Gbit/s", megabits as f64 / 1000.0));
        (up && name != "lo").then(|| format!("{name}{speed}"))
    };
    let mut links: Vec<String> = names("/sys/class/net").iter().filter_map(describe).collect();
    links.extend(names("/sys/class/infiniband").into_iter().map(|name| format!("{name} (InfiniBand)")));
    if links.is_empty() {
        Finding::ok("network", "none but the loopback: one machine only")
    } else {
        Finding::ok("network", links.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::super::Level;
    use super::*;

    #[test]
    fn gpus_their_driver_and_libraries_are_judged_by_what_tools_say() {
        let listed = "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)\nGPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-2)\n";
        let driver = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.1\nGCC version: x\n";
        let all = "\tGPU0\tGPU1\tCPU Affinity\nGPU0\t X \tNV18\t0-15\nGPU1\tNV18\t X \t0-15\n";
        #[rustfmt::skip]
        let table = [
            (gpu(None, None), Level::Ok, "none"),
            (gpu(Some(listed), Some(driver)), Level::Ok, "2 x NVIDIA H100 80GB HBM3"),
            (gpu(None, Some(driver)), Level::Warning, "none, though"),
            (driver_of(Some(driver)), Level::Ok, "580.1"),
            (driver_of(None), Level::Warning, "does not say"),
            (nccl(Nccl::load_from("libnccl-none.so")), Level::Warning, "no NCCL: libnccl-none.so: "),
            (gpu_links(all), Level::Ok, "NVLink"),
            (gpu_links("GPU0\t X \tSYS\nGPU1\tSYS\t X \n"), Level::Warning, "SYS"),
        ];
        for (finding, level, found) in table {
            assert!(finding.level == level && finding.found.contains(found), "{finding:?}");
        }
    }
}
