"""Whether a cluster is fit for a recipe."""

from __future__ import annotations

import contextlib
import json
import os
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ray_ft import recipe
from ray_ft.cli.app import Overrides, app
from ray_ft.errors import CredentialError, ResourceError
from ray_ft.view import View

if TYPE_CHECKING:
    from ray_ft.doctor import Finding

#: Exit status by the worst severity found.
STATUS = {"ok": 0, "note": 0, "warning": 1, "error": 2}


@app.command()
def doctor(
    path: Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="Recipe file (YAML).")] = None,
    overrides: Overrides = None,
    address: Annotated[str | None, typer.Option(help="Cluster, HOST:PORT; default: RAY_ADDRESS, else here.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="What train looks at itself, in seconds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Look at a cluster before a run; exits with 1 after warnings, with 2 after errors."""
    settings = None if path is None else recipe.load(path, overrides or ())
    if address:
        os.environ["RAY_ADDRESS"] = address
    view = View(Console(stderr=True, highlight=False, soft_wrap=True)) if as_json else View()
    findings = _findings(settings, view, quick)

    from ray_ft.doctor import show

    said = show.as_json(findings)
    if as_json:
        print(json.dumps(said, indent=2))
    else:
        show.show(findings, view)
    raise typer.Exit(STATUS[said["worst"]])


def _findings(settings: recipe.Recipe | None, view: View, quick: bool) -> list[Finding]:
    from ray_ft import session
    from ray_ft.doctor import Finding, Severity, examine

    where, ways = session.address(), ("start Ray there, or correct the address",)
    if "://" in where:  # the jobs API, which runs commands but lets nobody join
        what = f"{where} is the address of a dashboard, and the doctor looks at a cluster from one of its nodes"
        instead = (
            f"ray job submit --address {where} -- ray-ft doctor …",
            "on a node of the cluster: --address HOST:6379",
        )
        return [Finding("cluster.reached", Severity.ERROR, "here", what, instead)]
    if settings is not None and settings.train.in_process and not where:
        return examine(settings, view, quick=quick)  # such a run has no use for Ray
    with contextlib.ExitStack() as connection:
        try:
            connection.enter_context(session.connected())
        except (CredentialError, ResourceError) as error:
            # With the status of a found error; what a command that fails exits with would say "warnings".
            return [Finding("cluster.reached", Severity.ERROR, where or "here", error.what, error.ways_out or ways)]
        return examine(settings, view, quick=quick)
