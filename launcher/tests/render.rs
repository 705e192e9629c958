//! `moe-launch render`: its files against golden ones, and what it refuses. MOE_UPDATE_GOLDEN=1 writes the golden files anew.
#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in test functions, but not in their helpers")]

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A file of random content: its form is checked instead.
const TOKEN_FILE: &str = "join-token.env";

fn render(arguments: &[&str], out: &Path) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_moe-launch"));
    command.arg("render").args(arguments).arg("--out").arg(out).output().unwrap()
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        folder.read_dir().unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn the_files_of_a_run_are_the_golden_ones() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let update = std::env::var_os("MOE_UPDATE_GOLDEN").is_some();
    let config = golden.join("run.toml");
    let config = config.to_str().unwrap();
    #[rustfmt::skip]
    let table: [(&str, &[&str]); 6] = [
        ("slurm-cpu", &["slurm", "-n", "8", "--nodes", "2", "--config", config]),
        ("slurm-gpu", &["slurm", "-n", "16", "--nodes", "2", "--gpus", "--partition", "gpu", "--account", "me", "--time", "2-00",
            "--launcher", "mpirun", "--run-dir", "/scratch/it's mine", "--name", "big", "--config", config]),
        ("k8s-mpijob", &["k8s", "-n", "8", "--nodes", "2", "--config", config]),
        ("k8s-mpijob-gpu", &["k8s", "-n", "16", "--nodes", "2", "--gpus", "--storage", "1Ti", "--name", "big", "--config", config]),
        ("k8s-job", &["k8s", "--kind", "job", "-n", "4", "--gpus", "--image", "registry.example/moe:1", "--config", config]),
        ("k8s-jobset", &["k8s", "--kind", "jobset", "-n", "4", "--gpus", "--memory-per-rank-gib", "64", "--config", config]),
    ];
    for (case, arguments) in table {
        let home = tempfile::tempdir().unwrap();
        let out = home.path().join("files");
        let output = render(arguments, &out);
        assert!(output.status.success(), "{case}: {}", String::from_utf8_lossy(&output.stderr));
        let expected = golden.join(case);
        if update {
            let _ = std::fs::remove_dir_all(&expected);
            std::fs::create_dir_all(&expected).unwrap();
        }
        for name in names(&out) {
            let text = std::fs::read_to_string(out.join(&name)).unwrap().replace(out.to_str().unwrap(), "/OUT");
            if name == TOKEN_FILE {
                let token = text.strip_prefix("MOE_JOIN_TOKEN=").unwrap().trim_end();
                assert!(token.len() == 32 && token.bytes().all(|byte| byte.is_ascii_hexdigit()), "{case}");
                let mode = std::fs::metadata(out.join(&name)).unwrap().permissions().mode() & 0o777;
                assert_eq!(mode, 0o600, "{case}: a token is its owner's");
            } else if update {
                std::fs::write(expected.join(&name), text).unwrap();
            } else {
                assert_eq!(text, std::fs::read_to_string(expected.join(&name)).unwrap(), "{case}: {name}");
            }
        }
        let written: Vec<_> = names(&out).into_iter().filter(|name| name != TOKEN_FILE).collect();
        assert_eq!(written, names(&expected), "{case}");
    }
}

#[test]
fn what_cannot_run_is_refused_before_anything_is_written() {
    let home = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| -> PathBuf {
        let path = home.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let wrong = write("wrong.toml", "[model]\ntop_k = 9\n");
    let unknown = write("unknown.toml", "[model]\nexpertz = 9\n");
    let missing = home.path().join("missing.toml");
    let path = |path: &PathBuf| path.to_str().unwrap().to_owned();
    #[rustfmt::skip]
    let table: [(&[&str], i32, &str); 11] = [
        (&["slurm", "-n", "0"], 64, "-n 0: a job has at least 1 rank"),
        (&["slurm", "-n", "8", "--nodes", "3"], 64, "--nodes 3: cannot share 8 ranks evenly; numbers that can: [1, 2, 4, 8]"),
        (&["slurm", "-n", "8", "--cpus-per-rank", "0"], 64, "--cpus-per-rank 0: must be at least 1"),
        (&["k8s", "-n", "8", "--name", "Big_Run"], 64, "--name \"Big_Run\": must be 1 to 40 lower-case letters"),
        (&["k8s", "-n", "8", "--kind", "job"], 64, "--kind job: its ranks start without MPI, which 8 CPU ranks need"),
        (&["k8s", "-n", "8", "--kind", "jobset", "--gpus", "--nodes", "2"], 64, "--nodes 2: a jobset has one rank in each pod"),
        (&["k8s", "-n", "8", "--config", &path(&wrong)], 64, "wrong.toml: model.top_k = 9"),
        (&["k8s", "-n", "8", "--config", &path(&unknown)], 64, "unknown.toml: model.expertz = 9: there is no such key"),
        (&["slurm", "-n", "8", "--config", &path(&missing)], 74, "missing.toml: cannot be read"),
        (&["slurm"], 64, "--ranks <N>"),
        (&["k8s", "-n", "2", "--kind", "pod"], 64, "[possible values: mpijob, job, jobset]"),
    ];
    for (arguments, code, message) in table {
        let out = home.path().join("files");
        let output = render(arguments, &out);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
        assert!(said.contains(message), "{arguments:?}: {said}");
        assert!(!out.exists(), "{arguments:?}");
    }
}

#[test]
fn files_that_are_there_are_written_over_only_when_asked() {
    let home = tempfile::tempdir().unwrap();
    let out = home.path().join("files");
    assert!(render(&["slurm", "-n", "2"], &out).status.success());
    std::fs::write(out.join("run.toml"), "mine").unwrap();
    let again = render(&["slurm", "-n", "2"], &out);
    assert_eq!(again.status.code(), Some(64));
    let said = String::from_utf8_lossy(&again.stderr).into_owned();
    assert!(said.contains("moe-run.sbatch: exists; give another --out, or --force"), "{said}");
    assert_eq!(std::fs::read_to_string(out.join("run.toml")).unwrap(), "mine");
    assert!(render(&["slurm", "-n", "2", "--force"], &out).status.success());
    assert_eq!(std::fs::read_to_string(out.join("run.toml")).unwrap(), "preset = \"tiny\"\n");
}
