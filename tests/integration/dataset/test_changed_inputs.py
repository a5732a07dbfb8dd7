"""Inputs that changed, went or came: what the manifest step keeps and what it removes."""

from __future__ import annotations

from factories.hand_made import finish_with
from support.dataset_parts import commit, error_table, input_shard, make, names_of, success
from vitray.dataset import committed_files, data_files, read, read_manifest, write_manifest
from vitray.schema import Shard
from vitray.storage import exists, join


def test_a_superseded_version_stays_until_its_replacement_is_committed(quick_out: str) -> None:
    dataset, kept = make(quick_out), input_shard(quick_out, "kept")
    old = input_shard(quick_out, "photos", b"version 1")
    commit(dataset, old, 5, {0: "empty"})
    commit(dataset, kept, 4)
    finish_with(dataset, [old.id, kept.id], [old.id, kept.id])
    new = input_shard(quick_out, "photos", b"version 2, longer")
    listed = [new.id, kept.id]

    finish_with(dataset, listed, listed)
    assert set(committed_files(quick_out)) == {old.id, kept.id} and success(quick_out) is None
    finish_with(dataset, listed, [kept.id])
    assert set(committed_files(quick_out)) == {old.id, kept.id}, (
        "`limit` leaves the new version quick_out: the old one is all there is"
    )

    commit(dataset, new, 6)
    table = read(quick_out)
    assert len(set(table["shard"].to_pylist())) == 2, (
        "never two versions of an input, also before the manifest step"
    )
    finish_with(dataset, listed, listed)
    assert set(committed_files(quick_out)) == {new.id, kept.id} and not exists(
        dataset.errors_url(old.id)
    )
    assert data_files(quick_out) == [dataset.data_url(shard) for shard in sorted(listed)]
    assert read(quick_out).num_rows == 10 and success(quick_out) is not None


def test_a_gone_input_keeps_its_rows_until_prune(quick_out: str) -> None:
    dataset, one, two = (
        make(quick_out),
        input_shard(quick_out, "one"),
        input_shard(quick_out, "two"),
    )
    commit(dataset, one, 4)
    commit(dataset, two, 4, {0: "empty"})
    ledger = finish_with(dataset, [one.id], [one.id])
    assert (ledger.gone, ledger.shards, ledger.rows) == (1, 2, 7)
    manifest = read_manifest(quick_out)
    assert manifest is not None
    assert dict(zip(manifest["shard"].to_pylist(), manifest["state"].to_pylist())) == {
        one.id: "current",
        two.id: "gone",
    }
    assert read(quick_out).num_rows == 7
    ledger = finish_with(dataset, [one.id], [one.id], prune=True)
    assert (ledger.gone, ledger.shards, ledger.rows) == (0, 1, 4)
    assert list(committed_files(quick_out)) == [one.id] and names_of(quick_out, "_errors/") == [] and names_of(quick_out, "manifest-") == [
        f"_vitray/{ledger.manifest}"
    ]  # fmt: skip


def test_a_version_that_was_committed_after_the_listing_is_not_removed(quick_out: str) -> None:
    """A lists the old version; the input changes, another run commits the new one; A goes on."""
    dataset, old = make(quick_out), input_shard(quick_out)
    commit(dataset, old, 6)
    later: list[Shard] = []

    def list_ids() -> tuple[list[str], list[str]]:
        if later:
            return [later[0].id], [later[0].id]
        later.append(input_shard(quick_out, body=b"another tar, as it is now"))
        commit(dataset, later[0], 4)
        return [old.id], [old.id]

    ledger = write_manifest(dataset, list_ids)
    assert committed_files(quick_out).keys() == {later[0].id}
    assert (ledger.rows, ledger.pending) == (4, 0) and read_manifest(quick_out)[
        "shard"
    ].to_pylist() == [later[0].id]


def test_an_input_that_arrived_after_the_listing_is_not_pruned(quick_out: str) -> None:
    dataset, one = make(quick_out), input_shard(quick_out)
    commit(dataset, one, 6)
    ids = [one.id]

    def list_ids() -> tuple[list[str], list[str]]:
        listed = list(ids)
        if len(ids) == 1:
            arrived = input_shard(quick_out, "dogs")
            commit(dataset, arrived, 4)
            ids.append(arrived.id)
        return listed, listed

    assert write_manifest(dataset, list_ids, prune=True).shards == 2 and committed_files(
        quick_out
    ).keys() == set(ids)


def test_an_outdated_version_keeps_its_errors_and_its_place_in_the_manifest(quick_out: str) -> None:
    """Its input changed, and the new version is set aside, or left out by `limit`."""
    dataset, old = make(quick_out), input_shard(quick_out)
    commit(dataset, old, 6, {1: "empty"})
    new = input_shard(quick_out, body=b"changed")
    for planned, is_done in (([new.id], False), ([], True)):
        ledger = finish_with(dataset, [new.id], planned)
        assert (ledger.rows, ledger.errors, ledger.pending) == (5, 1, len(planned))
        assert read_manifest(quick_out).select(["shard", "state"]).to_pylist() == [
            {"shard": old.id, "state": "outdated"}
        ]
        assert (
            error_table(dataset, old).num_rows == 1
            and exists(join(quick_out, "_SUCCESS.json")) == is_done
        )
    commit(dataset, new, 4)
    assert finish_with(dataset, [new.id], [new.id]).rows == 4 and committed_files(
        quick_out
    ).keys() == {new.id}
