"""Where a checkpoint is: a local directory, the Hugging Face hub or S3. It is fetched if necessary.

Needs no torch.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile

from vitray import storage
from vitray.errors import ModelError, ObjectMissing
from vitray.models.checkpoint import EXPORT, GRAPH_FILES, Checkpoint
from vitray.models.foreign_checkpoints import describe_weights
from vitray.schema import short_hash

HUB_FILES = ["*.json", "model.safetensors", "model-*.safetensors", "merges.txt", "spiece.model"]
BUCKET_FILES = (".json", ".txt", ".safetensors", "spiece.model", *GRAPH_FILES)  # by suffix
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


def _from_hub(model: str, revision: str | None) -> Checkpoint:
    if not HUB_NAME.fullmatch(model):
        raise ModelError(
            f"{model} does not exist. Give a local directory, an s3:// directory, "
            "or a Hugging Face id (org/name)."
        )
    name = f"model {model}" + (f" at revision {revision}" if revision else "")
    directory = _download(model, revision, name)
    commit = os.path.basename(os.path.normpath(directory))
    if not COMMIT.fullmatch(commit):
        raise ModelError(
            f"{name}: the cache's snapshot {directory} is not named by a commit. "
            "Delete it and run again."
        )
    return Checkpoint(model, commit, directory)


def _download(model: str, revision: str | None, name: str) -> str:
    """The directory of a hub snapshot. name: the model and its revision, for messages."""
    from huggingface_hub import constants, errors, snapshot_download

    try:
        directory = snapshot_download(
            model, revision=revision, allow_patterns=HUB_FILES, ignore_patterns=["*/*"]
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


def _from_s3(url: str) -> str:
    """The directory in this node's cache; processes that ask at the same time fetch it once."""
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
    root = storage.cache_directory("models")
    versions = "\0".join(f"{info.url} {info.version}" for info in files.values())
    target = os.path.join(root, short_hash(versions, 32))
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
