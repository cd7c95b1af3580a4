"""ZeRO by DeepSpeed: stages 1 (optimizer), 2 (and gradients), 3 (and parameters) in partitions. Its only importer.

Parameters are computed with in the layout's precision; of trained ones each worker keeps its runs in float32 as well,
in flat tensors which the optimizer updates. DeepSpeed averages gradients over workers and this project sums them, so
losses are multiplied by the number of workers. Limits: one engine a process at a time, and what `zero_config` allows.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ray_ft.errors import RecipeError
from ray_ft.recipe import Recipe
from ray_ft.span import Span
from ray_ft.strategy import allocate, flat, state, zero_blocks
from ray_ft.strategy.base import PREFIX, Layout, Piece, Strategy, Updater
from ray_ft.strategy.flat import Flat
from ray_ft.strategy.zero_config import Sizes, zero_config

#: Key of the weights among what a flat tensor consists of; moments have names.
_WEIGHTS = ""


class Zero(Strategy):
    def __init__(self, layout: Layout, recipe: Recipe) -> None:
        super().__init__(layout)
        self._train = recipe.train
        self._stage = int(recipe.train.strategy.removeprefix("zero"))

    def setup(
        self,
        module: nn.Module,
        blocks: Iterable[nn.Module],
        fill: Callable[[Mapping[str, Span]], None],
        make_optimizer: Updater,
    ) -> None:
        blocks = list(blocks)
        shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
        from pydantic import ValidationError

        try:
            config = self.partition(module, blocks)
            import deepspeed

            named = {name.removeprefix(PREFIX): p for name, p in module.named_parameters()}
            shape_of = {name.removeprefix(PREFIX): shape for name, shape in shapes.items()}
            self._client = self._make_client(make_optimizer, named, shape_of)
            grouped = [list(group["params"]) for group in self._client.param_groups if group["params"]]
            # It prints how much memory is in use, again and again, and warns of optimizers that are not its own.
            with contextlib.redirect_stdout(io.StringIO()), _errors_only():
                self._engine, *_ = deepspeed.initialize(model=module, optimizer=self._client, config=config)
        except ValidationError as error:
            raise RecipeError(
                f"DeepSpeed does not accept train.zero.config {self._train.zero.config!r}: {error}",
                ["correct the keys that it names", "leave them out: the recipe fills them in"],
            ) from error
        self.module = self._engine
        self._optimizer = self._engine.optimizer
        if self._stage == 3:
            offload = self._optimizer.parameter_offload
            handles = (*offload.forward_hooks, *offload.backward_hooks)
            zero_blocks.gather_rest(module, blocks, handles, deepspeed.zero.register_external_parameter)
        self._copies: dict[int | str, dict[str, torch.Tensor]] = {}
        self._shapes = {name: tuple(shape_of[name]) for name in named}
        self._frozen = {name: parameter for name, parameter in named.items() if not parameter.requires_grad}
        names = {parameter: name for name, parameter in named.items()}
        if self._stage == 3:
            self._flats = flat.cut_each(self._optimizer, names, self._shapes, self.layout.rank, self.layout.world)
        else:
            tensors = [tensor for group in self._client.param_groups for tensor in group["params"]]
            self._flats = flat.cut_together(tensors, grouped, names, self._shapes, self.all_reduce, self.layout.device)
        fill(self.spans())
        self.restored()

    def partition(self, module: nn.Module, blocks: list[nn.Module]) -> dict[str, Any]:
        """Give a module on the meta device memory, each parameter cut up (stage 3) before the next one is allocated.

        Returns:
            DeepSpeed's configuration.
        """
        _environment(self.layout)
        import deepspeed

        # Joins the process group that exists; `zero.Init` would else read its configuration as if it were alone.
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        config = zero_config(
            self._train,
            "bfloat16" if self.layout.dtype == torch.bfloat16 else "float32",
            gpu=self.layout.device.type == "cuda",
            sizes=_sizes(module, blocks),
        )
        allocate.buffers(module, self.layout.device)
        one_by_one = allocate.OneByOne(module, self.layout.device, self.layout.dtype)
        if self._stage == 3:
            zero_blocks.prepare(blocks)
            deepspeed.zero.Init(module=one_by_one, config_dict_or_path=config)
        else:
            one_by_one.allocate()
        return config

    # ------------------------------------------------------------------------------------------------ construction

    def _make_client(
        self, make: Updater, named: Mapping[str, nn.Parameter], shapes: Mapping[str, torch.Size]
    ) -> torch.optim.Optimizer:
        """The optimizer over parameters that DeepSpeed then replaces by its flat float32 tensors.

        It is shown stand-ins without memory that are like what it will update: float32, on their device, of the whole
        shape, which a partitioned parameter does not have.
        """
        offloaded = self._train.zero.offload_optimizer != "none"
        device = torch.device("cpu") if offloaded else self.layout.device
        one, stand_ins = torch.empty(1, device=device), {}
        for name, parameter in named.items():
            stand_ins[name] = nn.Parameter(one.expand(shapes[name]), requires_grad=parameter.requires_grad)
        real = {stand_in: named[name] for name, stand_in in stand_ins.items()}
        client = make(stand_ins.items(), self.pieces)
        for group in client.param_groups:
            group["params"] = [real[stand_in] for stand_in in group["params"]]
        return client

    # ----------------------------------------------------------------------------------------------------- weights

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self._engine.module.named_parameters():
            yield name.removeprefix(PREFIX), parameter

    def spans(self) -> dict[str, Span]:
        held = {run.name: run.of(self._held(one)[_WEIGHTS]) for one in self._flats for run in one.runs}
        for name, parameter in self._frozen.items():
            held[name] = self._frozen_span(name, parameter)
        return {name: held[name] for name in self._shapes}

    def _frozen_span(self, name: str, parameter: nn.Parameter) -> Span:
        if self._stage < 3:
            return Span.whole(parameter, owner=self.layout.rank == 0)
        length = parameter.partition_numel()
        start = min(self.layout.rank * length, parameter.ds_numel)
        count = min(length, parameter.ds_numel - start)
        part = parameter.ds_tensor.detach()
        if part.numel() < length:
            if name not in self._copies:
                with _on_hand(parameter, changed=False):
                    self._copies[name] = {_WEIGHTS: parameter.ds_tensor.detach().clone()}
            part = self._copies[name][_WEIGHTS]
        return Span(part.narrow(0, 0, count), start, self._shapes[name], count > 0)

    @torch.no_grad()
    def restored(self) -> None:
        if self._stage < 3:
            self._optimizer.update_lp_params()
            return
        self._optimizer.checkpoint_event_prologue()  # gathered copies of the old values go
        for name, parameter in self._frozen.items():
            if name in self._copies:
                with _on_hand(parameter):
                    parameter.ds_tensor.copy_(self._copies[name][_WEIGHTS])
        for one in self._flats:
            with self._resident(one):
                held = self._in_memory(one)
                for key, copy in self._copies.get(one.number, {}).items():
                    held[key].copy_(copy)
                self._optimizer._reassign_or_swap_out_partitioned_parameters(one.number)
        self._optimizer.checkpoint_event_epilogue()
        self._copies.clear()

    # --------------------------------------------------------------------------------------------------- optimizer

    def pieces(self, tensor: torch.Tensor) -> Iterator[Piece]:
        """The runs of which one of the optimizer's tensors consists."""
        (one,) = (one for one in self._flats if one.data is tensor)
        return one.pieces()

    def moments(self) -> dict[str, dict[str, Span]]:
        found: dict[str, dict[str, Span]] = {}
        for one in self._flats:
            if not self._client.state.get(one.data):
                self._create_state(one)
            held = dict(self._held(one))
            weights = held.pop(_WEIGHTS)
            found |= one.moments(held, weights.numel())
        return {name: found[name] for name in self._shapes if name in found}

    def _create_state(self, one: Flat) -> None:
        groups = self._client.param_groups
        before = [group["params"] for group in groups]  # DeepSpeed puts its tensors there only as it updates them
        for number, group in enumerate(groups):
            group["params"] = [one.data] if number == one.group else []
        with self._resident(one):
            state.create(self._client)
        for group, parameters in zip(groups, before, strict=True):
            group["params"] = parameters

    def _in_memory(self, one: Flat) -> dict[str, torch.Tensor]:
        return {_WEIGHTS: one.data.detach(), **self._client.state.get(one.data, {})}

    def _held(self, one: Flat) -> dict[str, torch.Tensor]:
        """Weights and moments; copies of what is on disk, which `restored` writes back, and the next step forgets."""
        if not one.swapped:
            return self._in_memory(one)
        copies = self._copies.setdefault(one.number, {})
        if self._in_memory(one).keys() - copies.keys():
            with self._resident(one, changed=False):
                for key, value in self._in_memory(one).items():
                    copies.setdefault(key, value.clone())
        return copies

    @contextlib.contextmanager
    def _resident(self, one: Flat, changed: bool = True) -> Iterator[None]:
        """Context in which the data of a flat tensor are in memory also where they are kept on disk."""
        if one.swapped:
            self._optimizer._optimizer_states_and_gradient_swap_in(one.number)
        yield
        if one.swapped and changed:
            self._optimizer._optimizer_states_and_gradient_swap_out(one.number)
        elif one.swapped:
            self._optimizer._release_swap_buffers(one.number)

    # ------------------------------------------------------------------------------------------------------- steps

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        with super().evaluating():
            yield
        if self._stage == 3:
            # The last blocks are kept, and those before them prefetched, for a backward pass that does not come.
            self._optimizer.checkpoint_event_prologue()
            self._optimizer.checkpoint_event_epilogue()

    def precision(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()  # the parameters are in that precision

    def begin(self, lr: float) -> None:
        self._copies.clear()
        for group in self._client.param_groups:
            group["lr"] = lr
        # DeepSpeed overwrites these with a step's first gradient; a parameter that has none would see its last again.
        if self._stage == 3:
            self._optimizer.grad_partitions_flat_buffer.zero_()
        for one in self._flats:
            if one.data.grad is not None:
                one.data.grad.zero_()

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self.layout.world, scale_wrt_gas=False)

    def step(self, clip_norm: float | None) -> torch.Tensor:
        self._optimizer.clip_grad = clip_norm or 0.0
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        if not math.isfinite(norm) and self._stage < 3:
            # What DeepSpeed 0.19.8 forgets with an offloaded optimizer: the next step would add to these gradients.
            for number in getattr(self._optimizer, "averaged_gradients", {}):
                self._optimizer.averaged_gradients[number] = None
        return torch.tensor(norm, device=self.layout.device)

    def close(self) -> None:
        """Take DeepSpeed's hooks off, and its global replacement of ``torch.nn.functional.linear`` back."""
        self._engine.destroy()
        from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses as Patch

        nn.functional.linear = getattr(Patch, "linear_bk", nn.functional.linear)


# ------------------------------------------------------------------------------------------------------------ helpers


def _environment(layout: Layout) -> None:
    """What DeepSpeed reads from the environment, which its own launcher would have set."""
    os.environ.setdefault("DS_ACCELERATOR", layout.device.type)
    # It takes the device of this number; Ray may show each worker only its own.
    index = torch.cuda.current_device() if layout.device.type == "cuda" else 0
    os.environ["LOCAL_RANK"] = str(index if layout.device.index is None else layout.device.index)
    # It calls torch by names that torch 2.13 has deprecated.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
    if layout.device.type == "cpu":
        os.environ["LOCAL_SIZE"] = str(layout.world // layout.nodes)  # or it asks numactl in each reduction
        import deepspeed.ops

        # Shared-memory sums for inference: they would need a compiler, and wait for ever for ranks on other hosts.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@contextlib.contextmanager
def _errors_only() -> Iterator[None]:
    from deepspeed.utils import logger

    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def _on_hand(parameter: nn.Parameter, changed: bool = True) -> Iterator[None]:
    """Context in which a parameter's partition is in memory although it is kept on disk."""
    swapper = parameter.nvme_swapper
    swapper.swap_in([parameter], async_op=False)
    yield
    if changed:
        swapper.swap_out_and_release([parameter])
    else:
        swapper.remove_partition_and_release_buffers([parameter])


def _sizes(module: nn.Module, blocks: list[nn.Module]) -> Sizes:
    counts = {parameter: parameter.numel() for parameter in module.parameters()}
    inside = {parameter for block in blocks for parameter in block.parameters()}
    return Sizes(
        parameter=max(counts.values()),
        block=max((sum(p.numel() for p in block.parameters()) for block in blocks), default=0),
        rest=sum(count for parameter, count in counts.items() if parameter not in inside),
        trained=sum(count for parameter, count in counts.items() if parameter.requires_grad),
    )
