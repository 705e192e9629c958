"""The Dockerfile: what a linter says of it. No image is built: that needs a Docker engine."""

import pathlib
import re
import sys
import unittest

from tools import ROOT, need, run

HADOLINT = pathlib.Path(sys.executable).with_name("hadolint")
FOLDER = ROOT / "deploy" / "docker"


class Dockerfile(unittest.TestCase):
    def test_hadolint_has_no_complaint(self):
        need(HADOLINT.exists(), "the Dockerfile is not linted: hadolint is missing; deploy/setup-tests.sh installs it")
        result = run([str(HADOLINT), "--failure-threshold", "style", str(FOLDER / "Dockerfile")])
        self.assertEqual((result.returncode, result.stdout), (0, ""))

    def test_what_is_copied_is_there_and_not_ignored(self):
        text = (FOLDER / "Dockerfile").read_text()
        ignored = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
        kept = {line[1:] for line in ignored if line.startswith("!")}
        for source in re.findall(r"^COPY (?!--from)(\S+) ", text, re.M):
            self.assertTrue((ROOT / source).exists(), source)
            self.assertTrue(source == "." or any(source.startswith(path) for path in kept), source)
        for path in kept:
            self.assertTrue((ROOT / path).exists(), path)

    def test_what_the_programs_are_built_of_is_not_ignored(self):
        kept = {line[1:] for line in (FOLDER / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
        members = re.search(r"^members = \[(.*)\]", (ROOT / "Cargo.toml").read_text(), re.M)[1]
        self.assertLessEqual({member.strip(' "').split("/")[0] for member in members.split(",")}, kept)
        for source in (ROOT / "launcher" / "src").rglob("*.rs"):
            for included in re.findall(r"\.\./(deploy/\w+)", source.read_text()):
                self.assertIn(included, kept, source)


if __name__ == "__main__":
    unittest.main(argv=[sys.argv[0], "-v", *sys.argv[1:]])
