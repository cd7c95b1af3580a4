"""The training loop: an ordinary loop over batches. It knows neither Ray nor where the batches come from."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from ray_ft.data import pack
from ray_ft.data.order import Order
from ray_ft.data.stream import Batch, local_batches
from ray_ft.errors import TrainingError
from ray_ft.recipe import Train
from ray_ft.strategy.base import Layout, Strategy
from ray_ft.train.asks import Ask
from ray_ft.train.keeper import Keeper
from ray_ft.train.metrics import Meter
from ray_ft.train.objective import TOKENS, Means, Objective, Sums
from ray_ft.train.schedule import due, ends_epoch, learning_rate

NAMED = 16  # samples of each worker that an error names


class Link(Protocol):
    """What connects the loop to whoever started it."""

    def begin(self, step: int, workers: int, model_seconds: float, rows: list[dict[str, float]]) -> None:
        """Hear that training goes on after `step` steps, the model being built and restored; called by rank 0.

        `rows` are those of metrics that came with the checkpoint: they may never have reached who logs them.
        """

    def say(self, line: str) -> None:
        """Take a line for people; called by rank 0."""

    def log(self, row: dict[str, float]) -> None:
        """Take a row of metrics; called by rank 0."""

    def asked(self) -> Ask:
        """What is asked; every rank is asked in each step, and the largest of their answers counts."""


@dataclass(frozen=True)
class StepResult:
    """`loss` is the mean over the step's `targets` (nats), `more` what else is a mean over them, by name in metrics;
    `norm` the gradient's before clipping; `notes` the sums over all workers of what each gave."""

    loss: float
    norm: float
    targets: int
    more: dict[str, float]
    notes: list[float]


def train_step(
    strategy: Strategy,
    batch: Batch,
    settings: Train,
    lr: float,
    notes: Callable[[], Sequence[float]] = tuple,
    objective: Objective = TOKENS,
    order: Order | None = None,
) -> StepResult:
    """One optimizer step: the sum of gradients over all targets of the global batch, divided by their number.

    The divisor is global, so the step does not depend on how rows lie over workers, micro-batches and padding.

    Args:
        batch: this worker's rows of the step.
        notes: gives numbers that travel along with a sum over the workers that is needed anyway, late in the step;
            asked before anything is updated (but see optimizer.in_backward).
        order: whose sources' losses are told apart; None: they are not.

    Raises:
        _NotFinite: the loss or the gradient is not finite; nothing has been updated (but see optimizer.in_backward).
    """
    device = strategy.layout.device
    own = int(objective.targets(batch.rows.flags).sum())
    targets = strategy.all_reduce(torch.tensor(own, dtype=torch.float64, device=device)).item()
    strategy.begin(lr)
    sources = () if order is None else order.source_numbers
    origins = None if order is None else sources_of(batch, order)
    sums = Sums(objective, sources, device)
    losses: list[torch.Tensor] = []
    parts = list(micro_batches(batch.rows, settings.micro_batch))
    for micro in parts:
        with strategy.precision():
            found = strategy.module(*objective.inputs(micro, device))
        at = len(losses) * settings.micro_batch
        sums.add(found, micro.flags, None if origins is None else origins[at : at + len(micro)])
        loss = found[:, 0].sum()
        losses.append(loss.detach())
        strategy.backward(loss / targets, last=len(losses) == len(parts))
    noted = torch.tensor(notes(), dtype=torch.float64, device=device)
    summed = strategy.all_reduce(torch.cat((sums.values, noted))).tolist()
    means = sums.read(summed[: len(sums.values)])
    norm = strategy.step(settings.clip_norm).item() if np.isfinite(means.loss) else np.nan
    if not np.isfinite(norm):
        raise _NotFinite(means.loss, norm, torch.stack(losses).tolist())
    return StepResult(means.loss, norm, means.targets, dict(means.more("train")), summed[len(sums.values) :])


def train(
    strategy: Strategy,
    batches: Iterable[Batch],
    order: Order,
    held_out: Order | None,
    settings: Train,
    start: int,
    total: int,
    keeper: Keeper,
    link: Link,
    meter: Meter,
    objective: Objective = TOKENS,
) -> tuple[int, Ask]:
    """Train from step `start` to `total`, evaluating, saving and logging as the recipe says.

    Returns:
        The steps finished, and what was asked: NOTHING where the run is complete.

    Raises:
        TrainingError: the rows end too early, or a loss is not finite.
        StorageError: the last checkpoint could not be written, or several in a row.
    """
    layout = strategy.layout
    stream = iter(batches)
    finished, asked = start, Ask.NOTHING
    deaf = 0  # up to this step, a wish to grow is not heard
    for step in range(start, total):
        waited = time.perf_counter()
        batch = next(stream, None)
        if batch is None:
            raise TrainingError(
                f"the rows ended before step {step + 1} of {total}",
                [
                    "train again: it resumes at the newest checkpoint",
                    "report this with the recipe; it should not happen",
                ],
            )
        meter.waited(time.perf_counter() - waited)
        lr = learning_rate(settings.schedule, settings.optimizer.lr, step, total)
        try:
            notes = lambda: [*wishes(link), *keeper.signals()]  # noqa: E731 - beside the one call that it is for
            result = train_step(strategy, batch, settings, lr, notes, objective, order)
        except _NotFinite as fault:
            raise _explain(fault, step, batch, order, strategy.layout, settings) from None
        asked = max((ask for ask, number in zip(WISHES, result.notes, strict=False) if number), default=Ask.NOTHING)
        keeper.advance(result.notes[len(WISHES) :])
        finished = step + 1
        keeper.used(finished, batch)
        row = meter.step(finished, result.loss, result.norm, lr, batch.rows) | result.more
        if settings.eval_every == "epoch":
            held_out_due = finished == total or ends_epoch(order, settings.global_batch, finished)
        else:
            held_out_due = due(settings.eval_every, finished, total)
        held_out_due = held_out_due and held_out is not None
        if held_out_due:
            assert held_out is not None
            means = evaluate(strategy, held_out, settings.micro_batch, objective)
            row |= {"eval_loss": means.loss, **dict(means.more("eval"))}
            meter.pause()
        if asked is Ask.GROW and finished < deaf:
            asked = Ask.NOTHING
        ending = asked is not Ask.NOTHING or finished == total
        dropped = asked is Ask.DROP and finished < total
        saving = not dropped and (ending or due(settings.checkpoint.every, finished, total))
        logging = layout.rank == 0 and (
            held_out_due or saving or finished == start + 1 or due(settings.log_every, finished, total)
        )
        if logging:
            row = meter.row(row)
            keeper.noted(row)
        if saving:
            began = time.perf_counter()
            saved = keeper.save(finished, wait=ending or not settings.checkpoint.background)
            if asked is Ask.GROW and not saved and finished < total:  # to start again now would cost steps
                asked, ending, deaf = Ask.NOTHING, False, finished + settings.checkpoint.every
            row["checkpoint_seconds"] = time.perf_counter() - began
            meter.pause()
        if logging:
            link.log(row)
        keeper.check(finished, needed=finished == total or asked is Ask.STOP)
        if ending:
            break
    return finished, Ask.NOTHING if finished == total else asked


WISHES = (Ask.GROW, Ask.LEAVE, Ask.STOP, Ask.DROP)


def wishes(link: Link) -> list[float]:
    """What is asked of this worker, as numbers to be summed: one for each of `WISHES`."""
    asked = link.asked()
    return [float(asked is wish) for wish in WISHES]


def evaluate(strategy: Strategy, order: Order, micro_batch: int, objective: Objective = TOKENS) -> Means:
    """Means over every row of `order` exactly once."""
    layout = strategy.layout
    sums = Sums(objective, order.source_numbers, layout.device)
    share = micro_batch * layout.world
    stop = -(-order.rows // share) * share  # padding completes the last round, so that every worker takes part
    with strategy.evaluating():
        for batch in local_batches(order, 0, stop, layout.rank, layout.world, micro_batch):
            with strategy.precision():
                found = strategy.module(*objective.inputs(batch.rows, layout.device))
            sums.add(found, batch.rows.flags, sources_of(batch, order))
    return sums.read(strategy.all_reduce(sums.values).tolist())


def sources_of(batch: Batch, order: Order) -> np.ndarray | None:
    """Number of each row's source; None where there is one alone, and nothing to tell apart."""
    return order.sources(batch.first, batch.first + len(batch.rows)) if len(order.source_numbers) > 1 else None


def micro_batches(rows: pack.Rows, size: int) -> Iterator[pack.Rows]:
    for start in range(0, len(rows), size):
        yield rows.take(slice(start, start + size))


class _NotFinite(Exception):
    """`loss` and `norm` are those of the whole step, `losses` the sums of this worker's micro-batches."""

    def __init__(self, loss: float, norm: float, losses: list[float]) -> None:
        super().__init__(loss, norm, losses)
        self.loss, self.norm, self.losses = loss, norm, losses


def _explain(
    fault: _NotFinite, step: int, batch: Batch, order: Order, layout: Layout, settings: Train
) -> TrainingError:
    """Names the step and the rows of micro-batches at fault; of all workers, as any one's error may be what is shown.

    Where every loss is finite and only the gradient is not, any row of the step may be the cause.
    """
    suspects = [np.isfinite(fault.loss) or not np.isfinite(loss) for loss in fault.losses]
    size = settings.micro_batch
    names = [name for at in range(len(batch.rows)) if suspects[at // size] for name in order.locate(batch.first + at)]
    shares: list[list[str]] = [names]
    if layout.world > 1:
        shares = [[] for _ in range(layout.world)]
        torch.distributed.all_gather_object(shares, names)
    rows = ""
    for rank, share in enumerate(shares):
        found = [name for name in share if name != "padding"]
        if found:
            more = f" … ({len(found)})" if len(found) > NAMED else ""
            rows += f"; rows of worker {rank}: {', '.join(found[:NAMED])}{more}"
    taken = "taken in part, within the backward pass" if settings.optimizer.in_backward else "not taken"
    return TrainingError(
        f"step {step + 1}: loss {fault.loss:g}, gradient norm {fault.norm:g}; the step was {taken}{rows}",
        [
            "lower train.optimizer.lr or add train.schedule.warmup_steps",
            "look at the named rows",
            "model.dtype=float32 if the model overflows in bfloat16",
            "train again to resume at the newest checkpoint",
        ],
    )
