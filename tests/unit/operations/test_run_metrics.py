"""The metrics file of a run, and what a notification may contain."""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path

import pytest

from support.schemas import checked
from vitray.cli.json_output import json_text
from vitray.errors import JobError
from vitray.operations import run_metrics
from vitray.operations.notifying import notification_of, parse_target
from vitray.operations.run_metrics import MetricsFile, last_complete_in, require_metrics_path
from vitray.operations.runs import summary_of
from vitray.pipeline.metrics import PrometheusMeter
from vitray.pipeline.progress import Progress


def test_the_file_is_there_from_the_start_and_is_replaced_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "vitray.prom"
    meter = PrometheusMeter()
    file = MetricsFile(str(path), meter)
    assert "vitray_shards_expected 0.0" in path.read_text()
    meter.progress(Progress(shards=7))
    file.progress(Progress(shards=7))
    assert "vitray_shards_expected 0.0" in path.read_text(), "10 s have not passed"
    monkeypatch.setattr(run_metrics, "WRITE_EVERY_S", 0.0)
    file.progress(Progress(shards=7))
    assert "vitray_shards_expected 7.0" in path.read_text()
    assert [entry.name for entry in tmp_path.iterdir()] == ["vitray.prom"]


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"--metrics-file .*none/a.prom cannot be written: No such"):
        MetricsFile(f"{tmp_path}/none/a.prom", PrometheusMeter())


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.prom", None, ""),
        ("a.prom", "", ""),
        ("a.prom", "# HELP vitray_images_total images\n", ""),
        ("a.prom", "# HELP node_load1 load\n", "exists, and is no metrics file of vitray"),
        ("a.prom", "vitray", "exists, and is no metrics file of vitray"),
        ("job.yaml", "source: in\n", "give a path that ends in .prom"),
        ("a.txt", None, "give a path that ends in .prom"),
    ],
)
def test_only_a_file_of_vitrays_metrics_is_replaced(
    tmp_path: Path, name: str, content: str | None, says: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(JobError, match=says) if says else contextlib.nullcontext():
        require_metrics_path(str(path))


def test_the_file_of_an_earlier_run_is_replaced(tmp_path: Path) -> None:
    path = f"{tmp_path}/a.prom"
    MetricsFile(path, PrometheusMeter("pets"))
    require_metrics_path(path)


def test_a_folder_in_place_of_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.prom").mkdir()
    with pytest.raises(JobError, match=r"a.prom cannot be read: Is a directory"):
        require_metrics_path(f"{tmp_path}/a.prom")


def test_a_disk_that_fills_up_later_costs_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "m").mkdir()
    file = MetricsFile(f"{tmp_path}/m/a.prom", PrometheusMeter())
    (tmp_path / "m" / "a.prom").unlink()
    (tmp_path / "m").rmdir()
    with caplog.at_level(logging.WARNING):
        file.write()
        file.write()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "a.prom: No such file or directory" in caplog.text


def test_a_failed_night_keeps_the_time_of_the_last_complete_one(tmp_path: Path) -> None:
    path = str(tmp_path / "a.prom")
    assert last_complete_in(path) is None
    for code in (0, 1):
        meter = PrometheusMeter("pets", last_complete_in(path))
        file = MetricsFile(path, meter)
        meter.ended(code)
        file.write()
        if code == 0:
            complete = last_complete_in(path)
    assert complete is not None
    assert last_complete_in(path) == complete
    Path(path).write_text("{not metrics")
    assert last_complete_in(path) is None


@pytest.mark.parametrize(
    "url",
    ["", "hooks.example/x", "ftp://h/x", "file:///etc/passwd", "http://", "https://[x", "//h"],
)
def test_a_target_that_is_not_http_is_refused_without_being_shown(url: str) -> None:
    with pytest.raises(JobError, match="VITRAY_NOTIFY: give a URL") as refusal:
        parse_target(url)
    assert url in ("", "http://") or url not in str(refusal.value)


def test_a_target_shows_no_secret() -> None:
    url = "https://user:p%40ss@hooks.example:8443/T0/SECRET?token=SECRET#SECRET"
    target = parse_target(url)
    assert target.shown == "https://hooks.example:8443"
    assert target.url == "https://hooks.example:8443/T0/SECRET?token=SECRET"
    assert target.headers["Authorization"] == "Basic dXNlcjpwQHNz"
    assert "SECRET" not in repr(target) and "dXNl" not in repr(target)


def test_a_message_has_counts_and_no_text_of_errors() -> None:
    record = {
        "run": "20261201T030000-a",
        "started": "2026-12-01T03:00:00+00:00",
        "finished": "2026-12-01T04:00:00+00:00",
        "seconds": 3600.0,
        "images": 1200,
        "committed": 3,
        "reasons": {"empty": 2},
        "set_aside": {"shard-SECRET": "cut"},
        "notes": {"shard-SECRET": "x"},
        "exit_code": 1,
        "ended": "StorageError: s3://SECRET/key.jpg does not answer",
        "cost": {"machines": 1.0, "requests": 0.5, "total": 1.5},
    }
    message = checked(json_text(notification_of(summary_of(record), "s3://photos-vit")))
    assert "SECRET" not in json.dumps(message)
    assert message == {
        "schema": "vitray/notification/v1",
        "text": "vitray: s3://photos-vit: failed (StorageError), 1,200 images, 60.0 min, "
        "exit code 1",
        "out": "s3://photos-vit",
        "run": "20261201T030000-a",
        "kind": "run",
        "outcome": "failed",
        "exit_code": 1,
        "started": "2026-12-01T03:00:00+00:00",
        "finished": "2026-12-01T04:00:00+00:00",
        "seconds": 3600.0,
        "images": 1200,
        "bad_images": {"empty": 2},
        "committed": 3,
        "set_aside": 1,
        "truncated": None,
        "pending": None,
        "pruned": None,
        "cost": {"machines": 1.0, "requests": 0.5, "total": 1.5},
        "error": "StorageError",
        "limit": None,
    }


def test_a_message_names_the_limit_that_ended_a_run() -> None:
    record = {"exit_code": 7, "ended": "max_cost", "images": 1}
    message = notification_of(summary_of(record), "out")
    assert (message.error, message.limit) == (None, "max_cost")
    assert message.text == "vitray: out: budget spent (max_cost), 1 image, exit code 7"
