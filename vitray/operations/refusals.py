"""What a plan and a check refuse, as a run would before any work."""

from __future__ import annotations

from vitray.dataset import Dataset, require_continuable, with_frozen
from vitray.job import Job
from vitray.models import CheckedModel, check_model, possible_specs
from vitray.pipeline import passthrough_of
from vitray.sources import Listing


def require_fitting_model(
    job: Job, dataset: Dataset | None, *, reads_weights: bool
) -> CheckedModel:
    """The job's model, if it is there and gives what the job asks for. Raises ModelError.

    dataset: of the job's `out`; with it the weights are hashed, unless they are large.
    reads_weights: hash them in any case.
    """
    spec = None if dataset is None else dataset.spec
    frozen_job = job if dataset is None else with_frozen(job)
    return check_model(frozen_job, spec, reads_weights=reads_weights)


def require_same_job(
    job: Job,
    dataset: Dataset | None,
    listing: Listing,
    model: CheckedModel,
    most_footers: int | None = None,
) -> None:
    """Raise FingerprintError where `out` holds rows of another job.

    most_footers: of data files that no manifest lists, to read at most.
    """
    specs = [model.spec] if dataset is not None else possible_specs(job, model.spec)
    columns = passthrough_of(job, listing)
    require_continuable(job, specs, model.vectors, columns, most_footers)
