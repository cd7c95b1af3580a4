"""What a reference model says of pairs, kept beside their rows: unit by unit, so that it is read along with them.

    <storage>/_prepared/<key>/references/<key>/ 000000-00000.npy …  index.json (written last: the commit)

It takes 8 bytes a pair. The key is that of the model and the precision it computed in; the folder is that of the rows.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np

from ray_ft import paths
from ray_ft.data.identity import key_of
from ray_ft.data.prepared import Prepared, Unit
from ray_ft.errors import DataError

FORMAT = 1  # part of the key


def location_of(prepared: Prepared, model: dict[str, Any]) -> str:
    """Where the references of some rows lie.

    Args:
        model: what tells the reference model's numbers from others'.
    """
    return paths.join(prepared.location, "references", key_of({"format": FORMAT, **model}))


def file_of(location: str, unit: Unit) -> str:
    return paths.join(location, f"{unit.chunk:06d}-{unit.group:05d}.npy")


def write(location: str, unit: Unit, said: np.ndarray) -> None:
    """Keep float32 [rows, documents] of a unit."""
    stream = io.BytesIO()
    np.save(stream, said)
    paths.write_bytes(file_of(location, unit), stream.getvalue())


def read(location: str, unit: Unit) -> np.ndarray | None:
    """What is kept of a unit, float32 [rows, documents]; None: nothing."""
    file = file_of(location, unit)
    return np.load(io.BytesIO(paths.read_bytes(file)), allow_pickle=False) if paths.exists(file) else None


def commit(location: str, documents: int, model: dict[str, Any]) -> Stored:
    """Say that every unit's are there, of rows of so many documents at most."""
    paths.write_json(paths.join(location, "index.json"), {"documents": documents, "model": model})
    return Stored(location, documents)


def find(location: str) -> Stored | None:
    """What was committed; None where nothing complete lies."""
    index = paths.join(location, "index.json")
    return Stored(location, paths.read_json(index)["documents"]) if paths.exists(index) else None


@dataclass(frozen=True)
class Stored:
    """See `prepared.References`."""

    location: str
    documents: int

    def read(self, unit: Unit) -> np.ndarray:
        said = read(self.location, unit)
        if said is None:
            raise DataError(
                f"what the reference model says of prepared rows is gone from {file_of(self.location, unit)}",
                [f"delete {self.location}; it is then computed again"],
            )
        return np.pad(said, ((0, 0), (0, self.documents - said.shape[1])))
