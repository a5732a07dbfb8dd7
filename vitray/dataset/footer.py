"""The footer of a data file: what its metadata says, as stored and as `Footer`."""

from __future__ import annotations

import base64
import json
import uuid
from dataclasses import dataclass, field
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vitray.dataset.identity import Dataset
from vitray.dataset.row_digest import RowsDigest
from vitray.errors import CommitError, one_line
from vitray.left_out import LeftOut
from vitray.schema import ERROR_SCHEMA, End, ipc_bytes, ipc_table
from vitray.storage import store_for
from vitray.version import __version__

READS = 3  # of a file that cannot be parsed: the transfer may have damaged it
# fields of a Footer that the file stores as they are
_TEXTS = ("write_id", "fingerprint", "shard", "url", "source_version", "rows_sha256")
# fields of ModelSpec
_SPEC_FIELDS = ("model", "revision", "weights_sha256", "dimension", "precision", "engine")


@dataclass(frozen=True, slots=True)
class Footer:
    """The metadata in the footer of a data file.

    reasons: errors by reason. truncated_at: the byte at which its shard was cut.
    left_out: images of its shard without a row, by left_out.LEFT_OUT. image_members: images by the
    tar member that they came from. removals: how many lists of removed keys its rows were checked
    against.
    """

    write_id: str
    fingerprint: str
    shard: str
    url: str
    source_version: str
    rows: int
    errors: int
    truncated_at: int | None
    rows_sha256: str
    reasons: dict[str, int]
    error_rows: pa.Table
    left_out: dict[str, int] = field(default_factory=dict)
    image_members: dict[str, int] = field(default_factory=dict)
    source_rules: int = 1
    key_column: str | None = None
    removals: int = 0

    @property
    def total(self) -> int:
        """The images of its shard: rows, errors, and images whose row was removed."""
        return self.rows + self.errors + self.removed

    @property
    def removed(self) -> int:
        """Images whose row was removed, or never written because their key is blocked."""
        return self.left_out.get(LeftOut.REMOVED, 0)


class ShardInput(NamedTuple):
    """The shard id of a data file, and the URL and version of its input."""

    shard: str
    url: str
    version: str


def read_footer(url: str) -> Footer:
    """The footer of a data file. Raises ObjectMissing; CommitError for another program's file."""
    for attempt in range(1, READS + 1):
        try:
            with store_for(url).open(url) as stream:
                metadata = pq.read_metadata(stream).metadata or {}
            return parse_footer(
                {k.decode(): v.decode() for k, v in metadata.items() if k.startswith(b"vitray.")}
            )
        except (ValueError, KeyError, OSError) as error:
            # an error of the disk; pyarrow's own error for damaged bytes has no errno
            if isinstance(error, OSError) and error.errno is not None:
                raise
            if attempt == READS:
                reason = one_line(error)
                raise CommitError(
                    f"{url} is not a data file of vitray ({reason}). Move it away and run again."
                ) from error
    raise AssertionError


def footer_metadata(
    dataset: Dataset,
    source: ShardInput,
    end: End,
    digest: RowsDigest,
    errors: pa.Table,
    *,
    removals: int = 0,
) -> dict[str, str]:
    """The metadata of a data file's footer, as text, by their stored names."""
    reasons = pc.value_counts(errors["reason"]).to_pylist()
    metadata = {
        "write_id": uuid.uuid4().hex,
        "fingerprint": dataset.fingerprint,
        "shard": source.shard,
        "url": source.url,
        "source_version": source.version,
        "rows": digest.rows,
        "errors": errors.num_rows,
        "truncated_at": end.truncated_at,
        "rows_sha256": digest.hexdigest(),
        "reasons": json.dumps({item["values"]: item["counts"] for item in reasons}),
        "left_out": json.dumps(end.left_out) if end.left_out else "",
        "image_members": json.dumps(end.image_members) if end.image_members else "",
        "source_rules": dataset.job.rules,
        "key_column": dataset.job.key_column,
        "removals": removals or "",
        "error_rows": _encoded_rows(errors),
        **{name: getattr(dataset.spec, name) for name in _SPEC_FIELDS},
        "id2label_sha256": dataset.spec.labels_sha256(),
        "decode": dataset.job.decode,
        "version": __version__,
    }
    return {
        f"vitray.{name}": "" if value is None else str(value) for name, value in metadata.items()
    }


def _encoded_rows(rows: pa.Table) -> str:
    """Rows as base64, since footer values are text to other readers of Parquet; empty for none."""
    return base64.b64encode(ipc_bytes(rows, "zstd")).decode() if rows.num_rows else ""


def _decoded_rows(text: str) -> pa.Table:
    return ipc_table(base64.b64decode(text)) if text else ERROR_SCHEMA.empty_table()


def parse_footer(metadata: dict[str, str]) -> Footer:
    """The footer of stored metadata. Raises KeyError or ValueError for another program's."""
    values = {name.removeprefix("vitray."): value for name, value in metadata.items()}
    return Footer(
        **{name: values[name] for name in _TEXTS},
        rows=int(values["rows"]),
        errors=int(values["errors"]),
        truncated_at=int(values["truncated_at"]) if values["truncated_at"] else None,
        reasons=json.loads(values["reasons"]),
        error_rows=_decoded_rows(values["error_rows"]),
        # files written before December 2026 have neither of these two
        left_out=json.loads(values.get("left_out") or "{}"),
        image_members=json.loads(values.get("image_members") or "{}"),
        source_rules=int(values.get("source_rules") or 1),
        key_column=values.get("key_column") or None,
        removals=int(values.get("removals") or 0),
    )
