"""Whole commands that start in a third of the time: forks of one process that has imported torch
and transformers, and run nothing.

`python zygote.py` reads {"argv": [...], "environment": {...}, "stdout": a file} line by line and
answers each with the exit code of `vitray ARGV`, negative where a signal ended it.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

LIMIT_S = 120


class Zygote:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, argv: list[str], stdout: str = "/dev/stderr", **more: str) -> int:
        """argv: what comes after `vitray`; stdout: a file for what it prints."""
        environment = {
            name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"
        } | more
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(
            json.dumps({"argv": argv, "environment": environment, "stdout": stdout}) + "\n"
        )
        self._process.stdin.flush()
        if not select.select([self._process.stdout], [], [], LIMIT_S)[0]:
            os.killpg(self._process.pid, signal.SIGKILL)
            raise TimeoutError(f"no end in {LIMIT_S} s: vitray {' '.join(argv)}")
        return int(self._process.stdout.readline())


@contextmanager
def zygote() -> Iterator[Zygote]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, __file__], start_new_session=True, **pipes) as process:
        yield Zygote(process)
        # to close its input is not enough: a child that a test forked may hold it, too
        process.terminate()


def main() -> None:
    import numba.np.numpy_support  # noqa: F401
    import pandas  # noqa: F401  # pyarrow asks for it
    import transformers.models.vit.modeling_vit  # noqa: F401

    import vitray.models.torch_engine
    import vitray.pipeline.runner  # noqa: F401
    from vitray.cli import entry

    for line in sys.stdin:
        asked = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open(asked["stdout"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
            os.environ.clear()
            os.environ.update(asked["environment"])
            sys.argv = ["vitray", *asked["argv"]]
            entry()
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
