"""What cannot work as a job, refused before anything is sent: all faults at once.

The job starts in a copy of the working directory, on another machine. What the recipe or the verb's arguments name must
be in that copy, or be reached from there: storage that nodes share, a hub, a URL. Limits: whether an absolute path is
there on the nodes cannot be seen from here; `ray-ft doctor` looks on the cluster itself.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray_ft import paths, recipe
from ray_ft.credentials import has_credential, looks_secret, redacted
from ray_ft.errors import CredentialError, DataError, RecipeError, StorageError
from ray_ft.recipe import Recipe
from ray_ft.submit.package import Package

#: Folders that each node has for itself.
OWN = ("/tmp", "/var/tmp", "/dev/shm", "/run")  # noqa: S108 - named to be refused
SHARED = "storage that every node reaches: s3://…, gs://…, or a folder that they all mount"
ABOUT_RECIPE = ("train", "tune")
#: Parameters of the other verbs that name what is read, and what is written.
READ = {"evaluate": ("target", "path"), "export": ("run",), "generate": ("target", "source")}
WRITTEN = {"evaluate": ("to",), "export": ("to",), "generate": ("to",)}


@dataclass
class Checked:
    """What is submitted: the verb's arguments as the job gets them, which run it is about, and what to say before.

    Attributes:
        storage: of the run; "" where the verb is not about a run of ours.
        alone: one such job at a time: it writes into the run.
        own: paths of which each node would have its own, which is right where there is only one node.
    """

    arguments: list[str]
    run: str
    storage: str = ""
    alone: bool = False
    notes: list[str] = field(default_factory=list)
    own: list[str] = field(default_factory=list)


def check_recipe(path: str, overrides: Sequence[str], options: Sequence[str], package: Package) -> Checked:
    """For `train` and `tune`.

    Args:
        path: the recipe, from here or from the working directory.
        options: of the verb, passed on.

    Raises:
        RecipeError: the recipe is not valid, or cannot work as a job; names every fault.
    """
    name, where = _recipe_name(path, package)
    settings = _load_in(package.root, where, overrides)
    elsewhere = _load_in(Path("/"), where, overrides)  # what differs there is relative
    faults: list[str] = []
    checked = Checked([name, *overrides, *options], settings.run.name, settings.run.storage, alone=True)
    if settings.train.in_process:
        faults.append(
            "train.workers=0 trains in the job's own process, which runs on the head node and gets no GPU: "
            "train.workers=1 or more"
        )
    _check_storage(settings.run.storage, settings.run.storage != elsewhere.run.storage, package, faults, checked)
    _check_model(settings.model.path, settings.model.path != elsewhere.model.path, package, faults, checked)
    for split, sources, other in (
        ("train", settings.data.train, elsewhere.data.train),
        ("eval", settings.data.eval, elsewhere.data.eval),
    ):
        for number, (source, unlike) in enumerate(zip(sources, other, strict=True)):
            for one, there in zip(source.path, unlike.path, strict=True):
                alone = source.model_copy(update={"path": [one]})
                _check_rows(f"data.{split}.{number}.path", alone, one != there, package, faults, checked)
    config = settings.train.zero.config
    if config and not paths.is_uri(config) and _inside(config, package) and not package.holds(config):
        faults.append(f"train.zero.config={config} does not go along: --include '{_name(config, package)}'")
    if faults:
        raise RecipeError(f"{path} cannot run as a job from {package.root}", faults)
    return checked


def check_arguments(verb: str, given: Mapping[str, Any], arguments: Sequence[str], package: Package) -> Checked:
    """For `evaluate`, `export` and `generate`.

    Args:
        given: the verb's parameters by name, as its command line reads them.
        arguments: the same as they were written.

    Raises:
        RecipeError: what is named is not there for the job; names every fault.
    """
    faults: list[str] = []
    subject = str(given.get("target") or given.get("run"))
    checked = Checked(list(arguments), paths.base_name(subject.rstrip("/")) or subject)
    if paths.is_uri(subject) or os.path.isabs(subject):
        checked.storage = paths.parent(subject.rstrip("/"))
    for name in READ[verb]:
        value = given.get(name)
        for one in value if isinstance(value, list | tuple) else [value]:
            if one and not paths.is_uri(one):
                _check_read(str(one), name == "target", package, faults, checked)
    for name in WRITTEN[verb]:
        value = given.get(name)
        if value and not paths.is_uri(value):
            if not os.path.isabs(value) or _inside(value, package):
                faults.append(f"--{name} {value} lies in the job's copy of the working directory: name {SHARED}")
            else:
                checked.notes.append(f"--{name} {value} is written on the cluster")
    if faults:
        raise RecipeError(f"{verb} cannot run as a job from {package.root}", faults)
    return checked


def check_environment(names: Sequence[str]) -> dict[str, str]:
    """The variables to pass on, from this process's environment.

    Raises:
        CredentialError: one looks like a secret, which Ray would show in its API, its dashboard and its logs.
        RecipeError: one is not set here.
    """
    ways = [
        "put it into the file ~/.ray-ft/secrets/NAME (0600) on the nodes, or mount a secret at /etc/ray-ft/secrets",
        "on AWS and Google Cloud give the nodes a role instead of keys (docs/security.md)",
    ]
    for given in names:
        name, sign, value = given.partition("=")
        if looks_secret(name, value or os.environ.get(name, "")):
            raise CredentialError(f"--env {name} looks like a secret, and a job shows them all", ways)
        if sign:
            raise RecipeError(f"--env {name}=… is no name", [f"export it, then --env {name} passes its value on"])
        if name not in os.environ:
            raise RecipeError(f"--env {name} is not set here", [f"export {name}=…", "leave it out"])
    return {name: os.environ[name] for name in names}


def check_line(arguments: Sequence[str]) -> None:
    """The command line of a job is shown to all who may see the cluster.

    Raises:
        CredentialError: an argument holds what looks like a credential.
    """
    for one in arguments:
        if has_credential(one) or ("=" in one and looks_secret(*one.replace(".", "_").split("=", 1))):
            raise CredentialError(
                f"the argument {redacted(one).partition('=')[0]} holds what looks like a secret, and a job's command "
                "line is shown by Ray",
                ["put secrets into files on the nodes (docs/security.md) and leave them out of recipes and arguments"],
            )


# -------------------------------------------------------------------------------------------------------------- parts


def _recipe_name(path: str, package: Package) -> tuple[str, str]:
    """The recipe as the job names it, and where it is here."""
    if paths.is_uri(path):
        return path, path
    found = next((at for at in (Path(path).absolute(), package.root / path) if at.exists()), None)
    if found is None:
        raise RecipeError(f"no recipe at {path!r}", ["give the path of a YAML file"])
    if not _inside(found, package):
        raise RecipeError(
            f"the recipe {path} lies outside of the working directory {package.root}, so the job would not have it",
            ["name a --working-dir that holds it", "move it there"],
        )
    if not package.holds(found.resolve()):
        raise RecipeError(
            f"the recipe {path} does not go along: it is ignored or excluded",
            [f"--include '{_name(found, package)}'"],
        )
    return _name(found, package), str(found)


def _load_in(folder: Path, path: str, overrides: Sequence[str]) -> Recipe:
    with contextlib.chdir(folder):
        return recipe.load(path, overrides)


def _check_storage(storage: str, relative: bool, package: Package, faults: list[str], checked: Checked) -> None:
    if paths.is_uri(storage) and not storage.startswith("file://"):
        return
    local = storage.removeprefix("file://")
    if relative or _inside(local, package):
        faults.append(
            f"run.storage {'is relative' if relative else storage}: it would lie in the job's copy of the working "
            f"directory, which goes with the job. Name {SHARED}"
        )
        return
    if _own(local):
        checked.own.append(f"run.storage={storage}")
    checked.notes.append(f"run.storage={storage} must be one folder for all nodes of the cluster")


def _check_model(path: str, relative: bool, package: Package, faults: list[str], checked: Checked) -> None:
    if paths.is_uri(path):
        return
    if not relative and not os.path.isabs(path):
        return  # a hub id
    if _inside(path, package):
        missing = [name for name in _files_below(path) if not package.holds(name)]
        if missing or not relative:
            what = f"{len(missing)} of its files do not go along" if missing else "it is written as an absolute path"
            faults.append(
                f"model.path={_name(path, package)} lies in the working directory, and {what}. Name a hub id or "
                f"{SHARED}; a small model goes along with --include '{_name(path, package)}/**' and a relative path"
            )
        return
    if _own(path):
        checked.own.append(f"model.path={path}")
    checked.notes.append(f"model.path={path} must be there on each node")


def _check_rows(key: str, source: Any, relative: bool, package: Package, faults: list[str], checked: Checked) -> None:
    from ray_ft.data.files import find_files, public_name

    path = source.path[0]
    if paths.is_uri(path) and not path.startswith("file://"):
        return
    if not relative and not _inside(path, package):
        if _own(path):
            checked.own.append(f"{key}={path}")
        checked.notes.append(f"{key}={path} must be there on each node")
        return
    shown = _name(path, package)
    if not relative:
        faults.append(f"{key}={public_name(path)} is written as an absolute path of this machine: write {shown}")
        return
    try:
        found = find_files(source)
    except (DataError, StorageError):
        faults.append(f"{key}={shown} matches no file in the working directory. Name {SHARED}")
        return
    missing = [file for file in found if not package.holds(file.uri.removeprefix("file://"))]
    if missing:
        size = sum(file.size for file in missing) / 2**20
        faults.append(
            f"{key}={shown}: {len(missing)} of {len(found)} files ({size:.1f} MiB) do not go along. Put them on "
            f"{SHARED}; small ones go along with --include '{shown}'"
        )
    else:
        checked.notes.append(
            f"{key}={shown} goes along, and belongs to this submission: after another one, from a changed working "
            f"directory, the run would not know its rows again. For a run that is to be continued, use {SHARED}"
        )


def _check_read(path: str, model: bool, package: Package, faults: list[str], checked: Checked) -> None:
    if os.path.isabs(path):
        if _inside(path, package):
            faults.append(f"{path} lies in the working directory of this machine. Name {SHARED}")
        else:
            if _own(path):
                checked.own.append(path)
            checked.notes.append(f"{path} must be there on each node")
        return
    at = package.root / path
    if any(sign in path for sign in "*?["):
        names = [str(one) for one in package.root.glob(path)]
    else:
        names = _files_below(str(at)) if at.exists() else []
        if model and not at.exists() and path.count("/") == 1:
            return  # a hub id
    missing = [name for name in names if not package.holds(name)]
    if missing or not names:
        what = f"{len(missing)} of its files do not go along" if names else "there is no such file"
        faults.append(f"{path}: in the working directory, {what}. Name {SHARED}; or --include '{path}'")


def _files_below(path: str) -> list[str]:
    if not os.path.isdir(path):
        return [path]
    return [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]


def _inside(path: str | Path, package: Package) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(package.root)


def _name(path: str | Path, package: Package) -> str:
    """As the job names it, from the working directory."""
    return Path(os.path.relpath(os.path.realpath(Path(path).parent), package.root), Path(path).name).as_posix()


def _own(path: str) -> bool:
    return any(Path(path).is_relative_to(folder) for folder in OWN)
