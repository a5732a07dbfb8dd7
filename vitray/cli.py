"""The command line: each command is one call. The only place that prints, and that configures logging."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from vitray.errors import JobError, VitrayError
from vitray.version import __version__

if TYPE_CHECKING:
    from vitray.job import Job

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Label and embed image collections with a Vision Transformer: one Parquet file a shard, exactly once.",
    epilog="Exit codes: 0 all committed, 1 a broken system, 2 bad usage or job, 3 done but shards were cut short or set aside, "
    "4 too many bad images, 5 compare: too few labels agree, 130/143 interrupted: run again to go on.",
)

STOP_S = 15.0

Target = Annotated[str, typer.Argument(metavar="JOB.yaml|SOURCE", help="a job file, or images: path, glob, prefix, s3://…")]
Model = Annotated[str | None, typer.Option("--model", help="Hugging Face id, local directory or s3:// directory")]
Out = Annotated[str | None, typer.Option("--out", help="output directory, local or s3://")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="override a field of the job (repeatable)")]
OutArgument = Annotated[str, typer.Argument(metavar="OUT", help="a dataset directory")]
Address = Annotated[
    str | None,
    typer.Option("--address", help="a Ray cluster, or local for one of our own (default: RAY_ADDRESS, else none on a CPU)"),
]
Open = Annotated[bool, typer.Option("--allow-open-cluster", help="join a Ray cluster that asks for no token")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object")]


def _version(wanted: bool) -> None:
    if wanted:
        _say(f"vitray {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="show tracebacks and debug logs")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, help="print the version", is_eager=True)] = False,
) -> None:
    terminal = _Terminal()
    terminal.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, handlers=[terminal])
    if not debug:
        for noisy in ("ray", "botocore", "aiobotocore", "s3fs", "fsspec", "urllib3", "httpx", "transformers"):
            logging.getLogger(noisy).setLevel(logging.ERROR)


@app.command()
def run(
    target: Target,
    model: Model = None,
    out: Out = None,
    sets: Sets = None,
    address: Address = None,
    prune: Annotated[bool, typer.Option(help="delete rows whose input is gone")] = False,
    allow_open_cluster: Open = False,
    as_json: Json = False,
) -> None:
    """Label and embed what is missing; safe to repeat."""
    _run(_job(target, model, out, sets), address, allow_open_cluster, as_json, prune)


@app.command()
def backfill(
    target: Annotated[str, typer.Argument(metavar="JOB.yaml", help="the job of the dataset that is there")],
    model: Annotated[str, typer.Option("--model", help="the next model: Hugging Face id, local directory or s3:// directory")],
    out: Annotated[
        str | None, typer.Option("--out", help="the next dataset (default: the job's out and the model's name)")
    ] = None,
    sets: Sets = None,
    address: Address = None,
    allow_open_cluster: Open = False,
    as_json: Json = False,
) -> None:
    """Make the next dataset, by another model, beside the old one from the same shards; safe to repeat."""
    from vitray.backfilling import next_job

    _run(next_job(_job(target, None, None, sets), model, out), address, allow_open_cluster, as_json)


def _run(job: Job, address: str | None, allow_open_cluster: bool, as_json: bool, prune: bool = False) -> NoReturn:
    from vitray.pipeline import run as run_job
    from vitray.watching import reporter, summary

    threading.Thread(target=_end_if_stopped, daemon=True).start()
    result = run_job(job, address=address, prune=prune, progress=reporter(), stop=_stop, allow_open_cluster=allow_open_cluster)
    _print(result, as_json, summary(result, job))
    raise typer.Exit(result.exit_code)


@app.command()
def plan(target: Target, model: Model = None, out: Out = None, sets: Sets = None, as_json: Json = False) -> None:
    """Say what a run would do; writes nothing."""
    from vitray.planning import plan as plan_job

    found = plan_job(_job(target, model, out, sets))
    _print(found, as_json, str(found))


@app.command()
def bench(
    target: Target,
    model: Model = None,
    sets: Sets = None,
    images: Annotated[int, typer.Option(help="how many images of the source to measure with", min=32)] = 256,
    seconds: Annotated[float, typer.Option(help="how long each step is timed alone", min=0.1)] = 6.0,
    as_json: Json = False,
) -> None:
    """Time each step alone and the whole line on the first images of the source; writes nothing to `out`."""
    from vitray.bench import bench as bench_job

    found = bench_job(_job(target, model, None if _is_file(target) else "not-written", sets), images, seconds)
    _print(found, as_json, str(found))


@app.command()
def status(out: OutArgument, as_json: Json = False) -> None:
    """Say how far a dataset is."""
    from vitray.planning import status as dataset_status

    found = dataset_status(out)
    _print(found, as_json, str(found))


@app.command()
def validate(
    out: OutArgument,
    inputs: Annotated[bool, typer.Option(help="list the source again and compare")] = True,
    content: Annotated[bool, typer.Option(help="read every image's bytes again and compare hashes")] = False,
    as_json: Json = False,
) -> None:
    """Check every data file against manifest, footer and inputs; exit code 1 when something is wrong."""
    from vitray.validation import validate as validate_dataset

    found = validate_dataset(out, inputs, content)
    _print(found, as_json, str(found))
    raise typer.Exit(0 if found.ok else 1)


@app.command()
def compare(
    old: Annotated[str, typer.Argument(metavar="OLD", help="a dataset directory")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="another, made from the same input")],
    min_agreement: Annotated[float | None, typer.Option(help="exit code 5 where fewer labels agree", min=0, max=1)] = None,
    as_json: Json = False,
) -> None:
    """Say what another model or other settings changed: labels, scores, embeddings."""
    from vitray.comparing import compare as compare_datasets

    found = compare_datasets(old, new)
    if min_agreement is not None and found.agreement is None:
        raise JobError("--min-agreement: the two have no labels to compare. Leave it out, or compare datasets with labels.")
    _print(found, as_json, str(found))
    raise typer.Exit(5 if min_agreement is not None and (found.agreement or 0.0) < min_agreement else 0)


@app.command()
def compact(
    out: OutArgument,
    into: Annotated[str, typer.Option("--into", help="directory for the large files, local or s3://")],
    megabytes: Annotated[int, typer.Option(help="a file gets at least so many", min=1, max=2000)] = 256,
    as_json: Json = False,
) -> None:
    """Gather the data files of a complete dataset into few large ones with the same rows."""
    from vitray.compacting import compact as compact_dataset

    found = compact_dataset(out, into, megabytes)
    _print(found, as_json, str(found))


@app.command()
def redo(
    out: OutArgument,
    shard: Annotated[list[str] | None, typer.Option(help="a shard id (repeatable)")] = None,
    reason: Annotated[list[str] | None, typer.Option(help="every shard with an error of this reason (repeatable)")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="delete; without it only list")] = False,
) -> None:
    """Delete chosen data files, so that the next run makes them again."""
    from vitray.dataset import forget, shards_to_redo
    from vitray.planning import require_dataset
    from vitray.schema import REASONS
    from vitray.watching import count

    if not (shard or reason) or set(reason or ()) - REASONS.keys():
        raise JobError(f"give --shard ID (a file in {out}/data, without .parquet) or --reason R, one of {', '.join(REASONS)}")
    dataset = require_dataset(out)
    chosen = shards_to_redo(dataset, shard or (), reason or ())
    files = count(len(chosen), "data file")
    deed = f"deleting {files}; run the job again to make them anew" if yes else f"{files} would be deleted; add --yes to do it"
    _say("\n".join([*chosen, deed]))
    if yes:
        forget(dataset, chosen)


@app.command()
def clean(out: OutArgument) -> None:
    """Remove staging that no run needs any more."""
    from vitray.dataset import clean as clean_dataset
    from vitray.pipeline import groups_of
    from vitray.planning import require_dataset
    from vitray.sources import list_shards
    from vitray.watching import count

    dataset = require_dataset(out)
    removed = clean_dataset(dataset, [s.id for s in list_shards(dataset.job, groups_of(dataset.out)).shards])
    _say("\n".join([*removed, f"removed {count(len(removed), 'orphan')}"]))


@app.command()
def demo(
    directory: Annotated[str, typer.Argument(help="where to put model, shards and output")] = "demo",
    address: Annotated[str | None, typer.Option(help="a Ray cluster, or local")] = None,
) -> None:
    """Draw shapes, train a tiny ViT on them, label and embed them, check the result."""
    from vitray import demo as shapes
    from vitray.pipeline import run as run_job
    from vitray.validation import validate as validate_dataset
    from vitray.watching import reporter, summary

    _say("drawing shapes and training a tiny ViT …")
    job, held_out = shapes.build(directory)
    if held_out == held_out:  # NaN: it was trained by an earlier call
        _say(f"trained: accuracy {held_out:.3f} on held-out shapes")
    result = run_job(job, address=address, progress=reporter())
    _say(summary(result, job))
    checked = validate_dataset(job.out, content=True)
    _say(str(checked))
    files = os.path.join(job.out, "data", "*.parquet")
    _say(f"accuracy {shapes.accuracy(job.out):.3f} of the labels against what was drawn")
    quoted = files.replace("'", "''")
    _say(f"Parquet  {files}")
    _say(f"query    duckdb -c \"select label, count(*), avg(score) from '{quoted}' group by label\"")
    raise typer.Exit(result.exit_code if checked.ok else 1)


def _job(target: str, model: str | None, out: str | None, sets: list[str] | None) -> Job:
    from vitray.job import load_job, make_job, parse_set

    overrides = parse_set(sets or []) | {name: value for name, value in (("model", model), ("out", out)) if value is not None}
    return load_job(target, overrides) if _is_file(target) else make_job({"source": target, **overrides})


def _is_file(target: str) -> bool:
    return target.endswith((".yaml", ".yml"))


def _print(found: Any, as_json: bool, text: str) -> None:
    _say(json.dumps(dataclasses.asdict(found)) if as_json else text)


def _say(text: str) -> None:
    print(_plain(text), flush=True)


def _plain(text: str) -> str:
    """Without control characters: keys, file names and messages come from data, and a terminal obeys what it is sent."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


class _Terminal(logging.Handler):
    """Writes to what sys.stderr is now: while Ray runs it is another one than at the start."""

    def emit(self, record: logging.LogRecord) -> None:
        print(_plain(self.format(record)), file=sys.stderr, flush=True)


_stop, _is_running = threading.Event(), threading.Event()
_signals: list[int] = []  # that came; an Event's lock is not for handlers that may interrupt each other


def _end_if_stopped() -> None:
    """SIGTERM is what a machine that goes away sends, some seconds before: writes that began get STOP_S to end."""
    _is_running.set()
    _stop.wait()
    time.sleep(STOP_S)
    _end(signal.SIGTERM)


def _on_signal(number: int, _frame: object) -> None:
    """The first SIGTERM lets a run end what it writes. All else ends at once, as a crash would, which is safe at any moment."""
    _signals.append(number)
    if number != signal.SIGTERM or not _is_running.is_set() or len(_signals) > 1:
        _end(number)
    signal.alarm(0)  # Ray's own handler in C++, which came before this one, has set an alarm that aborts the process after 3 s
    _stop.set()


def _end(number: int) -> NoReturn:
    """No exception: in Ray's C++ it can abort the process."""
    with contextlib.suppress(OSError, ValueError):
        os.write(sys.stderr.fileno(), b"\ninterrupted; what is staged stays. Run the same command again to go on.\n")
    os._exit(128 + number)


def entry() -> NoReturn:
    """The console script. Ends without the interpreter's clean-up, where native threads that still wake abort the process."""
    code: object = 0
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _on_signal)
    try:
        main()
    except SystemExit as stop:
        code = stop.code
    with contextlib.suppress(OSError):  # nobody reads any more
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0)


def main() -> None:
    """Runs a command, turns every exception into one line and an exit code."""
    debug = "--debug" in sys.argv
    try:
        code = app(standalone_mode=False, args=_hoist_debug(sys.argv[1:]))
        sys.exit(code if isinstance(code, int) else 0)
    except VitrayError as error:
        _fail(error, type(error).__name__, error.exit_code, debug)
    except BrokenPipeError:
        os._exit(1)
    except Exception as error:
        if hasattr(error, "exit_code") and hasattr(error, "format_message"):  # click: bad usage
            if text := _one_line(_usage(error)):  # empty: no command was given, and the help stands there
                print(f"vitray: {text} (vitray --help)", file=sys.stderr)
            sys.exit(2)
        _fail(error, f"unexpected {type(error).__name__}", 1, debug)


def _usage(error: Any) -> str:
    """What click says, or how to set a field of the job that was written as an option."""
    from vitray.job import Job

    field = getattr(error, "option_name", "").lstrip("-").replace("-", "_")
    if field in Job.model_fields.keys() - {"source", "model", "out"} and error.ctx.info_name in ("run", "plan"):
        return f"`{field}` is a field of the job: write --set {field}=…"
    return str(error.format_message())


def _hoist_debug(args: list[str]) -> list[str]:
    """--debug is taken anywhere on the line."""
    return (["--debug"] if "--debug" in args else []) + [a for a in args if a != "--debug"]


def _fail(error: Exception, kind: str, code: int, debug: bool) -> NoReturn:
    if debug:
        logging.getLogger(__name__).error("traceback", exc_info=error)
    print(f"{kind}: {_one_line(str(error)) or kind}", file=sys.stderr)
    sys.exit(code)


def _one_line(text: str) -> str:
    return _plain(" ".join(text.split()))
