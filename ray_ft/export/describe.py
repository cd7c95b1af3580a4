"""What an export says of itself: the manifest's facts, checksums, and the model card."""

from __future__ import annotations

import datetime
import hashlib
import os
from pathlib import Path
from typing import Any

from ray_ft import __version__, hub, paths
from ray_ft.artifacts import MANIFEST_FORMAT
from ray_ft.export.case import Case
from ray_ft.export.checks.text import stop_ids_of
from ray_ft.export.gate import summary
from ray_ft.train.metrics import read_metrics
from ray_ft.trained import Trained


def describe(case: Case) -> dict[str, Any]:
    """The manifest without checks, proof and files; see `artifacts.Manifest`. Of an adapter, ``model`` is its base,
    with the adapter's rank."""
    trained, config = case.trained, case.config
    recipe = trained.recipe
    weights = case.folder if case.kind == "model" else trained.base
    rank = {"rank": recipe.model.adapter.rank} if case.kind == "adapter" and recipe.model.adapter else {}
    return {
        "format": MANIFEST_FORMAT,
        "ray_ft": __version__,
        "kind": case.kind,
        "run": recipe.run.name,
        "step": trained.found.step,
        "base": recipe.model.location,
        "recipe_sha256": recipe.sha256,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "metrics": _metrics(trained),
        "model": {
            "architecture": (config.architectures or [type(case.model).__name__])[0],
            "model_type": config.model_type,
            "dtype": str(case.dtype).removeprefix("torch."),
            "parameters": case.parameters,
            "bytes": sum(path.stat().st_size for path in Path(weights).glob("*.safetensors")),
            "max_position_embeddings": config.get_text_config().max_position_embeddings,
            "trained_seq_len": recipe.data.seq_len,
            "stop_token_ids": [] if trained.labels else stop_ids_of(trained.base),
            **({"labels": trained.labels} if trained.labels else {}),
            **rank,
        },
        "serve": recipe.serve.model_dump(mode="json"),
    }


def _metrics(trained: Trained) -> dict[str, float]:
    rows = [row for row in read_metrics(trained.run) if row["step"] <= trained.found.step]
    metrics = {"loss": rows[-1]["loss"]} if rows else {}
    metrics |= next(({"eval_loss": row["eval_loss"]} for row in reversed(rows) if "eval_loss" in row), {})
    if not paths.exists(trained.run.evaluation):
        return metrics
    report = paths.read_json(trained.run.evaluation)
    if report.get("step") == trained.found.step and isinstance(report.get("model"), dict):
        found = report["model"]
        said = {"eval_loss": found.get("loss"), "perplexity": found.get("perplexity"), **found.get("scores", {})}
        metrics |= {name: value for name, value in said.items() if isinstance(value, int | float)}
    return metrics


def checksums(folder: str) -> dict[str, dict[str, Any]]:
    """Name → ``bytes`` and ``sha256`` of every file."""
    found = {}
    for path in sorted(Path(folder).iterdir()):
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256")
        found[path.name] = {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
    return found


def write_card(case: Case, facts: dict[str, Any], checks: dict[str, dict[str, Any]]) -> None:
    recipe = case.trained.recipe
    base, revision = hub.split_revision(facts["base"])
    base = base if not os.path.isabs(base) else Path(base).name
    named = f"`{base}`, revision `{revision}`" if revision else f"`{base}`"
    metrics = "\n".join(f"| {name} | {value:.4f} |" for name, value in facts["metrics"].items())
    checked = "\n".join(f"- {line}" for line in summary(checks))
    adapter = case.kind == "adapter"
    paths.write_text(
        os.path.join(case.folder, "README.md"),
        f"""---
library_name: {"peft" if adapter else "transformers"}
base_model: {base}
tags: [ray-ft, fine-tuned{", lora" if adapter else ""}]
---

# {recipe.run.name}

{"An adapter of" if adapter else "Fine-tuned from"} {named}, trained with ray-ft {facts["ray_ft"]}:
{facts["step"]} steps of {recipe.train.global_batch} rows of {recipe.data.seq_len} tokens with
{recipe.train.optimizer.name}, learning rate {recipe.train.optimizer.lr:g}.
Recipe sha256 `{facts["recipe_sha256"]}`; `manifest.json` holds the rest.

| metric | value |
|---|---|
{metrics}

Checked before publication:

{checked}

```python
{_usage(base, revision, adapter, bool(case.trained.labels))}
```

The licence of the base model applies.
""",
    )


def _usage(base: str, revision: str | None, adapter: bool, labels: bool) -> str:
    pinned = f', revision="{revision}"' if revision else ""
    if adapter:
        return f"""from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"{pinned}), "path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("{base}"{pinned})"""
    auto = "AutoModelForSequenceClassification" if labels else "AutoModelForCausalLM"
    return f"""from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")"""
