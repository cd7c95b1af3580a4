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
    folder: Annotated[
        str | None, typer.Argument(help="Where to write it; default: demo, with --pictures demo-pictures.")
    ] = None,
    pictures: Annotated[bool, typer.Option("--pictures", help="Pictures of shapes, and a Gemma 3 that sees.")] = False,
) -> None:
    """Write the demo: number words to translate, and a tiny untrained Gemma 3 with its own tokenizer."""
    from ray_ft.demo import write_demo
    from ray_ft.pictures import write_pictures

    folder = folder or ("demo-pictures" if pictures else "demo")
    made: Any = write_pictures(folder) if pictures else write_demo(folder)
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
