"""The batch scripts on a real Slurm of one machine, which is started for the tests and stopped after them.

munged, slurmctld and slurmd run in the foreground as processes of this test, in a temporary folder, on free ports of 127.0.0.1.
Where Slurm is not installed the tests are skipped; where it is installed but does not start, that is a failure if CI=true.
"""

import getpass
import hashlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import unittest

from tools import CI, ROOT, TEXT, clean_environment, program, run, wait_for

SCRIPT = ROOT / "deploy" / "slurm" / "moe-worker.sbatch"
DAEMONS = ["munged", "slurmctld", "slurmd"]
TOOLS = ["sbatch", "srun", "scancel", "scontrol", "sinfo", "squeue"]
# Long enough that a signal comes in between, short enough to wait for.
STEPS = 150


class NotStarted(Exception):
    """Slurm is there and does not work."""


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class Cluster:
    """A Slurm of this machine alone."""

    def __init__(self):
        # A socket's path may have no more than 108 characters.
        self.home = pathlib.Path(tempfile.mkdtemp(prefix="moe-slurm-", dir="/tmp"))
        self.processes = []
        for folder in ("state", "spool", "work"):
            (self.home / folder).mkdir()
        self.home.chmod(0o755)
        self.environment = clean_environment(SLURM_CONF=str(self.home / "slurm.conf"))
        self.environment["PATH"] += ":/usr/sbin:/sbin"

    def start(self):
        home, host, user = self.home, socket.gethostname().split(".")[0], getpass.getuser()
        control, node = free_ports(2)
        (home / "munge.key").write_bytes(os.urandom(128))
        (home / "munge.key").chmod(0o400)
        (home / "slurm.conf").write_text(f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
SlurmdPort={node}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A requeued job waits for its credential to expire: two minutes by default.
AuthInfo=socket={home}/munge.socket,cred_expire=5
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
KillWait=5
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=1000 State=UNKNOWN
PartitionName=test Nodes={host} Default=YES MaxTime=INFINITE State=UP
""")
        self.daemon(
            "munged", "--foreground", "--force", f"--key-file={home}/munge.key", f"--socket={home}/munge.socket",
            f"--pid-file={home}/munged.pid", f"--log-file={home}/munged.log", f"--seed-file={home}/munged.seed",
        )  # fmt: skip
        self.wait("munged", lambda: (home / "munge.socket").exists())
        self.daemon("slurmctld", "-D")
        self.daemon("slurmd", "-D")
        self.wait("an idle node", lambda: self.tool("sinfo", "-h", "-o", "%T").stdout.strip() == "idle")

    def daemon(self, name, *arguments):
        with open(self.home / f"{name}.out", "w") as log:
            process = subprocess.Popen(
                [shutil.which(name, path=self.environment["PATH"]), *arguments],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=self.environment,
            )  # fmt: skip
        self.processes.append(process)

    def wait(self, what, condition):
        try:
            wait_for(what, lambda: condition() or any(p.poll() is not None for p in self.processes), 40)
        except TimeoutError as error:
            raise NotStarted(f"{error}\n{self.logs()}") from error
        if any(process.poll() is not None for process in self.processes):
            raise NotStarted(f"a daemon ended while waiting for {what}\n{self.logs()}")

    def logs(self):
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in self.home.glob("*.out"))

    def tool(self, name, *arguments, **variables):
        return run([name, *arguments], 30, env=self.environment | variables, cwd=self.home / "work")

    def stop(self):
        if self.processes and self.processes[-1].poll() is None and len(self.processes) == len(DAEMONS):
            self.tool("scancel", "--state=RUNNING")
            self.tool("scancel", "--state=PENDING")
            try:
                wait_for("jobs to end", lambda: not self.tool("squeue", "-h").stdout.strip(), 20)
            except TimeoutError as error:
                print(error, file=sys.stderr)
        for process in reversed(self.processes):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)
        shutil.rmtree(self.home, ignore_errors=True)


CLUSTER = None


def setUpModule():
    global CLUSTER
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    missing = [name for name in DAEMONS + TOOLS if not shutil.which(name, path=path)]
    if missing:
        raise unittest.SkipTest(f"Slurm is not installed ({', '.join(missing)}); deploy/setup-tests.sh installs it")
    CLUSTER = Cluster()
    try:
        CLUSTER.start()
    except (NotStarted, OSError, subprocess.SubprocessError) as error:
        CLUSTER.stop()
        if CI:
            raise
        raise unittest.SkipTest(f"Slurm is installed but does not start here: {error}") from error


def tearDownModule():
    if CLUSTER:
        CLUSTER.stop()


def tiny(steps):
    """A configuration that trains on a text of its own and saves only at the end or when it is told to stop."""
    text = CLUSTER.home / "work" / "text.txt"
    text.write_text(TEXT)
    return f'preset = "tiny"\n[train]\nsteps = {steps}\neval_every = 0\ncheckpoint_every = 0\n[data]\npaths = "{text}"\n'


class Job:
    """A submitted batch script."""

    def __init__(self, script, run_dir, output, *options, **variables):
        self.run_dir, self.output = run_dir, output
        variables = {"MOE_WORKER": program("moe-worker")} | variables
        submitted = CLUSTER.tool("sbatch", "--parsable", f"--output={output}", *options, str(script), **variables)
        if submitted.returncode:
            raise AssertionError(submitted.stdout)
        self.id = submitted.stdout.strip()

    @classmethod
    def of(cls, name, config="", script=SCRIPT, **variables):
        """Two ranks of a run of this name."""
        work = CLUSTER.home / "work"
        toml = work / f"{name}.toml"
        toml.write_text(config or tiny(STEPS))
        variables = {"MOE_RUN_DIR": str(work / name), "MOE_CONFIG": str(toml)} | variables
        return cls(
            script, work / name, work / f"{name}.out", "--ntasks-per-node=2", "--cpus-per-task=1", "--time=10", **variables
        )

    def facts(self):
        text = CLUSTER.tool("scontrol", "-o", "show", "job", self.id).stdout
        return dict(field.split("=", 1) for field in text.split() if "=" in field)

    def end(self, limit_s=120):
        """Waits for the job's end; its state, exit code and number of requeues."""

        def ended():
            facts = self.facts()
            return facts.get("JobState") in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL") and facts

        try:
            facts = wait_for(f"job {self.id} to end", ended, limit_s)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.facts()}\n{self.said()}\n{CLUSTER.logs()}") from error
        return facts["JobState"], facts["ExitCode"], int(facts["Restarts"])

    def said(self):
        return self.output.read_text() if self.output.exists() else ""

    def lines(self):
        path = self.run_dir / "metrics.jsonl"
        return path.read_text().splitlines() if path.exists() else []

    def signal_after(self, lines, name):
        wait_for(f"{lines} steps", lambda: len(self.lines()) >= lines, 60, 0.05)
        told = CLUSTER.tool("scancel", "--batch", f"--signal={name}", self.id)
        if told.returncode:
            raise AssertionError(told.stdout)

    def losses(self):
        return [(line["step"], line["loss"]) for line in map(json.loads, self.lines())]

    def checkpoints(self):
        return sorted(path.name for path in (self.run_dir / "checkpoints").iterdir())

    def weights(self):
        """Names and hashes of the files of the last checkpoint."""
        folder = self.run_dir / "checkpoints" / self.checkpoints()[-1]
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


class Slurm(unittest.TestCase):
    def test_a_job_runs_to_its_end_and_one_that_was_requeued_ends_with_the_same_weights(self):
        undisturbed = Job.of("undisturbed")
        self.assertEqual(undisturbed.end(), ("COMPLETED", "0:0", 0), undisturbed.said())
        self.assertEqual(len(undisturbed.lines()), STEPS)
        self.assertRegex(undisturbed.said(), r"ranks +2 = ")

        disturbed = Job.of("disturbed")
        disturbed.signal_after(10, "USR1")
        self.assertEqual(disturbed.end(), ("COMPLETED", "0:0", 1), disturbed.said())
        said = disturbed.said()
        self.assertRegex(said, r"stopped after step \d+")
        self.assertIn("exit code 75", said)
        self.assertRegex(said, r"resuming +after step \d+")
        self.assertEqual(disturbed.losses(), undisturbed.losses())
        self.assertEqual(disturbed.weights(), undisturbed.weights())

    def test_mpirun_starts_the_ranks_and_passes_a_stop_on_which_usr2_makes_final(self):
        job = Job.of("mpirun", MOE_LAUNCHER="mpirun")
        job.signal_after(10, "USR2")
        self.assertEqual(job.end(), ("FAILED", "75:0", 0), job.said())
        done = len(job.lines())
        self.assertLess(done, STEPS, "it was to be stopped in between")
        self.assertEqual(job.checkpoints(), [f"step-{done:08}"])
        again = Job.of("mpirun", MOE_LAUNCHER="mpirun")
        self.assertEqual(again.end(), ("COMPLETED", "0:0", 0), again.said())
        self.assertEqual(len(again.lines()), STEPS)

    def test_a_wrong_configuration_is_not_tried_again(self):
        job = Job.of("wrong", config="[model]\ntop_k = 9\n")
        self.assertEqual(job.end(), ("FAILED", "64:0", 0), job.said())
        self.assertIn("model.top_k", job.said())

    def test_starts_that_bring_no_checkpoint_come_to_an_end(self):
        worker = CLUSTER.home / "work" / "gives-up"
        worker.write_text("#!/bin/sh\nexit 75\n")
        worker.chmod(0o755)
        job = Job.of("fruitless", MOE_WORKER=str(worker), MOE_ATTEMPTS="1")
        self.assertEqual(job.end(), ("FAILED", "75:0", 1), job.said())
        self.assertIn("2 starts in a row ended with code 75 and brought no checkpoint", job.said())

    def test_ranks_without_mpi_are_refused_with_the_mend(self):
        script = CLUSTER.home / "work" / "plain.sbatch"
        script.write_text('#!/bin/sh\nexec srun --mpi=none "$MOE_WORKER" --run-dir "$MOE_RUN_DIR"\n')
        job = Job.of("plain", script=script)
        self.assertEqual(job.end(), ("FAILED", "64:0", 0), job.said())
        self.assertRegex(job.said(), r"rank [01] of 2 by srun .*: .* find each other at a coordinator.*srun --mpi=pmix")

    def test_moe_launch_run_inside_an_allocation_starts_srun_and_passes_a_stop_on(self):
        script = CLUSTER.home / "work" / "launch.sbatch"
        script.write_text(
            f"#!/bin/sh\nexec {program('moe-launch')} run -n 2 -- --config \"$MOE_CONFIG\" --run-dir \"$MOE_RUN_DIR\"\n"
        )
        job = Job.of("launch", script=script)
        job.signal_after(10, "INT")
        self.assertEqual(job.end(), ("FAILED", "75:0", 0), job.said())
        done = len(job.lines())
        self.assertEqual(job.checkpoints(), [f"step-{done:08}"])
        again = Job.of("launch", script=script)
        self.assertEqual(again.end(), ("COMPLETED", "0:0", 0), again.said())
        self.assertRegex(again.said(), rf"ranks +2 = .*\ndevice +CPU, 1 thread.*\n(.*\n)*resuming +after step {done}")
        self.assertEqual(len(again.lines()), STEPS)

    def test_a_rendered_script_runs(self):
        work = CLUSTER.home / "work"
        folder, config = work / "rendered", work / "rendered.toml"
        config.write_text(tiny(3))
        command = [program("moe-launch"), "render", "slurm", "--config", str(config), "-n", "2", "--cpus-per-rank", "1"]
        rendered = run([*command, "--name", "small", "--out", str(folder), "--run-dir", str(folder / "run")])
        self.assertEqual(rendered.returncode, 0, rendered.stdout)
        job = Job(folder / "small.sbatch", folder / "run", work / "rendered.out")
        self.assertEqual(job.end(), ("COMPLETED", "0:0", 0), job.said())
        self.assertEqual(len(job.lines()), 3)


if __name__ == "__main__":
    unittest.main(argv=[sys.argv[0], "-v", *sys.argv[1:]])
