"""Entrypoint for schedulers that start a Python file: `python jobs/run.py JOB.yaml [--set
field=value ...]`.
"""

import sys

from vitray.cli import entry

sys.argv.insert(1, "run")
entry()
