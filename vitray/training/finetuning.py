"""`vitray finetune`: from a TrainingConfig to a checkpoint for `model:`. Safe to kill and repeat.

The files in OUT:

    config.json, model.safetensors, preprocessor_config.json   the checkpoint
    head.json, head.safetensors         only of a linear probe
    README.md, metrics.jsonl, skipped.json, report.html, tensorboard/
    _vitray/training.json               what decides the numbers; the first run creates it
    _vitray/state/                      the best and the last checkpoint
    _vitray/result.json                 written last: the training has ended
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Callable

from vitray.dataset import check_store
from vitray.errors import JobError, ObjectMissing, count
from vitray.models import checkpoint
from vitray.storage import absolute, read, store_for
from vitray.training import checkpoints, out_folder, outputs
from vitray.training.activity import Activity, Phase, Watch, unwatched
from vitray.training.config import TrainingConfig
from vitray.training.examples import delete_work_folder
from vitray.training.outcome import (
    HeldOut,
    TrainingOutcome,
    TrainingResult,
    pictures_of_pixels,
    shown_images,
)
from vitray.training.training_run import TrainingRun, state_folder

log = logging.getLogger(__name__)
Report = Callable[[dict[str, float]], None]


def finetune(
    config: TrainingConfig,
    report: Report = lambda record: None,
    address: str | None = None,
    allow_open: bool = False,
    watch: Watch = unwatched,
) -> TrainingResult:
    """Train what is missing, and write OUT.

    report: gets the record of each epoch. watch: gets every Activity, many a second.
    address, allow_open: of Ray, for several workers.
    Raises JobError for a config that does not fit its data or model, StorageError, and
    FingerprintError if OUT was begun with other settings or data, or holds foreign files.
    """
    with out_folder.locked(config.out):
        result = _earlier_result(config)
        if result is not None:
            log.warning(
                "%s is trained already: nothing was done, and no image was read", config.out
            )
            return result
        out_folder.require_unused(config.out)
        check_store(config.out)
        try:
            result = _trained(config, report, address, allow_open, watch)
        except JobError:
            if not out_folder.is_begun(config.out):
                delete_work_folder(config.out)  # a refused config leaves nothing
            raise
        url = out_folder.result_url(config.out)
        # without `out`: a path of this machine is wrong after a move
        store_for(url).replace(url, json.dumps({**vars(result), "out": ""}, indent=1).encode())
        _clean_up(config)
        return result


def _earlier_result(config: TrainingConfig) -> TrainingResult | None:
    """The result of a training that has ended. Raises FingerprintError for other settings."""
    try:
        fields = json.loads(read(out_folder.result_url(config.out)))
    except ObjectMissing:
        return None
    out_folder.require_same(config, {})
    _clean_up(config)
    return TrainingResult(**{**fields, "out": absolute(config.out)})


def _clean_up(config: TrainingConfig) -> None:
    checkpoints.sweep(state_folder(config.out))
    delete_work_folder(config.out)


def _trained(
    config: TrainingConfig, report: Report, address: str | None, allow_open: bool, watch: Watch
) -> TrainingResult:
    if config.train == "probe":
        from vitray.training.probe_training import train_linear_probe

        return train_linear_probe(config, watch)
    return _train(config, report, address, allow_open, watch)


def _train(
    config: TrainingConfig, report: Report, address: str | None, allow_open: bool, watch: Watch
) -> TrainingResult:
    from vitray.training.fitting import WorkerGroup, copy_into

    run = TrainingRun.of(config, watch)
    watch(Activity(Phase.OPENING_MODEL))
    group = WorkerGroup(device=_own_device(config), owner=uuid.uuid4().hex)
    fitting = run.fitting(group)
    out_folder.require_same(config, _inputs(run, fitting.batches.size))
    checkpoints.take_over(fitting.state, group.owner)
    if config.workers > 1:
        from vitray.training.workers import fit_with_ray

        watch(Activity(Phase.TRAINING, detail=f"{count(config.workers, 'worker')}"))
        fit_with_ray(config, group.owner, address, allow_open)
        checkpoints.require_owner(fitting.state, group.owner)
    progress = fitting.run(report, watch)  # of several workers: reads their last checkpoint
    if config.workers > 1:
        for record in progress.records:
            if "epoch" in record:
                report(record)
    best = checkpoints.load(fitting.state, "best")
    if best is not None:
        tensors, _ = best
        copy_into(fitting.learning, tensors, fitting.state)
    examples = run.training_data.held_out
    held_out = None
    if len(examples.ids) > 0:
        fitting.meter.start(Phase.MEASURING, 0, len(examples.ids))
        evaluation = fitting.evaluate(examples, run.pixels)
        shown = shown_images(examples.ids, evaluation).all
        pictures = pictures_of_pixels(examples.pixels, shown)
        held_out = HeldOut(examples.keys, examples.ids, evaluation, pictures)
    outcome = _outcome(run, progress.records, held_out)
    checkpoints.require_owner(fitting.state, group.owner)
    watch(Activity(Phase.WRITING))
    outputs.write(outcome, fitting.student.finished().cpu(), head=None)
    return outcome.result(
        images=len(run.training_data.train.ids),
        epochs=int(progress.records[-1]["epoch"]),
        seconds=progress.seconds,
        is_model=True,
    )


def _own_device(config: TrainingConfig) -> str:
    """The device of this process; empty for the config's.

    With several workers this process only writes the result, on any device it has: the head of a
    cluster may be without a GPU.
    """
    from vitray.models.machine import resolve_device

    if config.workers == 1:
        return ""
    return "cpu" if config.device == "cpu" else resolve_device("auto")


def _inputs(run: TrainingRun, images_a_step: int) -> dict[str, object]:
    """What decides the numbers besides the config, by its names in training.json."""
    inputs: dict[str, object] = {
        "weights": run.weights,
        "data": run.training_data.digest,
        "class_names": list(run.training_data.classes),
    }
    if run.online_teacher:
        inputs["teacher_weights"] = checkpoint.hash_weights(run.online_teacher)
    return {**inputs, "images_a_step": images_a_step}


def _outcome(
    run: TrainingRun, records: list[dict[str, float]], held_out: HeldOut | None
) -> TrainingOutcome:
    return TrainingOutcome(
        config=run.config,
        base=run.base,
        classes=run.training_data.classes,
        records=records,
        skipped=run.training_data.skipped,
        figures=held_out.evaluation.figures(held_out.truth) if held_out is not None else {},
        held_out=held_out,
    )
