"""A kustomization, built: the few fields that this project's folders use, and an error for every other.

Owns the merging: resources, generated config maps and secrets, JSON patches. It never talks to a cluster and changes no name:
the folders switch kustomize's name suffixes off.
"""

import base64
import copy
import pathlib

import yaml

KNOWN = {"apiVersion", "kind", "resources", "configMapGenerator", "secretGenerator", "generatorOptions", "patches"}


class KustomizeError(Exception):
    """A kustomization that cannot be built, or that asks for what is not understood here."""


class _Loader(yaml.SafeLoader):
    """YAML, but a key that stands twice is an error, as it is for kubectl."""


def _mapping(loader, node):
    keys = [loader.construct_object(key) for key, _ in node.value]
    twice = {key for key in keys if keys.count(key) > 1}
    if twice:
        raise KustomizeError(f"{node.start_mark}: {sorted(twice)} twice")
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def load(path):
    """Every document of a file."""
    return [document for document in yaml.load_all(path.read_text(), Loader=_Loader) if document is not None]


def build(folder):
    """The resources of a folder, as `kubectl kustomize` would print them."""
    folder = pathlib.Path(folder)
    (spec,) = load(folder / "kustomization.yaml")
    unknown = set(spec) - KNOWN
    if unknown:
        raise KustomizeError(f"{folder}: {sorted(unknown)} are not understood")
    if spec["apiVersion"] != "kustomize.config.k8s.io/v1beta1" or spec["kind"] != "Kustomization":
        raise KustomizeError(f"{folder}: not a kustomization")
    resources = []
    for name in spec.get("resources", []):
        path = folder / name
        resources += build(path) if path.is_dir() else load(path)
    generators = [("ConfigMap", entry) for entry in spec.get("configMapGenerator", [])]
    generators += [("Secret", entry) for entry in spec.get("secretGenerator", [])]
    if generators and spec.get("generatorOptions") != {"disableNameSuffixHash": True}:
        raise KustomizeError(f"{folder}: generated names would get a suffix that no custom kind follows")
    resources += [_generate(folder, kind, entry) for kind, entry in generators]
    for patch in spec.get("patches", []):
        _patch(folder, patch, resources)
    seen = [(resource["kind"], resource["metadata"]["name"]) for resource in resources]
    if len(set(seen)) != len(seen):
        raise KustomizeError(f"{folder}: a resource stands twice: {seen}")
    return resources


def _generate(folder, kind, entry):
    unknown = set(entry) - {"name", "files", "envs"}
    if unknown:
        raise KustomizeError(f"{folder}: {entry['name']}: {sorted(unknown)} are not understood")
    data = {name: (folder / name).read_text() for name in entry.get("files", [])}
    for name in entry.get("envs", []):
        lines = (line for line in (folder / name).read_text().splitlines() if line and not line.startswith("#"))
        data.update(line.split("=", 1) for line in lines)
    resource = {"apiVersion": "v1", "kind": kind, "metadata": {"name": entry["name"]}, "data": data}
    if kind == "Secret":
        resource["type"] = "Opaque"
        resource["data"] = {key: base64.b64encode(value.encode()).decode() for key, value in data.items()}
    return resource


def _patch(folder, patch, resources):
    if set(patch) != {"path", "target"}:
        raise KustomizeError(f"{folder}: a patch has a path and a target, not {sorted(patch)}")
    target = dict(patch["target"])
    group, version = target.pop("group", None), target.pop("version", None)
    hits = [
        resource
        for resource in resources
        if (group is None or resource["apiVersion"].split("/")[0] == group)
        and (version is None or resource["apiVersion"].split("/")[-1] == version)
        and all({"kind": resource["kind"], "name": resource["metadata"]["name"]}[key] == value for key, value in target.items())
    ]
    if len(hits) != 1:
        raise KustomizeError(f"{folder}: {patch['path']}: {len(hits)} resources are meant, not 1")
    (operations,) = load(folder / patch["path"])
    for operation in operations:
        _apply(hits[0], operation)


def _apply(resource, operation):
    if set(operation) != {"op", "path", "value"} or operation["op"] != "replace":
        raise KustomizeError(f"only op replace with path and value is understood, not {operation}")
    *way, last = operation["path"].lstrip("/").split("/")
    at = resource
    for part in way:
        at = at[int(part)] if isinstance(at, list) else at[part]
    last = int(last) if isinstance(at, list) else last
    if not isinstance(at, list) and last not in at:
        raise KustomizeError(f"{operation['path']}: there is nothing to replace")
    at[last] = copy.deepcopy(operation["value"])
