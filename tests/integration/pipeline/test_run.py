"""Complete runs on either executor: numbers, formats, resume, odd images, two runs at once."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import vitray
from factories.shards import (
    Picture,
    plain_loop,
    put,
    put_files,
    put_manifest,
    put_parquet,
    put_tars,
    tar_bytes,
)
from support.whole_runs import listing, shape_job
from vitray.dataset import committed_files, data_files
from vitray.errors import ErrorRateExceeded, FingerprintError, JobError, ModelError
from vitray.job import make_job
from vitray.operations.planning import status


@pytest.fixture(
    params=["threads", pytest.param("ray", marks=[pytest.mark.ray, pytest.mark.nightly])]
)
def executor(request: pytest.FixtureRequest) -> None:
    """Either executor; both give the same rows. Tests of Ray alone use the fixture `ray`."""
    if request.param == "ray":
        request.getfixturevalue("ray")


def test_bf16_keeps_labels_and_directions(
    executor: None, tmp_path: Path, shapes_model: str, items: list[Picture]
) -> None:
    put_tars(str(tmp_path / "in"), items[:600], 2, tmp_path)
    job = shape_job(str(tmp_path / "in"), shapes_model, str(tmp_path / "out"), precision="bf16")
    vitray.run(job)
    expected, table = plain_loop(shapes_model, items[:600]), vitray.read(job.out)
    assert np.mean(table["label_id"].to_numpy() == expected.ids) >= 0.995
    vectors = np.stack(table["embedding"].to_numpy(zero_copy_only=False))
    cosine = (
        (vectors * expected.cls).sum(1)
        / np.linalg.norm(vectors, axis=1)
        / np.linalg.norm(expected.cls, axis=1)
    )
    assert cosine.min() >= 0.999


def test_tar_parquet_files_and_manifest_give_the_same_rows(
    executor: None, tmp_path: Path, shapes_model: str, items: list[Picture]
) -> None:
    some = items[:150]
    put_tars(str(tmp_path / "tar"), some, 3, tmp_path)
    put_parquet(str(tmp_path / "parquet"), some, rows_a_group=40)
    put_files(str(tmp_path / "files"), some)
    put_manifest(str(tmp_path), some, "files")
    columns = [
        "content_hash",
        "width",
        "height",
        "format",
        "label",
        "label_id",
        "score",
        "embedding",
    ]
    rows_by_kind = {}
    sources = {
        "tar": "tar",
        "parquet": "parquet/all.parquet",
        "files": "files",
        "manifest": "list.jsonl",
    }
    for kind, path in sources.items():
        fields = (
            {"group_size": 64, "batch_size": 8}
            if kind in ("files", "manifest")
            else {"batch_size": 8}
        )
        job = shape_job(str(tmp_path / path), shapes_model, str(tmp_path / f"out-{kind}"), **fields)
        result = vitray.run(job)
        assert (result.rows, result.errors) == (150, 0), kind
        rows = vitray.read(job.out, columns=columns).to_pylist()
        rows_by_kind[kind] = sorted(rows, key=lambda row: row["content_hash"])
    for kind in ("parquet", "files", "manifest"):
        for tar_row, row in zip(rows_by_kind["tar"], rows_by_kind[kind], strict=True):
            for name in columns[:6]:
                assert tar_row[name] == row[name], (kind, name)
            np.testing.assert_allclose(tar_row["embedding"], row["embedding"], rtol=1e-4, atol=1e-4)


def odd_images() -> tuple[list[Picture], dict[str, str]]:
    """Pictures that are odd, and the reason each must get ("" for a row)."""

    def saved(image: Image.Image, kind: str, **options: object) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    base = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    bomb = saved(Image.new("1", (9000, 9000)), "PNG")
    cases = {
        "cut": (saved(base, "JPEG")[:700], "jpg", "truncated"),
        "none": (b"", "jpg", "empty"),
        "text": (b"hello, I am no image", "png", "not_an_image"),
        "bomb": (bomb, "png", "too_many_pixels"),
        "float": (
            saved(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"),
            "tif",
            "float_pixels",
        ),
        "cmyk": (saved(base.convert("CMYK"), "JPEG"), "jpg", ""),
        "deep": (saved(Image.fromarray(np.full((40, 40), 40_000, np.uint16)), "PNG"), "png", ""),
        "palette": (saved(base.quantize(16), "PNG"), "png", ""),
        "turned": (saved(base, "JPEG", exif=exif), "jpg", ""),
        "moving": (saved(base, "GIF", save_all=True, append_images=[base.rotate(90)]), "gif", ""),
    }
    return [Picture(f"odd_{k}", d, "", s) for k, (d, s, _) in cases.items()], {
        f"odd_{k}": r for k, (_, _, r) in cases.items()
    }


def test_odd_images_become_rows_or_reasons_and_change_nothing_else(
    executor: None, tmp_path: Path, shapes_model: str, items: list[Picture]
) -> None:
    odd, reasons = odd_images()
    clean, mixed = items[:200], [*items[:90], *odd, *items[90:200]]
    put_tars(str(tmp_path / "clean"), clean, 1, tmp_path)
    put_tars(str(tmp_path / "mixed"), mixed, 2, tmp_path)
    jobs = [
        shape_job(str(tmp_path / n), shapes_model, str(tmp_path / f"out-{n}"))
        for n in ("clean", "mixed")
    ]
    results = [vitray.run(job) for job in jobs]
    bad = {key: reason for key, reason in reasons.items() if reason}
    assert [r.errors for r in results] == [0, len(bad)] and results[1].exit_code == 0
    reason_of_key = {}
    for path in (tmp_path / "out-mixed" / "_errors").iterdir():
        reason_of_key |= {row["key"]: row["reason"] for row in pq.read_table(path).to_pylist()}
    assert reason_of_key == bad
    row_of_key = {p.key: n for n, p in enumerate(clean)}
    reference, table = vitray.read(jobs[0].out), vitray.read(jobs[1].out)
    assert set(table["key"].to_pylist()) == set(row_of_key) | {
        key for key, reason in reasons.items() if not reason
    }
    for row in table.to_pylist():
        if row["key"] in row_of_key:
            expected_row = reference.slice(row_of_key[row["key"]], 1).to_pylist()[0]
            assert (row["label"], row["content_hash"]) == (
                expected_row["label"],
                expected_row["content_hash"],
            )
            np.testing.assert_allclose(
                row["embedding"], expected_row["embedding"], rtol=1e-4, atol=1e-4
            )
    sizes = {row["key"]: (row["width"], row["height"]) for row in table.to_pylist()}
    assert sizes["odd_turned"] == (64, 48)  # of the original, before its orientation
    assert vitray.validate(jobs[1].out, content=True).ok


def test_too_many_bad_images_stop_the_run(
    executor: None, tmp_path: Path, shapes_model: str, items: list[Picture]
) -> None:
    broken = [
        Picture(f"b{n:05d}", b"x", "", "jpg") if n % 5 == 0 else p for n, p in enumerate(items)
    ]
    put_tars(str(tmp_path / "in"), broken, 3, tmp_path)
    job = shape_job(str(tmp_path / "in"), shapes_model, str(tmp_path / "out"), max_error_rate=0.1)
    with pytest.raises(ErrorRateExceeded, match="not_an_image") as caught:
        vitray.run(job)
    assert caught.value.exit_code == 4
    result = vitray.run(make_job({**job.model_dump(), "max_error_rate": 0.3}))
    assert (result.rows, result.errors) == (832, 208)


def test_too_many_bad_images_of_few_are_reported_at_the_end_of_each_run(
    executor: None, tmp_path: Path, shapes_model: str, items: list[Picture]
) -> None:
    put_tars(
        str(tmp_path / "in"),
        [*items[:18], Picture("bad", b"x", "", "jpg"), Picture("worse", b"", "", "jpg")],
        1,
        tmp_path,
    )
    job = shape_job(str(tmp_path / "in"), shapes_model, str(tmp_path / "out"), max_error_rate=0.09)
    for result in (vitray.run(job), vitray.run(job)):  # with work, and with none left
        assert (result.rows, result.errors, result.too_many_errors, result.exit_code) == (
            18,
            2,
            True,
            4,
        )
    assert vitray.run(make_job({**job.model_dump(), "max_error_rate": 0.1})).exit_code == 0


def test_out_inside_source_is_refused(
    tmp_path: Path, shapes_model: str, items: list[Picture]
) -> None:
    put_tars(str(tmp_path / "in"), items[:4], 1, tmp_path)
    for out in (tmp_path / "in", tmp_path / "in" / "deep" / "out"):
        with pytest.raises(JobError, match="lies inside `source`"):
            vitray.run(shape_job(str(tmp_path / "in"), shapes_model, str(out)))
    (tmp_path / "link").symlink_to(tmp_path / "in")
    for source, name in (
        ("in/**/*.parquet", "in/out"),
        ("in", "link/out"),
        ("link", "in/out"),
        ("*/*/*/*", "in/out"),
    ):
        with pytest.raises(JobError, match="lies inside `source`"):
            vitray.run(shape_job(f"{tmp_path}/{source}", shapes_model, f"{tmp_path}/{name}"))
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["s-000.tar"]


def test_a_passthrough_column_with_the_name_of_an_output_column_is_called_input(
    executor: None, tmp_path: Path, shapes_model: str, items: list[Picture]
) -> None:
    table = pa.table({"image": [p.data for p in items[:30]], "label": list(range(30))})
    pq.write_table(table, tmp_path / "in.parquet")
    job = shape_job(
        str(tmp_path / "in.parquet"), shapes_model, str(tmp_path / "out"), keep=["label"]
    )
    vitray.run(job)
    labels = vitray.read(job.out, columns=["input_label", "label"])
    assert (
        labels["input_label"].to_pylist() == list(range(30)) and labels["label"].type == pa.string()
    )


def test_links_in_a_tar_are_error_rows_and_what_was_left_out_is_counted(
    executor: None,
    tmp_path: Path,
    shapes_model: str,
    items: list[Picture],
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / "links.tar", "w") as archive:
        for name, kind in (
            ("a.jpg", tarfile.REGTYPE),
            ("b.jpg", tarfile.LNKTYPE),
            ("c.jpg", tarfile.SYMTYPE),
            ("d.txt", tarfile.SYMTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.jpg" if kind != tarfile.REGTYPE else ""
            info.size = len(items[0].data) if kind == tarfile.REGTYPE else 0
            archive.addfile(info, io.BytesIO(items[0].data))
    job = shape_job(
        str(tmp_path / "in"), shapes_model, str(tmp_path / "out"), keep=["nope"], max_error_rate=1
    )
    result = vitray.run(job)
    assert (result.rows, result.errors, result.reasons) == (1, 2, {"missing": 2})
    assert list(result.notes.values()) == ["1 links were not followed"]
    assert "has a member .nope" in caplog.text


def test_a_changed_gone_and_new_input_each_get_their_due(
    executor: None, tmp_path: Path, shapes_model: str, items: list[Picture]
) -> None:
    put_tars(str(tmp_path / "in"), items[:120], 3, tmp_path)
    job = shape_job(str(tmp_path / "in/*.tar"), shapes_model, str(tmp_path / "out"))
    vitray.run(job)
    first = committed_files(job.out)
    put(str(tmp_path / "in" / "s-000.tar"), tar_bytes(items[200:230], tmp_path))
    os.remove(tmp_path / "in" / "s-001.tar")
    put(str(tmp_path / "in" / "s-009.tar"), tar_bytes(items[300:310], tmp_path))
    result = vitray.run(job)
    assert result.committed == 2 and result.gone == 1
    keys = vitray.read(job.out, columns=["key"])["key"].to_pylist()
    gone = [s for s in first if s.startswith("s_001")]
    kept = pq.read_table(
        data_files(job.out)[
            [f.split("/")[-1].startswith("s_001") for f in data_files(job.out)].index(True)
        ]
    )
    assert set(kept["key"].to_pylist()) <= set(keys) and len(gone) == 1
    assert {p.key for p in items[200:230]} <= set(keys) and {p.key for p in items[300:310]} <= set(
        keys
    )
    assert not any(f.startswith("s_000") and f in first for f in committed_files(job.out))
    states = {r["shard"][:5]: r["state"] for r in vitray_manifest(job.out)}
    assert states == {"s_000": "current", "s_001": "gone", "s_002": "current", "s_009": "current"}
    pruned = vitray.run(job, prune=True)
    assert pruned.gone == 0 and pruned.shards == 3


def vitray_manifest(out: str) -> list[dict[str, object]]:
    from vitray.dataset import read_manifest

    manifest = read_manifest(out)
    assert manifest is not None
    return manifest.to_pylist()


def test_cut_and_broken_shards_are_named_and_the_rest_completes(
    executor: None, tmp_path: Path, shapes_model: str, items: list[Picture]
) -> None:
    put_tars(str(tmp_path / "in"), items[:90], 3, tmp_path)
    tar_bytes = (tmp_path / "in" / "s-001.tar").read_bytes()
    put(str(tmp_path / "in" / "s-001.tar"), tar_bytes[: len(tar_bytes) // 2])
    put(str(tmp_path / "in" / "s-002.tar"), b"\x1f\x8b not a tar" * 100)
    job = shape_job(str(tmp_path / "in"), shapes_model, str(tmp_path / "out"))
    result = vitray.run(job)
    assert result.exit_code == 3
    assert [s[:5] for s in result.truncated] == ["s_001"] and [s[:5] for s in result.set_aside] == [
        "s_002"
    ]
    assert not (tmp_path / "out" / "_SUCCESS.json").exists()
    keys = vitray.read(job.out, columns=["key"])["key"].to_pylist()
    assert keys == [p.key for p in items[: len(keys)]] and 10 < len(keys) < 90
    assert vitray.run(job).exit_code == 3  # and reports it again
    ((shard, at),) = result.truncated.items()
    assert (
        f"cut short  {shard}: at byte {at:,}: {result.notes[shard]}" in str(status(job.out))
        and "cut" in result.notes[shard]
    )


def test_another_fingerprint_is_refused_with_its_fields(
    executor: None, tmp_path: Path, shapes_model: str, items: list[Picture]
) -> None:
    put_tars(str(tmp_path / "in"), items[:20], 1, tmp_path)
    job = shape_job(str(tmp_path / "in"), shapes_model, str(tmp_path / "out"))
    vitray.run(job)
    first_listing = listing(job.out)
    with pytest.raises(FingerprintError, match=r"precision differs \(fp32, this job: bf16\)"):
        vitray.run(make_job({**job.model_dump(), "precision": "bf16"}))
    with pytest.raises(ModelError, match="layer"):
        vitray.run(make_job({**job.model_dump(), "embeddings": [{"layer": 99}]}))
    assert listing(job.out) == first_listing
    shutil.rmtree(tmp_path / "out" / "_vitray")  # dataset.json is gone, the data files tell
    with pytest.raises(FingerprintError, match="holds 1 file of another job"):
        vitray.run(make_job({**job.model_dump(), "precision": "bf16"}))
    assert not (tmp_path / "out" / "_vitray").exists()
    assert vitray.run(job).committed == 0  # the same job takes them over


def test_a_shard_without_a_passthrough_column_and_a_broken_first_one_are_set_aside(
    executor: None, tmp_path: Path, shapes_model: str, items: list[Picture]
) -> None:
    put_parquet(str(tmp_path / "in" / "b"), items[:30], rows_a_group=30)
    put(str(tmp_path / "in" / "a.parquet"), b"PAR1 no footer PAR1")
    table = pq.read_table(tmp_path / "in" / "b" / "all.parquet").drop_columns(["key"])
    pq.write_table(table, tmp_path / "in" / "c.parquet")
    os.rename(tmp_path / "in" / "b" / "all.parquet", tmp_path / "in" / "b.parquet")
    job = shape_job(
        str(tmp_path / "in/*.parquet"),
        shapes_model,
        str(tmp_path / "out"),
        keep=["image"],
        key_column="key",
    )
    with pytest.raises(vitray.VitrayError):
        vitray.run(make_job({**job.model_dump(), "keep": ["nothing"]}))
    result = vitray.run(make_job({**job.model_dump(), "keep": []}))
    assert (
        result.rows == 30
        and sorted(s[:1] for s in result.set_aside) == ["a", "c"]
        and result.exit_code == 3
    )
