"""S3 that fails, refuses or loses answers: retries, and one clear error."""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from support.s3 import KEYS, new_bucket
from support.s3_proxy import FORWARD, LOSE, Proxy, proxied
from support.stores import below, first, put, require_one_line_with_next_step
from vitray.dataset import check_store
from vitray.errors import AccessError, ObjectRefused, StorageError, UnsafeStore
from vitray.exit_codes import ExitCode
from vitray.storage import exists, expand, join, read, store_for


@pytest.fixture
def proxy(mock_s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy to the mock, which the environment points at; `proxy_root` is a bucket behind it."""
    with proxied(mock_s3) as running:
        yield running


@pytest.fixture
def proxy_root(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the back-off, not the store
    root = new_bucket(proxy.url, monkeypatch) + "/root"
    put(join(root, "there"), b"bytes that are there")
    proxy.calls.clear()
    return root


@pytest.mark.parametrize("verdict", [500, 503, 429, 408, LOSE])
def test_nine_failures_are_survived(proxy: Proxy, proxy_root: str, verdict: int) -> None:
    store, url = store_for(proxy_root), join(proxy_root, "there")
    for method, work in {
        "HEAD": lambda: store.stat(url).size == 20,
        "GET": lambda: read(url) == b"bytes that are there",
        "DELETE": lambda: store.delete([join(proxy_root, "absent")]) is None,
    }.items():
        proxy.calls.clear()
        proxy.rule = first(9, verdict, method)
        assert work()
        assert proxy.count(method) == 10


def test_a_listing_survives_failures(proxy: Proxy, proxy_root: str) -> None:
    proxy.rule = first(4, 503)
    assert [i.url for i in store_for(proxy_root).find(proxy_root)] == [join(proxy_root, "there")]
    proxy.rule = first(4, 503)
    assert [i.url for i in expand(join(proxy_root, "th*"))] == [join(proxy_root, "there")]


@pytest.mark.parametrize("verdict", [503, 409])
def test_a_create_survives_failures_before_it_arrives(
    proxy: Proxy, proxy_root: str, verdict: int
) -> None:
    url = join(proxy_root, "new")
    proxy.rule = first(3, verdict, "PUT")
    assert store_for(url).create(url, b"mine") is True
    assert read(url) == b"mine" and proxy.count("PUT", "/new") == 4


def test_a_tenth_failure_is_one_error_with_the_url(proxy: Proxy, proxy_root: str) -> None:
    proxy.rule = lambda call: 503
    store, url = store_for(proxy_root), join(proxy_root, "there")
    for method, work in {
        "HEAD": lambda: store.stat(url),
        "PUT": lambda: store.create(url, b"x"),
        "DELETE": lambda: store.delete([url]),
    }.items():
        proxy.calls.clear()
        with pytest.raises(StorageError) as caught:
            work()
        require_one_line_with_next_step(
            caught.value, url, "10 attempts", "run the same command again"
        )
        assert type(caught.value) is StorageError and len(proxy.calls) == proxy.count(method) == 10


def test_a_refusal_is_not_retried(proxy: Proxy, proxy_root: str) -> None:
    url = join(proxy_root, "there")
    assert store_for(url).create(url, b"x") is False
    assert proxy.count("PUT") == 1
    proxy.rule = lambda call: 403
    with pytest.raises(StorageError, match="access refused"):
        store_for(url).create(url, b"x")
    assert proxy.count("PUT") == 2


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_an_object_that_is_refused_is_told_from_a_store_that_fails(
    proxy: Proxy, proxy_root: str, method: str
) -> None:
    proxy.rule = lambda call: 403 if call.method == method else FORWARD
    with pytest.raises(ObjectRefused, match="access refused"):
        read(join(proxy_root, "there"))
    assert proxy.count(method) == 1


def test_a_lost_answer_of_a_create_never_writes_twice(proxy: Proxy, proxy_root: str) -> None:
    url = join(proxy_root, "lost")
    proxy.rule = first(1, LOSE, "PUT")
    assert store_for(url).create(url, b"mine") is False, "it is there: whoever asks must look"
    assert read(url) == b"mine" and proxy.count("PUT", "/lost") == 2
    assert all(call.headers["if-none-match"] == "*" for call in proxy.calls if call.method == "PUT")


def test_a_read_cut_short_is_tried_again(mock_s3: str, proxy: Proxy, proxy_root: str) -> None:
    url = join(proxy_root, "there")
    proxy.rule = first(2, LOSE, "GET")
    assert read(url) == b"bytes that are there"
    gets = [call for call in proxy.calls if call.method == "GET"]
    assert len(gets) == 3 and {call.headers["if-match"].strip('"') for call in gets} == {
        store_for(url).stat(url).version
    }


def test_the_back_off_grows_and_ends(
    proxy: Proxy, proxy_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    proxy.rule = lambda call: 503
    with pytest.raises(StorageError):
        store_for(proxy_root).stat(join(proxy_root, "there"))
    assert len(slept) == 9 and all(0 <= s <= min(8.0, 0.1 * 2**n) for n, s in enumerate(slept))


def test_a_store_that_ignores_the_condition_is_refused(proxy: Proxy, proxy_root: str) -> None:
    proxy.drop_headers = frozenset({"if-none-match"})
    with pytest.raises(UnsafeStore) as caught:
        check_store(proxy_root)
    require_one_line_with_next_step(
        caught.value, proxy_root, "If-None-Match", "Use a store that honours it"
    )
    assert below(proxy_root) == ["there"]


def test_wrong_keys_are_one_error_and_not_retried(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put(join(s3, "x"))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("retried"))
    for work in (
        lambda: read(join(s3, "x")),  # a HEAD, to which S3 says 403 and no more
        lambda: store_for(s3).create(join(s3, "y"), b""),
        lambda: expand(s3),
        lambda: expand(join(s3, "*")),
        lambda: store_for(s3).delete([join(s3, "x")]),
    ):
        with pytest.raises(StorageError) as caught:
            work()
        require_one_line_with_next_step(
            caught.value, s3, "access refused", "Check AWS_PROFILE or AWS_ACCESS_KEY_ID"
        )
        assert type(caught.value) is AccessError
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", KEYS["AWS_SECRET_ACCESS_KEY"])
    assert read(join(s3, "x")) == b"x"


@contextlib.contextmanager
def refusing(status: int, code: str) -> Iterator[str]:
    """The endpoint of an S3 that answers every request with this error."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def refuse(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

        do_GET = do_PUT = do_HEAD = do_DELETE = refuse

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


@pytest.mark.parametrize(
    ("status", "code", "listing", "reading"),
    [
        (403, "InvalidAccessKeyId", AccessError, AccessError),
        (403, "SignatureDoesNotMatch", AccessError, AccessError),
        (403, "AccessDenied", AccessError, ObjectRefused),
        (400, "AuthorizationHeaderMalformed", AccessError, None),
        (403, "ExpiredToken", StorageError, StorageError),
        (403, "RequestTimeTooSkewed", StorageError, StorageError),
    ],
)
def test_a_refusal_that_no_later_run_mends_is_bad_usage(
    status: int,
    code: str,
    listing: type[StorageError],
    reading: type[StorageError] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("retried"))
    with refusing(status, code) as endpoint:
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": endpoint}.items():
            monkeypatch.setenv(name, value)
        works = {
            lambda: expand("s3://b/in"): listing,
            lambda: store_for("s3://b").create("s3://b/x", b"x"): listing,
            lambda: read("s3://b/x"): reading,
        }
        for work, kind in works.items():
            if kind is None:
                continue
            with pytest.raises(StorageError) as caught:
                work()
            assert type(caught.value) is kind
            is_final = kind is not StorageError
            assert caught.value.exit_code == (
                ExitCode.BAD_USAGE if is_final else ExitCode.BROKEN_SYSTEM
            )
            require_one_line_with_next_step(caught.value, "s3://b/", "Check ")


def test_no_keys_at_all_are_one_error(
    mock_s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in KEYS:
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", mock_s3)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("retried"))
    with pytest.raises(StorageError) as caught:
        store_for("s3://b").create("s3://b/x", b"x")
    require_one_line_with_next_step(caught.value, "s3://b/x", "AWS_ACCESS_KEY_ID")
    assert caught.value.exit_code is ExitCode.BAD_USAGE


@pytest.mark.parametrize("kind", ["mock", pytest.param("real", marks=pytest.mark.s3)])
def test_a_missing_bucket_is_one_error(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_bucket(request.getfixturevalue(f"{kind}_s3"), monkeypatch)
    url = f"s3://never-{uuid.uuid4().hex[:8]}"
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("retried"))
    for work in (
        lambda: store_for(url).create(join(url, "x"), b""),
        lambda: store_for(url).replace(join(url, "x"), b""),
        lambda: expand(join(url, "x")),
        lambda: expand(join(url, "*.tar")),
        lambda: store_for(url).find(url),
        lambda: store_for(url).stat(join(url, "x")),
        lambda: store_for(url).open(join(url, "x")),
        lambda: exists(join(url, "x")),
        lambda: check_store(join(url, "out")),
    ):
        with pytest.raises(StorageError) as caught:
            work()
        require_one_line_with_next_step(
            caught.value, url, "bucket does not exist", "Check its name"
        )
        assert type(caught.value) is AccessError


def test_a_bucket_that_may_not_be_asked_for_is_no_missing_one(
    proxy: Proxy, proxy_root: str
) -> None:
    """A policy can allow a prefix and refuse HEAD on its bucket."""
    proxy.rule = lambda call: (
        403 if call.method == "HEAD" and call.path.count("/") == 1 else FORWARD
    )
    assert store_for(proxy_root).find(join(proxy_root, "none")) == [] and not exists(
        join(proxy_root, "none")
    )
    assert store_for(proxy_root).glob(join(proxy_root, "none*")) == [] and proxy.count("HEAD") >= 3
    proxy.rule = lambda call: 403 if call.method == "GET" else FORWARD
    for work in (
        lambda: store_for(proxy_root).find(proxy_root),
        lambda: expand(join(proxy_root, "*")),
    ):
        with pytest.raises(StorageError, match="access refused"):
            work()


def test_an_unknown_profile_is_one_error(
    mock_s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = new_bucket(mock_s3, monkeypatch)
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("retried"))
    for work in (
        lambda: expand(url),
        lambda: read(join(url, "x")),
        lambda: store_for(url).create(join(url, "x"), b""),
    ):
        with pytest.raises(StorageError) as caught:
            work()
        require_one_line_with_next_step(
            caught.value, url, "(nobody)", "Check ~/.aws/config, or unset AWS_PROFILE."
        )
        assert type(caught.value) is AccessError
    (tmp_path / "config").write_text("no section\n[x")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    with pytest.raises(StorageError) as caught:
        expand(url)
    require_one_line_with_next_step(
        caught.value, url, "Unable to parse config file", "Check ~/.aws/config"
    )


def test_another_account_is_another_client(mock_s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url = new_bucket(mock_s3, monkeypatch)
    first = store_for(url)
    assert store_for(url) is first
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, "another")
        assert store_for(url) is not first
        first = store_for(url)
