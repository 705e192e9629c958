"""What the custom kinds allow: JSON schemas of the fields that may be set, each with the version it was written for.

Owns the outer fields only. Pod and job templates inside them are core kinds and are checked as such. Fields that a controller
sets (status) are not listed, so that a manifest with one is refused.
"""


def _object(required=(), **properties):
    return {"type": "object", "additionalProperties": False, "required": list(required), "properties": properties}


_TEXT = {"type": "string", "minLength": 1}
_FLAG = {"type": "boolean"}
_COUNT = {"type": "integer", "minimum": 0}
_TEXTS = {"type": "array", "items": _TEXT}
_TEMPLATE = {"type": "object"}
_METADATA = _object(
    ["name"], name=_TEXT, namespace=_TEXT, labels={"type": "object"}, annotations={"type": "object"}
)

# Kubeflow MPI operator v0.6, kubeflow.org/v2beta1.
_REPLICA = _object(
    ["template"],
    replicas={"type": "integer", "minimum": 1},
    # ExitCode is in the type but is turned into Never for both roles.
    restartPolicy={"enum": ["Never", "OnFailure"]},
    template=_TEMPLATE,
)
MPIJOB = _object(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "kubeflow.org/v2beta1"},
    kind={"const": "MPIJob"},
    metadata=_METADATA,
    spec=_object(
        ["mpiReplicaSpecs"],
        slotsPerWorker={"type": "integer", "minimum": 1},
        runLauncherAsWorker=_FLAG,
        sshAuthMountPath=_TEXT,
        launcherCreationPolicy={"enum": ["AtStartup", "WaitForWorkersReady"]},
        mpiImplementation={"enum": ["OpenMPI", "Intel", "MPICH"]},
        runPolicy=_object(
            cleanPodPolicy={"enum": ["None", "Running", "All"]},
            ttlSecondsAfterFinished=_COUNT,
            activeDeadlineSeconds={"type": "integer", "minimum": 1},
            backoffLimit=_COUNT,
            suspend=_FLAG,
            managedBy=_TEXT,
            schedulingPolicy=_object(
                minAvailable=_COUNT,
                queue=_TEXT,
                minResources={"type": "object"},
                priorityClass=_TEXT,
                scheduleTimeoutSeconds=_COUNT,
            ),
        ),
        mpiReplicaSpecs=_object(["Launcher", "Worker"], Launcher=_REPLICA, Worker=_REPLICA),
    ),
)

# JobSet v0.8, jobset.x-k8s.io/v1alpha2.
JOBSET = _object(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=_METADATA,
    spec=_object(
        ["replicatedJobs"],
        replicatedJobs={
            "type": "array",
            "minItems": 1,
            "items": _object(
                ["name", "template"],
                name=_TEXT,
                groupName=_TEXT,
                replicas={"type": "integer", "minimum": 1},
                template=_TEMPLATE,
                dependsOn={"type": "array", "items": _object(["name", "status"], name=_TEXT, status={"enum": ["Ready", "Complete"]})},
            ),
        },
        network=_object(enableDNSHostnames=_FLAG, subdomain=_TEXT, publishNotReadyAddresses=_FLAG),
        successPolicy=_object(["operator"], operator={"enum": ["All", "Any"]}, targetReplicatedJobs=_TEXTS),
        failurePolicy=_object(
            maxRestarts=_COUNT,
            restartStrategy={"enum": ["Recreate", "BlockingRecreate"]},
            rules={
                "type": "array",
                "items": _object(
                    ["name", "action"],
                    # A hyphen is refused by the controller.
                    name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
                    action={"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
                    onJobFailureReasons={
                        "type": "array",
                        "items": {
                            "enum": [
                                "BackoffLimitExceeded",
                                "DeadlineExceeded",
                                "FailedIndexes",
                                "MaxFailedIndexesExceeded",
                                "PodFailurePolicy",
                            ]
                        },
                    },
                    targetReplicatedJobs=_TEXTS,
                ),
            },
        ),
        coordinator=_object(["replicatedJob"], replicatedJob=_TEXT, jobIndex=_COUNT, podIndex=_COUNT),
        suspend=_FLAG,
        managedBy=_TEXT,
        ttlSecondsAfterFinished=_COUNT,
    ),
)

SCHEMAS = {"MPIJob": MPIJOB, "JobSet": JOBSET}


def templates(resource):
    """The core kinds inside a custom one, as resources of their own: (what it is, resource)."""
    spec, name = resource["spec"], {"name": "inside"}
    if resource["kind"] == "MPIJob":
        for role, replica in spec["mpiReplicaSpecs"].items():
            yield role, {"apiVersion": "v1", "kind": "Pod", **replica["template"], "metadata": {**replica["template"].get("metadata", {}), **name}}
    if resource["kind"] == "JobSet":
        for job in spec["replicatedJobs"]:
            yield job["name"], {"apiVersion": "batch/v1", "kind": "Job", "metadata": name, **job["template"]}
