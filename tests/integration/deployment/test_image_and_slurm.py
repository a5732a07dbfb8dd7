"""The container image, the Slurm script and the README of cluster/."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from dockerfile_parse import DockerfileParser

from support.cluster_files import CLUSTER, HOME, faults_of_batch, faults_of_image, text_of


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


def test_the_array_script_is_understood_by_bash_sbatch_and_vitray() -> None:
    text = text_of("slurm-array.sbatch")
    assert faults_of_batch(text) == []
    assert faults_of_batch(text.replace("--partition ", "--partitionx "))
    assert faults_of_batch(text.replace("--array", "--arrayx"))
    assert faults_of_batch(text.replace("exec vitray", "exec vitrayx"))


@pytest.mark.parametrize(("task", "last", "part"), [("0", "15", "0/16"), ("15", "15", "15/16")])
def test_a_task_of_the_array_runs_its_part(tmp_path: Path, task: str, last: str, part: str) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "activate").write_text(f"PATH={tmp_path}/bin:$PATH\n")
    command = tmp_path / "bin" / "vitray"
    command.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    command.chmod(0o755)
    script = text_of("slurm-array.sbatch").replace("SET_VENV", str(tmp_path))
    task_variables = {"SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_TASK_MAX": last}
    done = subprocess.run(
        ["bash", "-s", "my job.yaml"],
        input=script,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **task_variables},
    )
    assert done.stdout.splitlines() == ["run", "my job.yaml", "--partition", part]


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
