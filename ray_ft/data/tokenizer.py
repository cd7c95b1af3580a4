"""What of a tokenizer decides about tokens, without loading one that was looked at before.

A start whose rows are prepared needs no more of it than this, and loading one imports most of transformers: a quarter
of what the command itself computes up to the first step. It is kept beside the prepared rows:

    <storage>/_prepared/tokenizers/<key>.json

Limits: where code of the model's own may run, which can read any file, nothing is kept.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import os
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from ray_ft import hub, paths
from ray_ft.data.render import VOCABULARIES
from ray_ft.errors import StorageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 1  # of `identity`, and of what `render.load_tokenizer` does to a tokenizer
#: Files at the top of a model's folder that a tokenizer is made from; config.json may name its class.
MADE_FROM = (*VOCABULARIES, "*token*.json", "merges.txt", "config.json", "chat_template*", "*.jinja")
TEMPLATES = "additional_chat_templates"  # a folder of more of them


def identity(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Of a loaded one."""
    return {
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "template": [tokenizer.chat_template, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
    }


class Memo:
    """What is known of the tokenizer in a local model folder, as its files are now.

    Args:
        storage: `run.storage`.

    Attributes:
        known: its `identity`; None where the storage does not know it.
    """

    def __init__(self, folder: str, storage: str) -> None:
        self._folder, self._storage = folder, storage
        self._location = self._locate()
        self.known: dict[str, Any] | None = self._read()
        self._found: dict[str, Any] | None = None

    def found(self, identity: dict[str, Any]) -> None:
        """It was just loaded: that is worth keeping, unless its files have changed under it."""
        if self.known is None and self._location is not None and self._locate() == self._location:
            self._found = identity

    def keep(self) -> None:
        """Have the storage know what was found. Where it cannot, the next start loads it again."""
        if self._found is not None and self._location is not None:
            with contextlib.suppress(StorageError, OSError):
                paths.write_json(self._location, self._found)

    def _read(self) -> dict[str, Any] | None:
        with contextlib.suppress(StorageError, OSError, ValueError):
            if self._location is not None and paths.exists(self._location):
                content: dict[str, Any] = paths.read_json(self._location)
                return content
        return None

    def _locate(self) -> str | None:
        if hub.runs_code(self._folder):
            return None
        versions = [f"{package} {version(package)}" for package in ("transformers", "tokenizers")]
        digest = hashlib.sha256("\n".join([str(FORMAT), *versions, ""]).encode())
        try:
            for place in (self._folder, os.path.join(self._folder, TEMPLATES)):
                for name in sorted(os.listdir(place) if os.path.isdir(place) else ()):
                    path = os.path.join(place, name)
                    if any(fnmatch.fnmatch(name, one) for one in MADE_FROM) and os.path.isfile(path):
                        with open(path, "rb") as stream:
                            content = hashlib.file_digest(stream, "sha256").hexdigest()
                        digest.update(f"{os.path.relpath(path, self._folder)} {content}\n".encode())
        except OSError:  # a file went or may not be read: loading it says what is wrong
            return None
        return paths.join(self._storage, "_prepared", "tokenizers", f"{digest.hexdigest()[:20]}.json")
