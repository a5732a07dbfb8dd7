"""Datasets made before December 2026 open, validate and go on as they were begun: see
data/make_dataset_v1.py.
"""

from __future__ import annotations

import pytest

import vitray
from support.old_datasets import FIRST, job_of, objects, rows
from vitray.errors import JobError
from vitray.operations.validation import validate


@pytest.mark.parametrize("name", FIRST)
def test_an_old_dataset_goes_on_by_its_own_rules(bucket: str, name: str) -> None:
    old_objects, labelled = objects(bucket, name), {row["key"]: row for row in rows(bucket, name)}
    result = vitray.run(job_of(bucket, name))
    assert (result.exit_code, result.committed, result.pending) == (0, 1, 0)
    new_objects = objects(bucket, name)
    assert old_objects.items() <= new_objects.items() and not any(
        path.startswith("_errors/") for path in new_objects
    )
    checked = validate(result.out, content=True)
    assert checked.ok and checked.pending == 0, checked
    assert labelled.items() <= {row["key"]: row for row in rows(bucket, name)}.items()
    assert vitray.run(job_of(bucket, name)).committed == 0
    with pytest.raises(JobError, match="top_k differs"):
        vitray.run(job_of(bucket, name, top_k=2))
