"""Errors a person can act on.

Every error that this package raises on purpose says what is wrong, the value that is wrong, and every way out.
The command line prints them without a traceback; anything else that escapes is a bug and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence


class RayFtError(Exception):
    """Base of all deliberate errors.

    Args:
        what: one sentence: what is wrong, with the offending value.
        ways_out: what the reader can do about it, one sentence each.
    """

    #: Process exit status that the command line uses for this kind of error.
    exit_code = 1

    def __init__(self, what: str, ways_out: Sequence[str] = ()) -> None:
        self.what = what
        self.ways_out = tuple(ways_out)
        super().__init__(what, self.ways_out)  # both in args, so that the error survives pickling between processes

    def __str__(self) -> str:
        return "\n".join([self.what, *(f"  → {way}" for way in self.ways_out)])


def first_line(error: BaseException) -> str:
    """What an error says, for a line of another one."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


class RecipeError(RayFtError):
    """The recipe, or an override of it, is not valid. Lists all faults at once."""

    exit_code = 2


class DataError(RayFtError):
    """The data cannot be used: nothing there, nothing usable, or too much of it rejected."""


class ModelError(RayFtError):
    """The model folder is incomplete, or its weights do not fit its config."""


class StorageError(RayFtError):
    """The run directory cannot be read or written."""


class ResourceError(RayFtError):
    """The cluster or the machine lacks what the recipe asks for."""


class CredentialError(RayFtError):
    """A secret or the cluster's token is missing, wrong, or open to others."""


class CheckpointError(RayFtError):
    """No usable checkpoint, or one that does not fit this recipe."""


class TrainingError(RayFtError):
    """Training stopped: a non-finite loss, a failed worker, a broken order of samples."""


class ExportError(RayFtError):
    """The exported model failed a check and was not published."""


class ServeError(RayFtError):
    """The model cannot be served."""
