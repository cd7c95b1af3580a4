"""`ray-ft evaluate` as a Ray job; see `jobs/__init__.py`."""

import sys

from ray_ft.cli import main

sys.argv.insert(1, "evaluate")
main()
