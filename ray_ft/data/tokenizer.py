"""What of a tokenizer decides about tokens, without loading one that was looked at before.

A start whose rows are prepared needs no more of it than this, and loading one imports most of transformers: a quarter
of what the command itself computes up to the first step. It is kept beside the prepared rows:

    <storage>/_prepared/tokenizers/<key>.json
"""

from __future__ import annotations

import hashlib
import os
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from ray_ft import paths

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FOLDER = "tokenizers"
#: Ends of the names of the files that a tokenizer is made from; config.json among them, which may name its class.
MADE_FROM = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".py")


def identity(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Of a loaded one."""
    return {
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "template": [tokenizer.chat_template, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
    }


def known(folder: str, storage: str) -> dict[str, Any] | None:
    """Of the one in a local model folder, as `identity` says it, or None where the storage does not know it.

    Args:
        storage: `run.storage`.
    """
    location = _location(folder, storage)
    return paths.read_json(location) if paths.exists(location) else None


def keep(folder: str, storage: str, found: dict[str, Any]) -> None:
    """Have `known` know it."""
    paths.write_json(_location(folder, storage), found)


def _location(folder: str, storage: str) -> str:
    """Named by all files that it may be made from, and by what makes it."""
    digest = hashlib.sha256()
    for package in ("transformers", "tokenizers"):
        digest.update(f"{package} {version(package)}\n".encode())
    digest.update(f"own code: {paths.runs_code(folder)}\n".encode())
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in names if name.endswith(MADE_FROM)):
            path = os.path.join(place, name)
            with open(path, "rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
            digest.update(f"{os.path.relpath(path, folder)} {content}\n".encode())
    return paths.join(storage, "_prepared", FOLDER, f"{digest.hexdigest()[:20]}.json")
