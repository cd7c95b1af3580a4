"""The run: its name, where it is kept, its seed."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from ray_ft import artifacts, paths
from ray_ft.recipe.section import Section


class Run(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*$")]
    """Name of the run: its directory is <storage>/<name>, and training again under the same name resumes it. A slash
    makes folders: the trials of a sweep are <sweep>/0000 and so on."""
    storage: str = "runs"
    """Folder or URI (s3://…, gs://…) that holds run directories; every node must reach it."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the order of samples and of any random initialisation."""

    @field_validator("storage")
    @classmethod
    def _absolute(cls, storage: str) -> str:
        return paths.absolute(storage)

    @property
    def dir(self) -> artifacts.RunDir:
        return artifacts.RunDir(paths.join(self.storage, self.name))
