"""What one begins with: the demo, and the schema by which editors complete recipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ray_ft import recipe
from ray_ft.cli.app import app
from ray_ft.view import View


@app.command()
def demo(
    folder: Annotated[str | None, typer.Argument(help="Where to write it; default: demo, or demo-TASK.")] = None,
    task: Annotated[
        str, typer.Option(help="translation, reasoning, mixture, labels, preference or vision.")
    ] = "translation",
) -> None:
    """Write a task's demo: its data, such as number words to translate, and a tiny untrained Gemma 3."""
    from ray_ft.demo import write_demo

    to = folder or ("demo" if task == "translation" else f"demo-{task}")
    made: Any = write_demo(to, task=task)
    View().line(f"{'reusing' if made.reused else 'wrote'} the demo data and base model: {to}")


@app.command()
def schema(to: Annotated[Path | None, typer.Option(help="File to write; default: standard output.")] = None) -> None:
    """Print the JSON schema of recipes, from which editors complete them."""
    text = json.dumps(recipe.json_schema(), indent=2)
    if to is None:
        print(text)
        return
    to.write_text(text + "\n", encoding="utf-8")
    View().line(f"wrote {to}; first line for recipes: # yaml-language-server: $schema={to}")
