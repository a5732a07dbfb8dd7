"""Entry point for schedulers that start a Python file: `python jobs/run.py JOB.yaml`.

Takes the arguments of `vitray run`.
"""

import sys

from vitray.cli import entry

sys.argv.insert(1, "run")
entry()
