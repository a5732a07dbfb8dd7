"""Entrypoint for schedulers that start a Python file: `python jobs/run.py JOB.yaml [--set field=value ...]`."""

import sys

from vitray.cli import main

sys.argv.insert(1, "run")
main()
