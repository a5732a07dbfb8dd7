"""kill -9 of the driver, of a decode worker, of the model actor, in the middle of a run; then the
same command again.
"""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

import vitray
from factories.shards import pictures, put_files
from support.runs import IMAGES, command, images_by_step, start, wait_until_staged


def test_two_runs_at_once_make_each_object_once(shapes_model: str, tmp_path: Path) -> None:
    """Two processes on one OUT, with loose files that arrive between their listings."""
    items, out = pictures(170), tmp_path / "out"
    put_files(str(tmp_path / "in"), items[:150])
    argv = [*command(tmp_path, shapes_model, out), "--set", "group_size=32"]
    first = start(argv, tmp_path / "trace-1")
    while not list(out.glob("_vitray/shards/*.parquet")):  # its groups are in the log
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    put_files(str(tmp_path / "in"), items[150:])
    second = start(argv, tmp_path / "trace-2")
    for process in (first, second):
        _, stderr = process.communicate(timeout=240)
        assert process.returncode == 0, stderr
    table = vitray.read(str(out))
    assert sorted(table["uri"].to_pylist()) == sorted(
        f"{tmp_path}/in/{p.key}.{p.suffix}" for p in items
    )
    success = json.loads((out / "_SUCCESS.json").read_text())
    assert (success["shards"], success["rows"], success["errors"]) == (6, 170, 0)
    assert [p.name for p in out.glob("_vitray/manifest-*")] == [success["manifest"]]
    both = [images_by_step(tmp_path / f"trace-{n}")["stage"] for n in (1, 2)]
    print(f"staged by each: {both}")
    assert vitray.validate(str(out), content=True).ok


# a machine whose decoder refuses pictures that all others take: what a time limit or another
# libjpeg would do
OTHER_DECODER = """
import PIL.Image
whole = PIL.Image.open
def refusing(fp, *args, **kwargs):
    image = whole(fp, *args, **kwargs)
    if image.size != (8, 8) and sum(fp.getvalue()[-40:]) % 7 == 0:  # 8x8: the decoders' own warm-up
        raise OSError("a decoder of another mind")
    return image
PIL.Image.open = refusing
"""


def test_two_runs_that_disagree_on_bad_rows_leave_one_truth(
    inputs: Path, shapes_model: str, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "sitecustomize.py").write_text(OTHER_DECODER)
    argv = [*command(inputs, shapes_model, tmp_path / "out"), "--set", "max_error_rate=1"]
    odd = start(argv, tmp_path / "odd", PYTHONPATH=str(tmp_path / "other"))
    while images_by_step(tmp_path / "odd")["stage"] < 0.1 * IMAGES:
        assert odd.poll() is None, odd.communicate()
        time.sleep(0.05)
    plain = start(argv, tmp_path / "plain")
    for process in (odd, plain):
        _, stderr = process.communicate(timeout=280)
        assert process.returncode == 0, stderr
        assert "set aside" not in stderr
    checked = vitray.validate(str(tmp_path / "out"), content=True)
    assert checked.ok, str(checked)
    assert checked.rows + checked.errors == IMAGES and 0 < checked.errors < IMAGES / 2
    print(
        f"{checked.errors} bad rows, staged by each: "
        f"{[images_by_step(tmp_path / n)['stage'] for n in ('odd', 'plain')]}"
    )


def test_sigterm_ends_a_run_on_ray_that_stages_within_20_s_with_143(
    inputs: Path, shapes_model: str, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    process = start(command(inputs, shapes_model, tmp_path / "out", "--address", "local"), trace)
    wait_until_staged(process, trace, 0.1 * IMAGES)
    ends_within_20_s(process, 0.0)


@pytest.mark.nightly
@pytest.mark.parametrize("after_s", [0.0, 2.0, 4.0])
def test_sigterm_ends_a_run_on_ray_within_20_s_with_143(
    inputs: Path, shapes_model: str, tmp_path: Path, after_s: float
) -> None:
    """after_s: counted from when Ray begins to start."""
    process = start(
        command(inputs, shapes_model, tmp_path / "out", "--address", "local"), tmp_path / "trace"
    )
    deadline = time.monotonic() + 60
    while not list(Path("/tmp/ray").glob(f"session_*_{process.pid}")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ends_within_20_s(process, after_s)


@pytest.mark.parametrize("after_s", [0.8, 2.0, 4.0])
def test_sigterm_ends_a_run_within_20_s_with_143(
    inputs: Path, shapes_model: str, tmp_path: Path, after_s: float
) -> None:
    ends_within_20_s(
        start(command(inputs, shapes_model, tmp_path / "out"), tmp_path / "trace"), after_s
    )


def catches_sigterm(pid: int) -> bool:
    caught = next(
        line
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if line.startswith("SigCgt")
    )
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def ends_within_20_s(process: subprocess.Popen[str], after_s: float) -> None:
    while not catches_sigterm(process.pid):  # Python's own start comes before that
        time.sleep(0.02)
    time.sleep(after_s)
    process.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    _, stderr = process.communicate(timeout=60)
    took = time.monotonic() - sent
    assert process.returncode == 143, stderr
    assert "Run the same command again" in stderr and "Traceback" not in stderr
    assert took < 20
    print(f"SIGTERM after {after_s} s: ended in {took:.1f} s")
