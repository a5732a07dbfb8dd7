"""The output directory of a training: whether it may be written, and what it was begun with."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from vitray.dataset import is_scratch, training_url
from vitray.errors import FingerprintError, JobError, ObjectMissing
from vitray.schema import short_hash
from vitray.storage import absolute, cache_directory, exists, read, store_for
from vitray.training.config import TrainingConfig


def result_url(out: str) -> str:
    """The URL of result.json, which exists once a training has ended."""
    return training_url(out, "result.json")


def is_begun(out: str) -> bool:
    """Whether a training has begun there: its settings are fixed."""
    return exists(_settings_url(out))


def require_unused(out: str) -> None:
    """Raises FingerprintError if OUT holds files that no training wrote, such as a model.

    A killed training leaves decoded images and the files of a store check before it has begun.
    """
    if is_begun(out):
        return
    root = absolute(out)
    try:
        urls = [info.url for info in store_for(root).find(root)]
    except ObjectMissing:
        return
    images = training_url(root, "images") + "/"
    foreign = [url for url in urls if not (url.startswith(images) or is_scratch(root, url))]
    if foreign:
        name = foreign[0].removeprefix(f"{root}/")
        raise FingerprintError(
            f"{root} holds files that no training wrote, such as {name}. "
            "Choose an empty directory as `out`."
        )


def require_same(config: TrainingConfig, inputs: Mapping[str, object]) -> None:
    """Record what decides the numbers, the first time.

    inputs: hashes of data and weights, and the like. Raises FingerprintError if OUT was begun with
    other settings or inputs.
    """
    settings = json.loads(json.dumps({**config.deciding(), **inputs}))
    url = _settings_url(config.out)
    if store_for(url).create(url, json.dumps(settings, indent=1).encode()):
        return
    recorded = json.loads(read(url))
    if names := [name for name in settings if recorded.get(name) != settings[name]]:
        raise FingerprintError(
            f"{config.out} was begun with another {', '.join(names)}. "
            "Choose another `out`, or restore the old settings and inputs."
        )


def _settings_url(out: str) -> str:
    return training_url(out, "training.json")


@contextmanager
def locked(out: str) -> Iterator[None]:
    """Only one command of this machine trains into OUT at a time. Raises JobError.

    Two would delete each other's checkpoints.
    """
    name = f"{short_hash(absolute(out), 24)}.lock"
    with open(os.path.join(cache_directory("finetune"), name), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise JobError(
                f"another vitray finetune trains into {out}. Wait for it, or choose another `out`."
            ) from None
        yield
