"""A checkpoint is described from its headers alone, and then as `identify` describes it."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from factories.small_models import STEM, job_for, make_checkpoint
from support.command_line import subprocess_vitray
from vitray.errors import ModelError
from vitray.job import Embedding, Job
from vitray.models import check_model, identify
from vitray.models.checkpoint_check import possible_specs, quick_spec
from vitray.models.checkpoint_store import locate

WITHOUT_HEAD = ("clip", "siglip")


def job_of(folder: Path, name: str) -> Job:
    """A job for a new checkpoint of that family."""
    headed = name not in WITHOUT_HEAD
    model = make_checkpoint(folder / name, name, headed)
    embeddings = [Embedding(pool="mean", layer=2)]
    return job_for(model, labels=headed, embeddings=embeddings, batch_size=1)


@pytest.mark.parametrize("name", STEM)
def test_the_quick_description_is_that_of_identify(tmp_path: Path, name: str) -> None:
    job = job_of(tmp_path, name)
    spec = identify(job)
    assert quick_spec(job, locate(job.model, None), spec.weights_sha256) == spec
    assert check_model(job, reads_weights=True).spec == spec


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", {"id2label": None}),
        ("config.json", {"image_size": [32, 32]}),
        ("config.json", {"problem_type": "no such type"}),
        ("preprocessor_config.json", {"do_rescale": None}),
        ("preprocessor_config.json", {"size": 32}),
        ("preprocessor_config.json", {"size": {"height": 48, "width": 48}}),
        ("preprocessor_config.json", {"image_std": [0, 0, 0]}),
        ("preprocessor_config.json", {"image_processor_type": "OtherProcessor"}),
    ],
)
def test_where_a_default_decides_identify_is_asked(
    tmp_path: Path, file: str, change: dict[str, object]
) -> None:
    job = job_of(tmp_path, "vit")
    path = Path(job.model, file)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert quick_spec(job, locate(job.model, None), "0") is None
    outcomes = []
    for describe in (identify, lambda job: check_model(job, reads_weights=True).spec):
        try:
            outcomes.append(describe(job))
        except ModelError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]


def test_auto_may_mean_what_each_engine_can_compute(tmp_path: Path) -> None:
    job = job_of(tmp_path, "vit").model_copy(update={"engine": "auto", "precision": "auto"})
    checked = check_model(job, reads_weights=False)
    assert not checked.is_hashed
    found = {(spec.engine, spec.precision) for spec in possible_specs(job, checked.spec)}
    assert {("torch", "fp16"), ("openvino", "bf16"), ("onnx", "fp32")} <= found
    assert ("onnx", "bf16") not in found


class Hub(BaseHTTPRequestHandler):
    """A Hugging Face hub with one model, which answers ranges."""

    protocol_version = "HTTP/1.1"
    folder: Path
    commit = "a" * 40
    ranges: ClassVar[list[tuple[str, str | None]]] = []

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        if self.path.startswith("/api/models/org/name/tree"):
            files = [
                {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": "0" * 40}
                for path in self.folder.iterdir()
            ]
            self.answer(200, json.dumps(files).encode())
        elif self.path.startswith("/api/models/org/name"):
            siblings = [{"rfilename": path.name} for path in self.folder.iterdir()]
            info = {"id": "org/name", "sha": self.commit, "private": False, "siblings": siblings}
            info |= {"tags": [], "downloads": 0, "likes": 0}
            self.answer(200, json.dumps(info).encode())
        elif "/resolve/" in self.path and (self.folder / name).is_file():
            data = (self.folder / name).read_bytes()
            span = self.headers.get("range")
            self.ranges.append((name, span))
            first, last = map(int, (span or f"bytes=0-{len(data)}")[6:].split("-"))
            self.answer(206 if span else 200, data[first : last + 1])
        else:
            self.answer(404, b"")

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.commit)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    do_HEAD = do_GET


def test_the_weights_of_a_model_on_the_hub_are_not_fetched_for_a_check(tmp_path: Path) -> None:
    Hub.folder = Path(job_of(tmp_path, "vit").model)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"x")
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            done = subprocess_vitray(
                "check",
                tmp_path / "in",
                "--model",
                "org/name",
                "--out",
                tmp_path / "out",
                env={
                    **os.environ,
                    "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
                    "HF_HOME": str(tmp_path / "cache"),
                    "HF_HUB_OFFLINE": "0",
                    "HF_HUB_DISABLE_XET": "1",
                },
            )
        finally:
            server.shutdown()
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert "model        ok         vit, 7 labels, 32 values, 32x32 pixels" in done.stdout
    of_weights = [span for name, span in Hub.ranges if name == "model.safetensors"]
    assert of_weights == ["bytes=0-100000"]
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
