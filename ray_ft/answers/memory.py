"""Memory that runs out while a model is loaded or asked, here or in an actor, as an error that says what to do."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from ray_ft.errors import RayFtError, ResourceError, first_line

#: torch's, by name: torch is slow to import, and an error of an actor may be Ray's, which only wraps it.
OUT_OF_MEMORY = "OutOfMemoryError"


@contextlib.contextmanager
def explained(what: str, *ways_out: str) -> Iterator[None]:
    """Around work with a model.

    Args:
        what: the model, for people.
        ways_out: beside those that always are.

    Raises:
        ResourceError: in place of a GPU's memory that ran out, and of an actor that ended without a word, which is how
            the operating system or Ray ends one that takes too much.
    """
    try:
        yield
    except RayFtError:
        raise
    except Exception as error:
        ray: Any = sys.modules.get("ray")
        cause = getattr(error, "cause", None) or error
        if type(cause).__name__ == OUT_OF_MEMORY:
            told = f"the GPU's memory is too small for {what}: {first_line(cause)}"
        elif ray is not None and isinstance(error, ray.exceptions.RayActorError):
            told = f"the process that held {what} ended, most likely for want of memory: {first_line(error)}"
        else:
            raise
        raise ResourceError(told, [*ways_out, "use a machine with more memory"]) from error
