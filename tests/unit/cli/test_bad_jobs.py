"""A bad job gets one line that names the field, exit code 2, and writes nothing."""

from __future__ import annotations

import inspect
import pickle
import time
from pathlib import Path

import pytest

from factories import hand_made
from support.command_line import Call, refused, write_job
from vitray.errors import JobError, VitrayError
from vitray.job import Embedding, Job, make_job, parse_set, read_fields


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"batchsize": 8}, "unknown field `batchsize`; did you mean `batch_size`?"),
        ({"embeddings": [{"layr": 3}]}, "unknown field `embeddings.0.layr`; did you mean `layer`?"),
        ({"zzzzzz": 1}, "unknown field `zzzzzz`"),
        ({"top_k": "many"}, "`top_k`: must be a whole number"),
        ({"max_error_rate": 2}, "`max_error_rate`: must be at most 1"),
        ({"batch_size": 0}, "valid: `batch_size`: a whole number from 1 to 8192, or auto\n"),
        ({"batch_size": "abc"}, "valid: `batch_size`: a whole number from 1 to 8192, or auto\n"),
        (
            {"fragment_rows": 8193},
            "valid: `fragment_rows`: a whole number from 1 to 8192, or auto\n",
        ),
        (
            {"embeddings": [{"layer": "first"}]},
            "valid: `embeddings.0.layer`: a whole number from 1 to 999, or last\n",
        ),
        (
            {"precision": "bf17"},
            "`precision`: must be 'auto', 'bf16', 'fp16', 'fp32' or 'fp8'",
        ),
        (
            {"formats": ["jpg", "heic"]},
            "`formats`: unknown image format heic; known: bmp, gif, jpeg",
        ),
        ({"labels": False, "embeddings": []}, "valid: nothing to compute"),
        (
            {"keep": ["label", "input_label"]},
            "valid: keep: two columns of the output would be called input_label\n",
        ),
        ({"keep": "txt, cls,txt"}, "valid: keep: two columns of the output would be called txt\n"),
        ({"keep": "txt,"}, "`keep.1`: String should have at least 1 character"),
        ({"embeddings": [{}, {}]}, "valid: two embeddings are called cls_last"),
        ({"background": "white"}, "`background`"),
        ({"model": None}, "`model` is missing: Hugging Face id"),
        ({"out": None}, "`out` is missing: output directory"),
        ({"source": None}, "`source` is missing: URL"),
        ({"source": []}, "`source`: List should have at least 1 item"),
        ({"source": ""}, "`source.0`: String should have at least 1 character"),
        ({"source": ["in/*.tar", ""]}, "`source.1`: String should have at least 1 character"),
        ({"out": ""}, "`out`: String should have at least 1 character"),
        ({"format": "zip"}, "`format`: must be 'auto', 'tar'"),
    ],
)
@pytest.mark.parametrize("command", ["run", "plan"])
def test_a_bad_job_gets_one_line_that_names_the_field(
    vitray: Call, tmp_path: Path, command: str, fields: dict[str, object], says: str
) -> None:
    hand_made.write_tars(tmp_path / "in", 1)
    refused(
        vitray,
        tmp_path,
        [command, write_job(tmp_path / "job.yaml", **fields)],
        2,
        "JobError: the job is not valid: ",
        says,
    )


@pytest.mark.parametrize(
    ("pair", "says"),
    [
        ("topk=3", "unknown field `topk`; did you mean `top_k`?"),
        ("top_k=x", "`top_k`: must be a whole number"),
        ("top_k", "--set top_k: write --set field=value"),
        ("keep=[a", "--set keep=[a: the value is not valid YAML"),
        ("embeddings=[{pol: cls}]", "unknown field `embeddings.0.pol`; did you mean `pool`?"),
        ("source=", "`source`"),
        ("embeddings=[{layer: 1, layer: 2}]", "the value is not valid YAML"),
        ("since=2027-13-01", "`since`: a date like 2026-11-01, a time like 2026-11-01T06:00Z"),
        ("keep=,", "`keep.0`: String should have at least 1 character"),
        ("labels=cat,", "`labels`: label 2 is empty"),
        ("labels=cat,cat", "`labels`: label cat appears twice"),
    ],
)
def test_a_bad_set_gets_one_line(vitray: Call, tmp_path: Path, pair: str, says: str) -> None:
    refused(
        vitray,
        tmp_path,
        ["run", write_job(tmp_path / "job.yaml"), "--set", pair],
        2,
        "JobError: ",
        says,
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"source: [a, b", "is not valid YAML"),
        (b"source: \xff\xfe\x00a", "is not valid YAML"),
        (b"source: a\n\tmodel: b", "is not valid YAML"),
        (b"out: 2024-13-45", "is not valid YAML"),
        (b"[" * 5000, "is not valid YAML"),
        (
            b"source: a\nkeep: [a]\nmodel: m\nkeep: [b]\n",
            "is not valid YAML: `keep` appears twice, again in line 4",
        ),
        (
            b"embeddings:\n- layer: 1\n  layer: 2\n",
            "is not valid YAML: `layer` appears twice, again in line 3",
        ),
        (b"", "holds no fields; write lines like `source: photos/*.tar`"),
        (b"- a\n- b", "holds no fields"),
        (b"just text", "holds no fields"),
    ],
)
def test_an_unreadable_job_file_is_named(
    vitray: Call, tmp_path: Path, text: bytes, says: str
) -> None:
    path = tmp_path / "my job.yaml"
    path.write_bytes(text)
    refused(vitray, tmp_path, ["run", path], 2, f"JobError: {path} ", says)


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.system ['touch {mark}']",
        "!!python/object/new:os.system ['touch {mark}']",
        "!!python/name:os.system",
    ],
)
def test_a_python_tag_in_yaml_does_not_run(vitray: Call, tmp_path: Path, value: str) -> None:
    mark, job = tmp_path / "ran", tmp_path / "job.yaml"
    value = value.format(mark=mark)
    job.write_text(f"source: {value}\nmodel: m\nout: o\n")
    refused(
        vitray,
        tmp_path,
        ["plan", job],
        2,
        f"{job} is not valid YAML",
        "could not determine a constructor",
    )
    write_job(job)
    refused(
        vitray, tmp_path, ["plan", job, "--set", f"model={value}"], 2, "the value is not valid YAML"
    )
    assert not mark.exists()


def test_a_missing_job_file_is_named(vitray: Call, tmp_path: Path) -> None:
    refused(
        vitray,
        tmp_path,
        ["run", tmp_path / "no.yaml"],
        2,
        f"cannot read the job file {tmp_path}/no.yaml: No such file",
        "Give",
    )
    (tmp_path / "folder.yaml").mkdir()
    refused(vitray, tmp_path, ["run", tmp_path / "folder.yaml"], 2, "folder.yaml: Is a directory")


def test_a_bad_job_in_python_is_a_vitray_error_with_the_same_words() -> None:
    fields: dict[str, object] = {"source": "a", "model": "m", "out": "o", "batchsize": 8}
    said = []
    for make in (
        lambda: Job(**fields),
        lambda: Job.model_validate(fields),
        lambda: make_job(fields),
    ):
        with pytest.raises(VitrayError) as caught:
            make()
        assert isinstance(caught.value, JobError) and caught.value.__suppress_context__
        said.append(str(caught.value))
    assert (
        said == ["the job is not valid: unknown field `batchsize`; did you mean `batch_size`?"] * 3
    )
    with pytest.raises(JobError, match="unknown field `self`"):
        make_job({**fields, "self": 1})


def test_a_job_is_copied_and_pickled_whole() -> None:
    job = Job(
        source="a",
        model="m",
        out="o",
        keep="cls",
        embeddings=[{"layer": 2}, Embedding(pool="mean")],
    )
    assert pickle.loads(pickle.dumps(job)) == job == Job.model_validate_json(job.model_dump_json())
    copied = job.model_copy(update={"out": "x"})
    assert (copied.out, copied.source, copied.embeddings) == ("x", ["a"], job.embeddings)
    assert list(inspect.signature(Job).parameters)[:3] == ["source", "model", "out"]


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("keep", "a, b", ["a", "b"]),
        ("keep", ["a,b"], ["a,b"]),
        ("allow", "s3://a/,s3://b/", ["s3://a/", "s3://b/"]),
        ("allow", ["in, out/"], ["in, out/"]),
        ("formats", "png,jpg", ["jpeg", "png"]),
        ("labels", "cat, dog", ["cat", "dog"]),
        ("labels", "classes.txt", "classes.txt"),
        ("labels", "a,b.txt", "a,b.txt"),
        ("labels", "s3://b/a,b", "s3://b/a,b"),
        ("labels", "cat", "cat"),
        ("source", "in, out/*.tar", ["in, out/*.tar"]),
    ],
)
def test_a_text_of_names_is_cut_at_its_commas(
    field: str, value: object, expected: list[str]
) -> None:
    assert (
        getattr(make_job({"source": "a", "model": "m", "out": "o", field: value}), field)
        == expected
    )
    if isinstance(value, str):
        assert (
            getattr(
                make_job(
                    {"source": "a", "model": "m", "out": "o", **parse_set([f"{field}={value}"])}
                ),
                field,
            )
            == expected
        )


def test_a_file_of_labels_may_have_a_comma_in_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fields = {"source": "a", "model": "m", "out": "o", **parse_set(["labels=cats,dogs"])}
    assert make_job(fields).labels == ["cats", "dogs"]
    (tmp_path / "cats,dogs").write_text("cat\ndog\n")
    assert make_job(fields).labels == "cats,dogs"


def test_prompts_are_not_cut_at_their_commas() -> None:
    fields = {"source": "a", "model": "m", "out": "o", "labels": "cat,dog"}
    prompt = "A photo of a {}, at night."
    assert make_job({**fields, **parse_set([f"prompts={prompt}"])}).prompts == [prompt]


@pytest.mark.parametrize("text", ["7d", "7d ago", "168h", "168 h  ago"])
def test_since_takes_a_span_that_ends_now(text: str) -> None:
    fields = {"source": "a", "model": "m", "out": "o", **parse_set([f"since={text}"])}
    since = make_job(fields).since_s()
    assert since is not None and abs(time.time() - 7 * 86400 - since) < 60


def test_yaml_anchors_and_merges_are_no_duplicates(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(
        "one: &a {layer: 1, pool: cls}\ntwo: &b {<<: *a, layer: 2}\nembeddings: [*a, {<<: *b, "
        "pool: mean}]\n"
    )
    assert read_fields(path)["embeddings"] == [
        {"layer": 1, "pool": "cls"},
        {"layer": 2, "pool": "mean"},
    ]


@pytest.mark.parametrize("start", ["&k [x]", "&k [*k]"])
def test_a_value_of_terabytes_or_that_holds_itself_is_one_line(
    vitray: Call, tmp_path: Path, start: str
) -> None:
    deeper = "".join(f"a{n + 1}: &k{n + 1} [{', '.join(10 * [f'*k{n}'])}]\n" for n in range(12))
    job = tmp_path / "job.yaml"
    job.write_text(f"a0: {start.replace('k', 'k0')}\n{deeper}model: m\nout: o\nsource: [*k12]\n")
    started = time.monotonic()
    refused(vitray, tmp_path, ["run", job], 2, "JobError: the job is not valid: ", "`source")
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("value", ["auto", "on", "off"])
def test_on_and_off_are_words_also_where_yaml_thinks_otherwise(tmp_path: Path, value: str) -> None:
    (tmp_path / "job.yaml").write_text(f"source: s\nmodel: m\nout: o\ncompile: {value}\n")
    assert make_job(read_fields(tmp_path / "job.yaml")).compile == value
    assert (
        make_job(
            {"source": "s", "model": "m", "out": "o", **parse_set([f"compile={value}"])}
        ).compile
        == value
    )


def test_a_colour_is_never_taken_for_a_comment(tmp_path: Path) -> None:
    assert parse_set(["background=#ffffff"]) == {"background": "#ffffff"}
    file = tmp_path / "job.yaml"
    file.write_text("source: a\nbackground: #ffffff\n")
    with pytest.raises(
        JobError, match="`background` has no value in line 2; what begins with # goes in quotes"
    ):
        read_fields(file)
    file.write_text("source: a\nbackground: '#ffffff'\nrevision: null\n")
    assert read_fields(file) == {"source": "a", "background": "#ffffff", "revision": None}
