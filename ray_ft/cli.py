"""The command line: each verb parses, calls one function, and says what to do next."""

from __future__ import annotations

import json
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from ray_ft import __version__, recipe
from ray_ft.errors import RayFtError
from ray_ft.view import View

app = typer.Typer(
    help="Fine-tune and serve large language models on Ray clusters, from one recipe.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
RecipePath = Annotated[str, typer.Argument(metavar="RECIPE", help="Recipe file (YAML).")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]…", help="Settings to replace.")]
RunPath = Annotated[str, typer.Argument(metavar="RUN", help="Run directory: <run.storage>/<run.name>.")]


def main() -> None:
    """Entry point: deliberate errors are shown without a traceback, with their ways out."""
    try:
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


@app.command()
def data(
    path: RecipePath,
    overrides: Overrides = None,
    examples: Annotated[int, typer.Option(help="Packed rows to decode.")] = 3,
) -> None:
    """Prepare the data and look at what training will see."""
    from ray_ft import inspect, session
    from ray_ft.data import stream
    from ray_ft.data.prepare import check
    from ray_ft.train.launch import prepare_data

    settings, view = recipe.load(path, overrides or ()), View()
    if settings.train.in_process:
        job = prepare_data(settings, view, stream.in_process)
    else:
        with session.connected():
            job = prepare_data(settings, view, stream.spread)
    if job.train.reused:
        view.line(f"the data is prepared already: {job.train.location}")
    if job.train.rows:
        inspect.show(settings, job.splits, view.console, examples)
    for split, prepared in job.splits.items():
        check(prepared, settings, split, prepared.rejects)
    view.line(f"next: ray-ft train {' '.join([path, *(overrides or ())])}")


@app.command()
def plan(
    path: RecipePath,
    overrides: Overrides = None,
    gpu: Annotated[str | None, typer.Option(help="GPU, such as h100-80; all are in ray_ft/plan/gpus.yaml.")] = None,
    nodes: Annotated[int | None, typer.Option(help="Machines; default: as many as train.workers needs.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(help="GPUs of each machine.")] = None,
    tokens: Annotated[float | None, typer.Option(help="Tokens of the whole run, for its hours and dollars.")] = None,
    prices: Annotated[str | None, typer.Option(help="File that replaces parts of gpus.yaml.")] = None,
    config: Annotated[str | None, typer.Option(help="The model's config.json, where model.path has none.")] = None,
    top: Annotated[int, typer.Option(help="Settings to show of those that fit.", min=1)] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Reckon memory, speed and cost before training; exits with 1 where the recipe does not fit."""
    from ray_ft import plan as planning

    answer = planning.answer(
        recipe.load(path, overrides or ()),
        gpu=gpu,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        tokens=tokens,
        prices=prices,
        config=config,
        top=top,
    )
    if as_json:
        print(json.dumps(answer.as_json(), indent=2))
    else:
        answer.show(View().console, shlex.join([path, *(overrides or ())]))
    raise typer.Exit(0 if answer.plan.fits else 1)


@app.command()
def train(path: RecipePath, overrides: Overrides = None) -> None:
    """Train, or continue a run of the same name where it stands."""
    from ray_ft.train import launch

    settings, view = recipe.load(path, overrides or ()), View()
    outcome = launch.train(settings, view)
    run = settings.run.dir.root
    if not outcome.complete:
        view.line(f"stopped after step {outcome.finished} of {outcome.total}; the same command continues")
        raise typer.Exit(128 + (outcome.signal or signal.SIGINT))  # as shells report a process that a signal ended
    first = f", first step after {outcome.first_step_seconds:.0f} s" if outcome.first_step_seconds else ""
    if outcome.taken:
        view.line(f"trained {outcome.taken} steps in {outcome.seconds:.0f} s{first}: {run}")
    view.line(f"next: ray-ft evaluate {run}" if settings.data.eval else f"next: ray-ft export {run}")


@app.command()
def evaluate(run: RunPath) -> None:
    """Score a run's newest checkpoint on held-out rows."""
    from ray_ft import evaluate as evaluation

    view = View()
    report = evaluation.evaluate(run, view)
    view.line(f"step {report['step']}: loss {report['loss']:.4f}, perplexity {report['perplexity']:.3f}")
    if report["rows"]:
        view.line(
            f"{report['rows']} answers: exact match {report['exact_match']:.3f}, chrF {report['chrf']:.1f}, "
            f"BLEU {report['bleu']:.1f}"
        )
    for example in report["worst"][:2]:
        view.line(f"  worst: {_short(example['answer'])!r} for {_short(example['reference'])!r} ({example['origin']})")
    view.line(f"next: ray-ft export {run}")


def _short(text: str) -> str:
    return text if len(text) <= 70 else text[:69] + "…"


@app.command()
def export(
    run: RunPath, to: Annotated[str | None, typer.Option(help="Folder or URI; default: <run>/export.")] = None
) -> None:
    """Write a run as one plain Hugging Face folder, checked against what was trained."""
    from ray_ft import export as exporting

    view = View()
    manifest = exporting.export(run, view, to)
    view.line(
        f"exported step {manifest.content['step']} ({manifest.model['bytes'] / 2**20:.1f} MiB): {manifest.folder}"
    )
    view.line(f"next: ray-ft serve {to or run}")


@app.command()
def serve(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run directory or export folder, a path or URI.")],
    host: Annotated[str | None, typer.Option(help="Address to listen on; default: serve.host of the recipe.")] = None,
    port: Annotated[int | None, typer.Option(help="HTTP port; default: serve.port of the recipe.")] = None,
    model_name: Annotated[str | None, typer.Option(help="Name that clients ask for.")] = None,
    replicas: Annotated[int | None, typer.Option(help="Copies of the model.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Longest prompt plus answer, in tokens.")] = None,
) -> None:
    """Serve an exported run on Ray Serve and vLLM, with the OpenAI API."""
    from serving.run import serve_run

    serve_run(run, host, port, model_name=model_name, replicas=replicas, max_model_len=max_model_len)


@app.command()
def schema(to: Annotated[Path | None, typer.Option(help="File to write; default: standard output.")] = None) -> None:
    """Print the JSON schema of recipes, from which editors complete them."""
    text = json.dumps(recipe.json_schema(), indent=2)
    if to is None:
        print(text)
        return
    to.write_text(text + "\n", encoding="utf-8")
    View().line(f"wrote {to}; first line for recipes: # yaml-language-server: $schema={to}")


@app.command()
def demo(folder: Annotated[str, typer.Argument(help="Where to write it.")] = "demo") -> None:
    """Write the demo: number words to translate, and a tiny untrained Gemma 3 with its own tokenizer."""
    from ray_ft.demo import write_demo

    made: Any = write_demo(folder)
    View().line(f"{'reusing' if made.reused else 'wrote'} the demo data and base model: {folder}")


if __name__ == "__main__":
    main()
