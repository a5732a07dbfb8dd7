"""vitray search: what is nearest is what numpy says, whatever the keys, the blocks and the ties."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import vitray
from factories import embedded, shards, small_models
from factories.embedded import HOSTILE, Shown, noise
from vitray.consume.searching import Query, search
from vitray.dataset import Dataset, reading
from vitray.errors import JobError, ModelError


def brute_force(
    dataset: Dataset, query: np.ndarray, column: str = "embedding"
) -> list[tuple[str, int, float]]:
    """(shard, index, cosine) of every row by numpy in float64, nearest first, ties in the order of
    (shard, index).
    """
    table = vitray.read(dataset.out)
    vectors, query = np.stack(table[column].to_numpy()).astype(np.float64), query.astype(np.float64)
    lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(query)
    cosines = (vectors @ query) / np.where(lengths > 0, lengths, 1)
    rows = zip(
        table["shard"].to_pylist(), table["index"].to_pylist(), np.round(cosines, 9).tolist()
    )
    return sorted(rows, key=lambda row: (-row[2], row[0], row[1]))


def assert_nearest(result: object, expected: list[tuple[str, int, float]]) -> None:
    assert [(n.shard, n.index) for n in result.neighbours] == [row[:2] for row in expected]
    assert [n.cosine for n in result.neighbours] == pytest.approx(
        [row[2] for row in expected], abs=2e-6
    )


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("block_rows", [1, 7, 4096])
def test_the_nearest_are_those_of_a_brute_force_ties_in_the_order_of_the_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, block_rows: int
) -> None:
    monkeypatch.setattr(reading, "BLOCK_ROWS", block_rows)
    one, two = noise(40, seed=1), noise(30, seed=2)
    for at in (
        0,
        9,
        33,
    ):  # the same vector again and again, also in the other shard, and nothing at all
        one.vectors[at] = one.vectors[5]
    two.vectors[[3, 29]], one.vectors[7], two.vectors[0] = one.vectors[5], 0, 0
    dataset = embedded.make(tmp_path, [one, two], dtype)
    shard = vitray.read(dataset.out)["shard"][0].as_py()
    for k in (1, 4, 10, 70, 200):
        result = search(dataset.out, Query(shard=shard, row=9), k)
        assert_nearest(result, brute_force(dataset, one.vectors[9].astype(dtype))[:k])
        assert (result.rows, result.recall, result.notes) == (70, None, ())
    assert [n.index for n in result.neighbours[:6]] == [0, 5, 9, 33, 3, 29]
    assert result.neighbours[0].cosine == pytest.approx(1, abs=1e-6)


def test_every_key_finds_its_row_and_prints_on_one_line(tmp_path: Path) -> None:
    dataset = embedded.make(tmp_path, [noise(len(HOSTILE), keys=HOSTILE)])
    for at, key in enumerate(HOSTILE):
        result = search(dataset.out, Query(key=key), 3)
        first = result.neighbours[0]
        assert (first.key, first.index, first.label) == (key, at, ("cat", "dog", "emu")[at % 3])
        assert first.cosine == pytest.approx(1, abs=1e-6) and result.notes == ()
        assert len(str(result).split("\n")) == 4 and "\r" not in str(result)


def test_equal_keys_are_told_and_chosen_between(tmp_path: Path) -> None:
    dataset = embedded.make(
        tmp_path,
        [noise(4, seed=1, keys=["a", "b", "a", "c"]), noise(3, seed=2, keys=["x", "a", "y"])],
    )
    ids = sorted(set(vitray.read(dataset.out)["shard"].to_pylist()))
    first = search(dataset.out, Query(key="a"), 1)
    assert (first.neighbours[0].shard, first.neighbours[0].index) == (ids[0], 0)
    assert first.notes == (
        "3 rows have this key, and the first is the query; --shard and --row choose",
    )
    for query, message in (
        (Query(key="a", row=2), (ids[0], 2)),
        (Query(key="a", shard=ids[1]), (ids[1], 1)),
        (Query(shard=ids[1], row=0), (ids[1], 0)),
    ):
        result = search(dataset.out, query, 1)
        assert (
            result.neighbours[0].shard,
            result.neighbours[0].index,
        ) == message and result.notes == ()


def test_a_file_is_found_by_the_end_of_its_path_unless_a_key_is_that_end(tmp_path: Path) -> None:
    dataset = embedded.make(
        tmp_path,
        [noise(4, keys=["/in/a/cat.jpg", "/in/b/cat.jpg", "/in/b/bobcat.jpg", "/in/dog.jpg"])],
    )
    for key, index, notes in (
        ("b/cat.jpg", 1, 0),
        ("dog.jpg", 3, 0),
        ("bobcat.jpg", 2, 0),
        ("cat.jpg", 0, 1),
    ):
        result = search(dataset.out, Query(key=key), 1)
        assert (result.neighbours[0].index, len(result.notes)) == (index, notes)
    (tmp_path / "more").mkdir()
    exact = embedded.make(tmp_path / "more", [noise(2, keys=["/in/cat.jpg", "cat.jpg"])])
    assert search(exact.out, Query(key="cat.jpg"), 1).neighbours[0].index == 1


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (Query(), "give one query"),
        (Query(image="x.jpg", key="a"), "give one query"),
        (Query(shard="s"), "give one query"),
        (Query(key="none"), "has no good row like this"),
        (Query(key="a", shard="../../etc"), "has no good row like this"),
        (Query(image="/nowhere/x.jpg"), "x.jpg does not exist"),
        (Query(key="zero"), "is zero"),
    ],
)
def test_a_query_that_names_nothing_is_one_clear_error(
    tmp_path: Path, query: Query, message: str
) -> None:
    dataset = embedded.make(
        tmp_path, [Shown(["a", "zero"], np.array([[1, 2], [0, 0]], np.float32))]
    )
    with pytest.raises(JobError, match=message):
        search(dataset.out, query)


def test_of_several_vector_columns_one_is_chosen(tmp_path: Path) -> None:
    shown = noise(20)
    dataset = embedded.make(tmp_path, [shown], more=["other"])
    with pytest.raises(JobError, match="embedding_first, embedding_other: choose one by `column`"):
        search(dataset.out, Query(key="0/0003"))
    with pytest.raises(JobError, match="choose one by `column`"):
        search(dataset.out, Query(key="0/0003"), column="label")
    result = search(dataset.out, Query(key="0/0003"), column="embedding_other")
    assert result.column == "embedding_other"
    assert_nearest(result, brute_force(dataset, shown.vectors[3], "embedding_other")[:10])


def test_what_is_committed_is_searched_and_that_it_is_not_all_is_told(tmp_path: Path) -> None:
    dataset = embedded.make(tmp_path, [noise(5, seed=1), noise(5, seed=2)], commit=1)
    result = search(dataset.out, Query(key="1/0000"))
    assert result.rows == 5 and result.notes == (
        f"{dataset.out} is not complete: its committed rows were searched",
    )
    with pytest.raises(JobError, match="is not complete"):
        search(dataset.out, Query(key="1/0000"), index=str(tmp_path / "index"))


def labelled(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[vitray.Job, list[shards.Picture]]:
    """A dataset of 24 drawn shapes, made by `vitray run` with a small ViT."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    pictures = shards.pictures(24)
    shards.put_tars(str(folder / "in"), pictures, 2, folder)
    model = small_models.make_checkpoint(folder / "model", "vit", headed=True)
    fields = {"engine": "torch", "precision": "fp32", "device": "cpu", "batch_size": 8}
    job = vitray.Job(
        source=str(folder / "in/*.tar"), model=model, out=str(folder / "out"), **fields
    )
    assert vitray.run(job).rows == 24
    return job, pictures


def test_a_picture_finds_its_own_row_with_cosine_one_unless_the_weights_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, pictures = labelled(tmp_path, monkeypatch)
    for at in (0, 7, 20):  # a JPEG and a PNG, of both shards
        (tmp_path / "cat").write_bytes(pictures[at].data)
        result = search(job.out, Query(image=str(tmp_path / "cat")), 24)
        by_key = search(job.out, Query(key=pictures[at].key), 24)
        assert result.neighbours[0].key == pictures[at].key
        assert result.neighbours[0].cosine == pytest.approx(1, abs=1e-6)
        cosines = {n.key: n.cosine for n in by_key.neighbours}
        assert len(cosines) == 24
        assert [cosines[n.key] for n in result.neighbours] == pytest.approx(
            [n.cosine for n in result.neighbours], abs=1e-5
        )
    (tmp_path / "cat").write_bytes(b"no image")
    with pytest.raises(JobError, match="cannot be used: not_an_image"):
        search(job.out, Query(image=str(tmp_path / "cat")))
    (tmp_path / "cat").write_bytes(pictures[0].data)
    small_models.drop_weights(job.model, "position_embeddings")
    with pytest.raises(ModelError, match="the weights changed"):
        search(job.out, Query(image=str(tmp_path / "cat")))


def test_an_index_agrees_with_the_exact_search_and_is_made_anew_when_the_dataset_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("faiss")
    monkeypatch.setattr(reading, "BLOCK_ROWS", 300)
    one, index = noise(2000, 16, seed=1), tmp_path / "near.faiss"
    one.vectors[11] = 0
    dataset = embedded.make(
        tmp_path,
        [one, noise(500, 16, seed=2, keys=[HOSTILE[n % len(HOSTILE)] for n in range(500)])],
    )
    query = Query(key="1/0042")
    exact, built = search(dataset.out, query), search(dataset.out, query, index=str(index))
    assert built.recall >= 0.95 and any("exact and about as fast" in note for note in built.notes)
    assert any(
        note.startswith(f"built {index}") and "recall measured on 100 rows" in note
        for note in built.notes
    )
    same = {(n.key, n.shard, n.index, n.label, n.score): n.cosine for n in exact.neighbours}
    result = {(n.key, n.shard, n.index, n.label, n.score): n.cosine for n in built.neighbours}
    assert len(same.keys() & result.keys()) >= 8 and next(iter(result)) == next(iter(same))
    assert [result[row] for row in same if row in result] == pytest.approx(
        [same[row] for row in same if row in result], abs=1e-6
    )
    written = index.stat().st_mtime_ns
    again = search(dataset.out, query, index=str(index))
    assert again.neighbours == built.neighbours and not any(
        note.startswith("built") for note in again.notes
    )
    assert index.stat().st_mtime_ns == written
    grown = embedded.make(tmp_path, [one, noise(500, 16, seed=2), noise(100, 16, seed=3)])
    result = search(grown.out, Query(key="3/0050"), 1, index=str(index))
    assert (result.rows, result.neighbours[0].key, result.neighbours[0].index) == (
        2600,
        "3/0050",
        50,
    )
    assert any(note.startswith("built") for note in result.notes)
    assert sorted(path.name for path in tmp_path.glob("near*")) == ["near.faiss", "near.faiss.json"]


def test_an_index_that_was_cut_short_is_built_again_and_foreign_files_stay(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    dataset, index = embedded.make(tmp_path, [noise(30)], more=["other"]), tmp_path / "near"
    query = Query(key="0/0003")
    index.write_bytes(b"mine")
    for column in ("embedding_first", "embedding_other"):
        with pytest.raises(JobError, match="choose another file"):
            search(dataset.out, query, column=column, index=str(index))
    assert index.read_bytes() == b"mine"
    index.unlink()
    all_rows = search(dataset.out, query, column="embedding_first", index=str(index))
    assert (
        all_rows.neighbours
        == search(dataset.out, query, column="embedding_first", index=str(index)).neighbours
    )
    with pytest.raises(JobError, match="choose another file"):  # of the other column
        search(dataset.out, query, column="embedding_other", index=str(index))
    marks = json.loads((tmp_path / "near.json").read_text())
    (tmp_path / "near.json").write_text(
        json.dumps({name: marks[name] for name in ("source", "column")})
    )  # a death before the end
    again = search(dataset.out, query, column="embedding_first", index=str(index))
    assert again.neighbours == all_rows.neighbours and any(
        note.startswith("built") for note in again.notes
    )
    index.write_bytes(index.read_bytes()[:50])
    with pytest.raises(JobError, match="Delete it and"):
        search(dataset.out, query, column="embedding_first", index=str(index))
    with pytest.raises(JobError, match="lies inside the dataset"):
        search(dataset.out, query, column="embedding_first", index=f"{dataset.out}/near")


def test_without_faiss_an_index_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = embedded.make(tmp_path, [noise(5)])
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(JobError, match=r"pip install 'vitray\[search\]'"):
        search(dataset.out, Query(key="0/0003"), index=str(tmp_path / "near"))
