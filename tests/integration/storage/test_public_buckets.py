"""Buckets of others: public ones are read without credentials, and of some the requester pays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.public_buckets import (
    IMAGES,
    PAYER,
    UNSIGNED,
    Bucket,
    images_of,
    new_bucket,
    sign,
    tar_bytes,
)
from support.s3_proxy import FORWARD, Call
from vitray.errors import AccessError, ObjectRefused, StorageError
from vitray.storage import exists, expand, join, read, store_for

SERVERS = ["mock", pytest.param("real", marks=pytest.mark.s3)]


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


def test_a_bucket_that_its_acl_makes_public_is_read_without_credentials(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.show_to_everybody()
    require_readable_without_credentials(bucket, monkeypatch)


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


def test_a_private_bucket_is_refused_without_credentials(
    real_bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(UNSIGNED, "YES")
    for work in reads(real_bucket.url):
        error = refusal(work)
        assert type(error) in (AccessError, ObjectRefused)
        assert (
            "AWS_NO_SIGN_REQUEST is set, so requests carry no credentials: unset it to use yours."
            in str(error)
        )
        assert PAYER not in str(error)


def test_credentials_are_used_again_once_the_variable_is_gone(
    real_bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    sign(monkeypatch)
    assert images_of(f"{real_bucket.url}/in") == IMAGES
    monkeypatch.setenv(UNSIGNED, "1")
    refusal(lambda: images_of(f"{real_bucket.url}/in"))
    monkeypatch.delenv(UNSIGNED)
    assert images_of(f"{real_bucket.url}/in") == IMAGES


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


def test_wrong_keys_are_not_said_to_be_about_who_pays(
    real_bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    sign(monkeypatch)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    text = str(refusal(lambda: expand(real_bucket.url)))
    assert "access refused (SignatureDoesNotMatch)" in text
    assert PAYER not in text and UNSIGNED not in text
