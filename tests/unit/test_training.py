"""Promise 2, the sum: a step does not depend on workers, strategy, accumulation or packing; and what surrounds a step.

The reference shares nothing with the product but the tokens: the model as transformers builds it, one sample a row,
plain cross-entropy, torch's AdamW.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from distributed import FakeLink, KeepNothing, build, recipe_of, run, weights
from transformers import AutoModelForCausalLM

from ray_ft.data import stream
from ray_ft.data.order import Order
from ray_ft.data.pack import Rows, pack
from ray_ft.data.prepare import Prepared, prepare
from ray_ft.data.render import Tokens
from ray_ft.data.stream import Batch
from ray_ft.demo import DemoPaths
from ray_ft.errors import TrainingError
from ray_ft.recipe import Recipe
from ray_ft.strategy import Layout, Strategy
from ray_ft.train import checkpoint, loop, objective, worker
from ray_ft.train.metrics import Meter

STEPS, SAMPLES, SEQ_LEN, ROWS = 4, 24, 96, {True: 16, False: 32}  # rows of a global batch; padding completes them
LR = 2e-3
# AdamW divides by √v + eps: where a gradient is all rounding noise, a smaller eps would make steps of it.
OPTIMIZER = {"lr": LR, "weight_decay": 0.1, "eps": 1e-6}
METER = Meter(Layout(0, 1, torch.device("cpu"), torch.float32), flops_per_token=1.0)


def samples(step: int) -> list[Tokens]:
    """Prompts and answers of made-up tokens, of many lengths."""
    rng = np.random.default_rng(step)
    found = []
    for _ in range(SAMPLES):
        length = int(rng.integers(6, 70))
        trained = np.zeros(length, bool)
        trained[rng.integers(1, length) :] = True
        found.append(Tokens(rng.integers(6, 40, length).astype(np.int32), trained))
    return found


def global_batch(step: int, packing: bool) -> Rows:
    rows, _ = pack(samples(step), SEQ_LEN, packing=packing, pad_id=0)
    return Rows.concatenate([rows, Rows.blank(ROWS[packing] - len(rows), SEQ_LEN)])


def reference(base: str, steps: int = STEPS) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Losses, gradient norms before clipping, and final weights."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    decayed = [p for name, p in model.named_parameters() if name.endswith("proj.weight")]
    others = [p for name, p in model.named_parameters() if not name.endswith("proj.weight")]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-6)
    losses, norms = [], []
    for step in range(steps):
        total, tokens = torch.zeros(()), 0
        for sample in samples(step):
            ids, wanted = torch.from_numpy(sample.ids).long(), torch.from_numpy(sample.trained)
            logits = model(input_ids=ids[None]).logits[0]
            total = total + F.cross_entropy(logits[:-1][wanted[1:]], ids[1:][wanted[1:]], reduction="sum")
            tokens += int(wanted.sum())
        optimizer.zero_grad()
        (total / tokens).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
        losses.append((total / tokens).item())
    return losses, norms, {name: p.detach() for name, p in model.named_parameters()}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """For operations this small, a second thread costs more than it gives."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def expected(demo: DemoPaths) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    return reference(demo.base)


def recipe_for(demo: DemoPaths, strategy: str, world: int, accumulation: int, packing: bool) -> Recipe:
    rows = ROWS[packing]
    options = {**VARIANTS[strategy], "workers": world, "global_batch": rows, "optimizer": OPTIMIZER, "loss_chunk": 50}
    options["micro_batch"] = rows // (world * accumulation)
    return recipe_of(demo, "/none", *(f"train.{key}={value}" for key, value in options.items()))


#: Settings of train.* by a name for the case.
VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"strategy": name} for name in ("fsdp", "zero1", "zero2", "zero3", "none")},
    "fsdp tuned": {
        "strategy": "fsdp",
        "fsdp": {"cpu_offload": True, "prefetch": 2, "reshard_after_forward": False},
        "gradient_checkpointing": True,
    },
    "hsdp": {"strategy": "fsdp", "fsdp": {"replicas": 2}},
    "zero2 offloaded": {"strategy": "zero2", "zero": {"offload_optimizer": "cpu"}},
    "zero3 offloaded": {"strategy": "zero3", "zero": {"offload_optimizer": "cpu", "offload_parameters": "cpu"}},
}


def train_all(rank: int, world: int, demo: DemoPaths, cases: list[tuple[Any, ...]]) -> list[Any]:
    """For each (strategy, accumulation, packing, dtype): losses, gradient norms, final weights."""
    found = []
    for strategy_name, accumulation, packing, dtype in cases:
        recipe = recipe_for(demo, strategy_name, world, accumulation, packing)
        assert recipe.train.accumulation == accumulation
        strategy = build(recipe, rank, world, dtype)
        results = []
        for step in range(STEPS):
            share = recipe.train.rows_per_worker
            mine = global_batch(step, packing).take(slice(rank * share, (rank + 1) * share))
            results.append(loop.train_step(strategy, Batch(0, mine), recipe.train, LR))
        found.append(([r.loss for r in results], [r.norm for r in results], weights(strategy)))
    return found


CASES = list(itertools.product(["fsdp", "zero3", "none"], [1, 4], [True, False], [torch.float32]))
CASES += list(
    itertools.product(["fsdp tuned", "zero1", "zero2 offloaded", "zero3 offloaded"], [4], [True], [torch.float32])
)
LOW = list(itertools.product(["fsdp", "zero1", "zero3", "none"], [1], [True], [torch.bfloat16]))


def test_groups_of_workers_that_each_hold_a_copy_take_the_same_steps(
    demo: DemoPaths, expected: tuple[list[float], list[float], dict[str, torch.Tensor]]
) -> None:
    losses, norms, final = expected
    for ranks in run(4, train_all, demo, [("hsdp", 1, True, torch.float32), ("hsdp", 4, True, torch.float32)]):
        for found, found_norms, found_weights in ranks:
            assert found == pytest.approx(losses, rel=1e-5)
            assert found_norms == pytest.approx(norms, rel=1e-4)
            for name, tensor in found_weights.items():
                torch.testing.assert_close(tensor, final[name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("world", [1, 2])
def test_steps_equal_one_sample_a_row_in_one_process(
    world: int, demo: DemoPaths, expected: tuple[list[float], list[float], dict[str, torch.Tensor]]
) -> None:
    losses, norms, final = expected
    assert losses[0] - losses[-1] > 0.05  # something was learnt, so equality means something
    assert norms[0] > 1  # and the gradient was clipped
    base = dict(AutoModelForCausalLM.from_pretrained(demo.base).named_parameters())
    for ranks in run(world, train_all, demo, CASES + LOW):
        for case, (found, found_norms, found_weights) in zip(CASES + LOW, ranks, strict=True):
            low = case[-1] == torch.bfloat16
            assert found == pytest.approx(losses, rel=1e-2 if low else 1e-5), case
            assert found_norms == pytest.approx(norms, rel=5e-2 if low else 1e-4), case
            assert found_weights.keys() == final.keys()
            for name, tensor in found_weights.items():
                assert tensor.dtype == torch.float32
                if low:  # Adam turns noise in small gradients into whole steps: compare how far it went, and where to
                    assert (tensor - final[name]).norm() < 0.35 * (final[name] - base[name]).norm(), (case, name)
                else:
                    torch.testing.assert_close(tensor, final[name], rtol=0, atol=1e-5, msg=f"{case} {name}")


def test_the_comparison_notices_leaks_between_documents_and_a_wrong_divisor(
    demo: DemoPaths,
    expected: tuple[list[float], list[float], dict[str, torch.Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def first_losses() -> list[float]:
        strategy = build(recipe := recipe_for(demo, "none", 1, 4, True))
        batches = [Batch(0, global_batch(step, True)) for step in range(2)]
        return [loop.train_step(strategy, batch, recipe.train, LR).loss for batch in batches]

    assert first_losses() == pytest.approx(expected[0][:2], rel=1e-5)
    with monkeypatch.context() as patch:  # positions that run on: documents see each other
        patch.setattr(loop.pack, "position_ids", lambda flags: np.tile(np.arange(flags.shape[1]), (len(flags), 1)))
        assert first_losses()[0] != pytest.approx(expected[0][0], rel=1e-4)
    with monkeypatch.context() as patch:  # gradients averaged over micro-batches, not over tokens
        patch.setattr(Strategy, "backward", lambda self, loss, last: loss.backward(gradient=torch.tensor(0.25)))
        found = first_losses()
        assert found[0] == pytest.approx(expected[0][0], rel=1e-5)
        patch.setattr(Strategy, "backward", lambda self, loss, last: None)
        with pytest.raises(AssertionError):
            assert first_losses() == pytest.approx(expected[0][:2], rel=1e-5)


# ------------------------------------------------------------------------------------------- rows that are all padding


def train_on_uneven_rows(rank: int, world: int, demo: DemoPaths) -> list[Any]:
    """All samples on rank 0, nothing but padding on rank 1."""
    found = []
    for name in ("fsdp", "zero2", "zero3", "none"):
        recipe = recipe_for(demo, name, world, 1, False)
        strategy = build(recipe, rank, world)
        for step in range(2):
            rows = global_batch(step, False).take(slice(0, SAMPLES))
            mine = rows if rank == 0 else Rows.blank(SAMPLES, SEQ_LEN)
            result = loop.train_step(strategy, Batch(0, mine), recipe.train, LR, lambda: [rank == 1, rank])
        found.append((result.loss, result.targets, result.notes, weights(strategy)))
    return found


def test_a_worker_with_nothing_but_padding_takes_part_and_one_note_reaches_all(demo: DemoPaths) -> None:
    losses, _, final = reference(demo.base, steps=2)
    tokens = sum(int(sample.trained.sum()) for sample in samples(1))
    for ranks in run(2, train_on_uneven_rows, demo):
        for loss, counted, notes, found in ranks:
            assert (loss, counted, notes) == (pytest.approx(losses[1], rel=1e-5), tokens, [1.0, 1.0])
            for name, tensor in found.items():
                torch.testing.assert_close(tensor, final[name], rtol=0, atol=1e-5, msg=name)


# ------------------------------------------------------------------------------------------------ loss not finite


def prepared_rows(demo: DemoPaths, storage: str, split: Any, *overrides: str) -> Prepared:
    return prepare(recipe_of(demo, storage, *overrides), split, demo.base, stream.in_process)


POISONED = ("fsdp", "zero1", "zero3", "none")


def train_into_poison(rank: int, world: int, demo: DemoPaths, prepared: Prepared, token: int) -> list[Any]:
    """From the third step on, the embedding of one token is infinite: only rows that hold it give NaN."""
    found = []
    for name in POISONED:
        options = [f"train.strategy={name}", f"train.workers={world}", "train.micro_batch=2", "data.shuffle=false"]
        recipe = recipe_of(demo, "/none", *options)
        strategy, states = build(recipe, rank, world), list[dict[str, torch.Tensor]]()
        order, share = Order.of(recipe, prepared), recipe.train.rows_per_worker

        def poison(module: Any, inputs: Any, output: torch.Tensor, states: Any = states) -> torch.Tensor:
            return output.masked_fill((inputs[0] == token)[..., None] & (len(states) > 2), float("inf"))

        def batches(strategy: Strategy = strategy, states: Any = states, order: Any = order, share: int = share) -> Any:
            for batch in stream.local_batches(order, 0, order.rows, rank, world, share):
                states.append(weights(strategy))
                yield batch

        strategy.module.model.model.embed_tokens.register_forward_hook(poison)
        try:
            loop.train(strategy, batches(), order, None, recipe.train, 0, 10, KeepNothing(), FakeLink(), METER)
        except TrainingError as error:
            after = weights(strategy)
            same = all(torch.equal(after[key], states[-1][key]) for key in after)
            found.append((str(error), len(states), same))
    return found


def test_a_loss_that_is_not_finite_stops_before_the_step_and_names_it_and_the_rows(
    demo: DemoPaths, tmp_path: Any
) -> None:
    prepared = prepared_rows(demo, str(tmp_path), "train")
    order = Order.of(recipe_of(demo, str(tmp_path), "data.shuffle=false"), prepared)
    rows = Rows.concatenate([b.rows for b in stream.local_batches(order, 0, 24, 0, 1, 24)])
    # A token of step 3 (rows 16…23) that only one row of it has, on the second worker.
    counts = {int(t): [i for i in range(24) if t in rows.input_ids[i]] for t in np.unique(rows.input_ids[20:24])}
    token, at = next((t, where[-1]) for t, where in counts.items() if [w for w in where if w >= 16] == where[-1:])
    assert at >= 20
    for ranks in run(2, train_into_poison, demo, prepared, token):
        assert len(ranks) == len(POISONED)
        for message, steps, unchanged in ranks:
            first, *ways_out = message.splitlines()
            pair = 20 + (at - 20) // 2 * 2  # the micro-batch of two rows
            names = [name for row in (pair, pair + 1) for name in order.locate(row)]
            assert first == (
                "step 3: loss nan, gradient norm nan; the step was not taken; rows of worker 1: " + ", ".join(names)
            )
            assert len(ways_out) > 2
            assert steps == 3
            assert unchanged
    assert all(":" in name for name in names) and set(order.locate(at)) <= set(names)


# ------------------------------------------------------------------------------------------------------ evaluation


def evaluate_all(rank: int, world: int, demo: DemoPaths, held_out: Prepared, folder: str) -> list[Any]:
    """For each strategy: losses of evaluations, and what training gave between them."""
    found = []
    for name in ("fsdp", "fsdp tuned", "zero3", "none"):
        recipe = recipe_for(demo, name, world, 4, True)
        order, share = Order.once(held_out, window_rows=7), recipe.train.rows_per_worker
        strategy = build(recipe, rank, world)
        first = [loop.evaluate(strategy, order, micro).loss for micro in (1, 4, 64)]
        losses = []
        for step in range(STEPS):
            mine = global_batch(step, True).take(slice(rank * share, (rank + 1) * share))
            losses.append(loop.train_step(strategy, Batch(0, mine), recipe.train, LR).loss)
            loop.evaluate(strategy, order, 4)
        trained = weights(strategy)
        checkpoint.save(f"{folder}/{name}-{world}", STEPS, worker.state(strategy), {}, rank, world)
        assert strategy.module.training
        found.append((first, losses, trained))
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_evaluation_counts_every_row_once_and_training_goes_on_as_if_without_it(
    world: int, demo: DemoPaths, tmp_path: Any, expected: tuple[list[float], list[float], dict[str, torch.Tensor]]
) -> None:
    held_out = prepared_rows(demo, str(tmp_path), "eval")
    assert held_out.rows % 8 and held_out.rows % 2  # a share of the last round is padding
    model = AutoModelForCausalLM.from_pretrained(demo.base, dtype=torch.float32)
    single = prepared_rows(demo, str(tmp_path), "eval", "data.packing=false")
    total, tokens = 0.0, 0
    rows = single.read(single.units)
    with torch.no_grad():
        for ids, flags in zip(rows.input_ids, rows.flags, strict=True):
            wanted, length = torch.from_numpy((flags & 4) > 0), int((flags & 1).sum())
            inputs = torch.from_numpy(ids[:length]).long()
            logits = model(input_ids=inputs[None]).logits[0]
            wanted = wanted[1:length]
            total += F.cross_entropy(logits[:-1][wanted], inputs[1:][wanted], reduction="sum").item()
            tokens += int(wanted.sum())
    for ranks in run(world, evaluate_all, demo, held_out, str(tmp_path)):
        for first, losses, trained in ranks:
            assert first == pytest.approx([total / tokens] * 3, rel=1e-6)
            assert losses == pytest.approx(expected[0], rel=1e-5)
            for name, tensor in trained.items():
                torch.testing.assert_close(tensor, expected[2][name], rtol=0, atol=1e-5, msg=name)
    assert checkpoint.newest(f"{tmp_path}/fsdp-{world}") is not None


def test_columns_of_padding_are_left_out_and_no_real_token_is() -> None:
    rows = global_batch(0, False)
    ids, positions, labels = objective.tensors(rows.take(slice(0, 1)), torch.device("cpu"))
    real = int((rows.flags[0] & 1).sum())
    assert ids.shape == positions.shape == labels.shape == (1, 64 if real <= 64 else 96)
    wide = objective.tensors(rows, torch.device("cpu"))
    assert wide[0].shape == (32, 96)  # rounded up to 128, cut at seq_len
    assert objective.tensors(Rows.blank(2, SEQ_LEN), torch.device("cpu"))[0].shape == (2, 64)
