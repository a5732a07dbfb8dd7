"""Where a checkpoint is: a local directory, the Hugging Face hub or S3. It is fetched if necessary.

`outlined` fetches no weights. Needs no torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vitray import storage
from vitray.errors import ModelError, ObjectMissing
from vitray.models.checkpoint import EXPORT, GRAPH_FILES, INDEX, WEIGHTS, Checkpoint
from vitray.models.foreign_checkpoints import describe_weights
from vitray.schema import short_hash
from vitray.storage import ObjectInfo

HUB_SMALL_FILES = ["*.json", "merges.txt", "spiece.model"]
HUB_FILES = [*HUB_SMALL_FILES, "model.safetensors", "model-*.safetensors"]
BUCKET_FILES = (".json", ".txt", ".safetensors", "spiece.model", *GRAPH_FILES)  # by suffix
MOST_HEADER_BYTES = 100_000_000  # as in safetensors itself
COMMIT = re.compile(r"[0-9a-f]{40}")
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def locate(model: str, revision: str | None) -> Checkpoint:
    """The checkpoint of a local or s3:// directory or a Hugging Face id, fetched if necessary."""
    path = os.path.expanduser(model.removeprefix("file://"))
    if not model.startswith("s3://") and not os.path.exists(path):
        return _from_hub(model, revision)
    if revision is not None:
        raise ModelError(
            f"{model} is a directory, which has no revisions. "
            "Leave `revision` out, or give a Hugging Face id."
        )
    if model.startswith("s3://"):
        return Checkpoint(storage.absolute(model), None, _from_s3(model))
    if not os.path.isdir(path):
        raise ModelError(
            f"{model} is a file. Give the directory that holds config.json and model.safetensors."
        )
    return Checkpoint(storage.absolute(path), None, storage.absolute(path))


@dataclass(frozen=True, slots=True)
class Outline:
    """A checkpoint to look at. has_weights: it is whole; else its weights are headers alone."""

    checkpoint: Checkpoint
    has_weights: bool


@contextlib.contextmanager
def outlined(model: str, revision: str | None, whole: bool = False) -> Iterator[Outline]:
    """The checkpoint of `locate` during the block, without fetching its weights.

    Where they are elsewhere, files of their size have their headers and a hole. whole: fetch them.
    Raises ModelError as `locate` does.
    """
    is_remote = not os.path.exists(os.path.expanduser(model.removeprefix("file://")))
    if whole or not is_remote or (model.startswith("s3://") and revision is not None):
        yield Outline(locate(model, revision), True)
        return
    with tempfile.TemporaryDirectory(prefix="vitray-outline-") as folder:
        if model.startswith("s3://"):
            yield _outline_of_bucket(model, folder)
        else:
            yield _outline_of_hub(model, revision, folder)


def _outline_of_bucket(url: str, folder: str) -> Outline:
    files = _bucket_files(url)
    target = _cached_copy(files)
    if os.path.isdir(target):
        return Outline(Checkpoint(storage.absolute(url), None, target), True)
    for name, info in files.items():
        with storage.store_for(info.url).open(info.url, info.version) as source:
            path = os.path.join(folder, name)
            if name in GRAPH_FILES or name.endswith(".safetensors"):
                size = int.from_bytes(source.read(8), "little")
                _write_outline(path, source.read(min(size, MOST_HEADER_BYTES)), info.size)
            else:
                with open(path, "wb") as copy:
                    shutil.copyfileobj(source, copy, 8 << 20)
    return Outline(Checkpoint(storage.absolute(url), None, folder), False)


def _outline_of_hub(model: str, revision: str | None, folder: str) -> Outline:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import EntryNotFoundError

    with _without_progress_bars():
        checkpoint = _from_hub(model, revision, HUB_SMALL_FILES)
    present = os.listdir(checkpoint.directory)
    names = _weight_names(checkpoint.directory) if INDEX in present else [WEIGHTS]
    has_weights = set(names) <= set(present) or EXPORT in present
    if has_weights or constants.HF_HUB_OFFLINE:
        return Outline(checkpoint, has_weights)
    for name in set(present) - set(names):
        os.symlink(os.path.join(checkpoint.directory, name), os.path.join(folder, name))
    for name in names:
        try:
            header = HfApi().parse_safetensors_file_metadata(
                model, name, revision=checkpoint.revision
            )
        except EntryNotFoundError:  # its reader names what is missing
            continue
        except Exception as error:  # any exception of httpx
            raise ModelError(
                f"model {model}: the Hugging Face hub gave no answer about {name} "
                f"({type(error).__name__}). Check the network, then run the same command again."
            ) from error
        tensors = {key: vars(tensor) for key, tensor in header.tensors.items()}
        _write_header(os.path.join(folder, name), tensors)
    return Outline(Checkpoint(model, checkpoint.revision, folder), False)


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    """A block without the bars of huggingface_hub: small files take no time."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    was_disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not was_disabled:
            enable_progress_bars()


def _weight_names(directory: str) -> list[str]:
    """The files that an index of weights names; none for a damaged index."""
    with contextlib.suppress(OSError, ValueError, RecursionError, AttributeError, TypeError):
        with open(os.path.join(directory, INDEX), encoding="utf-8") as stream:
            names = set(json.load(stream)["weight_map"].values())
        return sorted(name for name in names if os.path.basename(name) == name)
    return []


def _write_header(path: str, tensors: Mapping[str, Mapping[str, Any]]) -> None:
    """Write a file of weights with a hole. tensors: dtype, shape and data_offsets by name."""
    names = ("dtype", "shape", "data_offsets")
    fields = {key: {name: tensor[name] for name in names} for key, tensor in tensors.items()}
    header = json.dumps(fields).encode()
    end = max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
    _write_outline(path, header, 8 + len(header) + end)


def _write_outline(path: str, header: bytes, size: int) -> None:
    """Write a file of that size, which has a header of safetensors, and a hole after it."""
    with open(path, "wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(size)


def _from_hub(model: str, revision: str | None, patterns: Sequence[str] = HUB_FILES) -> Checkpoint:
    if not HUB_NAME.fullmatch(model):
        raise ModelError(
            f"{model} does not exist. Give a local directory, an s3:// directory, "
            "or a Hugging Face id (org/name)."
        )
    name = f"model {model}" + (f" at revision {revision}" if revision else "")
    directory = _download(model, revision, name, patterns)
    commit = os.path.basename(os.path.normpath(directory))
    if not COMMIT.fullmatch(commit):
        raise ModelError(
            f"{name}: the cache's snapshot {directory} is not named by a commit. "
            "Delete it and run again."
        )
    return Checkpoint(model, commit, directory)


def _download(model: str, revision: str | None, name: str, patterns: Sequence[str]) -> str:
    """The directory of a hub snapshot. name: the model and its revision, for messages."""
    from huggingface_hub import constants, errors, snapshot_download

    try:
        directory = snapshot_download(
            model, revision=revision, allow_patterns=list(patterns), ignore_patterns=["*/*"]
        )
        # graphs only where vitray exported them: those of other repositories are not needed
        if os.path.isfile(os.path.join(directory, EXPORT)):
            snapshot_download(model, revision=revision, allow_patterns=list(GRAPH_FILES))
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{name} is gated: accept its terms on huggingface.co and set HF_TOKEN."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"{name}: neither on the Hugging Face hub nor a local directory. Check the spelling."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(
            f"{name}: no such revision. Give a branch, a tag or a commit of that model."
        ) from error
    except Exception as error:
        # any exception of httpx or of the disk: no answer from the hub, and not in the cache
        if constants.HF_HUB_OFFLINE:
            raise ModelError(
                f"{name} is neither a local directory nor in the cache {constants.HF_HUB_CACHE}, "
                "and HF_HUB_OFFLINE is set. Unset it, check the spelling, "
                "or give a local directory."
            ) from error
        raise ModelError(
            f"{name} is not a local directory, not in the cache, "
            f"and the Hugging Face hub gave no answer ({type(error).__name__}). "
            "Check the spelling and the network, or give a local directory."
        ) from error
    return str(directory)


def _bucket_files(url: str) -> dict[str, ObjectInfo]:
    """The objects of a checkpoint on S3, by name. Raises ModelError where it is none."""
    base = storage.absolute(url) + "/"
    try:
        listed = {info.url.removeprefix(base): info for info in storage.expand(base)}
    except ObjectMissing as error:
        raise ModelError(
            f"{url} holds no checkpoint: there is no object under it. Check the URL."
        ) from error
    files = {
        name: info
        for name, info in listed.items()
        if "/" not in name and name.endswith(BUCKET_FILES)
    }
    has_json = any(name.endswith(".json") for name in files)
    if not has_json and (problem := describe_weights(listed)):
        raise ModelError(f"{url} {problem}")
    return files


def _cached_copy(files: Mapping[str, ObjectInfo]) -> str:
    """The directory of these versions of the objects in this node's cache, if it is there."""
    versions = "\0".join(f"{info.url} {info.version}" for info in files.values())
    return os.path.join(storage.cache_directory("models"), short_hash(versions, 32))


def _from_s3(url: str) -> str:
    """The directory in this node's cache; processes that ask at the same time fetch it once."""
    files = _bucket_files(url)
    target = _cached_copy(files)
    root = os.path.dirname(target)
    with open(f"{target}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.path.isdir(target):
            with tempfile.TemporaryDirectory(prefix=".tmp-", dir=root) as scratch:
                complete = f"{scratch}/whole"
                os.mkdir(complete)
                for name, info in files.items():
                    source = storage.store_for(info.url).open(info.url, info.version)
                    with source, open(f"{complete}/{name}", "wb") as copy:
                        shutil.copyfileobj(source, copy, 8 << 20)
                os.rename(complete, target)
    return target
