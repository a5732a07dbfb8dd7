"""Jobs in a loop under random faults, each compared with the ids that must come out: `make soak
MINUTES=60`.

A round is one dataset: up to FAULTY runs are killed, told to end, stopped for a while, crashed at a
named point, or work against a store that fails (with Ceph's packages installed; else on a local
disk), sometimes two at once; then a run without faults ends it. Prints one JSON line a round, and a
total. Exits with 1 at the first lost, doubled or foreign row.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import boto3

import vitray
from vitray.crash import POINTS
from vitray.operations import demo_model
from vitray.storage import join

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from factories.shards import pictures, put_tars
from support.runs import command
from support.s3 import KEYS, RGW, free_port
from support.s3_proxy import Proxy, proxied
from support.store_faults import STORMS

IMAGES, SHARDS, FAULTY = 480, 8, 5
LIMIT_S = 300  # of one run: what is not over by then hangs


def s3_endpoint(stack: ExitStack) -> str | None:
    if not all(shutil.which(name) for name in ("radosgw", "ceph-mon", "ceph-osd")):
        return None
    folder, port, mon = f"/tmp/vitray-soak-{uuid.uuid4().hex[:8]}", free_port(), free_port()
    subprocess.run(
        ["bash", str(RGW), folder, str(port), str(mon), "start"], check=True, timeout=180
    )
    stack.callback(
        subprocess.run,
        ["bash", str(RGW), folder, str(port), str(mon), "stop"],
        check=False,
        timeout=60,
    )
    return f"http://127.0.0.1:{port}"


def befall(process: subprocess.Popen[bytes], what: str, rng: random.Random) -> None:
    """One fault, some time after the start."""
    time.sleep(rng.uniform(1, 8))
    if process.poll() is not None:
        return
    if what in ("kill", "term"):
        process.send_signal(signal.SIGKILL if what == "kill" else signal.SIGTERM)
    elif what == "stop":
        process.send_signal(signal.SIGSTOP)
        time.sleep(rng.uniform(1, 5))
        process.send_signal(signal.SIGCONT)


def wrong_with(out: str) -> str:
    """Why a dataset that a run called complete is not; empty when it is."""
    keys = Counter(vitray.read(out, columns=["key"])["key"].to_pylist())
    wanted = {f"{n:05d}" for n in range(IMAGES)}
    if keys != Counter(wanted):
        return (
            f"lost {len(wanted - keys.keys())}, doubled {sum(keys.values()) - len(keys)}, foreign "
            f"{len(keys.keys() - wanted)}"
        )
    checked = vitray.validate(out, content=True)
    return "" if checked.ok else str(checked)


def faulty_run(
    argv: list[str], out: str, proxy: Proxy | None, rng: random.Random
) -> tuple[str, list[int]]:
    """What befell one run, or two at once, and the exit codes. Exits where one claims what is not
    so, or prints a traceback.
    """
    what = rng.choice(["kill", "kill", "term", "stop", "crash", "storm", "two"])
    environment = dict(os.environ)
    if what == "crash":
        point = rng.choice(POINTS)
        environment["VITRAY_CRASH_AT"] = point
    if what == "storm" and proxy is not None:
        proxy.rule = rng.choice(STORMS)(rng)
    with tempfile.TemporaryFile("w+") as stderr:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": stderr, "env": environment}
        processes = [subprocess.Popen(argv, **quiet) for _ in range(2 if what == "two" else 1)]
        befall(processes[0], what if what != "two" else "kill", rng)
        codes = [process.wait(LIMIT_S) for process in processes]
        stderr.seek(0)
        said = stderr.read()
    if proxy is not None:
        proxy.rule = Proxy().rule
    if "Traceback" in said:
        sys.exit(f"{what}: {said}")
    if 0 in codes and (problem := wrong_with(out)):
        sys.exit(f"{what}: a run ended with 0, but {problem}")
    return what, codes


def main(minutes: float, seed: int) -> None:
    rng, until = random.Random(seed), time.monotonic() + minutes * 60
    total, befallen = Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory(prefix="vitray-soak-") as scratch, ExitStack() as stack:
        folder = Path(scratch)
        demo_model.train(str(folder / "model"))
        put_tars(str(folder / "in"), pictures(IMAGES), SHARDS, folder)
        endpoint = s3_endpoint(stack)
        proxy = stack.enter_context(proxied(endpoint)) if endpoint else None
        if endpoint and proxy:
            os.environ |= {**KEYS, "AWS_ENDPOINT_URL": proxy.url}
            boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="soak")
        while time.monotonic() < until:
            on_s3 = proxy is not None and rng.random() < 0.5
            out = join("s3://soak", uuid.uuid4().hex) if on_s3 else str(folder / uuid.uuid4().hex)
            argv = command(folder, str(folder / "model"), folder / "out")
            argv[argv.index(str(folder / "out"))] = out
            history = [faulty_run(argv, out, proxy, rng) for _ in range(rng.randint(1, FAULTY))]
            last = subprocess.run(argv, capture_output=True, text=True, timeout=LIMIT_S)
            problem = wrong_with(out) if last.returncode == 0 else last.stderr
            befallen.update(what for what, _ in history)
            total.update(rounds=1, runs=len(history) + 1, images=IMAGES)
            print(
                json.dumps(
                    {"s3": on_s3, "befell": history, "last": last.returncode, "problem": problem}
                ),
                flush=True,
            )
            if problem:
                sys.exit(f"the dataset is not whole: {problem}")
            if not on_s3:
                shutil.rmtree(out)
        print(
            json.dumps({"minutes": minutes, "seed": seed, **total, "faults": dict(befallen)}),
            flush=True,
        )


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(1 << 30))
