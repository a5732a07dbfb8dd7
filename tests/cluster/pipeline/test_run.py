"""Complete runs on either executor: numbers, formats, resume, odd images, two runs at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import vitray
from factories.shards import Picture, plain_loop, put_tars
from support.whole_runs import listing, shape_job


def test_a_thousand_images_on_s3_equal_a_plain_transformers_loop(
    ray: None, s3: str, shapes_model: str, items: list[Picture], tmp_path: Path
) -> None:
    put_tars(f"{s3}/in", items, 11, tmp_path)
    job = shape_job(f"{s3}/in/*.tar", shapes_model, f"{s3}/out", keep=["cls"], top_k=3)
    assert str(vitray.plan(job)).splitlines()[0].startswith("source     11 tar shards")
    result = vitray.run(job)
    assert (result.shards, result.rows, result.errors, result.exit_code) == (11, 1040, 0, 0)
    table = vitray.read(job.out)
    assert table["key"].to_pylist() == [p.key for p in items]  # order of shards, order in each
    assert len(set(zip(table["shard"].to_pylist(), table["index"].to_pylist()))) == 1040
    expected = plain_loop(shapes_model, items)
    assert table["label_id"].to_pylist() == expected.ids.tolist()
    vectors = np.stack(table["embedding"].to_numpy(zero_copy_only=False))
    np.testing.assert_allclose(
        vectors, expected.cls, rtol=1e-4, atol=1e-4 * np.abs(expected.cls).mean()
    )
    odds = np.exp(expected.logits - expected.logits.max(1, keepdims=True))
    np.testing.assert_allclose(
        table["score"].to_numpy(), (odds / odds.sum(1, keepdims=True)).max(1), rtol=1e-4
    )
    assert (
        np.mean([a == b for a, b in zip(table["label"].to_pylist(), table["cls"].to_pylist())])
        > 0.97
    )
    first_listing = listing(job.out)
    again = vitray.run(job)
    assert (again.committed, again.images) == (0, 0)
    # a finished job run again writes its record only
    (record,) = (url for url in listing(job.out) if url not in first_listing)
    assert "/_vitray/runs/" in record
    assert {**first_listing, record: listing(job.out)[record]} == listing(job.out)
    checked = vitray.validate(job.out, content=True)
    assert checked.ok and checked.rows == 1040, str(checked)
