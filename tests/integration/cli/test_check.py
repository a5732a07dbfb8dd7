"""`vitray check` on S3: rights, a missing bucket, and a store that is down."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from factories import hand_made
from support.command_line import Call
from support.paths import TESTS
from support.s3 import KEYS, new_bucket
from support.s3_proxy import FORWARD, proxied
from vitray.storage import store_for

MODEL = TESTS / "data" / "dataset-v1" / "model"


def test_check_of_a_bucket_needs_rights_and_leaves_nothing(
    vitray: Call, tmp_path: Path, mock_s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand_made.write_tars(tmp_path / "in", 1)
    with proxied(mock_s3) as proxy:
        bucket = new_bucket(proxy.url, monkeypatch)
        data = (tmp_path / "in" / "s-000.tar").read_bytes()
        assert store_for(bucket).create(f"{bucket}/in/a.tar", data)
        for path in MODEL.iterdir():
            assert store_for(bucket).create(f"{bucket}/model/{path.name}", path.read_bytes())
        argv = [f"{bucket}/in", "--model", f"{bucket}/model", "--out", f"{bucket}/out"]
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        code, out, err = vitray("check", *argv)
        assert (code, err) == (0, ""), out
        assert {call.method for call in proxy.calls} >= {"GET", "PUT", "DELETE"}
        assert store_for(bucket).find(f"{bucket}/out") == []
        assert not list((tmp_path / "cache").rglob("*.safetensors"))  # weights are not fetched

        proxy.rule = lambda call: 403 if call.method == "PUT" else FORWARD
        code, out, _ = vitray("check", *argv, "--json")
        findings = {f["check"]: f for f in json.loads(out)["findings"]}
        assert code == 2 and findings["out"]["verdict"] == "wrong"
        assert "access refused (403)" in findings["out"]["text"]
        assert findings["source"]["verdict"] == findings["model"]["verdict"] == "ok"


def test_check_tells_a_missing_bucket_from_a_store_that_is_down(
    vitray: Call, tmp_path: Path, mock_s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand_made.write_tars(tmp_path / "in", 1)
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": mock_s3}.items():
        monkeypatch.setenv(name, value)
    argv = [f"{tmp_path}/in", "--model", MODEL, "--out", "s3://no-such-bucket/out"]
    code, out, _ = vitray("check", *argv)
    text = " ".join(out.split())
    assert code == 2 and "out wrong s3://no-such-bucket/out" in text
    assert "the bucket does not exist. Check its name and AWS_ENDPOINT_URL." in text
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # the discard port: refused
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    code, out, _ = vitray("check", *argv)
    assert code == 1 and "no answer in 10 attempts" in " ".join(out.split())
    assert "The job would not start: 1 problem." in out
