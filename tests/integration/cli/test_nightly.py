"""`vitray run` with the options of a nightly job: what other systems see of it."""

from __future__ import annotations

import json
import signal
import socket
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from support.command_line import Call, waiting
from support.schemas import checked
from support.webhooks import webhook
from vitray.operations import notifying


def values_of(text: str) -> dict[str, float]:
    """{metric: value} of the metrics without tags."""
    families = text_string_to_metric_families(text)
    return {s.name: s.value for family in families for s in family.samples if not s.labels}


def test_a_run_with_nothing_to_do_is_reported(vitray: Call, labelled: Path, tmp_path: Path) -> None:
    prices = tmp_path / "prices.yaml"
    prices.write_text("machine_hour: 3600\n")
    with webhook() as hook:
        code, out, err = vitray(
            *("run", labelled / "a job.yaml", "--json"),
            *("--metrics-file", tmp_path / "vitray.prom", "--notify", f"{hook.url}?key=SECRET"),
            *("--prices", prices, "--max-hours", "1", "--max-cost", "1000000"),
        )
    assert code == 0, err
    result = json.loads(out)
    (posted,) = hook.messages
    message = checked(json.dumps(posted))
    assert message["schema"] == "vitray/notification/v1"
    assert (message["outcome"], message["exit_code"], message["images"]) == ("nothing to do", 0, 0)
    assert message["out"] == f"{labelled}/out"
    assert message["cost"] == result["cost"]
    assert result["cost"]["total"] == pytest.approx(result["seconds"], abs=0.5)
    assert result["ended_by"] is None
    metrics = values_of((tmp_path / "vitray.prom").read_text())
    assert metrics["vitray_run_exit_code"] == 0
    assert metrics["vitray_run_last_complete_timestamp_seconds"] > 1.7e9
    runs = json.loads(vitray("runs", labelled / "out", "--json")[1])["runs"]
    assert runs[-1]["run"] == message["run"]
    assert "SECRET" not in out + err + json.dumps(runs)
    text = vitray("run", labelled / "a job.yaml", "--prices", prices)[1]
    assert "\ncost       " in text


def test_a_run_that_is_refused_by_its_job_is_reported_too(
    vitray: Call, labelled: Path, tmp_path: Path
) -> None:
    with webhook() as hook:
        code, out, _ = vitray(
            *("run", labelled / "a job.yaml", "--model", labelled / "nowhere"),
            *("--metrics-file", tmp_path / "vitray.prom", "--notify", hook.url),
        )
    (message,) = hook.messages
    assert (code, out, message["exit_code"], message["outcome"]) == (2, "", 2, "failed")
    assert message["error"] == "ModelError"
    metrics = values_of((tmp_path / "vitray.prom").read_text())
    assert metrics["vitray_run_exit_code"] == 2
    assert "vitray_run_last_complete_timestamp_seconds" not in metrics


def test_the_environment_names_the_webhook_that_no_command_line_shows(
    vitray: Call, labelled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with webhook() as hook:
        monkeypatch.setenv("VITRAY_NOTIFY", hook.url)
        assert vitray("run", labelled / "a job.yaml")[0] == 0
        monkeypatch.setenv("VITRAY_NOTIFY", "")
        assert vitray("run", labelled / "a job.yaml")[0] == 0
    assert [message["outcome"] for message in hook.messages] == ["nothing to do"]


def test_a_file_that_is_not_of_metrics_is_kept(
    vitray: Call, labelled: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.prom"
    other.write_text("# HELP node_load1 load\nnode_load1 0.5\n")
    code, out, err = vitray("run", labelled / "a job.yaml", "--metrics-file", other)
    assert (code, out) == (2, "")
    assert "other.prom exists, and is no metrics file of vitray" in err
    assert other.read_text().startswith("# HELP node_load1")


def test_a_webhook_that_fails_changes_nothing(
    vitray: Call,
    labelled: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(notifying, "WAITS_S", (0.01, 0.01))
    with webhook([500]) as hook:
        code, out, _ = vitray("run", labelled / "a job.yaml", "--notify", f"{hook.url}/SECRET")
    assert (code, len(hook.requests)) == (0, 3)
    assert "nothing to do" in out
    assert (
        "could not notify http://127.0.0.1:" in caplog.text and ": it answered 500" in caplog.text
    )
    assert "SECRET" not in caplog.text


def test_metrics_are_served_while_the_run_works(
    vitray: Call,
    labelled: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from vitray.pipeline import runner

    seen: list[str] = []
    finish = runner.finish_run

    def scraped(*args: object) -> object:
        address = f"http://127.0.0.1:{port}/metrics"
        seen.append(urllib.request.urlopen(address, timeout=5).read().decode())
        return finish(*args)

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setattr(runner, "finish_run", scraped)
    argv = ["run", labelled / "a job.yaml", "--metrics-port", port, "--metrics-name", "pets"]
    assert vitray(*argv)[0] == 0
    assert f"metrics of this run: http://127.0.0.1:{port}/metrics" in caplog.text
    assert 'vitray_images_total{dataset="pets",outcome="good"} 0.0' in seen[0]


def test_port_0_is_a_free_one_which_is_said(
    vitray: Call, labelled: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert vitray("run", labelled / "a job.yaml", "--metrics-port", 0)[0] == 0
    assert "metrics of this run: http://127.0.0.1:" in caplog.text
    assert "127.0.0.1:0/" not in caplog.text


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--notify", "ftp://host/SECRET"], "VITRAY_NOTIFY: give a URL that begins with http://"),
        (["--metrics-host", "0.0.0.0"], "--metrics-host is for --metrics-port"),
        (["--metrics-name", "pets"], "--metrics-name names the metrics of"),
        (["--metrics-file", "/nowhere/a.txt"], "a.txt: give a path that ends in .prom"),
        (["--metrics-file", "/nowhere/a.prom"], "/nowhere/a.prom cannot be written: No such file"),
        (["--max-cost", "5"], "max_cost needs a price for time"),
        (["--max-hours", "0"], "max_hours is 0. Give a number above 0"),
        (["--prices", "/nowhere.yaml"], "--prices /nowhere.yaml cannot be read"),
    ],
)
def test_an_option_that_does_not_fit_is_refused_before_any_work(
    vitray: Call, labelled: Path, argv: list[object], says: str
) -> None:
    code, out, err = vitray("run", labelled / "a job.yaml", *argv)
    assert (code, out) == (2, "")
    assert says in err.splitlines()[-1] and "SECRET" not in err
    assert "reading the source" not in err


def test_a_port_that_is_taken_is_refused_before_any_work(vitray: Call, labelled: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, out, err = vitray("run", labelled / "a job.yaml", "--metrics-port", port)
    assert (code, out) == (2, "")
    assert f"--metrics-port {port}: no metrics on 127.0.0.1: Address already in use" in err
    assert "reading the source" not in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_is_reported(tmp_path: Path, number: int, code: int) -> None:
    """It waits for a store that never answers."""
    with webhook() as hook:
        argv = ["run", "s3://b/in", "--model", "m", "--out", tmp_path / "out"]
        argv += ["--notify", hook.url, "--metrics-file", tmp_path / "vitray.prom"]
        with waiting(*argv) as running:
            running.send_signal(number)
            if number == signal.SIGTERM:  # which lets a run finish its writes
                running.send_signal(number)
            running.communicate(timeout=20)
    assert running.returncode == code
    (message,) = hook.messages
    assert (message["exit_code"], message["outcome"]) == (code, "interrupted")
    assert values_of((tmp_path / "vitray.prom").read_text())["vitray_run_exit_code"] == code
