"""vitray backfill: the next model's dataset from the very shards of the old one, compared with
it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import vitray
from factories.shards import pictures, put_files
from factories.small_models import make_checkpoint
from support.schemas import checked
from vitray.dataset import committed_files, load_group_log


def cli(*argv: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vitray", *map(str, argv)],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_next_dataset_has_the_shards_of_the_old_one(shapes_model: str, tmp_path: Path) -> None:
    """Loose files that came in two deliveries: listed at once they would make other groups."""
    items = pictures(70)
    put_files(str(tmp_path / "in"), items[:10])
    fields = {
        "source": f"{tmp_path}/in",
        "model": shapes_model,
        "out": f"{tmp_path}/out",
        "group_size": 32,
        "engine": "torch",
    }
    (tmp_path / "job.yaml").write_text(json.dumps(fields))
    assert cli("run", tmp_path / "job.yaml").returncode == 0
    put_files(str(tmp_path / "in"), items[10:])
    assert cli("run", tmp_path / "job.yaml").returncode == 0
    make_checkpoint(tmp_path / "vit v2", "vit", headed=True)
    argv = ["backfill", tmp_path / "job.yaml", "--model", tmp_path / "vit v2"]
    done = cli(*argv)
    assert done.returncode == 0, done.stderr
    old, new = f"{tmp_path}/out", f"{tmp_path}/out-vit-v2"
    assert (
        committed_files(new).keys() == committed_files(old).keys()
        and len(committed_files(new)) == 3
    )
    assert load_group_log(new) == load_group_log(old)
    assert cli(*argv).stdout.startswith("nothing to do")
    told = checked(cli("compare", old, new, "--json").stdout)
    assert (told["rows"], told["only_old_shards"], told["only_new_shards"]) == (70, 0, 0)
    labels = [
        vitray.read(out, columns=["uri", "label"]).sort_by("uri")["label"].to_pylist()
        for out in (old, new)
    ]
    assert told["agreement"] == sum(a == b for a, b in zip(*labels)) / 70
