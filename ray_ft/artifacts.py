"""What a run leaves behind, and where it lies: its directory, an export's manifest, a sweep's best trial.

Nothing here imports torch or ray, so that serving and the command line can read a run without loading either.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ray_ft import paths
from ray_ft.errors import CheckpointError, ServeError, StorageError, first_line

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 2
SWEEP = "sweep.json"


def run_of(location: str) -> str:
    """The run directory that a location stands for: of a sweep's directory, its best trial's; else the location itself.

    Raises:
        CheckpointError: no trial of the sweep has reported yet, so none is the best.
        StorageError: what the sweep has written cannot be read.
    """
    record = paths.join(paths.absolute(location), SWEEP)
    if not paths.exists(record):
        return location
    ways = [
        "continue the sweep: ray-ft tune RECIPE --resume",
        f"name a trial's run directory: {paths.join(location, '0000')}",
    ]
    try:
        best = paths.read_json(record)["best"]
        name = None if best is None else trial_name(best)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise StorageError(f"the sweep's record {record} cannot be read: {first_line(error)}", ways) from error
    if name is None:
        raise CheckpointError(f"the sweep {location!r} has no best trial yet: none has reported its metric", ways)
    return paths.join(location, name)


def trial_name(number: int) -> str:
    """Of a trial, in its sweep's directory."""
    return f"{number:04d}"


@dataclass(frozen=True)
class RunDir:
    """The layout of one run's directory; `root` is ``<run.storage>/<run.name>``."""

    root: str

    def at(self, *parts: str) -> str:
        return paths.join(self.root, *parts)

    @property
    def recipe(self) -> str:
        return self.at("recipe.yaml")

    @property
    def rejects(self) -> str:
        return self.at("data", "rejects.jsonl")

    @property
    def stats(self) -> str:
        return self.at("data", "stats.json")

    @property
    def checkpoints(self) -> str:
        return self.at("checkpoints")

    @property
    def metrics(self) -> str:
        return self.at("metrics.jsonl")

    @property
    def tensorboard(self) -> str:
        return self.at("tensorboard")

    @property
    def logs(self) -> str:
        return self.at("logs")

    @property
    def evaluation(self) -> str:
        return self.at("eval", "report.json")

    @property
    def validations(self) -> str:
        """Folder with a report for each step that was evaluated beside the training."""
        return self.at("eval", "steps")

    @property
    def examples(self) -> str:
        """Held-out prompts with their references, for the playground."""
        return self.at("eval", "examples.json")

    @property
    def report(self) -> str:
        return self.at("report.html")

    @property
    def export(self) -> str:
        return self.at("export")

    @property
    def adapter(self) -> str:
        """The export of an adapter alone, without its base."""
        return self.at("adapter")


@dataclass(frozen=True)
class Manifest:
    """``manifest.json`` of an exported model: all that serving knows of how it was made.

    Attributes:
        folder: the Hugging Face folder that the manifest lies in (a location).
        content: the parsed JSON. Keys: ``format``, ``run``, ``step``, ``base``, ``recipe_sha256``, ``metrics``
            (name → number), ``created``, ``kind`` (``model``, or ``adapter`` of the model ``base``), ``model``
            {``architecture``, ``model_type``, ``dtype``, ``parameters``, ``bytes``, ``max_position_embeddings``,
            ``trained_seq_len``, ``stop_token_ids``, of an adapter ``rank``}, ``checks`` (what the gate measured),
            ``proof`` (``token_ids`` of a real row and ``logprobs``, what the trained weights give each of them but the
            first, so that whoever serves the folder can see that it answers alike), ``serve`` (the recipe's serve
            section) and ``files`` (name → {``bytes``, ``sha256``}).
    """

    folder: str
    content: dict[str, Any]

    @cached_property
    def model(self) -> dict[str, Any]:
        return self.content["model"]

    @property
    def serve(self) -> dict[str, Any]:
        return self.content["serve"]

    @property
    def run(self) -> str:
        return self.content["run"]

    @property
    def is_adapter(self) -> bool:
        return self.content["kind"] == "adapter"

    def save(self) -> None:
        paths.write_json(paths.join(self.folder, MANIFEST), self.content)

    @classmethod
    def load(cls, run_or_folder: str) -> Manifest:
        """Read the manifest of a run directory or of an export folder.

        Raises:
            ServeError: there is none, or it is of another format.
        """
        location = paths.absolute(run_or_folder)
        for folder in (location, paths.join(location, "export"), paths.join(location, "adapter")):
            if paths.exists(paths.join(folder, MANIFEST)):
                content = None
                with contextlib.suppress(ValueError):
                    content = paths.read_json(paths.join(folder, MANIFEST))
                if not isinstance(content, dict):
                    raise ServeError(
                        f"{paths.join(folder, MANIFEST)} is damaged: it holds no JSON object",
                        ["export the run again: ray-ft export RUN"],
                    )
                if content.get("format") != MANIFEST_FORMAT:
                    raise ServeError(
                        f"{paths.join(folder, MANIFEST)} has format {content.get('format')!r}, this version reads "
                        f"{MANIFEST_FORMAT}",
                        ["export the run again with this version: ray-ft export RUN"],
                    )
                return cls(folder, content)
        raise ServeError(
            f"no {MANIFEST} in {run_or_folder!r}, or its export/ or adapter/ folder",
            ["export the run first: ray-ft export RUN", "name a run directory or an export folder"],
        )
