"""The manifests of cluster/ fit their schemas, and every check sees a typo."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest

from support.cluster_files import (
    CLUSTER,
    FILES,
    README,
    TREES,
    VALUES,
    documents,
    faults_of,
    faults_of_changed,
    keys,
    leaves,
    text_of,
)
from vitray.exit_codes import ExitCode

PLACEHOLDER = re.compile(r"\bSET_[A-Z_]*[A-Z]\b")


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


def indexed_job() -> Any:
    (job,) = documents("kubernetes/indexed-job.yaml")
    return job


def test_each_pod_of_an_indexed_job_has_a_part_of_its_own_and_all_parts_have_one() -> None:
    spec = indexed_job()["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    env = {entry["name"]: entry["value"] for entry in container["env"]}
    assert spec["completionMode"] == "Indexed"
    assert str(spec["completions"]) == env["PARTS"]
    assert spec["parallelism"] <= spec["completions"]
    assert container["args"][-2:] == ["--partition", "$(JOB_COMPLETION_INDEX)/$(PARTS)"]


def test_a_lost_machine_is_no_failure_of_an_indexed_job_and_wrong_usage_ends_it() -> None:
    spec = indexed_job()["spec"]
    lost, wrong = spec["podFailurePolicy"]["rules"]
    assert (lost["action"], lost["onPodConditions"][0]["type"]) == ("Ignore", "DisruptionTarget")
    codes = [ExitCode.BAD_USAGE, ExitCode.TOO_MANY_BAD_IMAGES]
    assert (wrong["action"], wrong["onExitCodes"]["values"]) == ("FailJob", codes)
    (container,) = spec["template"]["spec"]["containers"]
    assert wrong["onExitCodes"]["containerName"] == container["name"]
    assert 0 < spec["backoffLimitPerIndex"] <= 3
    assert spec["template"]["spec"]["restartPolicy"] == "Never", "a policy requires it"


def test_a_misspelt_option_of_an_indexed_job_is_refused() -> None:
    docs = documents("kubernetes/indexed-job.yaml")
    options = [at for at, key, word in leaves(docs) if key == "args" and str(word)[:2] == "--"]
    assert len(options) == 1
    assert faults_of_changed("kubernetes/indexed-job.yaml", docs, options[0], "--partitionx")


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
        "part": indexed_job()["spec"]["template"]["spec"],
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
        for name in ("submitter", "cpu", "gpu", "part")
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
    part = indexed_job()["spec"]["template"]
    for template in (*templates, job["spec"]["submitterPodTemplate"], part):
        assert chosen.items() <= template["metadata"]["labels"].items()
    assert all(
        template["spec"]["serviceAccountName"] == account["metadata"]["name"]
        for template in (*templates, part)
    )
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"] and all(
        "from" in rule for rule in policy["spec"]["ingress"]
    )
    blocks = [
        to["ipBlock"] for rule in policy["spec"]["egress"] for to in rule["to"] if "ipBlock" in to
    ]
    assert [block["except"] for block in blocks] == [["169.254.169.254/32"]]


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
