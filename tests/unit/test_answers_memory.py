"""Memory that runs out: said with ways out, in whichever process it was; nothing else is touched."""

from __future__ import annotations

import pytest
import torch

from ray_ft.answers import explained
from ray_ft.errors import ModelError, ResourceError


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_gpu_that_is_too_small(wrapped: bool) -> None:
    from ray.exceptions import RayTaskError

    error: Exception = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nMore of it")
    if wrapped:
        error = RayTaskError("judge", "a traceback", error).as_instanceof_cause()
    with (
        pytest.raises(ResourceError, match=r"too small for gemma: CUDA out of memory\. Tried to allocate 20") as told,
        explained("gemma", "ask less"),
    ):
        raise error
    assert "More of it" not in told.value.what and told.value.ways_out[0] == "ask less"


def test_an_actor_that_was_ended() -> None:
    from ray.exceptions import ActorDiedError

    with pytest.raises(ResourceError, match="the process that held gemma ended"), explained("gemma"):
        raise ActorDiedError()


@pytest.mark.parametrize("error", [ModelError("no such tensor"), ValueError("a bug")])
def test_other_errors_are_left_alone(error: Exception) -> None:
    with pytest.raises(type(error)) as told, explained("gemma"):
        raise error
    assert told.value is error
