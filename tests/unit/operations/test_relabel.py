"""`vitray relabel` gives a finished dataset the labels of a head."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image

import vitray
from factories.small_models import noise
from support.linear_heads import IMAGES, NAMES, READS, make_head
from vitray.consume.comparing import compare
from vitray.consume.report import report, write_card
from vitray.dataset import delete_data_files, open_dataset, shards_to_redo
from vitray.errors import FingerprintError, JobError, ModelError
from vitray.job import Job
from vitray.models.linear_head import read_head
from vitray.operations.planning import status
from vitray.operations.relabelling import relabel


@pytest.mark.parametrize(
    ("reads", "column", "close"), [(READS[0], "raw", 1e-4), ((2, "mean", True), "half", 1e-2)]
)
def test_a_dataset_relabelled_equals_a_run_with_the_head(
    job: Job,
    vit: str,
    tmp_path: Path,
    reads: tuple[int | None, str, bool],
    column: str,
    close: float,
) -> None:
    head, into = make_head(tmp_path / "head", vit, *reads), f"{tmp_path}/into"
    vitray.run(job)
    ran = job.model_copy(update={"head": head, "out": f"{tmp_path}/ran"})
    vitray.run(ran)
    result = relabel(job.out, head, into)
    assert (result.column, result.shards, result.written, result.rows, result.errors) == (
        f"embedding_{column}",
        2,
        2,
        IMAGES,
        1,
    )
    old, new, expected = (vitray.read(out) for out in (job.out, into, ran.out))
    labels = ["label", "label_id", "score", "top_labels", "top_ids", "top_scores"]
    assert new.drop_columns(labels).equals(old.drop_columns(labels))
    assert new.schema.equals(expected.schema)
    np.testing.assert_allclose(new["score"], expected["score"], atol=close)
    chances = np.array(expected["top_scores"].to_pylist())
    clear = chances[:, 0] - chances[:, 1] > 2 * close
    assert (
        clear.sum() >= IMAGES // 2
        and pc.all(pc.equal(new["label"], expected["label"]).filter(clear)).as_py()
    )
    assert [len(row) for row in new["top_labels"].to_pylist()] == [3] * IMAGES and set(
        new["label"].to_pylist()
    ) <= set(NAMES)

    checked = vitray.validate(into, content=True)
    assert (checked.problems, checked.rows, checked.errors, checked.pending) == ((), IMAGES, 1, 0)
    assert status(into).complete
    assert (
        f"head       {head} (sha256 {read_head(head).sha256()[:12]}…), over the stored "
        f"{result.column}\n" in str(status(into))
    )
    assert (
        compare(into, ran.out).rows == IMAGES
        and (compare(into, ran.out).agreement or 0) >= clear.mean()
    )
    report(into, f"{tmp_path}/page.html", None, False)
    assert new["label"][0].as_py() in Path(f"{tmp_path}/page.html").read_text()
    assert (
        f"`{read_head(head).sha256()}`, over the stored `{result.column}`"
        in Path(write_card(into)).read_text()
    )
    assert relabel(job.out, head, into).written == 0
    with pytest.raises(
        FingerprintError, match="head differs"
    ):  # a run's labels are of the pass itself
        vitray.run(ran.model_copy(update={"out": into}))


def test_a_shard_that_was_redone_is_relabelled_again(job: Job, vit: str, tmp_path: Path) -> None:
    vitray.run(job)
    head, into = make_head(tmp_path / "head", vit), f"{tmp_path}/into"
    assert relabel(job.out, head, into).errors == 1
    dataset = open_dataset(job.out)
    assert dataset is not None
    delete_data_files(dataset, shards_to_redo(dataset, [], ["not_an_image"]))
    Image.fromarray(noise(1, seed=9)[0]).save(bad := tmp_path / "again.png")
    status = (tmp_path / "in" / "05x.png").stat()
    data = bad.read_bytes()
    (tmp_path / "in" / "05x.png").write_bytes(data[: status.st_size])
    os.utime(
        tmp_path / "in" / "05x.png", ns=(status.st_atime_ns, status.st_mtime_ns)
    )  # the same shard, other bytes
    vitray.run(job)
    assert relabel(job.out, head, into).written == 1 and relabel(job.out, head, into).written == 0
    reasons = vitray.validate(into, content=True)
    assert reasons.ok
    old, new = (pq.read_table(sorted(Path(out, "_errors").iterdir())[0]) for out in (job.out, into))
    assert old.equals(new)


def test_what_cannot_be_relabelled_is_refused_and_writes_nothing(
    job: Job, vit: str, tmp_path: Path
) -> None:
    vitray.run(job)
    head, into = make_head(tmp_path / "head", vit, None, "mean"), f"{tmp_path}/into"
    with pytest.raises(JobError) as raised:
        relabel(job.out, head, into)
    assert "reads layer last, pool mean, normalize false" in str(raised.value)
    assert (
        "embedding_raw: layer last, pool cls, normalize false; embedding_half: layer 2, pool mean"
        in str(raised.value)
    )
    foreign = make_head(tmp_path / "foreign", vit, weights_sha256="5" * 64)
    with pytest.raises(ModelError, match=r"weights 555555555555…\), and the embeddings are of"):
        relabel(job.out, foreign, into)
    good = make_head(tmp_path / "good", vit)
    for path, what in ((job.out, "the dataset"), (f"{tmp_path}/in", f"its source {tmp_path}/in")):
        with pytest.raises(JobError, match=f"lies inside {what}: choose another path"):
            relabel(job.out, good, f"{path}/into")
    with pytest.raises(JobError, match="holds no vitray dataset"):
        relabel(f"{tmp_path}/nothing", head, into)
    assert not Path(into).exists()
    assert not Path(tmp_path, "in", "into").exists()
    relabel(job.out, good, into)
    with pytest.raises(FingerprintError, match="head differs"):
        relabel(job.out, make_head(tmp_path / "next", vit, bias=np.ones(4, np.float32)), into)
