"""The names of the files of a dataset: stored datasets have them, so they never change."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import vitray
from vitray.dataset import layout

OUT = "s3://bucket/out"
PACKAGE = Path(vitray.__file__).parent


@pytest.mark.parametrize(
    ("url", "path"),
    [
        (layout.dataset_url(OUT), "_vitray/dataset.json"),
        (layout.source_url(OUT), "_vitray/source.json"),
        (layout.group_log_url(OUT, "000000.parquet"), "_vitray/shards/000000.parquet"),
        (layout.staging_url(OUT, "s"), "_vitray/staging/s"),
        (layout.runs_url(OUT, "r.json"), "_vitray/runs/r.json"),
        (layout.leases_url(OUT, "r.json"), "_vitray/leases/r.json"),
        (layout.manifest_url(OUT, "manifest-0.parquet"), "_vitray/manifest-0.parquet"),
        (layout.card_url(OUT), "_vitray/README.md"),
        (layout.success_url(OUT), "_SUCCESS.json"),
        (layout.data_url(OUT, "s"), "data/s.parquet"),
        (layout.data_folder(OUT), "data"),
        (layout.training_url(OUT, "images"), "_vitray/images"),
    ],
)
def test_a_file_has_the_name_of_every_stored_dataset(url: str, path: str) -> None:
    assert url == f"{OUT}/{path}"


def test_datasets_with_the_first_source_rules_keep_their_folder_of_errors() -> None:
    assert [layout.errors_folder(rules) for rules in (1, 2)] == ["errors", "_errors"]


def test_relative_and_file_urls_are_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    urls = {layout.success_url(out) for out in ("out", "out/", f"file://{tmp_path}/out")}
    assert urls == {f"{tmp_path}/out/_SUCCESS.json"}


def test_a_data_file_names_its_shard() -> None:
    assert layout.shard_of(layout.data_url(OUT, "cats-0123456789-aaaaaaaa")) == (
        "cats-0123456789-aaaaaaaa"
    )


def test_ids_of_two_versions_of_one_input_have_one_base() -> None:
    first, second = "cats-0123456789-aaaaaaaa", "cats-rg0-4-0123456789-bbbbbbbb"
    assert layout.base_of(first) == layout.base_of(second) == "cats-0123456789"
    assert [layout.version_of(shard) for shard in (first, second)] == ["aaaaaaaa", "bbbbbbbb"]
    assert layout.base_of("a") == "a"


def test_the_log_of_groups_is_known_by_its_url() -> None:
    assert layout.is_group_log(layout.group_log_url(OUT, "000000.parquet"))
    assert not layout.is_group_log(layout.manifest_url(OUT, "manifest-0.parquet"))


def test_scratch_is_known_by_its_url() -> None:
    assert layout.is_scratch(OUT, layout.scratch_url(OUT, "0123") + "/in/0.tar")
    assert not layout.is_scratch(OUT, layout.training_url(OUT, "images", "0.u8"))


def test_no_other_module_builds_a_url_from_these_names() -> None:
    names = {layout.INTERNAL_FOLDER, "_SUCCESS.json"}
    found = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in names and path.name != "layout.py"
    ]
    assert found == []
