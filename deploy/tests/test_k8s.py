"""The Kubernetes folders: what they build is valid, hangs together, and its commands run."""

import base64
import copy
import functools
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import unittest

import tools
from tools import ROOT, TEXT, clean_environment, need, program, run, wait_for

try:
    import jsonschema
    import kubernetes_validate

    import custom_kinds
    import kustomize

    MISSING = None
except ImportError as error:
    MISSING = str(error)

FOLDERS = ["mpijob", "mpijob-gpu", "job", "jobset"]
# The oldest that the manifests name, and the newest whose schemas are there.
VERSIONS = ["1.31", "1.34"]
RENDERED = {
    "cpu": ["-n", "4", "--nodes", "2"],
    "gpu": ["-n", "16", "--nodes", "2", "--gpus", "--cpus-per-rank", "8", "--memory-per-rank-gib", "32"],
    "job": ["--kind", "job", "-n", "4", "--gpus"],
    "jobset": ["--kind", "jobset", "-n", "4", "--gpus", "--image", "registry.example/moe:1"],
}
# Exit codes after which trying again cannot help, and the one that asks for it.
FINAL, AGAIN = [64, 65, 70, 77], 75


def setUpModule():
    need(MISSING is None, f"the manifests are not validated: {MISSING}; deploy/setup-tests.sh installs it")


def faults(resource):
    """Everything that is wrong with a resource, as text."""
    found = []
    schema = custom_kinds.SCHEMAS.get(resource["kind"])
    if schema:
        found += [f"{error.json_path}: {error.message}" for error in jsonschema.Draft202012Validator(schema).iter_errors(resource)]
        found += [f"{what}: {fault}" for what, inner in custom_kinds.templates(resource) for fault in faults(inner)]
        return found
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(resource, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            found.append(f"{version}: {'.'.join(map(str, error.path))}: {error.message}")
        except kubernetes_validate.SchemaNotFoundError as error:
            found.append(f"{version}: {error.message}")
    return found


def pods(resource):
    """The pod specs of a resource, with the labels of their pods."""
    kind, spec = resource["kind"], resource.get("spec", {})
    if kind == "MPIJob":
        templates = [replica["template"] for replica in spec["mpiReplicaSpecs"].values()]
    elif kind == "JobSet":
        templates = [job["template"]["spec"]["template"] for job in spec["replicatedJobs"]]
    else:
        templates = [spec["template"]] if kind == "Job" else []
    return [(template["spec"], template["metadata"]["labels"]) for template in templates]


def policies(resource):
    """The pod failure policies of a resource."""
    if resource["kind"] == "JobSet":
        return [job["template"]["spec"]["podFailurePolicy"] for job in resource["spec"]["replicatedJobs"]]
    return [resource["spec"]["podFailurePolicy"]] if resource["kind"] == "Job" else []


def each_folder(test):
    """Runs a test for every folder that was built, and says which one failed."""

    @functools.wraps(test)
    def run_all(self):
        for name, resources in self.built.items():
            with self.subTest(folder=name):
                test(self, name, resources)

    return run_all


class Folders(unittest.TestCase):
    """Both what stands in deploy/k8s and what is rendered from it."""

    @classmethod
    def setUpClass(cls):
        cls.home = tempfile.TemporaryDirectory()
        home = pathlib.Path(cls.home.name)
        cls.built = {name: kustomize.build(ROOT / "deploy" / "k8s" / name) for name in FOLDERS}
        for name, arguments in RENDERED.items():
            command = [program("moe-launch"), "render", "k8s", *arguments, "--name", f"run-{name}", "--out", str(home / name)]
            result = run(command)
            assert result.returncode == 0, result.stdout
            cls.built[f"rendered {name}"] = kustomize.build(home / name)

    @classmethod
    def tearDownClass(cls):
        cls.home.cleanup()

    @each_folder
    def test_every_resource_is_valid_under_strict_schemas(self, _, resources):
        for resource in resources:
            self.assertEqual(faults(resource), [], resource["kind"])

    @each_folder
    def test_a_misspelt_field_at_any_depth_is_found(self, name, resources):
        job = next(r for r in resources if r["kind"] in ("MPIJob", "JobSet", "Job"))
        inside = {
            "the resource": lambda broken: broken,
            "its spec": lambda broken: broken["spec"],
            "its pods": lambda broken: pods(broken)[0][0],
            "their containers": lambda broken: pods(broken)[0][0]["containers"][0],
        }
        for where, at in inside.items():
            broken = copy.deepcopy(job)
            at(broken)["reprlicas"] = 1
            self.assertTrue(any("reprlicas" in fault for fault in faults(broken)), (name, where))

    @each_folder
    def test_what_is_referred_to_is_there(self, name, resources):
        names = {(r["kind"], r["metadata"]["name"]) for r in resources}
        policy = next(r for r in resources if r["kind"] == "NetworkPolicy")
        selected = policy["spec"]["podSelector"]["matchLabels"]
        for resource in resources:
            for pod, labels in pods(resource):
                self.assertLessEqual(selected.items(), labels.items(), "the network policy must meet every pod")
                volumes = {volume["name"]: volume for volume in pod["volumes"]}
                for volume in volumes.values():
                    if "configMap" in volume:
                        self.assertIn(("ConfigMap", volume["configMap"]["name"]), names)
                    if "persistentVolumeClaim" in volume:
                        self.assertIn(("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]), names)
                for container in pod["containers"]:
                    self.assertLessEqual({mount["name"] for mount in container["volumeMounts"]}, set(volumes))
                    for entry in container.get("env", []):
                        secret = entry.get("valueFrom", {}).get("secretKeyRef")
                        if secret and name.startswith("rendered"):
                            self.assertIn(("Secret", secret["name"]), names)
                            made = next(r for r in resources if r["kind"] == "Secret")
                            token = base64.b64decode(made["data"][secret["key"]]).decode()
                            self.assertRegex(token, "^[0-9a-f]{32}$")

    @each_folder
    def test_rank_0_is_reached_by_a_name_that_exists(self, name, resources):
        for resource in resources:
            if resource["kind"] not in ("Job", "JobSet"):
                continue
            pod, labels = pods(resource)[0]
            arguments = pod["containers"][0]["args"]
            host, port = arguments[arguments.index("--coordinator") + 1].split(":")
            hostname, service = host.split(".")
            self.assertIn({"name": "coordinator", "containerPort": int(port)}, pod["containers"][0]["ports"])
            called = resource["metadata"]["name"]
            if resource["kind"] == "Job":
                self.assertEqual((hostname, service), (f"{called}-0", pod["subdomain"]))
                headless = next(r for r in resources if r["kind"] == "Service")
                self.assertEqual((headless["metadata"]["name"], headless["spec"]["clusterIP"]), (service, "None"))
                self.assertLessEqual(headless["spec"]["selector"].items(), labels.items())
            else:
                worker = resource["spec"]["replicatedJobs"][0]["name"]
                self.assertEqual(hostname, f"{called}-{worker}-0-0")
                self.assertEqual(service, resource["spec"]["network"]["subdomain"])

    @each_folder
    def test_pods_have_no_more_rights_than_they_need(self, _, resources):
        for resource in resources:
            for pod, _ in pods(resource):
                self.assertEqual(pod["securityContext"]["runAsNonRoot"], True)
                self.assertNotEqual(pod["securityContext"]["runAsUser"], 0)
                self.assertEqual(pod["automountServiceAccountToken"], False)
                for container in pod["containers"]:
                    context = container["securityContext"]
                    self.assertEqual(context["readOnlyRootFilesystem"], True)
                    self.assertEqual(context["allowPrivilegeEscalation"], False)
                    self.assertEqual(context["capabilities"], {"drop": ["ALL"]})
                    self.assertIn("memory", container["resources"]["limits"])

    @each_folder
    def test_ranks_have_shared_memory_in_memory(self, _, resources):
        for resource in resources:
            for pod, _ in pods(resource):
                memory = [v["name"] for v in pod["volumes"] if v.get("emptyDir", {}).get("medium") == "Memory"]
                for container in pod["containers"]:
                    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
                    if "/runs" in mounts:
                        self.assertEqual([mounts["/dev/shm"]], memory)

    @each_folder
    def test_ranks_and_pods_agree(self, name, resources):
        for resource in resources:
            spec = resource.get("spec", {})
            if resource["kind"] == "MPIJob":
                launcher, worker = (spec["mpiReplicaSpecs"][role] for role in ("Launcher", "Worker"))
                container = launcher["template"]["spec"]["containers"][0]
                self.assertEqual(container["args"][0], "-n")
                self.assertEqual(int(container["args"][1]), spec["slotsPerWorker"] * worker["replicas"])
                inner = worker["template"]["spec"]["containers"][0]
                threads = int(container["args"][-1].removeprefix("run.threads="))
                self.assertEqual(int(inner["resources"]["requests"]["cpu"]), threads * spec["slotsPerWorker"])
                gpus = inner["resources"]["limits"].get("nvidia.com/gpu")
                self.assertEqual(gpus, spec["slotsPerWorker"] if "gpu" in name else None)
                self.assertEqual(container["image"], inner["image"])
            elif resource["kind"] in ("Job", "JobSet"):
                job = spec if resource["kind"] == "Job" else spec["replicatedJobs"][0]["template"]["spec"]
                size = next(e["value"] for e in pods(resource)[0][0]["containers"][0]["env"] if e["name"] == "WORLD_SIZE")
                self.assertEqual((job["completions"], job["parallelism"]), (int(size), int(size)))
                self.assertEqual(job["completionMode"], "Indexed")

    @each_folder
    def test_exit_codes_decide_what_is_tried_again(self, name, resources):
        for policy in (policy for resource in resources for policy in policies(resource)):
            actions = {}
            for rule in policy["rules"]:
                for code in rule.get("onExitCodes", {}).get("values", []):
                    actions.setdefault(code, rule["action"])
            self.assertEqual({code: actions[code] for code in FINAL}, dict.fromkeys(FINAL, "FailJob"))
            # A JobSet starts all ranks again, so there the job may fail.
            self.assertEqual(actions.get(AGAIN), None if "jobset" in name else "Ignore")


class Commands(unittest.TestCase):
    """The commands of the manifests, run here with the environment and the mounts that the manifests give them."""

    def setUp(self):
        self.home = tempfile.TemporaryDirectory()
        self.addCleanup(self.home.cleanup)
        self.path = pathlib.Path(self.home.name)

    def command(self, folder, ranks, steps=3):
        """The command of a folder's job as it is run here, and its environment."""
        resources = kustomize.build(ROOT / "deploy" / "k8s" / folder)
        job = next(r for r in resources if r["kind"] in ("MPIJob", "JobSet", "Job"))
        config = next(r for r in resources if r["kind"] == "ConfigMap")
        launcher, ranked = pods(job)[0][0], pods(job)[-1][0]
        container = launcher["containers"][0]
        text = self.path / "text.txt"
        text.write_text(TEXT)
        # A mount is a folder here: the same paths, below another root.
        for mount in ranked["containers"][0]["volumeMounts"]:
            (self.path / mount["mountPath"].lstrip("/")).mkdir(parents=True, exist_ok=True)
        for name, content in config["data"].items():
            content += f'[train]\nsteps = {steps}\n[data]\npaths = "{text}"\n'
            (self.path / "etc" / "moe" / name).write_text(content)
        line = [self.local(word) for word in container["command"] + container["args"]]
        environment = {entry["name"]: entry["value"] for entry in container.get("env", []) if "value" in entry}
        environment |= {"PATH": f"{tools.BIN}:/usr/local/bin:/usr/bin:/bin", "HOME": str(self.path), "TMPDIR": str(self.path / "tmp")}
        environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        # Where pods would be, slots are: this machine may have fewer cores.
        environment["OMPI_MCA_rmaps_base_oversubscribe"] = "1"
        if "WORLD_SIZE" in environment:
            environment |= {"WORLD_SIZE": str(ranks), "MOE_JOIN_TOKEN": "0123456789abcdef" * 2}
        return line, environment

    def local(self, word):
        word = re.sub(r"^/(etc/moe|runs)(?=/)", lambda m: f"{self.path}/{m[1]}", word)
        # Pods find one another by name; here there is one machine.
        return re.sub(r"^moe-run[a-z0-9.-]*:7400$", f"127.0.0.1:{self.port()}", word)

    @staticmethod
    def port():
        import socket

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            return free.getsockname()[1]

    def steps(self):
        return sum(len(metrics.read_text().splitlines()) for metrics in (self.path / "runs").glob("*/metrics.jsonl"))

    def test_the_mpijob_trains(self):
        need(shutil.which("mpirun"), "mpirun cannot be run")
        line, environment = self.command("mpijob", 4)
        self.assertEqual(line[0], "mpirun")
        result = run(line, env=environment)
        self.assertEqual(result.returncode, 0, result.stdout)
        self.assertEqual(self.steps(), 3)
        self.assertRegex(result.stdout, r"ranks +4 = ")

    def probe(self, folder):
        """The readiness probe of a folder's ranks as it is run here."""
        resources = kustomize.build(ROOT / "deploy" / "k8s" / folder)
        container = next(pods(r)[0][0] for r in resources if r["kind"] in ("Job", "JobSet"))["containers"][0]
        return [self.local(word) for word in container["readinessProbe"]["exec"]["command"]]

    def test_a_job_of_one_rank_trains_is_found_by_its_probe_and_stopped_by_its_hook(self):
        for folder in ("job", "jobset"):
            with self.subTest(folder=folder):
                line, environment = self.command(folder, 1, steps=1_000_000)
                environment["JOB_COMPLETION_INDEX"] = "0"
                with open(self.path / "out.txt", "w+") as out:
                    worker = subprocess.Popen(line, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
                    self.addCleanup(worker.kill)
                    wait_for("three steps", lambda: worker.poll() is not None or self.steps() >= 3, 60)
                    (contact,) = (self.path / "runs").glob("*/coordinator.json")
                    self.assertIn(line[line.index("--coordinator") + 1], contact.read_text())
                    probed = run(self.probe(folder), env=environment)
                    self.assertEqual(probed.returncode, 0, probed.stdout)
                    # What the pre-stop hook sends.
                    worker.send_signal(signal.SIGUSR1)
                    code = worker.wait(60)
                    out.seek(0)
                    self.assertEqual(code, 75, out.read())
                self.assertTrue(list((self.path / "runs").glob("*/checkpoints/step-*/manifest.json")))
                shutil.rmtree(self.path / "runs")

    def test_several_ranks_of_a_job_find_one_another_and_train(self):
        line, environment = self.command("job", 4)
        ranks = []
        for index in range(4):
            out = open(self.path / f"out-{index}.txt", "w+")
            self.addCleanup(out.close)
            pod = environment | {"JOB_COMPLETION_INDEX": str(index)}
            rank = subprocess.Popen(line, env=pod, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
            self.addCleanup(rank.kill)
            ranks.append((rank, out))
        for rank, out in ranks:
            code = rank.wait(120)
            out.seek(0)
            self.assertEqual(code, 0, out.read())
        self.assertEqual(self.steps(), 3)

    def test_several_ranks_without_a_coordinator_are_refused_with_the_mend(self):
        line, environment = self.command("job", 4)
        at = line.index("--coordinator")
        # Its address and --host-coordinator go with it.
        line = line[:at] + line[at + 3:]
        for index in range(4):
            result = run(line, env=environment | {"JOB_COMPLETION_INDEX": str(index)})
            self.assertEqual(result.returncode, 64, result.stdout)
            self.assertRegex(result.stdout, f"rank {index} of 4 by JOB_COMPLETION_INDEX: .* find each other at a coordinator.*mpirun -n 4")
        self.assertFalse(list((self.path / "runs").iterdir()), "nothing may be begun")

    def test_the_probe_of_a_job_says_why_it_finds_no_coordinator(self):
        _, environment = self.command("job", 1)
        result = run(self.probe("job"), env=environment)
        self.assertEqual(result.returncode, 74, result.stdout)
        self.assertIn("does not exist", result.stdout)


if __name__ == "__main__":
    unittest.main(argv=[sys.argv[0], "-v", *sys.argv[1:]])
