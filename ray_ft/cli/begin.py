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
def demo(folder: Annotated[str, typer.Argument(help="Where to write it.")] = "demo") -> None:
    """Write the demo: number words to translate, and a tiny untrained Gemma 3 with its own tokenizer."""
    from ray_ft.demo import write_demo

    made: Any = write_demo(folder)
    View().line(f"{'reusing' if made.reused else 'wrote'} the demo data and base model: {folder}")


@app.command()
def schema(to: Annotated[Path | None, typer.Option(help="File to write; default: standard output.")] = None) -> None:
    """Print the JSON schema of recipes, from which editors complete them."""
    text = json.dumps(recipe.json_schema(), indent=2)
    if to is None:
        print(text)
        return
    to.write_text(text + "\n", encoding="utf-8")
    View().line(f"wrote {to}; first line for recipes: # yaml-language-server: $schema={to}")
