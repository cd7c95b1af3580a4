"""`ray-ft evaluate` as a Ray job; see `jobs/__init__.py`."""

from jobs import run

run("evaluate")
