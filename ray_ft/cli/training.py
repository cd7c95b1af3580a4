"""Rows to a trained model: look at the data, plan, train, search settings."""

from __future__ import annotations

import json
import shlex
import signal
from typing import Annotated, Any

import typer

from ray_ft import recipe
from ray_ft.cli.app import Overrides, RecipePath, app
from ray_ft.view import View


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
    outcome = launch.train(settings, view, _beside(settings))
    run = settings.run.dir.root
    if not outcome.complete:
        view.line(f"stopped after step {outcome.finished} of {outcome.total}; the same command continues")
        raise typer.Exit(128 + (outcome.signal or signal.SIGINT))  # as shells report a process that a signal ended
    first = f", first step after {outcome.first_step_seconds:.0f} s" if outcome.first_step_seconds else ""
    if outcome.taken:
        view.line(f"trained {outcome.taken} steps in {outcome.seconds:.0f} s{first}: {run}")
    view.line(f"next: ray-ft evaluate {run}" if settings.data.eval else f"next: ray-ft export {run}")


@app.command()
def tune(
    path: RecipePath,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the sweep of this name where it stands.")
    ] = False,
) -> None:
    """Search the settings of the recipe's tune section; each trial is a run of its own."""
    from ray_ft import report as reporting
    from ray_ft.tune import run

    settings, view = recipe.load(path, overrides or ()), View()
    outcome = run.tune(settings, view, resume=resume)
    sweep, best = outcome.sweep, outcome.best
    if best is not None:
        chosen = "  ".join(f"{key}={value}" for key, value in best.settings.items())
        view.line(f"best: trial {best.name}  {sweep.metric} {best.value:.6g}  {chosen}")
    view.line(f"wrote {reporting.report(sweep.root, view)}")
    if outcome.why is not None:
        view.line(f"ended early: {outcome.why}; the same command with --resume goes on")
        raise typer.Exit(128 + outcome.signal if outcome.signal else 0)
    view.line(f"next: ray-ft export {sweep.root}")


def _beside(settings: recipe.Recipe) -> list[Any]:
    if settings.evaluate.during is None:
        return []
    from ray_ft.evaluate.during import Validation

    return [Validation(settings)]
