"""The app that verbs are added to, how errors are shown, and the arguments that verbs share."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from ray_ft import __version__, credentials
from ray_ft.credentials import Redacting
from ray_ft.errors import RayFtError

app = typer.Typer(
    help="Fine-tune and serve large language models on Ray clusters, from one recipe.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
RecipePath = Annotated[str, typer.Argument(metavar="RECIPE", help="Recipe file (YAML).")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]…", help="Settings to replace.")]
RunPath = Annotated[str, typer.Argument(metavar="RUN", help="Run directory, <run.storage>/<run.name>, or a sweep's.")]


def main() -> None:
    """Entry point: deliberate errors are shown without a traceback, with their ways out; and no secret is."""
    # Also what libraries print and the traceback of a bug. Secrets first, as only what is known can be taken out.
    sys.stdout, sys.stderr = Redacting(sys.stdout), Redacting(sys.stderr)
    try:
        credentials.load()
        app()
    except RayFtError as error:
        console = Console(stderr=True, soft_wrap=True, highlight=False)
        console.print(f"[bold red]error:[/] {escape(error.what)}")
        for way in error.ways_out:
            console.print(f"  → {escape(way)}")
        sys.exit(error.exit_code)


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if show:
        print(__version__)
        raise typer.Exit
