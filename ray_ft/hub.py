"""The local folder of a model: of a path, of a URI, which is copied once per machine, or of an id on the hub."""

from __future__ import annotations

import os

import pyarrow as pa

from ray_ft import credentials, paths
from ray_ft.errors import ModelError

WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")

#: Folders whose Python code may run in this process: `model_folder` was told so.
_trusted: set[str] = set()


def runs_code(folder: str) -> bool:
    """Whether code in a model's folder may run in this process; not unless its recipe said so."""
    return folder in _trusted


def split_revision(location: str) -> tuple[str, str | None]:
    """Of ``org/name@revision``: the hub id and the revision, None where there is none. No hub id has an @."""
    if paths.is_uri(location) or os.path.isdir(paths.absolute(location)):
        return location, None
    name, sign, revision = location.partition("@")
    return (name, revision) if sign else (location, None)


def model_folder(location: str, *, weights: bool = True, code: bool = False) -> str:
    """A local folder of a model: of a local path, of a URI (downloaded once per machine), or of a hub id.

    Args:
        location: as the recipe's `model.location` has it; a hub id may be followed by ``@`` and a revision.
        weights: False fetches only what is small: config, tokenizer and template.
        code: the folder's own Python code may run in this process, and is fetched.

    Raises:
        ModelError: there is no such folder, and the hub has no such model or cannot be reached.
    """
    folder = _model_folder(location, weights, code)
    if code:
        _trusted.add(folder)
    return folder


def _model_folder(location: str, weights: bool, code: bool) -> str:
    if paths.is_uri(location):
        try:
            return paths.local_copy(location, leave_out=() if weights else WEIGHTS)
        except (OSError, pa.ArrowException) as error:
            raise ModelError(
                f"model.path {location!r} cannot be copied here: {error}",
                ["check the URI, the credentials in the environment of every node, and the free space"],
            ) from error
    local = paths.absolute(location)
    if os.path.isdir(local):
        return local
    ways_out = ["give a local folder, a URI, or a hub id such as google/gemma-3-27b-it"]
    name, revision = split_revision(location)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ModelError(f"model.path {location!r} is no folder", ways_out)
    credentials.load()
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.jinja", "*.model", "*.txt"]
    patterns += (["*.safetensors"] if weights else []) + (["*.py"] if code else [])
    try:
        return huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"model.path {location!r} is no local folder, and the hub does not give it: {str(error).splitlines()[0]}",
            [*ways_out, "for a gated model accept its terms on the hub and set HF_TOKEN on every node"]
            + ([f"check that the hub has model.revision {revision}"] if revision else []),
        ) from error
