"""Objects on S3, through s3fs.

A create is one PUT, never multipart. Listings are not cached, and checksums that older stores
refuse are off. Attempts are counted in objects.retrying alone: layers of retries multiply.
"""

from __future__ import annotations

import asyncio
import io
import os
import re
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, BinaryIO, NoReturn, cast

from vitray.errors import (
    AccessError,
    JobError,
    ObjectChanged,
    ObjectMissing,
    ObjectRefused,
    StorageError,
)
from vitray.storage.objects import ObjectInfo, reason, retrying

CALL_TIMEOUT_S = 120.0
READ_BLOCK_BYTES = 8 << 20
# botocore's names for errors in ~/.aws/config
BAD_CONFIG = ("ProfileNotFound", "ConfigParseError")
# botocore's names for other errors of the user's set-up, which no further attempt mends
BAD_SETUP = ("NoCredentialsError", "PartialCredentialsError", "ParamValidationError", *BAD_CONFIG)
# refusals of the account, not of one object
BAD_KEYS = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "AccountProblem")
# refusals that end without a change by the user: a role gets new keys, a clock is set
TEMPORARY_REFUSALS = ("ExpiredToken", "TokenRefreshRequired", "RequestTimeTooSkewed")
# a request that went to another region or endpoint, or that names no possible bucket
BAD_PLACE = (
    "AuthorizationHeaderMalformed",
    "InvalidBucketName",
    "PermanentRedirect",
    "IllegalLocationConstraintException",
)
REDIRECTS = (301, 307)
TRANSIENT_STATUS = (408, 409, 429)
TRANSIENT_CODES = ("SlowDown", "RequestTimeout", "XAmzContentSHA256Mismatch")
MAX_OBJECT_BYTES = 5 << 30  # one PUT; conditional multipart is not safe on every store
UNSIGNED = "AWS_NO_SIGN_REQUEST"  # both names as GDAL has them
PAYER = "AWS_REQUEST_PAYER"
READS = ("head_object", "get_object")  # of one object
WRITES = ("put_object", "delete_object")


class S3Store:
    def __init__(self) -> None:
        import s3fs

        self._is_unsigned = _is_unsigned()
        self._pays_requests = _pays_requests()
        self._fs = s3fs.S3FileSystem(
            anon=self._is_unsigned,
            requester_pays=self._pays_requests,
            # for _call_s3, to which older versions of s3fs do not add requester_pays
            s3_additional_kwargs={"RequestPayer": "requester"} if self._pays_requests else {},
            use_listings_cache=False,
            skip_instance_cache=True,
            endpoint_url=_endpoint(),
            config_kwargs={
                # attempts are counted in retrying() alone: layers of retries multiply
                "retries": {"total_max_attempts": 1},
                "connect_timeout": 10,
                "read_timeout": 60,
                "max_pool_connections": 64,
                "request_checksum_calculation": "when_required",
                "response_checksum_validation": "when_required",
            },
        )
        self._fs.retries = 1
        self._has_succeeded = False  # so the keys are good

    def find(self, prefix: str) -> list[ObjectInfo]:
        entries = self._call(prefix, lambda: self._fs.find(_key(prefix), detail=True))
        return _infos(entries) or self._nothing_in(prefix)

    def find_few(self, prefix: str) -> list[ObjectInfo]:
        bucket, _, key = _key(prefix).partition("/")
        # s3fs looks further where a listing is empty

        def list_first() -> Any:
            work = self._fs._call_s3("list_objects_v2", Bucket=bucket, Prefix=f"{key}/")
            return self._sync(work)

        page = self._call(prefix, list_first)
        if page.get("IsTruncated"):
            return self.find(prefix)
        return [
            ObjectInfo(
                f"s3://{bucket}/{item['Key']}",
                int(item["Size"]),
                item["ETag"].strip('"'),
                item["LastModified"].timestamp(),
            )
            for item in page.get("Contents", [])
        ]

    def find_all(self, prefix: str) -> tuple[list[ObjectInfo], list[str]]:
        return self.find(prefix), []

    def glob(self, pattern: str) -> list[ObjectInfo]:
        entries = self._call(pattern, lambda: self._fs.glob(_key(pattern), detail=True))
        return _infos(entries) or self._nothing_in(pattern)

    def stat(self, url: str) -> ObjectInfo:
        try:
            head = self._request("head_object", url)
        except ObjectMissing:
            self._nothing_in(url)
            raise
        except ObjectRefused:
            self._require_good_keys(url)
            raise
        return ObjectInfo(
            url,
            int(head["ContentLength"]),
            head["ETag"].strip('"'),
            head["LastModified"].timestamp(),
        )

    def _nothing_in(self, url: str) -> list[ObjectInfo]:
        """An empty listing of an existing bucket. Raises AccessError where it does not exist.

        s3fs lists a missing bucket as empty, and the response to a HEAD has no code.
        """
        try:
            self._request("head_bucket", f"s3://{_key(url).split('/')[0]}")
        except ObjectMissing as error:
            raise _no_bucket(url) from error
        except StorageError as error:
            if _status_and_code(error)[0] != 403:  # a policy may allow a prefix and not its bucket
                raise
        return []

    def _require_good_keys(self, url: str) -> None:
        """Raises AccessError where the store does not know the user at all.

        The response to a HEAD has no code, so wrong keys look like a refused object there.
        """
        if self._has_succeeded:
            return
        bucket = _key(url).split("/")[0]
        try:
            self._call(
                url,
                lambda: self._sync(self._fs._call_s3("list_objects_v2", Bucket=bucket, MaxKeys=1)),
            )
        except AccessError as error:
            if _status_and_code(error)[1] in BAD_KEYS:
                raise

    def open(self, url: str, version: str | None = None) -> BinaryIO:
        info = self.stat(url)
        if version is not None and info.version != version:
            raise ObjectChanged(f"{url} changed since it was listed")
        return cast(BinaryIO, io.BufferedReader(_RangeReader(self, info), READ_BLOCK_BYTES))

    def read_range(self, info: ObjectInfo, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of that version. Raises ObjectChanged where it is another one."""
        if stop <= start:
            return b""
        bucket, _, key = _key(info.url).partition("/")
        span = f"bytes={start}-{stop - 1}"

        async def get() -> bytes:
            response = await self._fs._call_s3(
                "get_object", Bucket=bucket, Key=key, Range=span, IfMatch=info.version
            )
            async with response["Body"] as body:
                data: bytes = await body.read()
            if len(data) != stop - start:
                raise ConnectionError(f"received {len(data)} of {stop - start} bytes")
            return data

        try:
            return cast(bytes, self._call(info.url, lambda: self._sync(get()), "get_object"))
        except FileExistsError as error:
            raise ObjectChanged(f"{info.url} changed while it was read") from error

    def create(self, url: str, data: bytes, metadata: dict[str, str] | None = None) -> bool:
        try:
            self._put(url, data, IfNoneMatch="*", Metadata=metadata or {})
        except FileExistsError:
            return False
        return True

    def replace(self, url: str, data: bytes) -> None:
        self._put(url, data)

    def replace_version(
        self, url: str, version: str, data: bytes, metadata: dict[str, str] | None = None
    ) -> bool:
        try:
            self._put(url, data, IfMatch=version, Metadata=metadata or {})
        except (FileExistsError, ObjectMissing):
            return False
        return True

    def _put(self, url: str, data: bytes, **conditions: object) -> None:
        if len(data) > MAX_OBJECT_BYTES:
            raise StorageError(
                f"{url}: {len(data)} bytes exceed one PUT (5 GB). "
                "Use smaller shards or fewer embeddings."
            )
        # 4 MB/s: any connection that can feed a GPU is faster
        self._request("put_object", url, CALL_TIMEOUT_S + len(data) / 4e6, Body=data, **conditions)

    def abandoned(self, prefix: str) -> list[str]:
        return []

    def delete_folder(self, url: str) -> None:
        """Folders are not objects."""

    def delete_tree(self, url: str) -> None:
        self.delete(info.url for info in self.find(url))

    def delete(self, urls: Iterable[str]) -> None:
        for url in urls:
            self._request("delete_object", url)

    def _request(
        self, method: str, url: str, timeout_s: float = CALL_TIMEOUT_S, **arguments: object
    ) -> Any:
        """The response to a request about the object, or the bucket, that the URL names."""
        bucket, _, key = _key(url).partition("/")
        where = {"Bucket": bucket, "Key": key} if key else {"Bucket": bucket}
        return self._call(
            url,
            lambda: self._sync(self._fs._call_s3(method, **where, **arguments), timeout_s),
            method,
        )

    def _sync(self, work: Coroutine[Any, Any, Any], timeout_s: float = CALL_TIMEOUT_S) -> Any:
        from fsspec.asyn import sync

        return sync(self._fs.loop, asyncio.wait_for, work, timeout_s)

    def _call(self, url: str, call: Callable[[], Any], method: str = "") -> Any:
        """The result of a request. method: of S3, unless it is a listing."""
        try:
            result = retrying(url, call, _is_transient)
            self._has_succeeded = True
            return result
        except StorageError:
            raise
        except Exception as error:
            step = self._step_after_refusal(error, writes=method in WRITES)
            _raise_s3(error, url, step, is_of_object=method in READS)

    def _step_after_refusal(self, error: Exception, writes: bool) -> str:
        """The advice to a person whose access was refused."""
        if self._is_unsigned:
            return f"{UNSIGNED} is set, so requests carry no credentials: unset it to use yours."
        check = "Check AWS_PROFILE or AWS_ACCESS_KEY_ID and the bucket's policy."
        if writes:
            return check
        if type(error).__name__ == "NoCredentialsError":
            return f"{check} To read a public bucket without credentials, set {UNSIGNED}=YES."
        # S3 does not tell whether the requester has to pay; a HEAD's response has no code
        is_denied = _status_and_code(error) in ((403, "AccessDenied"), (403, "403"))
        if is_denied and not self._pays_requests:
            return f"{check} If its requester pays, set {PAYER}=requester."
        return check


class _RangeReader(io.RawIOBase):
    """Sequential or seeking reads of one version of an object, each a ranged GET with If-Match."""

    def __init__(self, store: S3Store, info: ObjectInfo) -> None:
        self._store = store
        self._info = info
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origins = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._info.size}
        self._at = offset + origins[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readall(self) -> bytes:
        # the inherited method reads 8 kB at a time
        return b"".join(iter(lambda: self._next(READ_BLOCK_BYTES), b""))

    def readinto(self, buffer: Any) -> int:
        data = self._next(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _next(self, count: int) -> bytes:
        data = self._store.read_range(self._info, self._at, min(self._at + count, self._info.size))
        self._at += len(data)
        return data


def _endpoint() -> str | None:
    """The endpoint of the environment, None for AWS. Raises JobError for a malformed one."""
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        if value := os.environ.get(name):
            if not re.fullmatch(r"https?://[^\s/]+\S*", value, re.IGNORECASE):
                raise JobError(f"{name} is {value!r}: write http://host:port or https://host.")
            return value
    return None


def _is_unsigned() -> bool:
    """Whether requests have no credentials. Raises JobError for an unclear value."""
    value = os.environ.get(UNSIGNED, "")
    if value.lower() in ("yes", "true", "on", "1"):
        return True
    if value.lower() in ("", "no", "false", "off", "0"):
        return False
    raise JobError(
        f"{UNSIGNED} is {value!r}: write YES to read public buckets without credentials, "
        "or unset it."
    )


def _pays_requests() -> bool:
    """Whether the user pays for requests. Raises JobError for an unknown value."""
    value = os.environ.get(PAYER, "")
    if value.lower() not in ("", "requester"):
        raise JobError(
            f"{PAYER} is {value!r}: write requester to pay for requests yourself, or unset it."
        )
    return bool(value)


def _key(url: str) -> str:
    return url.removeprefix("s3://").rstrip("/")


def _infos(entries: dict[str, dict[str, Any]]) -> list[ObjectInfo]:
    return [
        ObjectInfo(
            f"s3://{name}",
            int(item["size"]),
            str(item.get("ETag", "")).strip('"'),
            item["LastModified"].timestamp(),
        )
        for name, item in sorted(entries.items())
        if item["type"] == "file" and not name.endswith("/")
    ]


def _status_and_code(error: BaseException) -> tuple[int, str]:
    """The HTTP status and S3 code of the store's response; (0, '') without a response."""
    cause: BaseException | None = error
    while cause is not None:
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            status: int = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            code: str = response.get("Error", {}).get("Code", "")
            return status, code
        cause = cause.__cause__
    return 0, ""


def _is_transient(error: Exception) -> bool:
    """Whether another attempt may succeed."""
    status, code = _status_and_code(error)
    if status:
        return status >= 500 or status in TRANSIENT_STATUS or code in TRANSIENT_CODES
    if type(error).__name__ in BAD_SETUP:
        return False
    library = type(error).__module__.split(".")[0]
    is_timeout = isinstance(error, (ConnectionError, TimeoutError, asyncio.TimeoutError))
    return is_timeout or library in ("aiohttp", "botocore", "fsspec")


def _raise_s3(error: Exception, url: str, step_after_refusal: str, is_of_object: bool) -> NoReturn:
    """Raises vitray's own exception in place of one of s3fs, with advice.

    is_of_object: the request read one object; the store may refuse it and not the others.
    """
    status, code = _status_and_code(error)
    if status == 412:  # a condition was refused: create() and read_range() know which one
        raise FileExistsError(url) from error
    if code == "NoSuchBucket":
        raise _no_bucket(url) from error
    if isinstance(error, FileNotFoundError) or status == 404:
        raise ObjectMissing(f"{url} does not exist") from error
    has_no_credentials = "Credentials" in type(error).__name__
    if isinstance(error, PermissionError) or status in (401, 403) or has_no_credentials:
        is_of_account = has_no_credentials or status == 401 or code in BAD_KEYS
        kind: type[StorageError] = AccessError
        if code in TEMPORARY_REFUSALS:
            kind = StorageError
        elif is_of_object and not is_of_account:
            kind = ObjectRefused
        raise kind(
            f"{url}: access refused ({code or reason(error)}). {step_after_refusal}"
        ) from error
    suspects = "the URL, AWS_DEFAULT_REGION and AWS_ENDPOINT_URL"
    if type(error).__name__ in BAD_CONFIG:
        suspects = "~/.aws/config, or unset AWS_PROFILE"
    is_place_wrong = code in BAD_PLACE or status in REDIRECTS
    kind = AccessError if is_place_wrong or type(error).__name__ in BAD_SETUP else StorageError
    raise kind(f"{url}: {reason(error).rstrip('.')}. Check {suspects}.") from error


def _no_bucket(url: str) -> AccessError:
    return AccessError(f"{url}: the bucket does not exist. Check its name and AWS_ENDPOINT_URL.")
