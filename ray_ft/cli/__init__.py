"""The command line, its verbs in the order of `--help`: each parses, calls one function, says what comes next."""

# isort: off
from ray_ft.cli import begin, training, answers, publish, doctor, submit, token  # noqa: F401 - each adds its verbs
from ray_ft.cli.app import app, main

__all__ = ["app", "main"]
