"""The frozen base in 4 bits: NF4 with doubly quantized scales, by bitsandbytes (Dettmers et al. 2023, QLoRA).

Layers are replaced on the meta device, where their weights have the size of their codes; each is quantized as it is
read from the checkpoint, so memory never holds more than one weight in 16 bits. Limits: linear layers; GPUs, since on
CPUs bitsandbytes computes with weights that it unpacks at each use.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ray_ft.errors import ResourceError
from ray_ft.model import gemma3n
from ray_ft.model.classify import head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# On CPUs it advises, whenever peft imports it, to install kernels for what is not done there.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

NF4: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": True}
BLOCKS = (64, 256)  # weights that share a scale, scales that share a scale: bitsandbytes' own


def check(device_type: str) -> None:
    """Refuse what 4-bit training is not for.

    Raises:
        ResourceError: it would run on a CPU, or bitsandbytes is not installed.
    """
    if device_type != "cuda":
        raise ResourceError(
            f"model.quantize = 'nf4' needs GPUs, and train.device is {device_type!r}",
            ["train the adapter over the unquantized base: model.quantize=null", "train.device=cuda, where GPUs are"],
        )
    _bitsandbytes()


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise ResourceError(
            f"model.quantize = 'nf4' needs bitsandbytes, which does not load here: {error}",
            ["pip install bitsandbytes==0.50.2", "or set model.quantize=null"],
        ) from error
    return bitsandbytes


def targets(model: PreTrainedModel, unreached: Collection[str] = ()) -> list[str]:
    """Names of the modules that are quantized: linear layers that text reaches, with a frozen weight, less the output
    projection, whose errors would reach every logit."""
    output, read_past = head(model), gemma3n.read_past(model)
    return [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and module is not output
        and not module.weight.requires_grad
        and f"{name}.weight" not in unreached
        and name not in read_past
    ]


def quantize(model: PreTrainedModel, names: Collection[str], dtype: torch.dtype) -> None:
    """Replace linear layers by 4-bit ones, in place, on the meta device.

    To be called after `adapter.inject`, which needs weights of full shape beneath DoRA's adapters.

    Args:
        dtype: in which weights are restored at each use.
    """
    bitsandbytes = _bitsandbytes()
    for name in names:
        old = model.get_submodule(name)
        assert isinstance(old, nn.Linear)
        new = bitsandbytes.nn.Linear4bit(
            old.in_features, old.out_features, bias=False, compute_dtype=dtype, device="meta", **NF4
        )
        new.bias = old.bias
        codes = torch.empty(-(-old.weight.numel() // 2), 1, dtype=torch.uint8, device="meta")
        new.weight = _parameter(new, codes, None)
        model.set_submodule(name, new.train(old.training))


def _parameter(module: nn.Module, codes: torch.Tensor, state: Any) -> nn.Parameter:
    return _bitsandbytes().nn.Params4bit(
        codes, requires_grad=False, quant_state=state, module=module, bnb_quantized=True, **NF4
    )


def is_quantized(module: nn.Module) -> bool:
    """Whether a module's weight is held in 4 bits; does not load bitsandbytes."""
    return isinstance(module, nn.Linear) and type(module).__module__.startswith("bitsandbytes.")


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The 4-bit layers by the names of their weights."""
    for name, module in model.named_modules():
        if is_quantized(module):
            yield f"{name}.weight", module


@torch.no_grad()
def store(module: Any, weight: torch.Tensor) -> None:
    """Fill one 4-bit layer, whose codes are allocated, from its weight [outputs, inputs] of any precision and device.

    Its parameter is made anew over the same memory: allocating has lost what bitsandbytes keeps beside the codes.
    """
    codes = module.weight.data
    fresh, state = _bitsandbytes().functional.quantize_4bit(weight.to(codes.device, module.compute_dtype), **NF4)
    codes.copy_(fresh)
    module.weight, module.quant_state = _parameter(module, codes, state), state


@torch.no_grad()
def dequantized(module: Any) -> torch.Tensor:
    """The weight of a filled 4-bit layer as it computes with it: [outputs, inputs], in its precision."""
    return _bitsandbytes().functional.dequantize_4bit(module.weight.data, module.quant_state)


@torch.no_grad()
def rounded(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A weight as a 4-bit layer computes with it, in `dtype`, on the weight's device; on a GPU where there is one,
    since that is where training rounded it."""
    functional = _bitsandbytes().functional
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # As one row: on CPUs bitsandbytes 0.50.2 restores rows wrongly whose length is no multiple of 64.
    codes, state = functional.quantize_4bit(weight.to(device, dtype).reshape(1, -1), **NF4)
    return functional.dequantize_4bit(codes, state).view(weight.shape).to(weight.device)


def stored_bytes(elements: int) -> int:
    """Memory of a quantized weight: codes, scales of one byte, and the scales' scales with their two tables."""
    scales = -(-elements // BLOCKS[0])
    return -(-elements // 2) + scales + 4 * -(-scales // BLOCKS[1]) + 4 * (16 + 256 + 1)
