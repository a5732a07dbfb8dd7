"""A job on a cluster that is reached by HTTP: handed over by Ray's job API, followed, stopped. The
cluster needs vitray installed.

What travels is the job, and a working tree where one is asked for; never an environment, a
credential or a token.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import re
import secrets
import shlex
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import yaml

from vitray.errors import ClusterError, JobError, VitrayError, one_line
from vitray.job import Job
from vitray.models import with_label_names
from vitray.version import __version__

ANSWER_S = 60.0  # for one answer of the cluster
TOLD_S = 20.0  # the same, after which a warning says so
LOST_S = 300.0  # without any answer, after which following ends; the job goes on
OVER = ("SUCCEEDED", "FAILED", "STOPPED")
JOB_FILE = "vitray-job.yaml"
NOT_FOUND = 127  # a shell's, of a command that is not there
_SCHEME = re.compile(r"https?://[^/@\s]+/?$")
_LEFT_HERE = (".git", ".venv", JOB_FILE)
_REMOTE = re.compile(r"s3://")
log = logging.getLogger(__name__)
OVERRIDING = (
    "RAY_API_SERVER_ADDRESS",
    "RAY_ADDRESS",
)  # where Ray's client would go instead of where it is told to
_ID = re.compile(r"[A-Za-z0-9_-]{1,100}")


@dataclass(frozen=True, slots=True)
class Submission:
    """A job that a cluster was given. status: PENDING, RUNNING, or one of OVER. exit_code:
    vitray's, None until it is over.
    """

    id: str
    address: str
    status: str
    exit_code: int | None
    message: str
    out: str

    def __str__(self) -> str:
        ended = "" if self.exit_code is None else f", exit code {self.exit_code}"
        lines = [f"{self.id}: {self.status}{ended}", f"out      {self.out}"]
        if self.exit_code is None:
            lines += [
                f"follow   vitray status {self.id} --follow {self._where}",
                f"stop     vitray stop {self.id} {self._where}",
            ]
        elif self.status == "FAILED":
            lines.append(f"because  {self.message}")
        return "\n".join(lines)

    @property
    def _where(self) -> str:
        return f"--address {self.address}"


class Cluster:
    """Ray's job API at `address`, like http://head:8265. Reads RAY_AUTH_MODE and RAY_AUTH_TOKEN, as
    Ray does.

    Raises ClusterError where nothing answers, or where it answers without a token and not
    `allow_open`.
    """

    def __init__(self, address: str, allow_open: bool = False) -> None:
        if not _SCHEME.match(address):
            shown = re.sub(r"//[^/]*@", "//***@", address)
            raise JobError(
                f"--address {shown}: give the URL of the cluster's job API, like http://head:8265"
            )
        self.address, self.allow_open = address.rstrip("/"), allow_open
        if (
            not os.environ.get("RAY_AUTH_TOKEN", "").strip().isprintable()
        ):  # requests would show it in its error
            raise ClusterError(
                "RAY_AUTH_TOKEN holds a line break or a control character. Set it again."
            )
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        with self._told():
            if not allow_open and _answers_strangers(self.address):
                raise ClusterError(
                    f"{self.address} answers without a token: whoever reaches it can run code "
                    f"there. Start it with "
                    "RAY_AUTH_MODE=token, or say --allow-open-cluster."
                )
            from ray.job_submission import JobSubmissionClient

            for chatty in (
                "ray",
                "ray.dashboard.modules.dashboard_sdk",
                "ray.dashboard.modules.job.sdk",
            ):
                logging.getLogger(chatty).setLevel(logging.WARNING)  # at INFO since their import
            with _without(*OVERRIDING):
                self._client: Any = self._ask(partial(JobSubmissionClient, self.address))

    def submit(
        self, job: Job, working_dir: str | None = None, submission_id: str | None = None
    ) -> Submission:
        """Hand a job over. Its paths must mean the same there: s3://, or absolute.

        working_dir: a directory that travels too, without what its .gitignore names; it is the
        job's current directory there.
        """
        job = with_label_names(job)
        _require_shared_paths(job, working_dir)
        name = submission_id or new_id()
        if not _ID.fullmatch(name):
            raise JobError(f"--submission-id {name!r}: letters, digits, - and _ only, 100 at most")
        if known := self._known(name):
            raise JobError(
                f"{name} was submitted before: {known.status}. Choose another --submission-id, or "
                f"leave it out."
            )
        entrypoint = [
            "vitray",
            "run",
            JOB_FILE,
            "--address",
            "auto",
            *(["--allow-open-cluster"] if self.allow_open else []),
        ]
        with tempfile.TemporaryDirectory(prefix="vitray-submit-") as scratch, self._told():
            folder = os.path.join(scratch, "job")
            _link(working_dir, folder)
            with open(os.path.join(folder, JOB_FILE), "w", encoding="utf-8") as file:
                yaml.safe_dump(job.model_dump(exclude_unset=True), file)
            deadline = time.monotonic() + ANSWER_S
            while True:
                try:
                    self._ask(
                        partial(
                            self._client.submit_job,
                            entrypoint=shlex.join(entrypoint),
                            submission_id=name,
                            runtime_env={"working_dir": folder},
                            metadata={"vitray": __version__, "out": job.out},
                        )
                    )
                    break
                except (
                    RuntimeError
                ) as error:  # a cluster that has just come up has no agent for it yet
                    if "No available agent" not in str(error) or time.monotonic() > deadline:
                        raise
                    time.sleep(1)
        return Submission(name, self.address, "PENDING", None, "", job.out)

    def find(self, submission_id: str) -> Submission:
        """Where a submission stands. Raises JobError for one that the cluster does not know."""
        if (found := self._known(submission_id)) is None:
            raise JobError(
                f"{self.address} knows no submission {submission_id}. `submit` prints its id, and "
                f"Ray forgets old ones."
            )
        return found

    def _known(self, submission_id: str) -> Submission | None:
        with self._told():
            try:
                info = self._ask(partial(self._client.get_job_info, submission_id))
            except RuntimeError as error:
                if "status code 404" in str(error):
                    return None
                raise
        status, code = info.status.value, info.driver_exit_code
        failed = code if code and 0 < code < 256 and code != NOT_FOUND else 1
        ended = {"SUCCEEDED": 0, "STOPPED": 143, "FAILED": failed}.get(status)
        out = (info.metadata or {}).get("out", "")
        said, _, printed = (info.message or "").partition(
            ", last available logs"
        )  # Ray adds a page of them
        last = printed.strip().rpartition("\n")[2]
        if code == NOT_FOUND:
            said, last = "the cluster's head has no `vitray` on its PATH: install it there", ""
        return Submission(
            submission_id,
            self.address,
            status,
            ended,
            " ".join(f"{said} {last}".split())[:400],
            out,
        )

    def follow(self, submission_id: str, write: Callable[[str], None]) -> Submission:
        """Gives `write` what the job prints, from its beginning, and returns when it is over."""
        self.find(submission_id)
        return asyncio.run(self._follow(submission_id, write))

    def stop(self, submission_id: str) -> Submission:
        """Ask it to end, as SIGTERM does; what is staged stays. Waits until it is over."""
        self.find(submission_id)
        with self._told():
            self._ask(partial(self._client.stop_job, submission_id))
        deadline = time.monotonic() + ANSWER_S
        while (found := self.find(submission_id)).exit_code is None and time.monotonic() < deadline:
            time.sleep(0.5)
        if found.exit_code is None:
            raise ClusterError(
                f"{submission_id} is still {found.status} {ANSWER_S:.0f} s after it was asked to "
                f"end. Ask again."
            )
        return found

    async def _follow(self, submission_id: str, write: Callable[[str], None]) -> Submission:
        written, heard, is_told = 0, time.monotonic(), False
        while True:
            broken: Exception | None = None
            try:
                seen = 0
                async for text in self._lines(submission_id):
                    fresh, seen = text[max(0, written - seen) :], seen + len(text)
                    if fresh:
                        write(fresh)
                    written, heard = max(written, seen), time.monotonic()
            except Exception as error:
                # a broken connection comes as one of many; a proxy may let no log through at all
                broken = error
            try:
                found = await asyncio.to_thread(self.find, submission_id)
                heard, is_told = time.monotonic(), False
                if found.exit_code is not None:
                    return found
            except ClusterError as error:
                broken = error
            silent = time.monotonic() - heard
            if broken is not None and silent > LOST_S:
                where = f"vitray status {submission_id} --follow --address {self.address}"
                raise ClusterError(
                    f"{self.address} has not answered for {LOST_S:.0f} s ({one_line(broken)}); "
                    f"the job may go on: {where}"
                ) from broken
            if broken is not None and silent > TOLD_S and not is_told:
                log.warning(
                    "%s does not answer (%s); asking again for %d s",
                    self.address,
                    one_line(broken),
                    LOST_S - TOLD_S,
                )
                is_told = True
            await asyncio.sleep(1)

    async def _lines(self, submission_id: str) -> AsyncIterator[str]:
        """What the job has printed and prints, until it is over or silent for a while."""
        tail = self._client.tail_job_logs(submission_id)
        try:
            while True:
                yield await asyncio.wait_for(anext(tail), ANSWER_S)
        except (StopAsyncIteration, TimeoutError):
            return
        finally:
            await tail.aclose()

    def _ask(self, question: Callable[[], Any]) -> Any:
        """What Ray's client says, which itself would wait for ever."""
        answers: queue.Queue[tuple[Any, Exception | None]] = queue.Queue()

        def ask() -> None:
            try:
                answers.put((question(), None))
            except Exception as error:
                answers.put((None, error))

        threading.Thread(target=ask, daemon=True).start()
        try:
            value, error = answers.get(timeout=ANSWER_S)
        except queue.Empty:
            raise ClusterError(
                f"{self.address} has not answered for {ANSWER_S:.0f} s. Run the same command again."
            ) from None
        if error is not None:
            raise error
        return value

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Whatever Ray's client raises, as one line."""
        try:
            yield
        except VitrayError:
            raise
        except Exception as error:  # of five libraries
            raise ClusterError(
                f"{self.address}: {_root_of(error)}. Check the address, RAY_AUTH_MODE and "
                f"RAY_AUTH_TOKEN."
            ) from error


def new_id() -> str:
    """A name for a submission that nobody else gives."""
    return f"vitray-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"


def _root_of(error: BaseException) -> str:
    """What the system said, where that is at the root of what others wrapped into each other; else
    the error's own text.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.strerror:
            return seen.strerror
        seen = seen.__cause__ or seen.__context__
    first = next(
        (line for line in str(error).splitlines() if line.strip()), type(error).__name__
    )  # Ray goes on with advice
    return " ".join(first.split())[:300].rstrip(" .:")


@contextlib.contextmanager
def _without(*names: str) -> Iterator[None]:
    """Without these in the environment."""
    held = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(held)


def _answers_strangers(address: str) -> bool:
    import requests

    status = requests.get(
        f"{address}/api/jobs/", timeout=ANSWER_S, allow_redirects=False
    ).status_code
    if status not in (200, 401, 403):  # a redirect could lead to an open one
        raise ClusterError(
            f"{address} does not say whether it asks for a token (HTTP {status}). Give the job "
            f"API's own URL; else run again."
        )
    return bool(status == 200)


def _require_shared_paths(job: Job, working_dir: str | None) -> None:
    places = [
        *job.source,
        *job.allow,
        job.out,
        *filter(None, [job.head]),
        *([job.model] if os.path.exists(job.model) else []),
    ]
    if local := next(
        (place for place in places if not _REMOTE.match(place) and not os.path.isabs(place)), None
    ):
        raise JobError(
            f"{local!r} is a path of this machine; on a cluster give s3://… or an absolute path "
            f"that every machine sees"
            + (" (what --working-dir takes along lies elsewhere on each)" if working_dir else "")
        )


def _link(working_dir: str | None, folder: str) -> None:
    """A directory of links to what stands in another: Ray packs what they lead to, and a file of
    ours can stand beside them.
    """
    os.mkdir(folder)
    if working_dir is not None and not os.path.isdir(working_dir):
        raise JobError(f"--working-dir {working_dir} is not a directory")
    for name in os.listdir(working_dir) if working_dir is not None else ():
        if name not in _LEFT_HERE:
            os.symlink(
                os.path.abspath(os.path.join(working_dir or "", name)), os.path.join(folder, name)
            )
