"""Whether a run kept the promises: its rows, losses and weights against those of a run that nobody disturbed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch

from ray_ft import artifacts
from ray_ft.data import ledger
from ray_ft.data.order import Order
from ray_ft.errors import TrainingError
from ray_ft.span import Span
from ray_ft.train import checkpoint
from ray_ft.train.metrics import read_metrics


@dataclass(frozen=True)
class Verdict:
    """
    Attributes:
        rows: what is wrong with the rows used; empty where each was used exactly once per epoch.
        loss: largest relative difference of a step's loss; infinite where other steps were taken.
        weights: largest of, for each tensor, ‖found − expected‖ ÷ ‖expected‖.
        bits: whether all tensors of the last checkpoint, the optimizer's included, are equal to the bit.
    """

    rows: str
    loss: float
    weights: float
    bits: bool

    def broken(self, limit: float) -> list[str]:
        """The promises that do not hold. limit: of the differences; 0 asks for equal bits."""
        found = [f"rows: {self.rows}"] if self.rows else []
        if self.loss == float("inf"):
            found.append("loss: other steps are recorded, or one is not a number")
        elif not self.loss <= limit:
            found.append(f"loss: differs by {self.loss:.1e}, more than {limit:g}")
        if limit == 0 and not self.bits:
            found.append(f"the last checkpoint is not equal to the bit; weights differ by {self.weights:.1e}")
        elif not self.weights <= limit:  # so that NaN is found
            found.append(f"weights: differ by {self.weights:.1e}, more than {limit:g}")
        return found


def judge(run: artifacts.RunDir, reference: artifacts.RunDir, order: Order, steps: int) -> Verdict:
    """Compare two finished runs of `steps` steps over the same order; both kept a ledger and a row for each step."""
    losses, expected = step_losses(run), step_losses(reference)
    state, wanted = last_checkpoint(run, steps), last_checkpoint(reference, steps)
    same = state.keys() == wanted.keys() and all(_same(state[n], wanted[n]) for n in wanted)
    return Verdict(
        wrong_rows(run, order, steps), loss_difference(losses, expected), weight_difference(state, wanted), same
    )


# ------------------------------------------------------------------------------------------------------------- rows


def wrong_rows(run: artifacts.RunDir, order: Order, steps: int) -> str:
    """What the ledger says against each sample being used exactly once in each epoch; "" where it says nothing."""
    try:
        used = ledger.read(run)
    except TrainingError as error:
        return error.what
    if missing := sorted(set(range(1, steps + 1)) - used.keys()):
        return f"steps {missing[:5]} left no record"
    if more := sorted(used.keys() - set(range(1, steps + 1))):
        return f"steps {more[:5]} were recorded, and the run has {steps}"
    epochs, there = ledger.consumed(used, order), samples(order)
    for epoch, counts in enumerate(epochs, start=1):
        if twice := sorted(name for name, count in counts.items() if count > there[name]):
            return f"epoch {epoch}: {len(twice)} samples more often than once, {twice[:3]}"
        if never := sorted(there.keys() - counts.keys()):
            return f"epoch {epoch}: {len(never)} samples never, {never[:3]}"
    return "" if epochs else "none were used"


def samples(order: Order) -> Counter[str]:
    """The samples that there are: what one pass in the order of the files goes through."""
    plain = Order.once(order.prepared)
    slices = plain.slices(0, plain.rows)
    return Counter(name for part in slices for row in part.names(order.prepared) for name in row)


# ------------------------------------------------------------------------------------------------- losses and weights


def step_losses(run: artifacts.RunDir) -> list[tuple[int, float]]:
    """(step, loss) of each row of metrics, as they stand there."""
    return [(int(row["step"]), float(row["loss"])) for row in read_metrics(run)]


def loss_difference(found: list[tuple[int, float]], expected: list[tuple[int, float]]) -> float:
    if [step for step, _ in found] != [step for step, _ in expected] or not expected:
        return float("inf")
    pairs = zip(found, expected, strict=True)
    return max(0.0 if a == b else _or_infinite(abs(a - b) / abs(b)) for (_, a), (_, b) in pairs)


def _or_infinite(difference: float) -> float:
    return difference if difference == difference else float("inf")  # max() would pass over NaN


def last_checkpoint(run: artifacts.RunDir, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint of the last step: weights and the optimizer's state, by name."""
    location = dict(checkpoint.committed(run.checkpoints))[step]
    index = checkpoint.index(location)
    tensors = {name: torch.empty(stored.shape, dtype=stored.dtype) for name, stored in index.items()}
    checkpoint.restore(location, {name: Span.whole(tensor) for name, tensor in tensors.items()})
    return tensors


def weight_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Of the weights alone."""
    names = {name for name in expected if name.startswith("model/")}
    if {name for name in found if name.startswith("model/")} != names or not names:
        return float("inf")
    return max(_distance(found[name].double(), expected[name].double()) for name in names)


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    if torch.equal(found, expected):
        return 0.0
    return _or_infinite(float((found - expected).norm() / expected.norm()))


def _same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.dtype == expected.dtype and bool(torch.equal(found, expected))
