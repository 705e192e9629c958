"""What the tests of deploy/ share: the programs under test, bounded runs, and when something missing is a failure."""

import os
import pathlib
import subprocess
import time
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
BIN = pathlib.Path(os.environ.get("MOE_BIN", ROOT / "target" / "debug"))
CI = os.environ.get("CI") == "true"

# The text that the built-in preset trains on without a download is made here: short, the same everywhere.
TEXT = "".join(f"{n} squared is {n * n}, and its half is {n / 2}.\n" for n in range(4000))


def need(condition, what):
    """Skips the test where `what` cannot be had; a failure where CI=true, since there it must be."""
    if not condition:
        if CI:
            raise AssertionError(f"{what}: missing, and CI=true")
        raise unittest.SkipTest(what)


def program(name):
    """A program of this project, built before."""
    path = BIN / name
    if not path.exists():
        raise AssertionError(f"{path} is missing: build it with `cargo build`, or name its folder in MOE_BIN")
    return str(path)


def run(command, limit_s=120, **more):
    """Runs a command to its end, with all it says as text in `stdout`."""
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True, timeout=limit_s, **more
    )


def wait_for(what, condition, limit_s, every_s=0.2):
    """The first true value of `condition`; an error that says what was waited for where there is none in time."""
    end = time.monotonic() + limit_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise TimeoutError(f"waited {limit_s} s for {what}")
        time.sleep(every_s)


def clean_environment(**more):
    """This environment without what a launcher around the tests may have set."""
    prefixes = ("SLURM_", "OMPI_", "PMIX_", "MOE_", "RANK", "WORLD_SIZE", "JOB_COMPLETION_INDEX")
    return {key: value for key, value in os.environ.items() if not key.startswith(prefixes)} | more
