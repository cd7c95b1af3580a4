"""Asking a run, a model or an endpoint: held-out rows, files of rows, one prompt."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console

from ray_ft.cli.app import app
from ray_ft.errors import RecipeError
from ray_ft.view import View

Asked = Annotated[
    str,
    typer.Argument(
        metavar="RUN|MODEL|URL", help="Run or sweep directory, model folder or hub id, or an endpoint's URL."
    ),
]
EngineOption = Annotated[str | None, typer.Option(help="What answers: auto, vllm or transformers.")]
ModelOption = Annotated[str | None, typer.Option(help="Of an endpoint: the model to ask for.")]
MaxTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)]
Temperature = Annotated[float, typer.Option(help="0: always the likeliest token.", min=0)]
TopP = Annotated[float, typer.Option(help="Share of the likeliest tokens to draw from.", min=0, max=1)]
Seed = Annotated[int | None, typer.Option(help="Seed of the drawing.")]
DeviceOption = Annotated[str, typer.Option(help="What computes here: auto, cpu or cuda.")]


@app.command()
def evaluate(
    target: Asked,
    path: Annotated[
        str | None, typer.Option("--recipe", metavar="RECIPE", help="Held-out data and base of what is no run.")
    ] = None,
    base: Annotated[
        bool | None, typer.Option("--base/--no-base", help="Ask the base model, too; default: evaluate.base.")
    ] = None,
    engine: EngineOption = None,
    model: ModelOption = None,
    to: Annotated[str | None, typer.Option(help="Folder for the report; default: <run>/eval.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Score a run, a model or an endpoint on held-out rows, beside its base."""
    from ray_ft import evaluate as evaluation

    view = View(Console(stderr=True, highlight=False, soft_wrap=True) if as_json else None)
    report = evaluation.evaluate(target, view, recipe=path, base=base, engine=_engine(engine), model=model, to=to)
    if as_json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
        return
    evaluation.show(report, view)
    if report["run"]:
        view.line(f"next: ray-ft export {target}")


@app.command()
def generate(
    target: Asked,
    source: Annotated[list[str], typer.Argument(metavar="ROWS…", help="JSONL or Parquet: files, folders, globs.")],
    to: Annotated[str, typer.Option(help="File to write, .jsonl or .parquet; the same command goes on with it.")],
    form: Annotated[
        str | None, typer.Option("--format", help="How rows ask: a format of recipes, or prompt; default: seen.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Of the format: prompt_field=question.")
    ] = None,
    max_new_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    engine: EngineOption = None,
    model: ModelOption = None,
    device: DeviceOption = "auto",
    batch_size: Annotated[int, typer.Option(help="Rows answered at once.", min=1)] = 32,
    gpus: Annotated[int, typer.Option(help="Most GPUs to use; 0: all there are.", min=0)] = 0,
    prefix: Annotated[str, typer.Option(help="Of the names of the columns that are added.")] = "",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin again.")] = False,
) -> None:
    """Answer every row of JSONL or Parquet files; killed, it goes on where it stands."""
    from ray_ft import generate as generating
    from ray_ft.answers import Sampling, Target

    view = View()
    done = generating.generate(
        source,
        Target.of(target, model),
        to,
        view=view,
        format=form,
        settings=_pairs(settings or []),
        sampling=Sampling(max_new_tokens, temperature, top_p, seed),
        engine=_engine(engine) or "auto",
        batch_size=batch_size,
        device=_device(device),
        gpus=gpus,
        prefix=prefix,
        overwrite=overwrite,
    )
    counts = done.counts
    view.line(
        f"{counts.answered} of {counts.rows} rows answered, {counts.rejected} rejected, {counts.failed} failed, "
        f"{done.seconds:.0f} s: {done.location}"
    )


@app.command()
def chat(
    target: Asked,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What to ask.")],
    system: Annotated[str | None, typer.Option(help="Instructions that stand before it.")] = None,
    image: Annotated[str | None, typer.Option(help="File or URI of an image, for a model that sees.")] = None,
    max_new_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    engine: EngineOption = None,
    model: ModelOption = None,
    device: DeviceOption = "auto",
    raw: Annotated[bool, typer.Option("--raw", help="Give the text as it is, without the chat template.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print answer, usage and seconds as JSON.")] = False,
) -> None:
    """Ask a run, a model or an endpoint one thing."""
    from ray_ft import chat as chatting
    from ray_ft.answers import Sampling, Target

    chatting.chat(
        Target.of(target, model),
        text,
        system=system,
        image=image,
        sampling=Sampling(max_new_tokens, temperature, top_p, seed),
        engine=_engine(engine) or "auto",
        device=_device(device),
        raw=raw,
        as_json=as_json,
    )


def _engine(name: str | None) -> Any:
    if name not in (None, "auto", "vllm", "transformers"):
        raise RecipeError(f"--engine {name} is not known", ["auto, vllm or transformers"])
    return name


def _device(name: str) -> str:
    if name not in ("auto", "cpu", "cuda"):
        raise RecipeError(f"--device {name} is not known", ["auto, cpu or cuda"])
    return name


def _pairs(settings: list[str]) -> dict[str, str]:
    if wrong := [each for each in settings if "=" not in each]:
        raise RecipeError(f"--set {wrong[0]} is not KEY=VALUE", ["such as --set prompt_field=question"])
    return dict(each.split("=", 1) for each in settings)
