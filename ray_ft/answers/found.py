"""A run or a folder, looked up: which weights answer, with which tokenizer, in how long a context.

A run answers with its export where that is of its newest checkpoint, else with the checkpoint itself.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ray_ft import hub, paths
from ray_ft.answers.prompt import Encoder
from ray_ft.answers.target import ADAPTER_CONFIG, WAYS, Target
from ray_ft.artifacts import MANIFEST, Manifest, RunDir
from ray_ft.data.render import load_tokenizer
from ray_ft.errors import CheckpointError, ModelError, RayFtError, ServeError, first_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from ray_ft.trained import Trained

#: Longest context where nothing else is said, as in serving: Gemma 3 allows 131,072 tokens, whose KV cache few machines
#: have room for.
CONTEXT = 8192


@dataclass(frozen=True)
class Found:
    """What answers.

    Attributes:
        name: for people.
        source: path, URI or hub id of the model's folder; with `run`, of its base's.
        run: the run whose newest checkpoint lies over the base; None: the folder holds all weights.
        adapter: folder of an adapter in PEFT's format that lies over the model in `source`.
        wanted: longest context that was asked for, in tokens; None: the usual one.
        trained_seq_len: longest row that it was trained on; 0 where that is not known.
        identity: what tells these weights from others; JSON.
    """

    name: str
    source: str
    identity: dict[str, Any]
    run: str | None = None
    adapter: str | None = None
    wanted: int | None = None
    trained_seq_len: int = 0

    @cached_property
    def folder(self) -> str:
        """A local folder of `source`.

        Raises:
            ModelError: there is none, and none can be fetched.
        """
        return local_folder(self.source)

    @cached_property
    def config(self) -> PretrainedConfig:
        from ray_ft.model import load

        return load.load_config(self.folder)

    @cached_property
    def context(self) -> int:
        limit = int(self.config.get_text_config().max_position_embeddings)
        return min(limit, self.wanted or max(CONTEXT, self.trained_seq_len))

    @cached_property
    def encoder(self) -> Encoder:
        return Encoder(load_tokenizer(self.folder), self.context, _listed_stops(self.folder))

    @cached_property
    def trained(self) -> Trained | None:
        """The run's checkpoint, with its base; None where the folder holds all weights."""
        from ray_ft.trained import Trained

        return Trained.of(self.run) if self.run else None


def find(target: Target, *, export_only: bool = False) -> Found:
    """Look up a run or a folder.

    Args:
        export_only: whether the weights must lie in one folder, as vLLM wants them.

    Raises:
        CheckpointError: the run has no checkpoint, or `export_only` and no export of its newest one.
        ModelError: the folder cannot be used.
    """
    return _run(target.location, export_only) if target.kind == "run" else _folder(target.location, export_only)


def refuse_labels(what: str, labels: Sequence[str]) -> None:
    """Refuse a classifier, which gives no text.

    Raises:
        ModelError: it has labels.
    """
    if labels:
        raise ModelError(
            f"{what} is a classifier of {', '.join(labels[:3])}{' …' if len(labels) > 3 else ''}, which gives "
            "probabilities of labels and no text",
            ["serve it, and ask POST /v1/classify: ray-ft serve RUN", "score it: ray-ft evaluate RUN"],
        )


def _run(location: str, export_only: bool) -> Found:
    from ray_ft.train import checkpoint
    from ray_ft.trained import Trained

    run = RunDir(location)
    newest = checkpoint.newest(run.checkpoints)
    obstacle = "it has no export"
    if newest is not None and paths.exists(paths.join(run.export, MANIFEST)):
        try:
            manifest = Manifest.load(run.export)
        except ServeError as error:  # the checkpoint, from which the export was made, is there all the same
            obstacle = first_line(error)
        else:
            if manifest.content["step"] == newest.step:
                return _exported(manifest, f"{manifest.run} (export of step {newest.step})")
            obstacle = f"its export is of step {manifest.content['step']}, its newest checkpoint of step {newest.step}"
    trained = Trained.of(location)
    if export_only:
        raise CheckpointError(
            f"vLLM loads exported models, and {location} is not exported: {obstacle}",
            [f"export it first: ray-ft export {location}", "answer with the checkpoint: --engine transformers"],
        )
    settings = trained.recipe
    refuse_labels(settings.run.name, settings.model.labels)
    return Found(
        name=f"{settings.run.name} (checkpoint of step {trained.found.step})",
        source=settings.model.location,
        identity={"run": location, "step": trained.found.step},
        run=location,
        wanted=settings.serve.max_model_len,
        trained_seq_len=settings.data.seq_len,
    )


def _exported(manifest: Manifest, name: str) -> Found:
    content = manifest.content
    refuse_labels(name, manifest.model.get("labels", ()))
    return Found(
        name=name,
        source=manifest.folder,
        identity={"folder": manifest.folder, "run": manifest.run, "step": content["step"], "files": content["files"]},
        wanted=manifest.serve["max_model_len"],
        trained_seq_len=manifest.model["trained_seq_len"],
    )


def _folder(location: str, export_only: bool) -> Found:
    manifest = None
    if (paths.is_uri(location) or os.path.isdir(location)) and paths.exists(paths.join(location, MANIFEST)):
        manifest = Manifest.load(location)
    if manifest is not None and not manifest.is_adapter:
        return _exported(manifest, f"{manifest.run} (export of step {manifest.content['step']})")
    local = local_folder(location)
    identity = {"folder": location, "files": _stamps(local)}
    if not os.path.exists(os.path.join(local, ADAPTER_CONFIG)):
        return Found(name=location, source=location, identity=identity)
    if export_only:
        raise ModelError(
            f"vLLM loads whole models here, and {location} is an adapter alone",
            ["export the run merged: ray-ft export RUN", "answer with --engine transformers"],
        )
    base = _base_of(local, manifest)
    return Found(name=location, source=base, identity={**identity, "base": base}, adapter=location)


def _base_of(local: str, manifest: Manifest | None) -> str:
    if manifest is not None:
        return str(manifest.content["base"])
    with open(os.path.join(local, ADAPTER_CONFIG), encoding="utf-8") as stream:
        settings = json.load(stream)
    base, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not base:
        raise ModelError(
            f"{ADAPTER_CONFIG} in {local} does not say which model the adapter is of",
            ["write it there as base_model_name_or_path"],
        )
    return f"{base}@{revision}" if revision and not os.path.isdir(base) and not paths.is_uri(base) else str(base)


def local_folder(location: str) -> str:
    """A local folder of a path, URI or hub id; an error that names the ways to say what is to answer."""
    try:
        return hub.model_folder(location)
    except ModelError as error:
        ways = [f"name {way}" for way in WAYS]
        raise ModelError(error.what.replace("model.path", "the model", 1), [*error.ways_out, *ways]) from error
    except OSError as error:
        raise ModelError(f"the model {location!r} cannot be read: {first_line(error)}", WAYS) from error


def _stamps(local: str) -> list[list[Any]]:
    # Where a hub's snapshot links to its blobs, their names are hashes of the content; elsewhere the time tells.
    found: list[list[Any]] = []
    with os.scandir(local) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.is_file() and not entry.name.startswith("."):
                status = entry.stat()
                found.append([entry.name, status.st_size, status.st_mtime_ns])
    return found


def _listed_stops(folder: str) -> list[int]:
    path = os.path.join(folder, "generation_config.json")
    if not os.path.exists(path):
        return []
    try:
        with open(path, encoding="utf-8") as stream:
            listed = json.load(stream).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise _damaged(path, error) from error
    return listed if isinstance(listed, list) else [] if listed is None else [listed]


def _damaged(path: str, error: Exception) -> RayFtError:
    return ModelError(f"{path} is damaged: {first_line(error)}", ["fetch or export the folder again"])
