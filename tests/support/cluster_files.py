"""What is wrong with a file of cluster/, by a schema or parser that knows its kind."""

from __future__ import annotations

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
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from support.paths import ROOT

HOME = ROOT
CLUSTER = HOME / "cluster"
CRDS = HOME.parent / "shared" / "kuberay"
KUBERNETES = "1.37"
KUBERAY = ("rayjob", "raycronjob", "cronjob", "access")
TREES = (
    *(f"kuberay/{name}.yaml" for name in KUBERAY),
    "kubernetes/indexed-job.yaml",
    "aws.yaml",
    "prometheus.yaml",
    "alerts.yaml",
    "grafana.json",
)
FILES = (*TREES, "Dockerfile", "slurm.sbatch", "slurm-array.sbatch")
README = (CLUSTER / "README.md").read_text()

# Below these keys, names are the user's own, or another system's: no schema can know them.
FREE = {"labels", "matchLabels", "annotations", "nodeSelector", "requests", "limits", "file_mounts"}
FREE_AT = {
    ("available_node_types", "cpu"),
    ("available_node_types", "gpu"),
    ("head", "resources", "CPU"),
}

# vitray's own metrics and their tags, as Ray exports them
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
        "Job",
        "CronJob",
        "RayJob",
        "RayCronJob",
    },
    "restartPolicy": {"Never", "OnFailure"},
    "operator": {"Equal", "Exists", "In"},
    "completionMode": {"Indexed"},
    "action": {"Ignore", "FailJob"},
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
        "rule_files": {"type": "array", "items": {"enum": ["alerts.yaml"]}},
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

# Prometheus' alerting rules: https://prometheus.io/docs/prometheus/latest/configuration/alerting_rules/
ALERTS = {
    "type": "object",
    "required": ["groups"],
    "additionalProperties": False,
    "properties": {
        "groups": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["name", "rules"],
                "additionalProperties": False,
                "properties": {
                    "name": {"type": "string"},
                    "rules": {
                        "type": "array",
                        "minItems": 1,
                        "items": {
                            "type": "object",
                            "required": ["alert", "expr", "labels", "annotations"],
                            "additionalProperties": False,
                            "properties": {
                                "alert": {"pattern": "^Vitray[A-Za-z]+$"},
                                "expr": {"type": "string"},
                                "for": {"pattern": r"^\d+(s|m|h)$"},
                                "labels": {
                                    "type": "object",
                                    "required": ["severity"],
                                    "additionalProperties": False,
                                    "properties": {"severity": {"enum": ["warning", "critical"]}},
                                },
                                "annotations": {
                                    "type": "object",
                                    "required": ["summary", "description"],
                                    "additionalProperties": False,
                                    "properties": {
                                        "summary": {"type": "string"},
                                        "description": {"type": "string"},
                                    },
                                },
                            },
                        },
                    },
                },
            },
        }
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


# function a kind
def faults_of(name: str, docs: list[Any]) -> list[str]:
    """What is wrong with the documents of a tree-shaped file."""
    if name == "aws.yaml":
        return faults_of_aws(docs[0])
    if name == "prometheus.yaml":
        return broken(docs[0], jsonschema.Draft202012Validator(PROMETHEUS))
    if name == "alerts.yaml":
        return broken(docs[0], jsonschema.Draft202012Validator(ALERTS)) + faults_of_alerts(docs[0])
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
    return faults + (faults_of_job(doc) if doc.get("kind") == "Job" else [])


def faults_of_job(doc: Any) -> list[str]:
    """The arguments of a Job's containers are those of the image's entrypoint, vitray."""
    pod = doc.get("spec", {}).get("template", {}).get("spec", {})
    commands = [container.get("args", []) for container in pod.get("containers", [])]
    return [
        fault for words in commands for fault in faults_of_command(shlex.join(["vitray", *words]))
    ]


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


def faults_of_alerts(doc: Any) -> list[str]:
    """Of the queries of alerts: metrics or labels that no run exports."""
    rules = [rule for group in doc.get("groups", []) for rule in group.get("rules", [])]
    faults = [fault for rule in rules for fault in faults_of_query(rule.get("expr", ""), "")]
    shown = {
        label
        for rule in rules
        for text in rule.get("annotations", {}).values()
        for label in re.findall(r"\$labels\.(\w+)", text)
    }
    return faults + [f"no metric has the label {label}" for label in shown - {"dataset"}]


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
    names |= {
        f"ray_{name}_{end}": tags
        for name, tags in HISTOGRAMS.items()
        for end in ("bucket", "count", "sum")
    }
    return names | exported_without_ray()


@functools.cache
def exported_without_ray() -> dict[str, set[str]]:
    """The names and labels that a run with --metrics-file writes, read from such a file."""
    from prometheus_client import generate_latest
    from prometheus_client.parser import text_string_to_metric_families

    from vitray.pipeline.events import FragmentWritten
    from vitray.pipeline.metrics import PrometheusMeter

    meter = PrometheusMeter("photos", last_complete=1.0)
    meter.fragment(FragmentWritten("s", 0, 2, {"empty": 1}, {"read": 0.1}, 10))
    meter.ended(0)
    text = generate_latest(meter.registry).decode()
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    return {sample.name: set(sample.labels) for sample in samples}


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


def faults_of_changed(name: str, docs: list[Any], at: tuple[Any, ...], to: Any = None) -> list[str]:
    """Only the document that was changed is looked at again."""
    one = [docs[at[0]]]
    return faults_of(name, changed(one, (0, *at[1:]), to))


def faults_of_batch(text: str) -> list[str]:
    """What bash, sbatch, `ray symmetric-run` and vitray would not understand.

    A script runs vitray by symmetric-run, or alone.
    """
    parsed = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    faults = [parsed.stderr] if parsed.returncode else []
    head = text.split("\nset ")[0].splitlines()
    faults += [] if head[0] == "#!/bin/bash" else ["no shebang"]
    for line in head[1:]:
        option = re.fullmatch(r"#SBATCH --([a-z-]+)(=\S+)?", line)
        if not (re.match(r"# ", line) or (option and option[1] in SBATCH.split())):
            faults.append(f"unknown: {line}")
    if alone := re.search(r"^exec (vitray .*)$", text, re.MULTILINE):
        return faults + faults_of_command(alone[1].replace('"', ""))
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
