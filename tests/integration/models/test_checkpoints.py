"""Checkpoints: where they come from, and that nothing which was not trained, or which could run
code, ever predicts.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from factories.small_models import drop_weights, job_for, make_checkpoint, noise, run
from vitray.errors import ModelError
from vitray.models import identify, open_model
from vitray.models.checkpoint_store import locate
from vitray.schema import ModelOutputs


def test_s3_checkpoints_are_fetched_once_and_again_when_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server_module = pytest.importorskip("moto.server")
    server = server_module.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "x",
            "AWS_SECRET_ACCESS_KEY": "x",
        }.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        from vitray import storage

        directory = make_checkpoint(tmp_path / "m", "vit", True)
        store = storage.store_for("s3://models/")
        store._fs.mkdir("models")  # a bucket: vitray itself never makes one
        for path in Path(directory).iterdir():
            store.replace(f"s3://models/tiny/{path.name}", path.read_bytes())
        store.replace("s3://models/tiny/pytorch_model.bin", b"not fetched")
        job = job_for("s3://models/tiny/")
        with ThreadPoolExecutor(4) as pool:  # as many actors of one node do
            assert (
                len({found.directory for found in pool.map(locate, [job.model] * 4, [None] * 4)})
                == 1
            )
        spec = identify(job)
        assert spec.model == "s3://models/tiny"
        np.testing.assert_array_equal(
            run(job, noise(2), spec).scores, run(job_for(directory), noise(2)).scores
        )
        cache = tmp_path / "cache" / "vitray" / "models"
        (kept,) = [p for p in cache.iterdir() if p.is_dir()]  # no scratch directory is left either
        assert sorted(p.name for p in kept.iterdir()) == [
            "config.json",
            "model.safetensors",
            "preprocessor_config.json",
        ]
        drop_weights(directory, "classifier.bias")
        store.replace(
            "s3://models/tiny/model.safetensors",
            Path(f"{directory}/model.safetensors").read_bytes(),
        )
        with pytest.raises(ModelError, match="the weights changed"):
            open_model(spec, ModelOutputs((), 1), "cpu", 1)
        with pytest.raises(ModelError, match="holds no checkpoint"):
            identify(job_for("s3://models/other"))
    finally:
        server.stop()
