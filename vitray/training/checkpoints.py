"""Where a training stands, in storage: tensors as safetensors, numbers as JSON. No pickle.

A state is a few objects of at most a gigabyte, whose names nobody else uses, and one small object
that names them. That one is replaced as a whole, so a state is the old one or the new one, whenever
the process dies.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from typing import Any

from vitray.errors import ObjectMissing, StorageError, one_line
from vitray.storage import absolute, join, read, store_for

PART_BYTES = 1 << 30
OWNER = "owner"


def take(folder: str, owner: str) -> None:
    """From now on these states are ours: a command of another machine that wrote them before ends
    at its next one.
    """
    url = join(absolute(folder), OWNER)
    store_for(url).replace(url, owner.encode())


class TakenOver(StorageError):
    """Another command has these states now."""


def require_own(folder: str, owner: str) -> None:
    """Raises TakenOver where another command took them since."""
    if owner and read(join(absolute(folder), OWNER)).decode() != owner:
        raise TakenOver(
            f"another command, on another machine, trains into {folder} by now, from the last "
            f"checkpoint on. This one ends."
        )


def save(folder: str, name: str, tensors: dict[str, Any], numbers: dict[str, Any]) -> None:
    """Replace the state of that name. Raises StorageError."""
    from safetensors.torch import save as to_bytes

    pointer, old = join(absolute(folder), f"{name}.json"), _pointer(folder, name)
    parts: list[dict[str, str]] = []
    for chunk in _cut(tensors):
        data = to_bytes({key: value.detach().cpu().contiguous() for key, value in chunk.items()})
        parts.append(
            {
                "object": f"{name}-{uuid.uuid4().hex}.safetensors",
                "sha256": hashlib.sha256(data).hexdigest(),
            }
        )
        store_for(pointer).replace(join(absolute(folder), parts[-1]["object"]), data)
    store_for(pointer).replace(pointer, json.dumps({"parts": parts, "numbers": numbers}).encode())
    if old is not None:
        store_for(pointer).delete([join(absolute(folder), part["object"]) for part in old["parts"]])


def load(folder: str, name: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """(tensors, numbers) of the state of that name, None when there is none. Raises StorageError
    when it is damaged.
    """
    from safetensors.torch import load as from_bytes

    found, tensors = _pointer(folder, name), dict[str, Any]()
    if found is None:
        return None
    for part in found["parts"]:
        try:
            data = read(join(absolute(folder), part["object"]))
        except ObjectMissing as error:
            if (
                _pointer(folder, name) != found
            ):  # replaced meanwhile, by a command that was taken over from
                return load(folder, name)
            raise _damaged(folder, name, one_line(error)) from error
        if hashlib.sha256(data).hexdigest() != part["sha256"]:
            raise _damaged(folder, name, f"{part['object']} changed")
        tensors |= from_bytes(data)
    return tensors, found["numbers"]


def sweep(folder: str) -> None:
    """Delete objects that no state names: of a process that died between two writes."""
    store = store_for(folder)
    try:
        there = {info.url for info in store.find(absolute(folder))}
    except ObjectMissing:
        return
    states = [
        _pointer(folder, url.rpartition("/")[2].removesuffix(".json"))
        for url in there
        if url.endswith(".json")
    ]
    named = {
        join(absolute(folder), part["object"])
        for state in states
        if state
        for part in state["parts"]
    }
    store.delete(sorted(url for url in there if url.endswith(".safetensors") and url not in named))


def _pointer(folder: str, name: str) -> dict[str, Any] | None:
    try:
        said = json.loads(read(join(absolute(folder), f"{name}.json")))
        parts = [
            {"object": str(part["object"]), "sha256": str(part["sha256"])} for part in said["parts"]
        ]
        return {"parts": parts, "numbers": dict(said["numbers"])}
    except ObjectMissing:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, name, f"{name}.json: {one_line(error)}") from error


def _damaged(folder: str, name: str, why: str) -> StorageError:
    return StorageError(
        f"the checkpoint {join(folder, name)} is damaged ({why}). Delete {folder} to train from "
        f"the start."
    )


def _cut(tensors: dict[str, Any]) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        size += tensor.nbytes
        if size > PART_BYTES and parts[-1]:
            parts.append({})
            size = tensor.nbytes
        parts[-1][name] = tensor
    return parts
