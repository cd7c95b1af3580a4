"""What a step's activations take: a few layers of the true model run on tensors without memory, and are counted.

The layers run forwards and backwards under PyTorch's fake tensors, so shapes, precisions and what autograd saves are
those of the family's own code, while nothing is computed. Limits: kernels' inner scratch space is not seen; attention
is counted as SDPA or eager runs it, with a mask (flash-attention needs none, and takes less).
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ray_ft.errors import ModelError
from ray_ft.model import classify, gemma3n
from ray_ft.plan.ledger import Ledger

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNKS = 3  # of the loss that are traced: from the third on nothing grows


@dataclass(frozen=True)
class Block:
    """Of one kind of block, in bytes above what was there before it.

    Attributes:
        forward: the most while it runs forwards.
        kept: what stays while the forward pass goes on; `kept_later`: what of it stays for the backward pass.
        backward: the most while it runs backwards, above all that is kept up to and with this block; without the
            gradients of parameters that are complete. `backward_held`: with those of its own.
    """

    forward: float
    kept: float
    kept_later: float
    backward: float
    backward_held: float


@dataclass(frozen=True)
class Trace:
    """Bytes of activations. `before`: kept from before the first block; `after`: from after the last one."""

    before: float
    blocks: dict[Any, Block]
    after: float


@dataclass(frozen=True)
class Numbers:
    """Precisions of a traced run: `autocast` where parameters are kept in another one than is computed with."""

    compute: torch.dtype
    trained: torch.dtype
    checkpointing: bool

    @property
    def autocast(self) -> bool:
        return self.trained != self.compute


class Tracer:
    """Runs a model on the meta device, which it cuts down and keeps.

    Args:
        kinds: of each text block in order, what distinguishes kinds of blocks.
    """

    def __init__(self, model: PreTrainedModel, kinds: Iterable[Any], seq_len: int) -> None:
        self._model, self._seq_len = model, seq_len
        self._decoder = model.get_decoder()
        self._blocks = _cut(self._decoder, list(kinds))
        self._measured = lru_cache(maxsize=None)(self._run)
        self.activations = lru_cache(maxsize=None)(self._activations)
        self.loss = lru_cache(maxsize=None)(self._loss)

    def _activations(self, numbers: Numbers, rows: int) -> Trace:
        run = self._measured(numbers, rows)
        kept = [after - before for before, after in itertools.pairwise(run.live)]
        later = kept
        if numbers.checkpointing and numbers.autocast:
            # Casts of weights live as long as the forward pass, and recomputing makes new ones. They are what does not
            # grow with the rows.
            one, two = (self._measured(numbers, n).live for n in (1, 2))
            casts = [2 * (one[i + 1] - one[i]) - (two[i + 1] - two[i]) for i in range(len(kept))]
            later = [both - cast for both, cast in zip(kept, casts, strict=True)]
        blocks, top = {}, float(run.live[0])
        for index, (kind, _) in enumerate(self._blocks):
            top += later[index]
            if 0 < index < len(self._blocks) - 1:  # the first has no gradient to hand on, the last none that comes in
                backward, held = (most - top for most in run.backward[index])
                forward = run.forward[index + 1] - run.live[index]
                blocks[kind] = Block(forward, kept[index], later[index], backward, held)
        return Trace(run.live[0], blocks, kept[-1] - blocks[self._blocks[-1][0]].kept)

    def _run(self, numbers: Numbers, rows: int) -> _Run:
        """One forward and backward pass through the blocks, without the loss."""
        model, decoder, seen = self._model, self._decoder, _Seen()
        if numbers.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        else:
            model.gradient_checkpointing_disable()
        model.train()
        ledger = Ledger()
        with _fake():
            _materialise(decoder, numbers, ledger)
            handles = [block.register_forward_pre_hook(seen.enter(ledger)) for _, block in self._blocks]
            trained = [parameter for parameter in decoder.parameters() if parameter.requires_grad]
            handles += [parameter.register_post_accumulate_grad_hook(ledger.complete) for parameter in trained]
            try:
                with ledger:
                    self._pass(numbers, rows, seen, ledger)
            except Exception as error:
                raise ModelError(
                    f"a layer of {type(model).__name__} cannot be planned, as what it does depends on the values of "
                    f"tensors: {type(error).__name__}: {str(error).splitlines()[0]}",
                    ["mixtures of experts are not planned yet", "measure a run: metrics.jsonl tells memory_gib"],
                ) from error
            finally:
                for handle in handles:
                    handle.remove()
        return _Run(seen.live, seen.forward, [seen.backward.get(i, (top, top)) for i, top in enumerate(seen.live[1:])])

    def _pass(self, numbers: Numbers, rows: int, seen: _Seen, ledger: Ledger) -> None:
        ids = torch.zeros(rows, self._seq_len, dtype=torch.int64)
        positions = torch.arange(self._seq_len).expand(rows, -1)
        with _autocast(numbers):
            hidden = self._decoder(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
            seen.forward_ends(ledger)
        gradient = torch.empty_like(hidden)
        if hidden.requires_grad:
            hidden.backward(gradient)

    def _loss(self, numbers: Numbers, tokens: int, chunk: int) -> tuple[float, float]:
        """Most bytes of the loss of `tokens` target tokens, forwards and backwards, above its input."""
        head, ledger = classify.head(self._model), Ledger()
        cap = getattr(self._model.config.get_text_config(), "final_logit_softcapping", None)
        embedding = self._model.get_input_embeddings().weight
        dtype = numbers.trained if embedding.requires_grad else numbers.compute

        def chunk_loss(states: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
            logits = head(states).float()
            if cap is not None:
                logits = torch.tanh(logits / cap) * cap
            return F.cross_entropy(logits, words, reduction="sum")

        with _fake():
            _materialise(head, numbers, ledger)
            hidden = torch.empty(tokens, head.weight.shape[1], dtype=dtype, requires_grad=True)
            ledger.ignore(hidden)
            with ledger:
                with _autocast(numbers):
                    states, words = hidden[torch.arange(tokens)], torch.zeros(tokens, dtype=torch.int64)
                    total = torch.zeros(())
                    for start in range(0, min(tokens, CHUNKS * chunk), chunk):
                        part = slice(start, start + chunk)
                        total = total + checkpoint(
                            chunk_loss, states[part], words[part], use_reentrant=False, preserve_rng_state=False
                        )
                forward = ledger.take_peak()[1]
                total.backward()
                return forward, ledger.take_peak()[1]


@dataclass(frozen=True)
class _Run:
    """Bytes of one run.

    Attributes:
        live: alive when each block begins and, last, when the forward pass ends; `forward`: the most before that.
        backward: the most in each block's backward pass, without and with its own gradients.
    """

    live: list[int]
    forward: list[int]
    backward: list[tuple[int, int]]


class _Seen:
    """Takes notes at the borders between blocks, forwards and backwards."""

    def __init__(self) -> None:
        self.live: list[int] = []
        self.forward: list[int] = []
        self.backward: dict[int, tuple[int, int]] = {}
        self._gradients = 0
        self._ended = False

    def enter(self, ledger: Ledger) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if self._ended:
                return  # recomputed in the backward pass
            index = len(self.live)
            self._note(ledger)
            if args[0].requires_grad:
                args[0].register_hook(lambda _: self._left(index, ledger))

        return hook

    def forward_ends(self, ledger: Ledger) -> None:
        self._note(ledger)
        self._ended = True

    def _note(self, ledger: Ledger) -> None:
        self.forward.append(ledger.take_peak()[0])
        self.live.append(ledger.live)

    def _left(self, index: int, ledger: Ledger) -> None:
        """The backward pass of block `index` is through."""
        without, held = ledger.take_peak()
        self.backward[index] = without, held - self._gradients
        self._gradients = ledger.gradients


def _cut(decoder: nn.Module, kinds: list[Any]) -> list[tuple[Any, nn.Module]]:
    """Leave of the decoder's blocks one in front, one of each kind, and one behind.

    Of Gemma 3n's kinds the last ones: layers that borrow keys and values find those of the last that lends some. Its
    config stays as it is, by which inputs of all layers are made together.
    """
    name, blocks = next(
        (name, child)
        for name, child in decoder.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == len(kinds)
    )
    borrows = any(gemma3n.borrows(part) for part in decoder.modules())
    chosen = [0, *{kind: index for index, kind in enumerate(kinds)}.values()]
    chosen.append(chosen[-1])
    config = decoder.config
    if not borrows:
        config.num_hidden_layers = len(chosen)
    if getattr(config, "layer_types", None) and not borrows:
        config.layer_types = [config.layer_types[index] for index in chosen]
    # The same module may stand twice, but not with the same hooks: a copy of what holds no memory costs nothing.
    picked = [copy.deepcopy(blocks[index]) for index in chosen]
    setattr(decoder, name, nn.ModuleList(picked))
    return [(kinds[index], block) for index, block in zip(chosen, picked, strict=True)]


def _fake() -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def _autocast(numbers: Numbers) -> Any:
    return torch.autocast("cpu", dtype=numbers.compute) if numbers.autocast else nullcontext()


def _materialise(module: nn.Module, numbers: Numbers, ledger: Ledger) -> None:
    """Give a module fake tensors in the precisions of the run, in place of those of the last run."""
    made: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                dtype = parameter.dtype
                if dtype.is_floating_point:
                    dtype = numbers.trained if parameter.requires_grad else numbers.compute
                data = torch.empty(parameter.shape, dtype=dtype, device="cpu")
                made[id(parameter)] = nn.Parameter(data, requires_grad=parameter.requires_grad)
            part._parameters[name] = made[id(parameter)]
            ledger.ignore(made[id(parameter)])
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
                ledger.ignore(part._buffers[name])
