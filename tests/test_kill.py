"""kill -9 of the driver, of a decode worker, of the model actor, in the middle of a run; then the
same command again.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from shards import pictures, put_files, put_tars

import vitray
from vitray.dataset import open_dataset
from vitray.pipeline.cluster import own_cpus, share_out

IMAGES, FRAGMENT = 1536, 32
ROUNDS = [pytest.param(n, marks=[pytest.mark.nightly] if n >= 1 else []) for n in range(25)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kill")
    put_tars(str(folder / "in"), pictures(IMAGES), 6, folder)
    return folder


def command(inputs: Path, model: str, out: Path, *more: str) -> list[str]:
    fields = ["precision=fp32", "engine=torch", "batch_size=8", f"fragment_rows={FRAGMENT}"]
    sets = [part for field in fields for part in ("--set", field)]
    return [
        sys.executable,
        "-m",
        "vitray",
        "run",
        str(inputs / "in"),
        "--model",
        model,
        "--out",
        str(out),
        *sets,
        *more,
    ]


def start(argv: list[str], trace: Path, **more: str) -> subprocess.Popen[str]:
    trace.mkdir(exist_ok=True)
    environment = {**os.environ, "VITRAY_TRACE": str(trace), "RAY_AUTH_MODE": "token", **more}
    environment.pop("RAY_ADDRESS", None)
    return subprocess.Popen(
        argv,
        env=environment,
        text=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )


def lines_of(trace: Path) -> list[dict[str, object]]:
    found = []
    for path in trace.glob("*.jsonl"):
        for line in path.read_text().splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:  # the line a kill cut short
                continue
    return found


def images_by_step(trace: Path) -> Counter[str]:
    counts: Counter[str] = Counter()
    for line in lines_of(trace):
        counts[str(line["step"])] += int(str(line["stop"])) - int(str(line["start"]))
    return counts


def wait_until_staged(process: subprocess.Popen[str], trace: Path, images: float) -> None:
    deadline = time.monotonic() + 200
    while images_by_step(trace)["stage"] < images:
        assert process.poll() is None, f"the run ended too early: {process.communicate()}"
        assert time.monotonic() < deadline, "too little was staged"
        time.sleep(0.05)


def kill_in_the_middle(
    process: subprocess.Popen[str], trace: Path, victim: str, share: float
) -> None:
    """SIGKILL once `share` of the images are staged. A kill outside 10 to 90% does not count: the
    test fails.
    """
    wait_until_staged(process, trace, share * IMAGES)
    if victim.startswith("driver"):
        os.kill(process.pid, signal.SIGKILL)
    else:
        last = max(
            (line for line in lines_of(trace) if line["step"] == victim),
            key=lambda line: float(str(line["at"])),
        )
        os.kill(int(str(last["pid"])), signal.SIGKILL)
    staged = images_by_step(trace)["stage"] / IMAGES
    assert 0.1 <= staged <= 0.9, f"the kill came at {staged:.0%}"


def staged_bytes(out: Path) -> dict[str, bytes]:
    found = {}
    for path in (out / "_vitray" / "staging").glob("*/*.arrow"):
        with contextlib.suppress(FileNotFoundError):  # its shard was committed just now
            found[str(path)] = path.read_bytes()
    return found


@pytest.mark.ray
@pytest.mark.parametrize(
    "victim",
    [
        "driver",
        *(pytest.param(v, marks=pytest.mark.nightly) for v in ("driver on ray", "decode")),
        "predict",
    ],
)
@pytest.mark.parametrize("round_", ROUNDS)
def test_killed_process_leaves_no_lost_or_doubled_row(
    inputs: Path, shapes_model: str, tmp_path: Path, victim: str, round_: int
) -> None:
    share = random.Random(f"{victim}{round_}").uniform(0.1, 0.8)
    out, trace = tmp_path / "out", tmp_path / "trace"
    on_ray = victim != "driver"  # else all is in one process
    argv = command(inputs, shapes_model, out, *(["--address", "local"] if on_ray else []))
    first = start(argv, trace)
    kill_in_the_middle(first, trace, victim, share)
    if victim.startswith("driver"):
        first.wait(30)
        time.sleep(3)  # its workers notice and go
        kept = staged_bytes(out)
        done = sum(
            pq.read_metadata(path).num_rows for path in (out / "data").glob("*.parquet")
        )  # had left the staging
        assert len(kept) * FRAGMENT + done >= 0.05 * IMAGES
        second = start(argv, trace)
        while second.poll() is None:  # a fragment keeps its bytes until its shard is committed
            now = staged_bytes(out)
            assert all(now.get(path, data) == data for path, data in kept.items())
            time.sleep(0.2)
    else:
        second = first
    _, stderr = second.communicate(timeout=240)
    assert second.returncode == 0, stderr
    if on_ray:  # its logs stay only after a failure
        assert not list(Path("/tmp/ray").glob(f"session_*_{second.pid}"))
    again = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=True)
    assert again.stdout.startswith("0 shards committed now"), again.stdout
    table = vitray.read(str(out), columns=["key", "shard", "index"])
    assert sorted(table["key"].to_pylist()) == [f"{n:05d}" for n in range(IMAGES)]
    assert len(set(zip(table["shard"].to_pylist(), table["index"].to_pylist()))) == IMAGES
    assert vitray.validate(str(out), content=True).ok
    counts, shares = images_by_step(trace), share_out([{"CPU": own_cpus()}], "cpu")
    bound = (4 * shares.actors + 2 * shares.readers if on_ray else shares.threads + 6) * FRAGMENT
    redone = {step: counts[step] - IMAGES for step in ("decode", "predict", "stage")}
    assert all(extra <= bound for extra in redone.values()), (redone, bound)
    dataset = open_dataset(str(out))
    assert dataset is not None and dataset.fragment_rows == FRAGMENT
    print(f"{victim} killed at {share:.0%}: done again {redone}, bound {bound}")


@pytest.mark.ray
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


@pytest.mark.ray
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


@pytest.mark.ray
@pytest.mark.parametrize(
    "after_s", [*(pytest.param(s, marks=pytest.mark.nightly) for s in (0.0, 3.0, 6.0)), 9.0]
)
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


@pytest.mark.ray
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
