"""Who answers: a run, a model folder or an endpoint, asked through one interface.

    with answers.opened(Target.of("runs/demo"), batch_size=32) as engine:
        for answer in engine.answers(prompts, Sampling()): ...

Answers come one per prompt, in order; see `Answer`, `Engine`.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ray_ft import placement, session
from ray_ft.answers.memory import explained
from ray_ft.answers.target import KEY_VARIABLE, Answer, Engine, EngineName, Prompt, Sampling, Target
from ray_ft.errors import ModelError, ResourceError, ServeError
from ray_ft.placement.nodes import is_connected

if TYPE_CHECKING:
    from ray_ft.answers.found import Found

__all__ = [
    "opened",
    "check",
    "explained",
    "Target",
    "Prompt",
    "Answer",
    "Sampling",
    "Engine",
    "EngineName",
    "KEY_VARIABLE",
]


@contextlib.contextmanager
def opened(
    target: Target, engine: EngineName = "auto", *, batch_size: int = 32, device: str = "auto", gpus: int = 0
) -> Iterator[Engine]:
    """Ready to answer while the block runs. Nothing is loaded before the first prompt.

    Args:
        engine: "auto": vLLM for a model whose weights lie in one folder, on GPUs; else transformers. Of no meaning for
            an endpoint.
        batch_size: prompts that are answered at once; for an endpoint, requests under way.
        device: "auto", "cpu" or "cuda".
        gpus: most GPUs to use; 0: all that there are, in the cluster or here. Of a cluster that has none and may grow,
            those of one node that its autoscaler may add.

    Raises:
        RayFtError: the target cannot answer, or not with this engine; each kind says what to do.
    """
    if batch_size < 1:
        raise ModelError(f"batch_size = {batch_size} answers nothing", ["give at least 1"])
    if target.kind == "endpoint":
        if engine != "auto":
            raise ServeError(
                f"{target.location} has its own engine: {engine} cannot be chosen for it", ["leave the engine out"]
            )
        from ray_ft.answers.endpoint import Endpoint

        with contextlib.closing(Endpoint(target, batch_size)) as asked:
            yield asked
        return
    with contextlib.ExitStack() as stack:
        there = _gpus(stack, engine, device)
        used = min(gpus or there, there)
        made = _made(target, engine, batch_size, used)
        stack.callback(made.close)
        yield made


def check(target: Target, engine: EngineName) -> Found | None:
    """What would answer, looked up with nothing loaded, so that what cannot is known before hours of other work.

    Returns:
        None for an endpoint, which is asked when it is opened.

    Raises:
        RayFtError: the target is not there, or this engine cannot load it.
    """
    from ray_ft.answers.found import find

    if target.kind == "endpoint":
        return None
    if engine == "vllm" and not _has_vllm():
        raise ModelError(
            "vLLM is not installed here",
            ["install it: pip install 'ray-ft[gpu]', or [cpu]", "answer with --engine transformers"],
        )
    return find(target, export_only=engine == "vllm")


def _has_vllm() -> bool:
    return importlib.util.find_spec("vllm") is not None


def _made(target: Target, engine: EngineName, batch_size: int, gpus: int) -> Any:
    what = check(target, engine)
    assert what is not None
    if engine == "vllm" or (engine == "auto" and gpus and _has_vllm() and what.run is None and what.adapter is None):
        from ray_ft.answers.offline import Offline

        return Offline(what, batch_size, gpus)
    return _transformers(what, batch_size, gpus)


def _transformers(what: Found, batch_size: int, gpus: int) -> Any:
    import torch

    from ray_ft.answers.local import Transformers

    device = "cuda" if gpus else "cpu"
    if session.address():
        # Never in this process: it may be on a head that has neither GPU nor memory, and Ray would not know of it.
        return Transformers(what, batch_size, device, actors=gpus or 1)
    return Transformers(what, batch_size, device, actors=0 if gpus <= torch.cuda.is_available() else gpus)


def _gpus(stack: contextlib.ExitStack, engine: EngineName, device: str) -> int:
    """GPUs there are or may come, of the cluster where one is needed or named; connects to it for the block."""
    import torch

    here = torch.cuda.device_count() if device != "cpu" else 0
    if engine == "vllm" or session.address() or here > 1 or is_connected():
        stack.enter_context(session.connected())
        here = placement.gpus_within_reach() if device != "cpu" else 0
    if device == "cuda" and not here:
        raise ResourceError("device = 'cuda', and there is no GPU", ["device auto, or cpu", "use a machine with one"])
    return here
