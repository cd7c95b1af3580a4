"""A finished run to its users: report, export, endpoint, keys."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from ray_ft import credentials
from ray_ft.cli.app import RunPath, app
from ray_ft.view import View


@app.command()
def report(
    run: RunPath, to: Annotated[str | None, typer.Option(help="File to write; default: <run>/report.html.")] = None
) -> None:
    """Write one page about a run: curves, data, evaluation, sample answers, the export's checks."""
    from ray_ft import report as reporting

    view = View()
    view.line(f"wrote {reporting.report(run, view, to)}")


@app.command()
def export(
    run: RunPath,
    to: Annotated[str | None, typer.Option(help="Folder or URI; default: <run>/export, or <run>/adapter.")] = None,
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="The adapter in PEFT's layout, without the base's weights.")
    ] = False,
    push: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Upload it to this repository of the hub, made private.")
    ] = None,
    vllm: Annotated[
        bool | None, typer.Option("--vllm/--no-vllm", help="Compare vLLM's answers; default: where vLLM can run here.")
    ] = None,
) -> None:
    """Write a run as one plain Hugging Face folder, proved to answer like what was trained."""
    from ray_ft import export as exporting

    view = View()
    manifest = exporting.export(run, view, to, adapter_only=adapter_only, push=push, vllm=vllm)
    size = sum(file["bytes"] for file in manifest.content["files"].values())
    view.line(f"exported step {manifest.content['step']} ({size / 2**20:.1f} MiB): {manifest.folder}")
    view.line(f"next: ray-ft serve {to or (manifest.folder if adapter_only else run)}")


@app.command()
def serve(
    runs: Annotated[list[str], typer.Argument(metavar="RUN…", help="Run directories, export folders or sweeps.")],
    host: Annotated[str | None, typer.Option(help="Address to listen on; default: serve.host of the recipe.")] = None,
    port: Annotated[int | None, typer.Option(help="HTTP port; default: serve.port of the recipe.")] = None,
    model_name: Annotated[str | None, typer.Option(help="Name that clients ask for.")] = None,
    replicas: Annotated[int | None, typer.Option(help="Copies of each model.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Longest prompt plus answer, in tokens.")] = None,
    base: Annotated[bool, typer.Option("--base", help="Serve also the models that they were trained from.")] = False,
    update: Annotated[
        bool,
        typer.Option("--update", help="Replace or add models of the endpoint that runs; no request fails."),
    ] = False,
) -> None:
    """Serve exported runs on Ray Serve and vLLM, with the OpenAI API behind keys, and a playground."""
    from serving import run

    replaced = run.Replaced(host, port, model_name, replicas, max_model_len)
    (run.update if update else run.serve_run)(runs, replaced, base=base)


@app.command()
def key(
    name: Annotated[str, typer.Argument(help="Whose key it is: what logs and metrics call it.")],
    file: Annotated[Path | None, typer.Option(help="File of keys to add it to (serve.gateway.api_keys_file).")] = None,
) -> None:
    """Make an API key for the gateway; with --file, only its hash is kept there."""
    from serving.gateway.keys import add_key

    made, line = add_key(name, file)
    with credentials.revealing(made):
        print(made)
    note = Console(stderr=True, soft_wrap=True, highlight=False)
    if file is None:
        note.print(f"keep it: it is shown once. For a file of keys: {escape(line)}")
    else:
        note.print(f"keep it: it is shown once, and {escape(str(file))} has only its hash")
