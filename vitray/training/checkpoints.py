"""The states of a training in storage: tensors as safetensors, numbers as JSON. No pickle.

A state is a few objects of at most a gigabyte with unique names, and a small object that lists
them. The list is replaced as a whole. So a state is the old one or the new one, whenever the
process dies.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from typing import Any

from vitray.errors import ObjectMissing, StorageError, TakenOver, one_line
from vitray.storage import absolute, join, read, store_for

PART_BYTES = 1 << 30
OWNER = "owner"


def take_over(folder: str, owner: str) -> None:
    """Own these states. The command that owned them ends at its next checkpoint."""
    url = join(absolute(folder), OWNER)
    store_for(url).replace(url, owner.encode())


def require_owner(folder: str, owner: str) -> None:
    """Raises TakenOver if another command owns these states now. No owner: nothing is checked."""
    if owner and read(join(absolute(folder), OWNER)).decode() != owner:
        raise TakenOver(
            f"another command, on another machine, now trains into {folder} "
            "from the last checkpoint on. This command ends."
        )


def save(folder: str, name: str, tensors: dict[str, Any], numbers: dict[str, Any]) -> None:
    """Replace the state of that name. Raises StorageError."""
    from safetensors.torch import save as to_bytes

    folder = absolute(folder)
    store = store_for(folder)
    old_state = _read_state(folder, name)
    parts: list[dict[str, str]] = []
    for chunk in _in_parts(tensors):
        data = to_bytes({key: value.detach().cpu().contiguous() for key, value in chunk.items()})
        part = f"{name}-{uuid.uuid4().hex}.safetensors"
        parts.append({"object": part, "sha256": hashlib.sha256(data).hexdigest()})
        store.replace(join(folder, part), data)
    state = {"parts": parts, "numbers": numbers}
    store.replace(join(folder, f"{name}.json"), json.dumps(state).encode())
    if old_state is not None:
        store.delete([join(folder, part["object"]) for part in old_state["parts"]])


def load(folder: str, name: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """(tensors, numbers) of the state of that name; None if there is none.

    Raises StorageError if it is damaged.
    """
    from safetensors.torch import load as from_bytes

    state = _read_state(folder, name)
    if state is None:
        return None
    tensors: dict[str, Any] = {}
    for part in state["parts"]:
        try:
            data = read(join(absolute(folder), part["object"]))
        except ObjectMissing as error:
            # a command that does not know yet that it was taken over may replace the state
            if _read_state(folder, name) != state:
                return load(folder, name)
            raise _damaged(folder, name, one_line(error)) from error
        if hashlib.sha256(data).hexdigest() != part["sha256"]:
            raise _damaged(folder, name, f"{part['object']} changed")
        tensors |= from_bytes(data)
    return tensors, state["numbers"]


def sweep(folder: str) -> None:
    """Delete objects that no state lists: a process died between two writes."""
    store = store_for(folder)
    try:
        urls = {info.url for info in store.find(absolute(folder))}
    except ObjectMissing:
        return
    listed: set[str] = set()
    for url in urls:
        name = url.rpartition("/")[2]
        if name.endswith(".json"):
            state = _read_state(folder, name.removesuffix(".json"))
            parts = state["parts"] if state is not None else []
            listed |= {join(absolute(folder), part["object"]) for part in parts}
    unlisted = urls - listed
    store.delete(sorted(url for url in unlisted if url.endswith(".safetensors")))


def _read_state(folder: str, name: str) -> dict[str, Any] | None:
    """The list of a state's objects, and its numbers. Raises StorageError if it is damaged."""
    try:
        state = json.loads(read(join(absolute(folder), f"{name}.json")))
        parts = [
            {"object": str(part["object"]), "sha256": str(part["sha256"])}
            for part in state["parts"]
        ]
        return {"parts": parts, "numbers": dict(state["numbers"])}
    except ObjectMissing:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, name, f"{name}.json: {one_line(error)}") from error


def _damaged(folder: str, name: str, reason: str) -> StorageError:
    return StorageError(
        f"the checkpoint {join(folder, name)} is damaged ({reason}). "
        f"Delete {folder} to train from the start."
    )


def _in_parts(tensors: dict[str, Any]) -> list[dict[str, Any]]:
    """The tensors in parts of at most PART_BYTES; a larger tensor is a part of its own."""
    parts: list[dict[str, Any]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        size += tensor.nbytes
        if size > PART_BYTES and parts[-1]:
            parts.append({})
            size = tensor.nbytes
        parts[-1][name] = tensor
    return parts
