"""A run to a model that anything can load: one Hugging Face folder with its manifest, published only when it is proved.

Weights are written file by file in the base's own layout, names and precision, so that memory holds one file's tensors
and every reader of the base reads the result. The folder is built beside, checked, then renamed.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ray_ft import __version__, paths
from ray_ft.data.render import Renderer, load_tokenizer
from ray_ft.errors import ExportError
from ray_ft.export import weights
from ray_ft.export.proof import prove
from ray_ft.model import load
from ray_ft.paths import MANIFEST, MANIFEST_FORMAT, Manifest
from ray_ft.train.metrics import read_metrics
from ray_ft.trained import Trained
from ray_ft.view import View

#: Everything of a model folder that is not weights and is copied as it is.
COPIED = ("*.json", "*.jinja", "*.model", "*.txt")
REPLACED = {load.INDEX, MANIFEST, "generation_config.json", "README.md"}


def export(run: str, view: View, to: str | None = None) -> Manifest:
    """Write a run's newest checkpoint as a Hugging Face folder.

    Args:
        to: where to; the run's ``export`` folder if None.

    Raises:
        ExportError: a check failed; what was published before stays.
    """
    trained = Trained.of(run)
    target = paths.absolute(to) if to else trained.run.export
    if paths.list_dir(target) and not paths.exists(paths.join(target, MANIFEST)):
        raise ExportError(
            f"{target} holds files that are no export of ours; they would be replaced",
            ["name a folder that is new, empty, or an earlier export: --to DIR"],
        )
    scratch = None if paths.is_uri(target) else str(Path(target).parent)
    if scratch:
        os.makedirs(scratch, exist_ok=True)
    folder = tempfile.mkdtemp(prefix=".export-", dir=scratch)
    try:
        weights.write(trained, folder)
        _copy_rest(trained, folder)
        facts = _describe(trained, folder)
        checks = prove(trained, folder, view)
        _write_card(trained, folder, facts, checks)
        content = {**facts, "checks": checks, "files": _files(folder)}
        paths.write_json(os.path.join(folder, MANIFEST), content)
        _publish(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Manifest(target, content)


def _publish(folder: str, target: str) -> None:
    os.chmod(folder, 0o755)  # noqa: S103 - mkdtemp makes it private, which a serving user could not read
    if not paths.is_uri(target):
        before = f"{folder}.before"  # the earlier export, kept until the new one stands
        if os.path.isdir(target):
            os.rename(target, before)
        os.rename(folder, target)
        shutil.rmtree(before, ignore_errors=True)
        return
    # An object store has no rename: the manifest, without which nothing is served, goes last.
    manifest = Path(folder, MANIFEST).read_bytes()
    os.remove(os.path.join(folder, MANIFEST))
    paths.delete_dir(target)
    paths.upload_dir(folder, target)
    paths.write_bytes(paths.join(target, MANIFEST), manifest)


def _copy_rest(trained: Trained, folder: str) -> None:
    for pattern in COPIED:
        for path in Path(trained.base).glob(pattern):
            if path.name not in REPLACED:
                shutil.copy(path, folder)
    stops = _stop_ids(trained)
    generation = Path(trained.base, "generation_config.json")
    settings = json.loads(generation.read_text()) if generation.exists() else {}
    settings["eos_token_id"] = stops
    paths.write_json(os.path.join(folder, "generation_config.json"), settings)


def _stop_ids(trained: Trained) -> list[int]:
    generation = Path(trained.base, "generation_config.json")
    known = json.loads(generation.read_text()).get("eos_token_id") if generation.exists() else None
    listed = known if isinstance(known, list) else [] if known is None else [known]
    return sorted({*listed, *Renderer(load_tokenizer(trained.base)).stop_ids()})


def _describe(trained: Trained, folder: str) -> dict[str, Any]:
    """The manifest without checks and files; see `paths.Manifest`."""
    recipe, config = trained.recipe, load.load_config(trained.base)
    model = load.build(config)
    rows = [row for row in read_metrics(trained.run) if row["step"] <= trained.found.step]
    metrics = {"loss": rows[-1]["loss"]} if rows else {}
    metrics |= next(({"eval_loss": row["eval_loss"]} for row in reversed(rows) if "eval_loss" in row), {})
    if paths.exists(trained.run.evaluation):
        report = paths.read_json(trained.run.evaluation)
        if report["step"] == trained.found.step:
            metrics |= {key: report[key] for key in ("perplexity", "exact_match", "chrf", "bleu") if key in report}
            metrics["eval_loss"] = report["loss"]
    return {
        "format": MANIFEST_FORMAT,
        "ray_ft": __version__,
        "run": recipe.run.name,
        "step": trained.found.step,
        "base": recipe.model.path,
        "recipe_sha256": recipe.sha256,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "metrics": metrics,
        "model": {
            "architecture": (config.architectures or [type(model).__name__])[0],
            "model_type": config.model_type,
            "dtype": str(load.stored_dtype(config)).removeprefix("torch."),
            "parameters": sum(p.numel() for p in model.parameters()),
            "bytes": sum(path.stat().st_size for path in Path(folder).glob("*.safetensors")),
            "max_position_embeddings": config.get_text_config().max_position_embeddings,
            "trained_seq_len": recipe.data.seq_len,
            "stop_token_ids": _stop_ids(trained),
        },
        "serve": recipe.serve.model_dump(mode="json"),
    }


def _files(folder: str) -> dict[str, dict[str, Any]]:
    found = {}
    for path in sorted(Path(folder).iterdir()):
        digest = hashlib.sha256()
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
        found[path.name] = {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
    return found


def _write_card(trained: Trained, folder: str, facts: dict[str, Any], checks: dict[str, Any]) -> None:
    recipe = trained.recipe
    base = facts["base"] if not os.path.isabs(facts["base"]) else Path(facts["base"]).name
    metrics = "\n".join(f"| {name} | {value:.4f} |" for name, value in facts["metrics"].items())
    paths.write_text(
        os.path.join(folder, "README.md"),
        f"""---
library_name: transformers
base_model: {base}
tags: [ray-ft, fine-tuned]
---

# {recipe.run.name}

Fine-tuned from `{base}` with ray-ft {facts["ray_ft"]}: {facts["step"]} steps of {recipe.train.global_batch} rows of
{recipe.data.seq_len} tokens, {recipe.train.optimizer.name}, learning rate {recipe.train.optimizer.lr:g}.
Recipe sha256 `{facts["recipe_sha256"]}`; `manifest.json` holds the rest.

| metric | value |
|---|---|
{metrics}

Checked before publication: {checks["tensors"]} tensors; logits within {checks["logits_max_difference"]:.1e} of the
trained weights.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

The licence of the base model applies.
""",
    )
