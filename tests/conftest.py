"""What the tests share: a trained tiny model, shards of drawn shapes, S3 servers (a mock and a real
one), one Ray.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import browser
from support import shapes_model as shapes_model_cache
from support.paths import TESTS
from support.s3 import KEYS, RGW, free_port, new_bucket
from support.zygote import Zygote, zygote

os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # threads of tiny products wait for each other where several processes share the cores: a
    # training took 31 s instead of 5
    os.environ.setdefault("OMP_NUM_THREADS", "1")


GROUPS = ("unit", "integration", "slow", "cluster", "nightly")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each test the markers of its folder, and its process where several run tests.

    A test of a folder `cluster` needs Ray, one of `nightly` runs at night. One process has the Ray
    that tests share. A file's tests that start a Ray of their own stay together, as those of S3.
    """
    for item in items:
        folders = item.path.relative_to(TESTS).parts[:-1]
        fixtures = set(getattr(item, "fixturenames", ()))
        if folders and folders[0] in GROUPS:
            item.add_marker(getattr(pytest.mark, folders[0]))
        if "cluster" in folders:
            item.add_marker(pytest.mark.ray)
        if fixtures & {"s3", "real_s3"}:
            item.add_marker(pytest.mark.s3)
        marks = {mark.name for mark in item.iter_markers()}
        if "ray" in marks:
            group = "ray" if "ray" in fixtures else item.path.stem
            item.add_marker(pytest.mark.xdist_group(group))
        elif "s3" in marks:
            item.add_marker(pytest.mark.xdist_group("s3"))


@pytest.fixture(autouse=True)
def printed_json_fits_its_schema() -> Iterator[None]:
    """Fail a test in which vitray, in this process, prints JSON that its schema does not allow."""
    from support.schemas import checked
    from vitray.cli import json_output

    make_object = json_output.as_object

    def checked_object(result: object) -> dict[str, Any]:
        made = make_object(result)
        checked(json.dumps(made))
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_output, "as_object", checked_object)
        yield


@pytest.fixture(scope="session")
def shapes_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Directory of the tiny ViT that knows drawn shapes. Trained once for all test runs; see
    support/shapes_model.py.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    directory = shared / "shapes-model"
    with open(shared / "shapes-model.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not directory.exists():
            shapes_model_cache.shapes_model(directory)
    return str(directory)


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    if browser.BROWSER is None:
        if os.environ.get("CI"):
            pytest.fail("CI is set, but chromium is not installed")
        pytest.skip("no Chromium: install chromium to look at the page in a browser")
    opened = browser.Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def commands() -> Iterator[Zygote]:
    with zygote() as found:
        yield found


def with_torch_threads(count: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny products are slower on two threads, and much slower beside other work."""
    yield from with_torch_threads(1)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """For what must not depend on how many there are."""
    yield from with_torch_threads(2)


@pytest.fixture(scope="session")
def real_s3() -> Iterator[str]:
    """Endpoint of a real S3 server: VITRAY_TEST_S3, else a Ceph of our own where Debian's packages
    are installed.
    """
    if given := os.environ.get("VITRAY_TEST_S3"):
        yield given
        return
    if not all(
        shutil.which(name) for name in ("radosgw", "ceph-mon", "ceph-osd", "ceph", "monmaptool")
    ):
        if os.environ.get("VITRAY_REQUIRE_S3"):
            pytest.fail(
                "VITRAY_REQUIRE_S3 is set, but radosgw, ceph-mon and ceph-osd are not installed"
            )
        pytest.skip("no real S3 server: set VITRAY_TEST_S3, or install radosgw ceph-mon ceph-osd")
    folder = f"/tmp/vitray-rgw-{uuid.uuid4().hex[:8]}"  # short: unix sockets live in it
    port, mon = free_port(), free_port()
    subprocess.run(
        ["bash", str(RGW), folder, str(port), str(mon), "start"], check=True, timeout=180
    )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        subprocess.run(
            ["bash", str(RGW), folder, str(port), str(mon), "stop"], check=False, timeout=60
        )


@pytest.fixture(scope="session")
def mock_s3() -> Iterator[str]:
    """Endpoint of moto's S3 in this process."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(real_s3: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """s3:// URL of an empty bucket on the real server."""
    return new_bucket(real_s3, monkeypatch)


@pytest.fixture(params=["local", "mock", pytest.param("real", marks=pytest.mark.s3)])
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty place to store things, on each kind of store in turn."""
    if request.param == "local":
        return str(tmp_path / "root")
    return new_bucket(request.getfixturevalue(f"{request.param}_s3"), monkeypatch) + "/root"


@pytest.fixture(scope="session")
def rays() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture
def ray(request: pytest.FixtureRequest, rays: contextlib.ExitStack) -> None:
    """One Ray for the tests in a row that ask for it; its workers know the real S3 server, where
    there is one.
    """
    import ray

    from vitray.pipeline.cluster import ray_session

    os.environ.update(KEYS)
    with contextlib.suppress(pytest.skip.Exception):
        os.environ["AWS_ENDPOINT_URL"] = request.getfixturevalue("real_s3")
    if not ray.is_initialized():
        rays.enter_context(ray_session(None))


@pytest.fixture(autouse=True)
def _threads_unless_ray(request: pytest.FixtureRequest, rays: contextlib.ExitStack) -> None:
    """Where Ray is up, `vitray.run` goes through it, in several times the time: it ends before a
    test that did not ask for it.
    """
    if request.node.get_closest_marker("ray") is None:
        rays.close()
