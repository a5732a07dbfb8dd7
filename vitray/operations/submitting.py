"""Jobs on a cluster that is reached by HTTP: submit, follow and stop them by Ray's job API.

The cluster needs vitray installed. What is sent is the job, and a directory if one is named; never
an environment, a credential or a token.
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
from vitray.exit_codes import ExitCode
from vitray.job import Job
from vitray.models import with_label_names
from vitray.version import __version__

ANSWER_S = 60.0  # for one answer of the cluster
WARN_S = 20.0  # without an answer, after which a warning says so
LOST_S = 300.0  # without an answer, after which following ends; the job continues
ENDED = {"SUCCEEDED": ExitCode.DONE, "STOPPED": ExitCode.TERMINATED}  # FAILED: as the job says
JOB_FILE = "vitray-job.yaml"
NOT_FOUND = 127  # the code of a shell that does not find a command
NOT_SENT = (".git", ".venv", JOB_FILE)
MESSAGE_CHARS = 300  # of the cause of an error
# Ray's client prefers these to the address that it is given
OVERRIDING = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
CHATTY_LOGGERS = ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")
_SCHEME = re.compile(r"https?://[^/@\s]+/?$")
_REMOTE = re.compile(r"s3://")
_ID = re.compile(r"[A-Za-z0-9_-]{1,100}")
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Submission:
    """A job that was submitted to a cluster.

    status: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED. exit_code: vitray's; None until the job
    has ended.
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
    """Ray's job API at `address`, like http://head:8265.

    client: Ray's JobSubmissionClient; by default a new one. Reads RAY_AUTH_MODE and RAY_AUTH_TOKEN,
    as Ray does. Raises ClusterError if nothing answers, or if the cluster answers without a token
    and not `allow_open`.
    """

    def __init__(self, address: str, allow_open: bool = False, client: Any = None) -> None:
        if not _SCHEME.match(address):
            hidden = re.sub(r"//[^/]*@", "//***@", address)
            raise JobError(
                f"--address {hidden}: give the URL of the cluster's job API, like http://head:8265"
            )
        self.address = address.rstrip("/")
        self.allow_open = allow_open
        # an error of requests would show such a token
        if not os.environ.get("RAY_AUTH_TOKEN", "").strip().isprintable():
            raise ClusterError(
                "RAY_AUTH_TOKEN holds a line break or a control character. Set it again."
            )
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        self._client = self._connected() if client is None else client

    def _connected(self) -> Any:
        """A client of Ray's job API. Raises ClusterError."""
        from ray.job_submission import JobSubmissionClient

        for name in CHATTY_LOGGERS:
            logging.getLogger(name).setLevel(logging.WARNING)  # the import set them to INFO
        with self._one_line_errors():
            if not self.allow_open and answers_without_token(self.address):
                raise ClusterError(
                    f"{self.address} answers without a token: anyone who reaches it can run "
                    "code there. Start it with RAY_AUTH_MODE=token, or use --allow-open-cluster."
                )
            with _without_variables(*OVERRIDING):
                return self._ask(partial(JobSubmissionClient, self.address))

    def submit(
        self, job: Job, working_dir: str | None = None, submission_id: str | None = None
    ) -> Submission:
        """Submit a job. Its paths must mean the same on the cluster: s3://, or absolute.

        working_dir: a directory to send along, without what its .gitignore names; it becomes the
        job's current directory.
        """
        job = with_label_names(job)
        _require_shared_paths(job, working_dir)
        name = submission_id or new_id()
        if not _ID.fullmatch(name):
            raise JobError(f"--submission-id {name!r}: letters, digits, - and _ only, 100 at most")
        if earlier := self._lookup(name):
            raise JobError(
                f"{name} was submitted before: {earlier.status}. "
                "Choose another --submission-id, or leave it out."
            )
        with (
            tempfile.TemporaryDirectory(prefix="vitray-submit-") as parent,
            self._one_line_errors(),
        ):
            folder = os.path.join(parent, "job")
            _link(working_dir, folder)
            with open(os.path.join(folder, JOB_FILE), "w", encoding="utf-8") as file:
                yaml.safe_dump(job.model_dump(exclude_unset=True), file)
            self._submit_folder(folder, name, job.out)
        return Submission(name, self.address, "PENDING", None, "", job.out)

    def _submit_folder(self, folder: str, name: str, out: str) -> None:
        command = ["vitray", "run", JOB_FILE, "--address", "auto"]
        if self.allow_open:
            command.append("--allow-open-cluster")
        submit = partial(
            self._client.submit_job,
            entrypoint=shlex.join(command),
            submission_id=name,
            runtime_env={"working_dir": folder},
            metadata={"vitray": __version__, "out": out},
        )
        deadline = time.monotonic() + ANSWER_S
        while True:
            try:
                self._ask(submit)
                return
            except RuntimeError as error:  # a cluster that has just started has no agent yet
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(1)

    def find(self, submission_id: str) -> Submission:
        """The submission as it is now. Raises JobError if the cluster does not know it."""
        submission = self._lookup(submission_id)
        if submission is None:
            raise JobError(
                f"{self.address} knows no submission {submission_id}. "
                "`submit` prints its id, and Ray forgets old ones."
            )
        return submission

    def _lookup(self, submission_id: str) -> Submission | None:
        with self._one_line_errors():
            try:
                info = self._ask(partial(self._client.get_job_info, submission_id))
            except RuntimeError as error:
                if "status code 404" in str(error):
                    return None
                raise
        status = info.status.value
        return Submission(
            submission_id,
            self.address,
            status,
            _exit_code(status, info.driver_exit_code),
            _message(info.message or "", info.driver_exit_code),
            (info.metadata or {}).get("out", ""),
        )

    def follow(self, submission_id: str, write: Callable[[str], None]) -> Submission:
        """The submission, once it has ended. `write` gets all that the job prints."""
        self.find(submission_id)
        return asyncio.run(self._follow(submission_id, write))

    def stop(self, submission_id: str) -> Submission:
        """Ask the job to stop, as SIGTERM does, and wait until it has. What is staged stays."""
        self.find(submission_id)
        with self._one_line_errors():
            self._ask(partial(self._client.stop_job, submission_id))
        deadline = time.monotonic() + ANSWER_S
        submission = self.find(submission_id)
        while submission.exit_code is None and time.monotonic() < deadline:
            time.sleep(0.5)
            submission = self.find(submission_id)
        if submission.exit_code is None:
            raise ClusterError(
                f"{submission_id} is still {submission.status}, "
                f"{ANSWER_S:.0f} s after it was asked to stop. Ask again."
            )
        return submission

    async def _follow(self, submission_id: str, write: Callable[[str], None]) -> Submission:
        written_chars = 0
        last_answer = time.monotonic()
        is_warned = False
        while True:
            failure: Exception | None = None
            try:
                read_chars = 0  # a new connection begins with the first line again
                async for text in self._log_lines(submission_id):
                    new_text = text[max(0, written_chars - read_chars) :]
                    read_chars += len(text)
                    if new_text:
                        write(new_text)
                    written_chars = max(written_chars, read_chars)
                    last_answer = time.monotonic()
            except Exception as error:
                # a broken connection has many types; a proxy may let no log through at all
                failure = error
            try:
                submission = await asyncio.to_thread(self.find, submission_id)
                last_answer = time.monotonic()
                is_warned = False
                if submission.exit_code is not None:
                    return submission
            except ClusterError as error:
                failure = error
            if failure is not None:
                silent_s = time.monotonic() - last_answer
                is_warned = self._check_silence(submission_id, silent_s, failure, is_warned)
            await asyncio.sleep(1)

    def _check_silence(
        self, submission_id: str, silent_s: float, failure: Exception, is_warned: bool
    ) -> bool:
        """Warn once after WARN_S without an answer; returns whether it has warned.

        Raises ClusterError after LOST_S.
        """
        if silent_s > LOST_S:
            command = f"vitray status {submission_id} --follow --address {self.address}"
            raise ClusterError(
                f"{self.address} has not answered for {LOST_S:.0f} s ({one_line(failure)}); "
                f"the job may still run: {command}"
            ) from failure
        if silent_s > WARN_S and not is_warned:
            log.warning(
                "%s does not answer (%s); asking again for %d s",
                self.address,
                one_line(failure),
                LOST_S - WARN_S,
            )
            return True
        return is_warned

    async def _log_lines(self, submission_id: str) -> AsyncIterator[str]:
        """What the job prints, from its beginning, until it ends or is silent for ANSWER_S."""
        tail = self._client.tail_job_logs(submission_id)
        try:
            while True:
                yield await asyncio.wait_for(anext(tail), ANSWER_S)
        except (StopAsyncIteration, TimeoutError):
            return
        finally:
            await tail.aclose()

    def _ask(self, request: Callable[[], Any]) -> Any:
        return answer_in_time(self.address, request)

    @contextlib.contextmanager
    def _one_line_errors(self) -> Iterator[None]:
        """Turns all that Ray's client raises into a ClusterError of one line."""
        try:
            yield
        except VitrayError:
            raise
        except Exception as error:  # of five libraries
            raise ClusterError(
                f"{self.address}: {_root_cause(error)}. "
                "Check the address, RAY_AUTH_MODE and RAY_AUTH_TOKEN."
            ) from error


def answer_in_time(address: str, request: Callable[[], Any]) -> Any:
    """The answer to a request with Ray's client, which has no time limit of its own.

    address: for messages. Raises ClusterError after ANSWER_S, and what the request raises.
    """
    answers: queue.Queue[tuple[Any, Exception | None]] = queue.Queue()

    def ask() -> None:
        try:
            answers.put((request(), None))
        except Exception as error:
            answers.put((None, error))

    threading.Thread(target=ask, daemon=True).start()
    try:
        value, error = answers.get(timeout=ANSWER_S)
    except queue.Empty:
        raise ClusterError(
            f"{address} has not answered for {ANSWER_S:.0f} s. Run the same command again."
        ) from None
    if error is not None:
        raise error
    return value


def _exit_code(status: str, driver_code: int | None) -> int | None:
    """vitray's exit code of a job; None until it has ended."""
    if status != "FAILED":
        return ENDED.get(status)
    if driver_code and 0 < driver_code < 256 and driver_code != NOT_FOUND:
        return driver_code
    return ExitCode.BROKEN_SYSTEM


def _message(text: str, driver_code: int | None) -> str:
    """What Ray reports of a job: its message and the last line of the log that Ray appends."""
    if driver_code == NOT_FOUND:
        return "the cluster's head has no `vitray` on its PATH: install it there"
    reported, _, printed = text.partition(", last available logs")
    last_line = printed.strip().rpartition("\n")[2]
    return one_line(f"{reported} {last_line}")


def new_id() -> str:
    """A unique name for a submission."""
    return f"vitray-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"


def _root_cause(error: BaseException) -> str:
    """What the system reported, if that is the root of nested errors; else the error's own text."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    lines = [line for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__  # in later lines Ray gives advice
    return one_line(text, MESSAGE_CHARS).rstrip(" .:")


@contextlib.contextmanager
def _without_variables(*names: str) -> Iterator[None]:
    """Removes these variables from the environment for a while."""
    values = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(values)


def answers_without_token(address: str) -> bool:
    """Whether the job API accepts requests without a token. Raises ClusterError if unclear."""
    import requests

    response = requests.get(f"{address}/api/jobs/", timeout=ANSWER_S, allow_redirects=False)
    if response.status_code not in (200, 401, 403):  # a redirect could lead to an open one
        raise ClusterError(
            f"{address} does not say whether it asks for a token (HTTP {response.status_code}). "
            "Give the job API's own URL; else run again."
        )
    return bool(response.status_code == 200)


def _require_shared_paths(job: Job, working_dir: str | None) -> None:
    paths = [*job.source, *job.allow, job.out]
    if job.head:
        paths.append(job.head)
    if os.path.exists(job.model):  # else it is a Hugging Face id
        paths.append(job.model)
    for path in paths:
        if not _REMOTE.match(path) and not os.path.isabs(path):
            hint = " (each machine has --working-dir at another path)" if working_dir else ""
            raise JobError(
                f"{path!r} is a path of this machine; on a cluster give s3://… or an absolute path "
                f"that every machine sees{hint}"
            )


def _link(working_dir: str | None, folder: str) -> None:
    """Make a folder of links to the entries of `working_dir`, so that the job file can be added.

    Ray packs the files behind the links.
    """
    os.mkdir(folder)
    if working_dir is None:
        return
    if not os.path.isdir(working_dir):
        raise JobError(f"--working-dir {working_dir} is not a directory")
    for name in os.listdir(working_dir):
        if name not in NOT_SENT:
            target = os.path.abspath(os.path.join(working_dir, name))
            os.symlink(target, os.path.join(folder, name))
