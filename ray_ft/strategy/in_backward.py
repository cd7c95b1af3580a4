"""The optimizer within the backward pass: each weight is updated as soon as its gradient is there, which is then freed.

Only the gradients of what is computed at the moment exist: with FSDP2, whose hooks run once a block's gradients have
been summed over workers, one block's; without sharding, one parameter's. Limits: one backward pass a step, and no
clipping by the norm of all gradients, which is known only at the end. Weights used several times (tied embeddings, or
the output projection of a loss in chunks) are updated once, after their last use. Checkpointing with re-entry would
come back to a weight after its update; the model uses the other kind. Workers without sharding sum each gradient as it
comes, so it has to come in the same order on all of them: a graph that depends on the rows (experts) needs FSDP2.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ray_ft.strategy.base import Piece, Updater
from ray_ft.strategy.collective import all_reduce


class InBackward:
    """An optimizer for each parameter, called by autograd.

    A parameter whose gradient is not finite, on any of the workers that hold it, keeps its weight and moments. The
    optimizers learn that from their ``found_inf``, a scalar on the device, as torch's fused ones do: reading it here
    would have the host wait for each gradient, and the next layer's work would begin late.

    Args:
        parameters: those that are trained, by name, laid out as they will stay.
        make_optimizer: called with one parameter at a time.
        reduce_squares: this worker's sum of squared gradients to that of all workers.
        reduce: completes a gradient over workers, in place, before it is used.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        make_optimizer: Updater,
        pieces: Callable[[torch.Tensor], Iterable[Piece]],
        reduce_squares: Callable[[torch.Tensor], torch.Tensor],
        reduce: Callable[[torch.Tensor], None],
    ) -> None:
        self._pieces, self._reduce_squares, self._reduce = pieces, reduce_squares, reduce
        self._squares: torch.Tensor | None = None
        self._optimizers: dict[nn.Parameter, torch.optim.Optimizer] = {}
        update = weakref.WeakMethod(self._update)

        def call(parameter: nn.Parameter) -> None:
            bound = update()
            assert bound is not None, "a gradient has come after the strategy was let go of"
            bound(parameter)

        for name, parameter in parameters:
            self._optimizers[parameter] = make_optimizer([(name, parameter)], pieces)
            # FSDP2 calls these hooks itself, with its shards. Autograd holds them where the garbage collector does not
            # look: one that held this object, and so all parameters, would keep the model in memory for good.
            parameter.register_post_accumulate_grad_hook(call)

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        return list(self._optimizers.values())

    @torch.no_grad()
    def _update(self, parameter: nn.Parameter) -> None:
        gradient, optimizer = parameter.grad, self._optimizers[parameter]
        assert gradient is not None
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        self._reduce(local)
        squares = torch.linalg.vector_norm(local, dtype=torch.float32).square()
        self._squares = squares.double() if self._squares is None else self._squares + squares
        broken = squares.isfinite().logical_not_().float()
        for piece in self._pieces(parameter):
            all_reduce(broken, piece.group)
        optimizer.found_inf = broken.clamp_(max=1.0)
        optimizer.step()
        optimizer.found_inf = None
        parameter.grad = None

    def norm(self) -> torch.Tensor:
        """Global 2-norm of the gradients since the last call, a float32 scalar."""
        squares, self._squares = self._squares, None
        assert squares is not None, "no parameter has received a gradient"
        return self._reduce_squares(squares).sqrt().float()
