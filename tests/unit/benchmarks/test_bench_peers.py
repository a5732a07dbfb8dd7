"""The harness of `make bench`: its arithmetic, and that no peer passes with wrong, missing or
doubled answers.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import bench_peers
from bench_peers import Run

COUNT = 40


def runs(peer: str, walls: list[tuple[float, float]]) -> list[Run]:
    """One round a pair: seconds at 100 and at 300 images."""
    return [
        Run(n, peer, images, seconds, 700, 1.0, None)
        for n, pair in enumerate(walls, 1)
        for images, seconds in zip((100, 300), pair)
    ]


def test_slopes_leave_start_up_out_and_whole_commands_keep_it() -> None:
    made = runs("vitray", [(12.0, 16.0), (20.0, 30.0)])
    assert bench_peers.slopes(made, "vitray", 100, 300) == {1: 50.0, 2: 20.0}
    assert bench_peers.wholes(made, "vitray", 300) == {1: 18.75, 2: 10.0}


def test_a_round_that_noise_ate_or_that_was_cut_has_no_slope() -> None:
    made = [
        *runs("vitray", [(12.0, 16.0), (30.0, 20.0)]),
        Run(3, "vitray", 300, 9.0, 700, 1.0, None),
    ]
    assert bench_peers.slopes(made, "vitray", 100, 300) == {1: 50.0}


def test_ratios_are_of_one_round_each_and_their_median_is_told(tmp_path: Path) -> None:
    # a slow minute hits both peers of a round: the rounds' ratios are 2, 2 and 4, the medians' own
    # ratio is 4
    made = runs("hand", [(1.0, 9.0), (1.0, 3.0), (1.0, 5.0)]) + runs(
        "vitray", [(5.0, 9.0), (5.0, 6.0), (5.0, 6.0)]
    )
    mine, theirs = (bench_peers.slopes(made, peer, 100, 300) for peer in ("vitray", "hand"))
    assert bench_peers.ratios(mine, theirs) == [2.0, 2.0, 4.0]
    file = tmp_path / "runs.jsonl"
    file.write_text(
        "".join(json.dumps(line) + "\n" for line in [{"sizes": [100, 300]}, *map(asdict, made)])
    )
    about, again = bench_peers.read_lines(file)
    hand, vitray = bench_peers.table(again, *about["sizes"]).splitlines()[2:]
    assert hand.split(" | ")[1:5] == [
        "50.00 (25.00..100.00)",
        "5.0 (3.0..9.0)",
        "2.00 (2.00..4.00)",
        "0.83 (0.50..1.00)",
    ]
    assert vitray.split(" | ")[3:5] == ["1.00 (1.00..1.00)"] * 2


def test_a_command_is_timed_from_outside_and_a_failing_or_late_one_is_named(tmp_path: Path) -> None:
    log, environment = tmp_path / "log", dict(os.environ)
    seconds, peak_mb = bench_peers.run_command(
        [sys.executable, "-c", "x = bytearray(300_000_000); print(1)"], environment, log, 60
    )
    assert 0 < seconds < 60
    assert peak_mb > 290
    with pytest.raises(RuntimeError, match=r"exit code 3 after .*\n.*no such thing"):
        bench_peers.run_command(
            [sys.executable, "-c", "print('no such thing'); exit(3)"], environment, log, 60
        )
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"exit code -9 .*limit 1 s"):
        bench_peers.run_command(
            [sys.executable, "-c", "import time; time.sleep(60)"], environment, log, 1
        )
    assert time.monotonic() - started < 30


def reference() -> pa.Table:
    """40 images of 8 labels; the first four are near ties."""
    vectors = np.random.default_rng(0).normal(size=(COUNT, 16)).astype(np.float32)
    columns = {
        "key": [f"{n:05d}" for n in range(COUNT)],
        "label": [f"LABEL_{n % 8}" for n in range(COUNT)],
    }
    return pa.table(
        {**columns, "clear": [n >= 4 for n in range(COUNT)], "embedding": list(vectors)}
    )


def judged(out: Path, **changed: object) -> tuple[float, float | None]:
    """The verdict on two files that hold the reference's own answers, in reverse, but for the
    changed columns (in order).
    """
    truth = reference()
    columns = {"path": [f"/in/loose/{key}.jpg" for key in truth["key"].to_pylist()]}
    columns |= {name: truth[name].to_pylist() for name in ("label", "embedding")} | changed
    answers = pa.table(
        {name: column for name, column in columns.items() if column is not None}
    ).take(list(range(len(columns["path"])))[::-1])
    out.mkdir(exist_ok=True)
    for n, part in enumerate((answers.slice(0, 10), answers.slice(10))):
        pq.write_table(part, out / f"{n}.parquet")
    return bench_peers.judge(truth, bench_peers.answers_of(out))


def test_right_answers_pass_in_any_order_and_near_ties_do_not_count(tmp_path: Path) -> None:
    assert judged(tmp_path) == (1.0, pytest.approx(1.0))
    labels = ["LABEL_9"] * 4 + reference()["label"].to_pylist()[4:]
    assert judged(tmp_path, label=labels, embedding=None) == (1.0, None)


def test_wrong_labels_are_refused(tmp_path: Path) -> None:
    labels = reference()["label"].to_pylist()
    with pytest.raises(ValueError, match=r"97\.2% of the clear images"):
        judged(tmp_path, label=[*labels[:-1], "LABEL_0"])
    with pytest.raises(ValueError, match=r"0\.0% of the clear images"):
        judged(tmp_path, label=[*labels[1:], labels[0]])


def test_vectors_of_other_images_are_refused(tmp_path: Path) -> None:
    vectors = reference()["embedding"].to_pylist()
    with pytest.raises(ValueError, match="mean CLS cosine"):
        judged(tmp_path, embedding=[*vectors[1:], vectors[0]])
    with pytest.raises(ValueError, match="mean CLS cosine nan"):
        judged(tmp_path, embedding=[[float("nan")] * 16, *vectors[1:]])


def test_missing_and_doubled_images_are_refused(tmp_path: Path) -> None:
    paths = [f"{n:05d}.jpg" for n in range(COUNT)]
    short = {name: reference()[name].to_pylist()[:-1] for name in ("label", "embedding")}
    with pytest.raises(ValueError, match="39 rows for 40 images"):
        judged(tmp_path, path=paths[:-1], **short)
    with pytest.raises(ValueError, match="not every image was labelled once"):
        judged(tmp_path, path=[*paths[:-1], paths[0]])
    with pytest.raises(ValueError, match="no Parquet file"):
        bench_peers.answers_of(tmp_path / "nothing")


def test_a_reference_that_cannot_tell_peers_apart_is_refused() -> None:
    constant = reference().set_column(1, "label", pa.array(["LABEL_0"] * COUNT))
    with pytest.raises(ValueError, match="proves nothing"):
        bench_peers.judge(constant, constant)
    unclear = reference().set_column(2, "clear", pa.array([False] * COUNT))
    with pytest.raises(ValueError, match="proves nothing"):
        bench_peers.judge(unclear, unclear)
