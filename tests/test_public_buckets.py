"""Buckets of others: public ones are read without credentials, and of some the requester pays."""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from conftest import KEYS
from s3_proxy import FORWARD, Call, Proxy, proxied

from vitray.cli import main
from vitray.errors import JobError, ObjectRefused, StorageError
from vitray.job import make_job
from vitray.schema import Encoded
from vitray.sources import list_shards, read_shard
from vitray.storage import exists, expand, join, read, store_for

UNSIGNED, PAYER = "AWS_NO_SIGN_REQUEST", "AWS_REQUEST_PAYER"
IMAGES = {f"img{n}": bytes([255, 216, n]) * (100 + n) for n in range(3)}
SERVERS = ["mock", pytest.param("real", marks=pytest.mark.s3)]


class Bucket:
    """A bucket with a tar of IMAGES under `in/`; url is its address, proxy sees every request of
    vitray's.
    """

    def __init__(self, endpoint: str, proxy: Proxy) -> None:
        self.name = f"t-{uuid.uuid4().hex[:12]}"
        self.url = f"s3://{self.name}"
        self.proxy = proxy
        self.owner: Any = boto3.client(
            "s3",
            endpoint_url=endpoint,
            aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
            region_name=KEYS["AWS_DEFAULT_REGION"],
        )
        self.owner.create_bucket(Bucket=self.name)
        self.owner.put_object(Bucket=self.name, Key="in/a.tar", Body=tar_bytes())

    def allow_everybody(self, *, to_list: bool = True) -> None:
        """To list the bucket and to read its objects, by a policy."""
        rights = [("s3:ListBucket", "")] * to_list + [("s3:GetObject", "/*")]
        statements = [
            {
                "Effect": "Allow",
                "Principal": "*",
                "Action": [action],
                "Resource": [f"arn:aws:s3:::{self.name}{below}"],
            }
            for action, below in rights
        ]
        policy = json.dumps({"Version": "2012-10-17", "Statement": statements})
        self.owner.put_bucket_policy(Bucket=self.name, Policy=policy)

    def show_to_everybody(self) -> None:
        """The same by access control lists."""
        self.owner.put_bucket_acl(Bucket=self.name, ACL="public-read")
        self.owner.put_object_acl(Bucket=self.name, Key="in/a.tar", ACL="public-read")

    def headers(self, name: str) -> list[str | None]:
        """What each request so far had in this header."""
        return [call.headers.get(name) for call in self.proxy.calls]


def tar_bytes() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, data in IMAGES.items():
            member = tarfile.TarInfo(f"{name}.jpg")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def new_bucket(endpoint: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(folder / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with proxied(endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield Bucket(endpoint, proxy)


@pytest.fixture(params=SERVERS)
def bucket(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Bucket]:
    """A private bucket of somebody else: the environment has no credentials at all."""
    yield from new_bucket(request.getfixturevalue(f"{request.param}_s3"), tmp_path, monkeypatch)


@pytest.fixture
def real_bucket(real_s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """The same on a server that looks at the rights to write, too; the mock does not."""
    yield from new_bucket(real_s3, tmp_path, monkeypatch)


@pytest.fixture
def mock_bucket(mock_s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    yield from new_bucket(mock_s3, tmp_path, monkeypatch)


def sign(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)


def images_of(source: str, **fields: object) -> dict[str, bytes | None]:
    job = make_job({"source": source, "model": "m", "out": "o", **fields})
    shards = list_shards(job, []).shards
    rows = [
        row
        for shard in shards
        for row in read_shard(shard, job, lambda index: True)
        if isinstance(row, Encoded)
    ]
    return {row.key: row.data for row in rows}


def reads(url: str) -> list[Callable[[], object]]:
    return [
        lambda: expand(url),
        lambda: expand(join(url, "in/*.tar")),
        lambda: read(join(url, "in/a.tar")),
        lambda: exists(join(url, "in/none")),
    ]


def writes(url: str) -> list[Callable[[], object]]:
    return [
        lambda: store_for(url).create(join(url, "out/x"), b"x"),
        lambda: store_for(url).replace(join(url, "out/x"), b"x"),
        lambda: store_for(url).delete([join(url, "out/x")]),
    ]


def refusal(work: Callable[[], object]) -> StorageError:
    with pytest.raises(StorageError) as caught:
        work()
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".") and len(text) < 600
    return caught.value


# ---------------------------------------------------------------- without credentials


def test_a_bucket_that_its_acl_makes_public_is_read_without_credentials(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.show_to_everybody()
    require_readable_without_credentials(bucket, monkeypatch)


@pytest.mark.s3
def test_a_bucket_that_its_policy_makes_public_is_read_without_credentials(
    real_bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_bucket.allow_everybody()
    require_readable_without_credentials(real_bucket, monkeypatch)


def require_readable_without_credentials(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(UNSIGNED, "YES")
    for source in (
        f"{bucket.url}/in",
        f"{bucket.url}/in/",
        f"{bucket.url}/in/a.tar",
        f"{bucket.url}/*/*.tar",
        bucket.url,
    ):
        assert images_of(source) == IMAGES, source
    assert read(f"{bucket.url}/in/a.tar") == tar_bytes()
    assert exists(f"{bucket.url}/in/none") is False
    assert len(bucket.proxy.calls) > 10
    assert set(bucket.headers("authorization")) == {None}


@pytest.mark.s3
def test_a_manifest_names_public_objects_of_a_bucket_that_nobody_may_list(
    real_bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_bucket.owner.put_object(Bucket=real_bucket.name, Key="in/a.jpg", Body=IMAGES["img0"])
    real_bucket.allow_everybody(to_list=False)
    monkeypatch.setenv(UNSIGNED, "YES")
    refusal(lambda: expand(f"{real_bucket.url}/in"))
    (tmp_path / "list.csv").write_text(f"path\n{real_bucket.url}/in/a.jpg\n")
    assert images_of(str(tmp_path / "list.csv"), allow=[real_bucket.url]) == {
        f"{real_bucket.url}/in/a.jpg": IMAGES["img0"]
    }


@pytest.mark.s3
def test_a_public_bucket_is_not_written_without_credentials(
    real_bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_bucket.allow_everybody()
    monkeypatch.setenv(UNSIGNED, "YES")
    for work in writes(real_bucket.url):
        assert str(refusal(work)) == (
            f"{real_bucket.url}/out/x: access refused (AccessDenied). "
            "AWS_NO_SIGN_REQUEST is set, so requests carry no credentials: unset it to use yours."
        )
    listed = real_bucket.owner.list_objects_v2(Bucket=real_bucket.name)["Contents"]
    assert [item["Key"] for item in listed] == ["in/a.tar"]


@pytest.mark.s3
def test_a_private_bucket_is_refused_without_credentials(
    real_bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(UNSIGNED, "YES")
    for work in reads(real_bucket.url):
        error = refusal(work)
        assert type(error) is ObjectRefused
        assert (
            "AWS_NO_SIGN_REQUEST is set, so requests carry no credentials: unset it to use yours."
            in str(error)
        )
        assert PAYER not in str(error)


@pytest.mark.s3
def test_credentials_are_used_again_once_the_variable_is_gone(
    real_bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    sign(monkeypatch)
    assert images_of(f"{real_bucket.url}/in") == IMAGES
    monkeypatch.setenv(UNSIGNED, "1")
    refusal(lambda: images_of(f"{real_bucket.url}/in"))
    monkeypatch.delenv(UNSIGNED)
    assert images_of(f"{real_bucket.url}/in") == IMAGES


@pytest.mark.parametrize(
    ("value", "signed"),
    [("YES", False), ("yes", False), ("TRUE", False), ("True", False), ("1", False), ("on", False)]
    + [(value, True) for value in ("NO", "no", "FALSE", "0", "off", "")],
)
def test_the_variable_says_yes_or_no_as_gdal_reads_it(
    mock_bucket: Bucket, monkeypatch: pytest.MonkeyPatch, value: str, signed: bool
) -> None:
    mock_bucket.show_to_everybody()
    sign(monkeypatch)
    monkeypatch.setenv(UNSIGNED, value)
    assert read(f"{mock_bucket.url}/in/a.tar") == tar_bytes()
    assert [header is not None for header in mock_bucket.headers("authorization")] == [
        signed,
        signed,
    ]


def test_missing_credentials_name_the_variable_where_something_is_read(bucket: Bucket) -> None:
    keys = "Check AWS_PROFILE or AWS_ACCESS_KEY_ID and the bucket's policy."
    for work in reads(bucket.url):
        text = str(refusal(work))
        assert text.endswith(
            f"access refused (Unable to locate credentials). {keys} "
            "To read a public bucket without credentials, set AWS_NO_SIGN_REQUEST=YES."
        )
    for work in writes(bucket.url):
        text = str(refusal(work))
        assert text.endswith(f"access refused (Unable to locate credentials). {keys}")
    assert bucket.proxy.calls == []


# ---------------------------------------------------------------- requester pays


@pytest.mark.parametrize("value", ["requester", "Requester"])
def test_every_request_says_that_the_requester_pays(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    sign(monkeypatch)
    monkeypatch.setenv(PAYER, value)
    assert images_of(f"{bucket.url}/in") == IMAGES
    assert images_of(f"{bucket.url}/*/*.tar") == IMAGES
    assert exists(f"{bucket.url}/in/none") is False
    for work in writes(bucket.url):
        work()
    calls = bucket.proxy.calls
    assert {call.method for call in calls} == {"GET", "HEAD", "PUT", "DELETE"}
    assert any("list-type=2" in call.path for call in calls)
    # HEAD of a bucket, which answers whether it is there, takes no such header
    of_bucket = [
        call for call in calls if call.method == "HEAD" and call.path.strip("/") == bucket.name
    ]
    assert {call.headers.get("x-amz-request-payer") for call in calls if call not in of_bucket} == {
        "requester"
    }
    assert len(of_bucket) < len(calls) / 2


@pytest.mark.parametrize("value", [None, ""])
def test_without_the_variable_no_request_says_so(
    mock_bucket: Bucket, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    sign(monkeypatch)
    if value is not None:
        monkeypatch.setenv(PAYER, value)
    assert images_of(f"{mock_bucket.url}/in") == IMAGES
    assert set(mock_bucket.headers("x-amz-request-payer")) == {None}


def test_a_refused_read_says_what_to_do_if_the_requester_pays(
    mock_bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    sign(monkeypatch)

    def refuse(call: Call) -> int:
        return FORWARD if call.headers.get("x-amz-request-payer") == "requester" else 403

    mock_bucket.proxy.rule = refuse
    check = "Check AWS_PROFILE or AWS_ACCESS_KEY_ID and the bucket's policy."
    url = f"{mock_bucket.url}/in/a.tar"
    assert str(refusal(lambda: read(url))) == (
        f"{url}: access refused (403). {check} If its requester pays, set "
        f"AWS_REQUEST_PAYER=requester."
    )
    assert str(refusal(writes(mock_bucket.url)[0])).endswith(check)
    monkeypatch.setenv(PAYER, "requester")
    assert read(url) == tar_bytes()
    mock_bucket.proxy.rule = lambda call: 403
    assert str(refusal(lambda: read(url))) == f"{url}: access refused (403). {check}"


@pytest.mark.s3
def test_wrong_keys_are_not_said_to_be_about_who_pays(
    real_bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    sign(monkeypatch)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    text = str(refusal(lambda: expand(real_bucket.url)))
    assert "access refused (SignatureDoesNotMatch)" in text
    assert PAYER not in text and UNSIGNED not in text


# ---------------------------------------------------------------- bad values


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        (
            UNSIGNED,
            "maybe",
            "is 'maybe': write YES to read public buckets without credentials, or unset it.",
        ),
        (UNSIGNED, " ", "is ' ': write YES"),
        (PAYER, "YES", "is 'YES': write requester to pay for requests yourself, or unset it."),
        (PAYER, "BucketOwner", "is 'BucketOwner': write requester"),
    ],
)
def test_a_bad_value_names_the_variable_and_ends_with_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    value: str,
    says: str,
) -> None:
    sign(monkeypatch)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # the discard port: refused
    monkeypatch.setenv(name, value)
    with pytest.raises(JobError, match=f"^{name} {says}"):
        read("s3://photos/a.tar")
    monkeypatch.setattr(
        sys,
        "argv",
        ["vitray", "plan", "s3://photos/a.tar", "--model", "m", "--out", str(tmp_path / "out")],
    )
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(f"JobError: {name} {says}")
    assert not (tmp_path / "out").exists()


def test_a_bad_value_does_not_matter_where_nothing_is_on_s3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(UNSIGNED, "maybe")
    (tmp_path / "a.tar").write_bytes(tar_bytes())
    assert images_of(str(tmp_path)) == IMAGES
