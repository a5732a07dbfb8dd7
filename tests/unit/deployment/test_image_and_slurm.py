"""The container image, the Slurm script and the README of cluster/."""

from __future__ import annotations

import ast
import re

from support.cluster_files import CLUSTER, FILES, README, faults_of_command, text_of


def test_the_snippets_of_the_readme_are_python_and_its_commands_exist() -> None:
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(snippets) == 2
    for snippet in snippets:
        ast.parse(snippet)
    commands = re.findall(r"vitray (?:run|submit) [^\n`'\"]*", README)
    assert sorted(line.split()[1] for line in commands) == ["run", "run", "run", "submit", "submit"]
    assert [fault for line in commands for fault in faults_of_command(line)] == []


def test_every_file_that_the_readme_names_exists() -> None:
    for name in re.findall(
        r"`((?:(?:kuberay|kubernetes)/)?[\w.-]+\.(?:yaml|json|sbatch|txt))`", README
    ):
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
