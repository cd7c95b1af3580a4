"""What no setting of a recipe does, for the table of what each thing brings: named kernels, compiled layers, Liger.

A patch is a pair of contexts: one in which the model is built, one in which it is trained. Limit: Liger's replaces
classes of transformers and stays in force until the process ends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

#: Name after "sdpa " → torch's names of kernels, the first that can do a layer's attention does it. None can do all of
#: Gemma's alone: layers with a window have a mask, which flash cannot take, and the others share keys among heads.
KERNELS = {
    "efficient": ("EFFICIENT_ATTENTION", "FLASH_ATTENTION", "CUDNN_ATTENTION", "MATH"),
    "cudnn": ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"),
}
NAMES = ("compile", "liger", *(f"sdpa {kernel}" for kernel in KERNELS))


def before(names: Sequence[str]) -> None:
    """To be called before the model is built.

    Raises:
        ImportError: liger-kernel is not installed.
    """
    unknown = [name for name in names if name not in NAMES]
    assert not unknown, unknown
    if "liger" in names:
        from liger_kernel.transformers import apply_liger_kernel_to_gemma3

        # The product's own loss stays: Liger's would replace a forward pass that the product does not call.
        apply_liger_kernel_to_gemma3(cross_entropy=False, fused_linear_cross_entropy=False, layer_norm=False)


def after(names: Sequence[str], module: Any) -> None:
    """To be called on the strategy's module, laid out and filled."""
    if "compile" not in names:
        return
    from ray_ft.model.loss import decoder_layers

    text = {id(part) for part in module.model.get_decoder().modules()}
    for layer in decoder_layers(module.model):
        if id(layer) in text:
            # Where there is no GPU the figure means nothing, and graphs alone are captured.
            cuda = next(layer.parameters()).is_cuda
            layer.compile(backend="inductor" if cuda else "eager")


@contextlib.contextmanager
def training(names: Sequence[str]) -> Iterator[None]:
    """Context of the steps."""
    kernels = [kernel for name in names if name.startswith("sdpa ") for kernel in KERNELS[name.removeprefix("sdpa ")]]
    if not kernels:
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel([getattr(SDPBackend, kernel) for kernel in kernels], set_priority=True):
        yield
