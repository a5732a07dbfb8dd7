"""The files of cluster/: each is held against a schema or a parser that knows its kind, and each
check is shown to see a typo.

Nothing here asks the network. What a schema leaves open (labels, node selectors) is named in FREE.
"""

from __future__ import annotations

import ast
import copy
import functools
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import promql_parser
import pytest
import yaml
from dockerfile_parse import DockerfileParser
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

HOME = Path(__file__).parent.parent
CLUSTER = HOME / "cluster"
CRDS = HOME.parent / "shared" / "kuberay"
KUBERNETES = "1.37"
KUBERAY = ("rayjob", "raycronjob", "cronjob", "access")
TREES = (
    *(f"kuberay/{name}.yaml" for name in KUBERAY),
    "aws.yaml",
    "prometheus.yaml",
    "grafana.json",
)
FILES = (*TREES, "Dockerfile", "slurm.sbatch")
README = (CLUSTER / "README.md").read_text()
PLACEHOLDER = re.compile(r"\bSET_[A-Z_]*[A-Z]\b")

# Below these keys, names are the user's own, or another system's: no schema can know them.
FREE = {"labels", "matchLabels", "annotations", "nodeSelector", "requests", "limits", "file_mounts"}
FREE_AT = {
    ("available_node_types", "cpu"),
    ("available_node_types", "gpu"),
    ("head", "resources", "CPU"),
}

# vitray's own metrics and their tags
COUNTERS = {
    "vitray_images": {"outcome"},
    "vitray_bytes": set(),
    "vitray_failures": {"reason"},
    "vitray_shard_commits": set(),
}
HISTOGRAMS = {"vitray_step_seconds": {"step"}}

# Closed lists that the API server knows and the published schemas do not
VALUES = {
    "kind": {
        "ServiceAccount",
        "NetworkPolicy",
        "Role",
        "RoleBinding",
        "CronJob",
        "RayJob",
        "RayCronJob",
    },
    "restartPolicy": {"Never", "OnFailure"},
    "operator": {"Equal", "Exists"},
    "effect": {"NoSchedule", "PreferNoSchedule", "NoExecute"},
    "medium": {"Memory"},
    "concurrencyPolicy": {"Forbid"},
    "submissionMode": {"K8sJobMode"},
    "protocol": {"TCP", "UDP"},
    "policyTypes": {"Ingress", "Egress"},
    "verbs": {"create", "get", "list", "watch"},
}

PROMETHEUS = {  # of Prometheus' configuration the part that is used here
    "type": "object",
    "required": ["scrape_configs"],
    "additionalProperties": False,
    "properties": {
        "global": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "scrape_interval": {"pattern": r"^\d+(ms|s|m)$"},
                "evaluation_interval": {"pattern": r"^\d+(ms|s|m)$"},
            },
        },
        "scrape_configs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["job_name"],
                "additionalProperties": False,
                "oneOf": [
                    {"required": ["kubernetes_sd_configs"]},
                    {"required": ["file_sd_configs"]},
                ],
                "properties": {
                    "job_name": {"type": "string"},
                    "kubernetes_sd_configs": {
                        "items": {
                            "required": ["role"],
                            "additionalProperties": False,
                            "properties": {
                                "role": {
                                    "enum": [
                                        "node",
                                        "service",
                                        "pod",
                                        "endpoints",
                                        "endpointslice",
                                        "ingress",
                                    ]
                                },
                                "namespaces": {
                                    "additionalProperties": False,
                                    "required": ["names"],
                                    "properties": {"names": {"items": {"type": "string"}}},
                                },
                            },
                        }
                    },
                    "file_sd_configs": {
                        "items": {
                            "required": ["files"],
                            "additionalProperties": False,
                            "properties": {"files": {"items": {"pattern": r"\.(json|ya?ml)$"}}},
                        }
                    },
                    "relabel_configs": {
                        "items": {
                            "required": ["source_labels"],
                            "additionalProperties": False,
                            "properties": {
                                "source_labels": {"items": {"pattern": "^[a-zA-Z_][a-zA-Z0-9_]*$"}},
                                "regex": {"type": "string"},
                                "target_label": {"type": "string"},
                                "action": {"enum": ["keep", "drop", "replace"]},
                            },
                            "oneOf": [{"required": ["target_label"]}, {"required": ["action"]}],
                        }
                    },
                },
            },
        },
    },
}

# `man sbatch`, Slurm 22.05
SBATCH = """
account acctg-freq array batch bb bbf begin chdir cluster-constraint clusters comment constraint container contiguous
core-spec cores-per-socket cpu-freq cpus-per-gpu cpus-per-task deadline delay-boot dependency distribution error exclude
exclusive export export-file extra-node-info get-user-env gid gpu-bind gpu-freq gpus gpus-per-node gpus-per-socket
gpus-per-task gres gres-flags hint hold ignore-pbs input job-name kill-on-invalid-dep licenses mail-type mail-user mcs-label
mem mem-bind mem-per-cpu mem-per-gpu mincpus network nice no-kill no-requeue nodefile nodelist nodes ntasks ntasks-per-core
ntasks-per-gpu ntasks-per-node ntasks-per-socket open-mode output overcommit oversubscribe parsable partition power prefer
priority profile propagate qos quiet reboot requeue reservation signal sockets-per-node spread-job switches thread-spec
threads-per-core time time-min tmp uid use-min-nodes verbose wait wait-all-nodes wckey
"""


def text_of(name: str) -> str:
    return (CLUSTER / name).read_text()


def documents(name: str) -> list[Any]:
    """The documents of a YAML or JSON file, without shared parts, so that one place can be changed
    alone.
    """
    return json.loads(json.dumps(list(yaml.safe_load_all(text_of(name)))))


# ---------------------------------------------------------------- what is wrong with a file: one
# function a kind


def faults_of(name: str, docs: list[Any]) -> list[str]:
    """What is wrong with the documents of a tree-shaped file."""
    if name == "aws.yaml":
        return faults_of_aws(docs[0])
    if name == "prometheus.yaml":
        return broken(docs[0], jsonschema.Draft202012Validator(PROMETHEUS))
    if name == "grafana.json":
        return faults_of_dashboard(docs[0])
    return [fault for doc in docs for fault in faults_of_object(doc)]


def broken(doc: Any, validator: Any) -> list[str]:
    return [f"{error.json_path}: {error.message[:200]}" for error in validator.iter_errors(doc)]


def faults_of_object(doc: Any) -> list[str]:
    """Of one Kubernetes object: KubeRay's own schema for its kinds, Kubernetes' for the rest."""
    faults = [
        f"{at[-1]}: {value}"
        for at, key, value in leaves(doc)
        if value not in VALUES.get(key, {value})
    ]
    if str(doc.get("apiVersion")).startswith("ray.io/"):
        if (doc.get("apiVersion"), doc.get("kind")) not in (
            ("ray.io/v1", "RayJob"),
            ("ray.io/v1", "RayCronJob"),
        ):
            return [f"no kind {doc.get('kind')} in {doc.get('apiVersion')}"]
        return faults + broken(doc, crd(doc["kind"])) + faults_of_ray(doc)
    try:
        kubernetes_validate.validate(doc, KUBERNETES, strict=True)
    except (
        kubernetes_validate.ValidationError,
        kubernetes_validate.SchemaNotFoundError,
        KeyError,
        FileNotFoundError,
    ) as error:
        faults.append(getattr(error, "message", repr(error)))
    return faults


def faults_of_ray(doc: Any) -> list[str]:
    """rayStartParams are options of `ray start`; the entrypoint is a command of vitray."""
    spec = doc["spec"].get("jobTemplate", doc["spec"]) if "spec" in doc else {}
    cluster = spec.get("rayClusterSpec", {})
    groups = [cluster.get("headGroupSpec", {}), *cluster.get("workerGroupSpecs", [])]
    given = {f"--{option}" for group in groups for option in group.get("rayStartParams", {})}
    return [
        *(f"ray start has no {option}" for option in given - ray_options()),
        *faults_of_command(spec.get("entrypoint", "")),
    ]


def faults_of_aws(doc: Any) -> list[str]:
    """Ray's own validator, as `ray up` calls it; EC2's model for what Ray hands on to it."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    schema = ray_schema()["properties"]["provider"]
    faults = [
        f"provider has no {key}"
        for key in doc.get("provider", {}).keys() - schema["properties"].keys()
    ]
    try:
        whole = prepare_config(copy.deepcopy(doc))
        validate_config(whole)
    except (
        Exception
    ) as error:  # jsonschema's, ValueError, KeyError, and what a provider of another name raises
        return [*faults, f"{type(error).__name__}: {str(error)[:200]}"]
    for kind in whole["available_node_types"].values():
        faults += faults_of_machine(kind["node_config"])
    for command in (*whole["head_start_ray_commands"], *whole["worker_start_ray_commands"]):
        faults += faults_of_command(command)
    return faults + [
        f"{key} is the default's" for key in ("head_start_ray_commands", "docker") if key not in doc
    ]


def faults_of_machine(config: Any) -> list[str]:
    """Of one node_config, by the model of EC2's RunInstances that boto3 ships."""
    from botocore.validate import ParamValidator

    shape = ec2().operation_model("RunInstances").input_shape
    report = ParamValidator().validate({**config, "MinCount": 1, "MaxCount": 1}, shape)
    return ([report.generate_report()] if report.has_errors() else []) + list(
        foreign_values(config, shape)
    )


def foreign_values(value: Any, shape: Any) -> Iterator[str]:
    """Values that are not in the closed list which the model has for them."""
    if shape.type_name == "structure":
        for key in value.keys() & shape.members.keys():
            yield from foreign_values(value[key], shape.members[key])
    elif shape.type_name == "list":
        for item in value:
            yield from foreign_values(item, shape.member)
    elif value not in (getattr(shape, "enum", None) or [value]):
        yield f"{shape.name} has no {value}"


def faults_of_command(line: str) -> list[str]:
    """Options that `ray start`, `vitray run` or `vitray submit` does not have, or a command that is
    none of these.
    """
    words = shlex.split(line)
    known = {
        ("ray", "start"): ray_options(),
        ("ray", "stop"): set(),
        **{("vitray", command): vitray_options(command) for command in ("run", "submit")},
    }.get(tuple(words[:2]))
    if known is None:
        return [f"unknown command: {line}"]
    return [
        f"{words[0]} {words[1]} has no {word}"
        for word in words[2:]
        if word[:2] == "--" and word.split("=")[0] not in known
    ]


def faults_of_dashboard(doc: Any) -> list[str]:
    """Keys that Grafana's own model does not keep, PromQL that does not parse, metrics and labels
    that nobody exports.
    """
    register_default_plugins()
    try:
        kept = json.loads(JSONEncoder().encode(Dashboard.from_json(copy.deepcopy(doc))))
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        return [repr(error)]
    faults = list(lost(doc, kept, "$"))
    for panel in doc.get("panels", []):
        targets = panel.get("targets", [])
        faults += (
            [] if targets and panel.get("gridPos") else [f"panel {panel.get('title')} is empty"]
        )
        faults += [
            fault
            for target in targets
            for fault in faults_of_query(target.get("expr", ""), target.get("legendFormat", ""))
        ]
    return faults + ([] if doc.get("panels") else ["no panels"])


def lost(given: Any, kept: Any, at: str) -> Iterator[str]:
    if isinstance(given, dict) and isinstance(kept, dict):
        for key, value in given.items():
            yield from (
                lost(value, kept[key], f"{at}.{key}") if key in kept else [f"{at}.{key} is unknown"]
            )
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        for i, (one, other) in enumerate(zip(given, kept)):
            yield from lost(one, other, f"{at}[{i}]")
    elif given != kept:
        yield f"{at}: {given!r} became {kept!r}"


def faults_of_query(query: str, legend: str) -> list[str]:
    try:
        tree = promql_parser.parse(query.replace("$__rate_interval", "5m"))
    except ValueError as error:
        return [f"{query}: {error}"]
    faults: list[str] = []
    names: list[str] = []
    by: list[str] = []

    def visit(node: Any) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            names.append(str(node.name))
        if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
            by.extend(node.modifier.labels)

    promql_parser.walk(tree, visit)
    tags = {"le", "Location"}.union(*(exported().get(name, set()) for name in names))
    faults += [
        f"nobody exports {name}"
        for name in names
        if name not in exported() and name not in of_ray()
    ]
    faults += [
        f"{query}: no label {label}" for label in {*by, *re.findall(r"{{(\w+)}}", legend)} - tags
    ]
    return faults


# ---------------------------------------------------------------- what the checks know


@functools.cache
def crd(kind: str) -> jsonschema.Draft202012Validator:
    """KubeRay's schema of a kind, closed wherever it does not say that it is open; `metadata` is
    Kubernetes' own.
    """
    path = CRDS / f"ray.io_{kind.lower()}s.yaml"
    if not path.exists():
        what = (
            f"{path} is missing: ray-operator/config/crd/bases of github.com/ray-project/kuberay, "
            f"commit feeaf72f"
        )
        assert not os.environ.get("CI"), what
        pytest.skip(what)
    whole = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (schema,) = [
        v["schema"]["openAPIV3Schema"] for v in whole["spec"]["versions"] if v["name"] == "v1"
    ]
    close(schema)
    schema["required"] = ["apiVersion", "kind", "metadata", "spec"]
    return jsonschema.Draft202012Validator(schema)


def close(schema: Any) -> None:
    """Refuse unknown fields at every level, in place."""
    if isinstance(schema, list):
        for part in schema:
            close(part)
    if not isinstance(schema, dict):
        return
    for name, part in schema.get("properties", {}).items():
        if name == "metadata" and part == {"type": "object"}:
            schema["properties"][name] = object_meta()
    is_open = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if isinstance(schema.get("properties"), dict) and not is_open:
        schema["additionalProperties"] = False
    for part in schema.values():
        close(part)


@functools.cache
def object_meta() -> dict[str, Any]:
    text = {"type": "string"}
    named = {"type": "object", "additionalProperties": text}
    properties = {"name": text, "generateName": text, "labels": named, "annotations": named}
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        "minProperties": 1,
    }


@functools.cache
def ray_schema() -> Any:
    import ray.autoscaler

    return json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())


@functools.cache
def ec2() -> Any:
    import botocore.session

    return botocore.session.Session().get_service_model("ec2")


@functools.cache
def ray_options() -> set[str]:
    from ray.scripts.scripts import start

    return {option for parameter in start.params for option in parameter.opts}


@functools.cache
def vitray_options(command: str) -> set[str]:
    import typer.main

    from vitray.cli import app

    found = typer.main.get_command(app).commands[command]
    return {
        option
        for parameter in found.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }


@functools.cache
def exported() -> dict[str, set[str]]:
    """Names under which Prometheus sees vitray's metrics, with their tags."""
    names = {f"ray_{name}_total": tags for name, tags in COUNTERS.items()}
    return names | {
        f"ray_{name}_{end}": tags
        for name, tags in HISTOGRAMS.items()
        for end in ("bucket", "count", "sum")
    }


@functools.cache
def of_ray() -> set[str]:
    """Names that Ray's own dashboards ask for, or that its reporter makes gauges of."""
    import ray

    modules = Path(ray.__file__).parent / "dashboard" / "modules"
    shown = "".join(
        path.read_text() for path in (modules / "metrics" / "dashboards").glob("*_panels.py")
    )
    gauges = re.findall(
        r'"((?:node|cluster)_\w+)"', (modules / "reporter" / "reporter_agent.py").read_text()
    )
    return {*re.findall(r"\bray_\w+", shown), *(f"ray_{name}" for name in gauges)}


def leaves(node: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], str, Any]]:
    """Every scalar: its path, the nearest key above it, its value."""
    if isinstance(node, (dict, list)):
        for key, part in node.items() if isinstance(node, dict) else enumerate(node):
            yield from leaves(part, (*at, key))
    else:
        yield at, next((key for key in reversed(at) if isinstance(key, str)), ""), node


def keys(node: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every key that is not free."""
    if isinstance(node, dict):
        for key, part in node.items():
            here = (*at, key)
            if not (at and at[-1] in FREE) and not any(here[-len(end) :] == end for end in FREE_AT):
                yield here
            yield from keys(part, here)
    elif isinstance(node, list):
        for i, part in enumerate(node):
            yield from keys(part, (*at, i))


def changed(docs: list[Any], at: tuple[Any, ...], to: Any = None) -> list[Any]:
    """A copy with the key at a path misspelt, or its value exchanged."""
    copied = json.loads(json.dumps(docs))
    node = functools.reduce(lambda part, step: part[step], at[:-1], copied)
    if to is None:
        parts = list(node.items())
        node.clear()
        node.update((f"{key}x" if key == at[-1] else key, value) for key, value in parts)
    else:
        node[at[-1]] = to
    return copied


# ---------------------------------------------------------------- all of them


def test_every_file_of_the_folder_is_checked_here() -> None:
    found = {str(path.relative_to(CLUSTER)) for path in CLUSTER.rglob("*") if path.is_file()}
    elsewhere = {"README.md", "constraints.txt", "requirements.txt", "Dockerfile.dockerignore"}
    assert found - elsewhere == set(FILES)


@pytest.mark.parametrize("name", TREES)
def test_a_manifest_is_valid(name: str) -> None:
    assert faults_of(name, documents(name)) == []


@pytest.mark.parametrize("name", TREES)
def test_a_misspelt_key_is_refused(name: str) -> None:
    docs = documents(name)
    places = list(keys(docs))
    assert len(places) > 10
    assert [at for at in places if not faults_of_changed(name, docs, at)] == []


@pytest.mark.parametrize("name", TREES)
def test_a_value_that_its_list_does_not_have_is_refused(name: str) -> None:
    closed = {
        "apiVersion",
        "kind",
        "mode",
        "version",
        "upscalingMode",
        "role",
        "action",
        "MarketType",
        "SpotInstanceType",
    }
    closed |= {"InstanceType", "VolumeType", "HttpTokens", "head_node_type", "expr", *VALUES}
    docs = documents(name)
    places = [
        at
        for at, key, value in leaves(docs)
        if key in closed and isinstance(value, str) and not {"stacking", "tooltip"} & set(at)
    ]
    values = {at: functools.reduce(lambda part, step: part[step], at, docs) for at in places}
    assert values
    assert [at for at in places if not faults_of_changed(name, docs, at, f"{values[at]}x")] == []


@pytest.mark.parametrize("name", ["kuberay/rayjob.yaml", "aws.yaml"])
def test_a_misspelt_option_of_a_command_is_refused(name: str) -> None:
    docs = documents(name)
    seen = 0
    for at, key, line in leaves(docs):
        for option in re.finditer(
            r"--[a-z-]+", str(line) if key == "entrypoint" or key.endswith("_ray_commands") else ""
        ):
            assert faults_of_changed(
                name, docs, at, f"{line[: option.end()]}x{line[option.end() :]}"
            ), option[0]
            seen += 1
    assert seen == {"kuberay/rayjob.yaml": 1, "aws.yaml": 7}[name]


def faults_of_changed(name: str, docs: list[Any], at: tuple[Any, ...], to: Any = None) -> list[str]:
    """Only the document that was changed is looked at again."""
    one = [docs[at[0]]]
    return faults_of(name, changed(one, (0, *at[1:]), to))


def test_every_placeholder_is_listed_with_the_files_that_have_it() -> None:
    there = {name: set(PLACEHOLDER.findall(text_of(name))) for name in FILES}
    rows = re.findall(r"^\| `(SET_\w+)` \| ([^|]*) \| [^|]+ \|$", README, re.MULTILINE)
    assert len(rows) == len(dict(rows))
    listed = {mark: set(re.findall(r"`([^`]+)`", files)) for mark, files in rows}
    assert listed == {
        mark: {name for name in FILES if mark in there[name]}
        for mark in set().union(*there.values())
    }


def test_no_file_names_a_machine_or_holds_a_secret() -> None:
    for name in (*FILES, "README.md"):
        text = text_of(name)
        assert not re.search(r"/(home|Users|root|mnt|work|opt)/(?!vitray\b)", text), name
        assert not re.search(
            r"AKIA|ASIA[A-Z0-9]{12}|BEGIN [A-Z "
            r"]*KEY|(?i:password|secret_access_key)|hf_[A-Za-z0-9]{20}",
            text,
        ), name
        assert not re.search(r"RAY_AUTH_TOKEN(=|: *|, value: )[\"']?[0-9a-z]", text), name
        hosts = set(
            re.findall(r"\b[\w-]+(?:\.[\w-]+)*\.(?:com|io|org|net|internal|local)\b(?=/)", text)
        )
        labels = {"ray.io", "app.kubernetes.io", "kubernetes.io", "eks.amazonaws.com", "nvidia.com"}
        kinds = {"rbac.authorization.k8s.io", "networking.k8s.io"}
        assert hosts <= labels | kinds | {"registry.k8s.io", "download.pytorch.org"}, name


# ---------------------------------------------------------------- KubeRay


def pods(spec: Any) -> dict[str, Any]:
    cluster = spec["rayClusterSpec"]
    groups = {
        group["groupName"]: group["template"]["spec"] for group in cluster["workerGroupSpecs"]
    }
    return {
        "submitter": spec["submitterPodTemplate"]["spec"],
        "head": cluster["headGroupSpec"]["template"]["spec"],
        **groups,
    }


def test_both_schedules_start_the_same_job() -> None:
    (job,), (scheduled,) = documents("kuberay/rayjob.yaml"), documents("kuberay/raycronjob.yaml")
    assert scheduled["spec"]["jobTemplate"] == job["spec"]


def test_a_run_on_kuberay_asks_for_a_token_and_bounds_its_retries() -> None:
    (job,) = documents("kuberay/rayjob.yaml")
    spec, locked = job["spec"], re.search(r"^ray==(\S+)", text_of("constraints.txt"), re.MULTILINE)
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert locked and spec["rayClusterSpec"]["rayVersion"] == locked[1]
    assert spec["rayClusterSpec"]["autoscalerOptions"]["version"] == "v2"
    assert (
        spec["backoffLimit"] == 2
        and spec["ttlSecondsAfterFinished"] > 0
        and spec["shutdownAfterJobFinishes"]
    )
    for name in ("head", "cpu", "gpu"):
        container = pods(spec)[name]["containers"][0]
        assert {"name": "RAY_task_oom_retries", "value": "3"} in container["env"]
        assert {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"} in container["env"]


def test_every_pod_runs_without_root_and_its_object_store_is_shared_memory() -> None:
    (job,) = documents("kuberay/rayjob.yaml")
    (cron,) = [doc for doc in documents("kuberay/cronjob.yaml") if doc["kind"] == "CronJob"]
    everyone = {
        **pods(job["spec"]),
        "cron": cron["spec"]["jobTemplate"]["spec"]["template"]["spec"],
    }
    for name, pod in everyone.items():
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"][
            "seccompProfile"
        ] == {"type": "RuntimeDefault"}
        for container in (*pod.get("initContainers", []), *pod["containers"]):
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, name
            assert container["securityContext"]["allowPrivilegeEscalation"] is False, name
            mounts = {
                mount["name"]: mount["mountPath"] for mount in container.get("volumeMounts", [])
            }
            volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
            assert mounts.keys() <= volumes.keys(), name
            if name in ("head", "cpu", "gpu"):
                assert (
                    mounts["shm"] == "/dev/shm" and volumes["shm"]["emptyDir"]["medium"] == "Memory"
                )
    assert all(
        everyone[name]["automountServiceAccountToken"] is False
        for name in ("submitter", "cpu", "gpu")
    )


def test_gpu_workers_go_to_spot_machines_and_others_do_not() -> None:
    (job,) = documents("kuberay/rayjob.yaml")
    spot = {
        name
        for name, pod in pods(job["spec"]).items()
        if "SET_SPOT_LABEL" in pod.get("nodeSelector", {})
    }
    assert (
        spot
        == {"gpu"}
        == {name for name, pod in pods(job["spec"]).items() if pod.get("tolerations")}
    )
    assert pods(job["spec"])["gpu"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_no_two_scheduled_runs_are_at_work_and_the_schedule_may_only_create_and_watch() -> None:
    account, role, binding, cron = documents("kuberay/cronjob.yaml")
    assert cron["spec"]["concurrencyPolicy"] == "Forbid"
    pod = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    (job,) = documents("kuberay/rayjob.yaml")
    ((key, value),) = job["metadata"]["labels"].items()
    assert (
        f"--selector={key}={value}" in pod["containers"][0]["command"]
    )  # it waits for what it created
    attempts_s = (1 + job["spec"]["backoffLimit"]) * job["spec"][
        "activeDeadlineSeconds"
    ]  # KubeRay begins to count anew with each
    assert f"--timeout={attempts_s // 3600 + 1}h" in pod["containers"][0]["command"]
    assert cron["spec"]["jobTemplate"]["spec"]["activeDeadlineSeconds"] > attempts_s + 3600
    assert role["rules"] == [
        {
            "apiGroups": ["ray.io"],
            "resources": ["rayjobs"],
            "verbs": ["create", "get", "list", "watch"],
        }
    ]
    assert (
        account["metadata"]["name"]
        == binding["subjects"][0]["name"]
        == pod["serviceAccountName"]
        == "vitray-cron"
    )
    assert binding["roleRef"]["name"] == role["metadata"]["name"]


def test_the_network_policy_covers_every_pod_of_a_run_and_hides_the_machines_credentials() -> None:
    account, policy = documents("kuberay/access.yaml")
    (job,) = documents("kuberay/rayjob.yaml")
    chosen = policy["spec"]["podSelector"]["matchLabels"]
    cluster = job["spec"]["rayClusterSpec"]
    templates = [
        group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    ]
    for template in (*templates, job["spec"]["submitterPodTemplate"]):
        assert chosen.items() <= template["metadata"]["labels"].items()
    assert all(
        template["spec"]["serviceAccountName"] == account["metadata"]["name"]
        for template in templates
    )
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"] and all(
        "from" in rule for rule in policy["spec"]["ingress"]
    )
    blocks = [
        to["ipBlock"] for rule in policy["spec"]["egress"] for to in rule["to"] if "ipBlock" in to
    ]
    assert [block["except"] for block in blocks] == [["169.254.169.254/32"]]


# ---------------------------------------------------------------- EC2


def test_gpu_workers_on_ec2_are_spot_machines_and_only_the_head_may_start_others() -> None:
    (doc,) = documents("aws.yaml")
    machines = {name: kind["node_config"] for name, kind in doc["available_node_types"].items()}
    assert {name for name, machine in machines.items() if "InstanceMarketOptions" in machine} == {
        "gpu"
    }
    assert machines["gpu"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert {name: machine["IamInstanceProfile"]["Arn"] for name, machine in machines.items()} == {
        "head": "SET_HEAD_PROFILE_ARN",
        "cpu": "SET_WORKER_PROFILE_ARN",
        "gpu": "SET_WORKER_PROFILE_ARN",
    }
    for machine in machines.values():
        assert (
            machine["SecurityGroupIds"] and machine["MetadataOptions"]["HttpTokens"] == "required"
        )
    assert "--dashboard-host=127.0.0.1" in doc["head_start_ray_commands"][1]
    assert not any("ssh_private_key" in part for part in (doc["auth"], doc["provider"]))


# ---------------------------------------------------------------- Slurm


def faults_of_batch(text: str) -> list[str]:
    """What bash, sbatch, `ray symmetric-run` and vitray would not understand."""
    parsed = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    faults = [parsed.stderr] if parsed.returncode else []
    head = text.split("\nset ")[0].splitlines()
    faults += [] if head[0] == "#!/bin/bash" else ["no shebang"]
    for line in head[1:]:
        option = re.fullmatch(r"#SBATCH --([a-z-]+)(=\S+)?", line)
        if not (re.match(r"# ", line) or (option and option[1] in SBATCH.split())):
            faults.append(f"unknown: {line}")
    command = re.search(
        r"ray symmetric-run (.*?) -- (vitray .*)$", text.replace("\\\n", ""), re.MULTILINE
    )
    if not command:
        return [*faults, "no symmetric-run"]
    own = {"--address", "--min-nodes"}  # --head, --port and --node-ip-address are its own business
    given = {word.split("=")[0] for word in command[1].split()}
    faults += [f"ray start has no {option}" for option in given - own - ray_options()]
    faults += [f"symmetric-run wants {option}" for option in own - given]
    return faults + faults_of_command(command[2].replace('"', ""))


def test_the_slurm_script_is_understood_by_bash_sbatch_and_ray() -> None:
    from ray.scripts.symmetric_run import symmetric_run

    text = text_of("slurm.sbatch")
    assert faults_of_batch(text) == []
    assert (
        "export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_task_oom_retries=3 "
        "RAY_num_workers_soft_limit=64 RAY_USAGE_STATS_ENABLED=0" in text
    )
    assert {option for parameter in symmetric_run.params for option in parameter.opts} >= {
        "--address",
        "--min-nodes",
    }


def test_a_misspelt_option_of_the_slurm_script_is_refused() -> None:
    text = text_of("slurm.sbatch")
    options = [
        match
        for match in re.finditer(r"--([a-z][a-z-]*)", text)
        if match[0] != "--cpus-per-task" or match.start() < 500
    ]
    options = [
        match
        for match in options
        if "srun" not in text[text.rfind("\n", 0, match.start()) : match.start()]
    ]
    assert len(options) > 15
    assert [
        m[0] for m in options if not faults_of_batch(f"{text[: m.end()]}x{text[m.end() :]}")
    ] == []
    assert faults_of_batch(text.replace("#SBATCH", "#SBATCHx", 1)) and faults_of_batch(
        text + "\nif true; then"
    )


# ---------------------------------------------------------------- the image


def faults_of_image(texts: dict[str, str], folder: Path) -> dict[str, list[str]]:
    """hadolint's findings of any severity, file by file."""
    for name, text in texts.items():
        (folder / name).write_text(text)
    hadolint = Path(sys.executable).with_name("hadolint")
    command = [str(hadolint), "--no-color", "--format=json", *texts]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C.UTF-8"}
    )
    found: dict[str, list[str]] = {name: [] for name in texts}
    for finding in json.loads(done.stdout):
        found[finding["file"]].append(f"{finding['line']}: {finding['code']} {finding['message']}")
    return found


def test_the_image_is_pinned_runs_without_root_and_holds_no_weights(tmp_path: Path) -> None:
    assert faults_of_image({"Dockerfile": text_of("Dockerfile")}, tmp_path) == {"Dockerfile": []}
    parser = DockerfileParser(path=str(tmp_path))
    steps = [
        (step["instruction"], step["value"])
        for step in parser.structure
        if step["instruction"] != "COMMENT"
    ]
    stages = [value.split(" AS ") for instruction, value in steps if instruction == "FROM"]
    assert stages[0] == ["python:3.11.14-slim-trixie", "base"]
    assert {base for base, _ in stages[1:]} <= {"packages-${TORCH}", *(name for _, name in stages)}
    assert [value for instruction, value in steps if instruction == "USER"] == ["1000"]
    after = [instruction for instruction, _ in steps[[i for i, _ in steps].index("USER") :]]
    assert after == ["USER", "WORKDIR", "ENTRYPOINT"] and steps[-1][1] == '["vitray"]'
    assert not any(instruction == "ADD" for instruction, _ in steps)
    copied = {
        word for instruction, value in steps if instruction == "COPY" for word in value.split()[:-1]
    }
    assert all((HOME / path).exists() for path in copied)
    assert copied <= {
        line[1:] for line in text_of("Dockerfile.dockerignore").splitlines() if line.startswith("!")
    }
    arguments = [value for instruction, value in steps if instruction in ("ARG", "ENV")]
    assert arguments == [
        "TORCH=cuda",
        "HOME=/home/vitray HF_HOME=/weights RAY_AUTH_MODE=token RAY_task_oom_retries=3 "
        "RAY_num_workers_soft_limit=64 "
        "RAY_USAGE_STATS_ENABLED=0 RAY_JOB_STOP_WAIT_TIME_S=20",
    ]
    installs = [value for _, value in steps if "pip install" in value]
    assert all("--require-hashes" in value or "--no-deps" in value for value in installs)


def test_a_misspelt_instruction_of_the_image_is_refused(tmp_path: Path) -> None:
    text = text_of("Dockerfile")
    found = list(
        re.finditer(
            r"^(ARG|FROM|SHELL|RUN|WORKDIR|COPY|ENV|USER|ENTRYPOINT)(?= )", text, re.MULTILINE
        )
    )
    typos = {f"{i}.Dockerfile": f"{text[: m.end()]}X{text[m.end() :]}" for i, m in enumerate(found)}
    spoilt = {
        "root.Dockerfile": text.replace("USER 1000", "USER root"),
        "latest.Dockerfile": text.replace("python:3.11.14-slim-trixie", "python"),
        "url.Dockerfile": text.replace("COPY vitray ./vitray", "ADD vitray ./vitray"),
    }
    assert len(typos) > 15
    assert [
        name for name, faults in faults_of_image(typos | spoilt, tmp_path).items() if not faults
    ] == []


def test_the_image_without_cuda_leaves_out_torch_alone_and_takes_the_locked_one_elsewhere(
    tmp_path: Path,
) -> None:
    command = re.search(r"sed -E '(.*)' requirements.txt > rest.txt", text_of("Dockerfile"))
    assert command
    rest = subprocess.run(
        ["sed", "-E", command[1], str(CLUSTER / "requirements.txt")],
        capture_output=True,
        text=True,
        check=True,
    )
    locked, kept = (
        set(re.findall(r"^([\w.-]+)==", t, re.MULTILINE))
        for t in (text_of("requirements.txt"), rest.stdout)
    )
    left = locked - kept
    assert {"torch", "triton"} <= left and all(
        re.match(r"torch$|triton$|nvidia-|cuda-", name) for name in left
    )
    assert {"ray", "transformers", "sympy", "networkx"} <= kept
    assert re.search(r"^torch==[\d.]+$", text_of("constraints.txt"), re.MULTILINE)


# ---------------------------------------------------------------- metrics


def test_metrics_come_out_of_ray_under_the_names_that_the_dashboard_asks_for() -> None:
    """Ray's own recorder and exporter, in a process of their own: they are global."""
    code = (
        "import json, sys\nfrom prometheus_client import REGISTRY\n"
        "from ray._private.telemetry.open_telemetry_metric_recorder import "
        "OpenTelemetryMetricRecorder\n"
        "counters, histograms = json.loads(sys.argv[1])\nrecorder = OpenTelemetryMetricRecorder()\n"
        "for name in counters:\n    recorder.register_counter_metric(name, 'd')\n    "
        "recorder.set_metric_value(name, {}, 1.0)\n"
        "for name in histograms:\n    recorder.register_histogram_metric(name, 'd', [1.0])\n    "
        "recorder.set_metric_value(name, {}, 1.0)\n"
        "print(json.dumps([sample.name for metric in REGISTRY.collect() for sample in "
        "metric.samples]))"
    )
    names = json.dumps([list(COUNTERS), list(HISTOGRAMS)])
    done = subprocess.run(
        [sys.executable, "-c", code, names], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert {name for name in json.loads(done.stdout) if "vitray" in name} == exported().keys()


def test_the_dashboard_shows_every_metric_of_vitray() -> None:
    text = text_of("grafana.json")
    assert [name for name in COUNTERS if f"ray_{name}_total" not in text] == []
    assert [name for name in HISTOGRAMS if f"ray_{name}_bucket" not in text] == []


@pytest.mark.parametrize(
    "query",
    [
        "sum(rate(ray_vitray_image_total[5m]))",
        "sum(rate(ray_vitray_images_total[5m])",
        "sum by (kind) (ray_vitray_images_total)",
    ],
)
def test_a_query_that_would_show_nothing_is_refused(query: str) -> None:
    assert faults_of_query(query, "")
    assert faults_of_query("sum by (outcome) (ray_vitray_images_total)", "{{outcomes}}")


# ---------------------------------------------------------------- the README


def test_the_snippets_of_the_readme_are_python_and_its_commands_exist() -> None:
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(snippets) == 2
    for snippet in snippets:
        ast.parse(snippet)
    commands = re.findall(r"vitray (?:run|submit) [^\n`'\"]*", README)
    assert sorted(line.split()[1] for line in commands) == ["run", "run", "run", "submit", "submit"]
    assert [fault for line in commands for fault in faults_of_command(line)] == []


def test_every_file_that_the_readme_names_exists() -> None:
    for name in re.findall(r"`((?:kuberay/)?[\w.]+\.(?:yaml|json|sbatch|txt))`", README):
        assert (CLUSTER / name).exists() or name == "job.yaml", name
    assert all(f"`{name}`" in README for name in FILES)


def test_the_image_has_what_ray_up_needs() -> None:
    """rsync in the container, and on the head what starts workers on EC2: an ssh client, and boto3.
    Source: ray/autoscaler/_private.
    """
    packages = (
        text_of("Dockerfile").partition("--no-install-recommends")[2].partition("&&")[0].split()
    )
    assert {"rsync", "openssh-client"} <= set(packages)
    assert "\nboto3==" in text_of("requirements.txt") and "\ns3transfer==" in text_of(
        "requirements.txt"
    )
