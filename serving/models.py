"""What there is to serve: exported models and adapters, read from their manifests alone, and sorted into engines.

An engine holds one set of base weights and any number of adapters on it. Limits: an adapter goes with the base that its
manifest names; what the base's folder holds is checked by the gate of the adapter's export, not here.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from ray_ft import artifacts, hub, paths
from ray_ft.artifacts import Manifest
from ray_ft.errors import ServeError

#: Files up to this size, in bytes, are hashed before anything starts; weights where they are loaded, beside loading.
SMALL = 64 << 20

#: What a name may not hold: Ray reads ':' as an adapter's, '/' and '..' have been joined to paths by engines before.
FORBIDDEN = ("..", ":", "\\", "\n", "\r", "\0")


@dataclass(frozen=True)
class Served:
    """One export under the name that clients ask for."""

    name: str
    manifest: Manifest

    @property
    def details(self) -> dict[str, Any]:
        """What GET /v1/models tells of it."""
        content = self.manifest.content
        created = int(datetime.datetime.fromisoformat(content["created"]).timestamp())
        return {**{key: content[key] for key in ("run", "step", "base")}, "created": created}


@dataclass(frozen=True)
class Model:
    """One engine to run.

    Attributes:
        name: what the engine calls its base weights; clients ask for it only where `own` or `base` says so.
        folder: the weights: a path, a URI, or a hub id.
        facts: the manifest's ``model``.
        hf_config: its ``config.json``.
        serve: the recipe's serve section, with the command line's replacements.
        own: the export that the weights are; None where only the adapters' base is held.
        adapters: exports of adapters on it.
        base: the weights are those that something served was trained from, and are served to be compared with.
        examples: held-out prompts of the run, for the playground.
    """

    name: str
    folder: str
    facts: Mapping[str, Any]
    hf_config: Mapping[str, Any]
    serve: Mapping[str, Any]
    own: Served | None = None
    adapters: tuple[Served, ...] = ()
    base: bool = False
    examples: tuple[Mapping[str, Any], ...] = ()

    @property
    def classifies(self) -> bool:
        return self.facts["architecture"].endswith("ForSequenceClassification")

    @property
    def served(self) -> list[Served]:
        return [*([self.own] if self.own else []), *self.adapters]

    @property
    def version(self) -> str:
        """Identity of weights, adapters and settings: two engines of one version answer alike."""
        files = [(each.name, each.manifest.content["files"]) for each in self.served]
        identity = [self.folder, self.name, self.base, dict(self.serve), files]
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]


def load(runs: Sequence[str], *, base: bool = False, **replaced: Any) -> list[Model]:
    """The engines for some exports.

    Args:
        runs: run directories, sweeps' for their best trial's, or export folders; paths or URIs.
        base: serve also the models that they were trained from.
        replaced: values for keys of the serve sections; None leaves the manifest's. `model_name` is for a single run.

    Raises:
        CheckpointError: no trial of a sweep has reported yet.
        ServeError: an export is missing or not what its manifest says, or two have one name.
    """
    replaced = {key: value for key, value in replaced.items() if value is not None}
    if "model_name" in replaced and len(runs) > 1:
        raise ServeError(
            f"one model name, {replaced['model_name']!r}, for {len(runs)} runs",
            ["name each in its recipe: serve.model_name, then export again", "serve one run"],
        )
    models: list[Model] = []
    shared: dict[str, list[tuple[Served, dict[str, Any], str]]] = {}
    for run in map(artifacts.run_of, runs):
        manifest = Manifest.load(run)
        check(manifest)
        serve = {**manifest.serve, **replaced}
        served = Served(check_name(serve["model_name"] or default_name(manifest.run)), manifest)
        if manifest.is_adapter:
            shared.setdefault(manifest.content["base"], []).append((served, serve, run))
            continue
        hf_config = paths.read_json(paths.join(manifest.folder, "config.json"))
        models.append(
            Model(served.name, manifest.folder, manifest.model, hf_config, serve, served, examples=_examples(run))
        )
    for location, group in shared.items():
        folder = hub.model_folder(location, weights=False)
        examples = tuple(example for _, _, run in group for example in _examples(run))
        models.append(
            Model(
                base_name(location), location, group[0][0].manifest.model,
                paths.read_json(paths.join(folder, "config.json")), group[0][1],
                adapters=tuple(served for served, _, _ in group), base=base, examples=examples,
            )
        )  # fmt: skip
    if base:
        if labelled := [model.name for model in models if model.classifies]:
            raise ServeError(
                f"{labelled[0]!r} is a classifier, whose base has nothing that tells labels apart to be compared with",
                ["leave --base out"],
            )
        models += list(_bases(models))
    names = [each.name for model in models for each in model.served] + [m.name for m in models if m.base]
    engines = {model.name for model in models if model.adapters}
    if hidden := sorted({each.name for model in models for each in model.adapters} & engines):
        raise ServeError(
            f"an adapter has the name of its base, {hidden[0]!r}, which would answer in its place",
            ["give the run a serve.model_name of its own, and export again", "--model-name"],
        )
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ServeError(
            f"two models have the name {twice[0]!r}",
            ["give each run a serve.model_name of its own", "serve one of them with --model-name"],
        )
    return models


def _bases(models: Sequence[Model]) -> Iterator[Model]:
    """Engines for the bases of fully trained models, one for each base."""
    held = {model.folder for model in models if model.base}
    for model in models:
        if model.own is None:
            continue
        location = model.own.manifest.content["base"]
        if location in held:
            continue
        held.add(location)
        folder = hub.model_folder(location, weights=False)
        yield dataclasses.replace(
            model, name=base_name(location), folder=location, own=None, base=True, examples=(),
            hf_config=paths.read_json(paths.join(folder, "config.json")),
        )  # fmt: skip


def base_name(location: str) -> str:
    return check_name(paths.base_name(hub.split_revision(location.rstrip("/"))[0]))


def default_name(run: str) -> str:
    """What clients ask for where no name is set: the run's. A trial's, ``sweep/0007``, would read like a hub id."""
    return run.replace("/", "-")


def check_name(name: str) -> str:
    """The name, if clients can ask for it.

    Raises:
        ServeError: it has a character that is no name's.
    """
    found = next((bad for bad in FORBIDDEN if bad in name), None)
    if found is not None or not name or name.startswith("/"):
        raise ServeError(
            f"serve.model_name {name!r} cannot be a model's name: it has {found!r}"
            if found
            else f"serve.model_name {name!r} cannot be a model's name",
            ["choose another through serve.model_name or --model-name: letters, digits, '-', '_', '.' and '/' within"],
        )
    return name


def check(manifest: Manifest) -> None:
    """Every file is there, at its full size, and the small ones have their checksum.

    Raises:
        ServeError: naming the files at fault.
    """
    files: dict[str, dict[str, Any]] = manifest.content["files"]
    fs, folder = paths.filesystem(manifest.folder)
    infos = fs.get_file_info([paths.join(folder, name) for name in files])
    faults = []
    for (name, expected), info in zip(files.items(), infos, strict=True):
        if info.type != pafs.FileType.File:
            faults.append(f"{name} is missing")
        elif info.size != expected["bytes"]:
            faults.append(f"{name} has {info.size:,} bytes instead of {expected['bytes']:,}")
        elif info.size <= SMALL and sha256(paths.join(folder, name), fs) != expected["sha256"]:
            faults.append(f"{name} has another checksum")
    if "config.json" not in files and not manifest.is_adapter:
        faults.append("config.json is not listed")
    _refuse(manifest.folder, faults)


def check_weights(folder: str, files: Mapping[str, Mapping[str, Any]]) -> None:
    """The checksums of what `check` left out, in a local folder; a thread for each file, as hashing waits for the disk.

    Raises:
        ServeError: naming the files at fault.
    """
    large = [name for name, expected in files.items() if expected["bytes"] > SMALL]
    with ThreadPoolExecutor(min(len(large), os.cpu_count() or 1) or 1) as pool:
        found = list(pool.map(lambda name: sha256(str(Path(folder, name))), large))
    faults = [
        f"{name} has another checksum"
        for name, digest in zip(large, found, strict=True)
        if digest != files[name]["sha256"]
    ]
    _refuse(folder, faults)


def local(location: str, files: dict[str, Any]) -> str:
    """A folder on this node with the content of `location`, whose weights have their checksums."""
    if not paths.is_uri(location) and (paths.absolute(location) == location or os.path.isdir(location)):
        folder = location
    else:
        folder = hub.model_folder(location)
    if not os.path.isdir(folder):
        raise ServeError(
            f"model folder {folder!r} is not there on node {socket.gethostname()!r}, where the replica runs",
            ["use storage that all nodes share, or a URI (s3://…, gs://…)"],
        )
    check_weights(folder, files)
    return folder


def _refuse(folder: str, faults: list[str]) -> None:
    if faults:
        raise ServeError(
            f"the export in {folder!r} is not what its manifest says: {'; '.join(faults)}",
            ["export the run again: ray-ft export RUN", "copy the whole folder again"],
        )


def sha256(path: str, fs: pafs.FileSystem | None = None) -> str:
    """Checksum of a file, in hex; `fs`: where it lies, this machine by default."""
    digest = hashlib.sha256()
    with (fs or pafs.LocalFileSystem()).open_input_stream(path, compression=None) as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _examples(run: str) -> tuple[Mapping[str, Any], ...]:
    """Held-out prompts that `ray-ft evaluate` left in a run's directory; none where an export stands alone."""
    location = artifacts.RunDir(paths.absolute(run)).examples
    return tuple(paths.read_json(location)["examples"]) if paths.exists(location) else ()
