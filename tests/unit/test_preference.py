"""Preference losses equal the papers' formulas over answers that are computed one by one, however pairs are packed.

The plain computation shares nothing with the product but the tokens: the model as transformers builds it, one document
a row, log-softmax over all logits, and for the reference a second model.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from distributed import build, recipe_of, run, weights

from ray_ft.data.pack import REJECTED, START, Rows, labels, pack, pairs
from ray_ft.data.render import Tokens, paired
from ray_ft.data.stream import Batch
from ray_ft.demo import DemoPaths
from ray_ft.model import adapter
from ray_ft.model.preference import STATISTICS, PreferenceLoss
from ray_ft.recipe import Preference, Recipe
from ray_ft.recipe.model import Adapter
from ray_ft.train import loop, objective

CPU = torch.device("cpu")
SEQ_LEN = 128
SETTINGS = [
    Preference(beta=0.3),
    Preference(beta=0.3, label_smoothing=0.2),
    Preference(beta=0.3, loss="hinge"),
    Preference(beta=0.3, loss="ipo"),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def document(rng: np.random.Generator, prompt: np.ndarray) -> Tokens:
    answer = rng.integers(6, 60, int(rng.integers(1, 12)))
    ids = np.concatenate((prompt, answer)).astype(np.int32)
    return Tokens(ids, np.arange(len(ids)) >= len(prompt))


def some_pairs(count: int, seed: int = 0) -> list[tuple[Tokens, Tokens]]:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        prompt = rng.integers(6, 60, int(rng.integers(2, 12)))
        found.append((document(rng, prompt), document(rng, prompt)))
    return found


def packed(some: Sequence[tuple[Tokens, Tokens]], *, packing: bool = True) -> Rows:
    samples = [paired(*pair) for pair in some]
    assert all(isinstance(sample, Tokens) for sample in samples)
    return pack(samples, SEQ_LEN, packing=packing, pad_id=0)[0]  # type: ignore[arg-type]


def said(model: Any, tokens: Tokens) -> torch.Tensor:
    """Log-probability of one answer, all by itself."""
    ids = torch.from_numpy(tokens.ids).long()
    probabilities = model(input_ids=ids[None]).logits[0].float().log_softmax(-1)
    targets = torch.from_numpy(np.flatnonzero(tokens.trained))
    return probabilities[targets - 1, ids[targets]].sum()


def plainly(
    model: Any, reference: Any, some: Sequence[tuple[Tokens, Tokens]], settings: Preference
) -> tuple[torch.Tensor, dict[str, float]]:
    """(sum of losses, means of the statistics) by the formulas of the papers."""
    total, sums = torch.zeros(()), dict.fromkeys(STATISTICS, 0.0)
    beta = settings.beta
    for pair in some:
        (pi_w, ref_w, n_w), (pi_l, ref_l, n_l) = (
            (said(model, one), said(reference, one).detach(), int(one.trained.sum())) for one in pair
        )
        sums["logprob_accuracy"] += float(pi_w > pi_l) if settings.loss != "ipo" else float(pi_w / n_w > pi_l / n_l)
        if settings.loss == "ipo":
            pi_w, ref_w, pi_l, ref_l = pi_w / n_w, ref_w / n_w, pi_l / n_l, ref_l / n_l
        h = (pi_w - ref_w) - (pi_l - ref_l)
        if settings.loss == "sigmoid":
            smooth = settings.label_smoothing
            p = torch.sigmoid(beta * h)
            total = total - (1 - smooth) * torch.log(p) - smooth * torch.log(1 - p)
        elif settings.loss == "hinge":
            total = total + max(torch.zeros(()), 1 - beta * h)
        else:
            total = total + (h - 1 / (2 * beta)) ** 2
        rewards = (beta * (pi_w - ref_w)).item(), (beta * (pi_l - ref_l)).item()
        sums["chosen_reward"] += rewards[0]
        sums["rejected_reward"] += rewards[1]
        sums["reward_margin"] += rewards[0] - rewards[1]
        sums["reward_accuracy"] += rewards[0] > rewards[1]
    return total, {name: value / len(some) for name, value in sums.items()}


def with_reference(rows: Rows, reference: Any) -> Rows:
    """Rows with what a model says of their documents, by the product's own forward pass."""
    module = PreferenceLoss(reference, 7, Preference(), "itself")
    *inputs, bits = objective.with_reference(rows, CPU)
    with torch.no_grad():
        sums = module.log_probabilities(*inputs, documents=bits.shape[1])[0]
    return replace(rows, reference=sums.numpy())


def other_model(model: Any) -> Any:
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return other


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda one: f"{one.loss} {one.label_smoothing}")
@pytest.mark.parametrize("family", ["gemma3_text", "llama"])
def test_loss_statistics_and_gradient_are_those_of_answers_one_by_one(family: str, settings: Preference) -> None:
    model = tiny.filled(family)
    reference, some = other_model(model), some_pairs(9)
    expected, statistics = plainly(model, reference, some, settings)
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for packing in (True, False):
        model.zero_grad()
        rows = with_reference(packed(some, packing=packing), reference)
        assert len(rows) == (2 if packing else 9)
        found = PreferenceLoss(model, 7, settings, "rows")(*objective.with_reference(rows, CPU))
        assert found.shape == (len(rows), 1 + len(STATISTICS))
        means = dict(zip(STATISTICS, (found[:, 1:].sum(0) / 9).tolist(), strict=True))
        assert means == pytest.approx(statistics, abs=2e-5)
        assert 0 < means["reward_accuracy"] < 1
        torch.testing.assert_close(found[:, 0].sum(), expected, rtol=1e-5, atol=1e-5)
        found[:, 0].sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=2e-5, msg=name)


def test_the_documents_of_a_pair_lie_side_by_side_and_are_counted() -> None:
    some = some_pairs(7)
    rows = packed(some)
    assert pairs(rows.flags).sum() == 7
    assert objective.PAIRS.targets(Rows.concatenate([rows, Rows.blank(2, SEQ_LEN)]).flags).sum() == 7
    for ids, flags in zip(rows.input_ids, rows.flags, strict=True):
        starts = np.flatnonzero(flags & START).tolist()
        for number, (begin, end) in enumerate(zip(starts, [*starts[1:], SEQ_LEN], strict=True)):
            rejected = (flags[begin:end] & REJECTED) != 0
            assert rejected.all() if number % 2 else not rejected.any()
        assert any(np.array_equal(ids[: starts[2] if len(starts) > 2 else SEQ_LEN][: len(c) + len(r)], both)
                   for c, r in some for both in [np.concatenate((c.ids, r.ids))])  # fmt: skip


def test_padding_adds_nothing_and_is_no_pair() -> None:
    model = tiny.filled("llama")
    module = PreferenceLoss(model, 7, Preference(loss="ipo"), "itself")
    blank = module(*objective.with_reference(Rows.blank(2, SEQ_LEN), CPU))
    assert blank.shape == (2, 1 + len(STATISTICS)) and not blank.any()
    blank.sum().backward()  # no parameter is left out of a collective operation
    assert all(parameter.grad is not None for parameter in model.parameters())
    rows = packed(some_pairs(5))
    both = Rows.concatenate([Rows.blank(1, SEQ_LEN), rows])
    found = module(*objective.with_reference(both, CPU))
    torch.testing.assert_close(found[1:], module(*objective.with_reference(rows, CPU)))
    assert not found[0].any()


def test_a_model_is_no_better_than_itself() -> None:
    module = PreferenceLoss(tiny.filled("llama"), 7, Preference(), "itself")
    found = module(*objective.with_reference(packed(some_pairs(6)), CPU)).sum(0) / 6
    assert found.tolist()[:5] == pytest.approx([math.log(2), 0.5, 0, 0, 0])


# ----------------------------------------------------------------------------------------------------- the adapter off


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_with_its_adapter_switched_off_a_model_is_its_base(kind: str) -> None:
    base = tiny.filled("gemma3_text")
    model = copy.deepcopy(base)
    settings = Adapter.model_validate({"name": kind, "rank": 4, "dropout": 0.3})
    adapter.inject(model, settings, adapter.targets(model, settings))
    torch.manual_seed(4)
    for name, parameter in list(model.named_parameters()):
        if adapter.stored_name(name) is None:  # on the meta device so far
            owner, _, leaf = name.rpartition(".")
            value = torch.rand(parameter.shape) * 0.2 + float("magnitude" in name)
            setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(value))
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    rows = packed(some_pairs(6))
    module = PreferenceLoss(model, 7, Preference(), "adapter off").train()
    inputs = objective.with_reference(rows, CPU)
    assert torch.equal(
        module._without_gradient(*inputs[:3], documents=inputs[3].shape[1]),
        torch.from_numpy(with_reference(rows, base).reference),
    )
    assert model.training and trained == {name: p.requires_grad for name, p in model.named_parameters()}
    module.eval()
    switched = module(*inputs)
    given = PreferenceLoss(model, 7, Preference(), "rows").eval()(
        *objective.with_reference(with_reference(rows, base), CPU)
    )
    torch.testing.assert_close(switched, given)
    assert (switched[:, 3] - switched[:, 4]).abs().sum() > 0.1  # the adapter does something


# ------------------------------------------------------------------------------------------------- under any strategy


STEPS, BATCH = 3, 8
CASES = {
    1: [("none", False, 8, "float32"), ("none", True, 8, "float32")],
    2: [(name, lora, 2, "float32") for name in ("fsdp", "zero3", "none") for lora in (False, True)]
    + [("fsdp", False, 2, "bfloat16")],
}


def recipe_for(demo: DemoPaths, storage: str | Path, *overrides: str) -> Recipe:
    options = [
        "data.train=[{path: pairs.jsonl, format: preference}]",  # which nothing here reads
        "data.eval=[]",
        f"data.seq_len={SEQ_LEN}",
    ]
    return recipe_of(demo, storage, *options, *overrides)


def step_rows(step: int, base: Any | None) -> Rows:
    rows = packed(some_pairs(18, seed=step % 2))
    if base is not None:
        rows = with_reference(rows, base)
    width = None if rows.reference is None else rows.reference.shape[1]
    return Rows.concatenate([rows, Rows.blank(BATCH - len(rows), SEQ_LEN, width)])


def take_steps(rank: int, world: int, demo: DemoPaths) -> list[Any]:
    from ray_ft.model.whole import whole

    base = whole(demo.base, CPU, torch.float32)
    found = []
    for strategy, lora, micro, dtype in CASES[world]:
        options = [f"train.{key}={value}" for key, value in (
            ("strategy", strategy), ("workers", world), ("micro_batch", micro), ("loss_chunk", 50),
            ("optimizer.lr", 0.01), ("optimizer.eps", 1e-6),
        )]  # fmt: skip
        options += ["model.adapter={name: lora, rank: 3, dropout: 0}"] if lora else []
        recipe = recipe_for(demo, "/none", *options)
        task = objective.of(recipe)
        strategy_ = build(recipe, rank, world, getattr(torch, dtype))
        share = recipe.train.rows_per_worker
        results = []
        for step in range(STEPS):
            mine = step_rows(step, None if lora else base).take(slice(rank * share, (rank + 1) * share))
            results.append(loop.train_step(strategy_, Batch(0, mine), recipe.train, 0.01, objective=task))
        trained = {
            name: tensor for name, tensor in weights(strategy_).items() if not lora or not adapter.stored_name(name)
        }
        found.append(([r.loss for r in results], [r.more for r in results], [r.targets for r in results], trained))
    return found


def test_steps_do_not_depend_on_workers_and_strategies(demo: DemoPaths) -> None:
    expected = {lora: found for (_, lora, *_), found in zip(CASES[1], run(1, take_steps, demo)[0], strict=True)}
    for losses, more, _, _ in expected.values():
        assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and losses[-1] < losses[0] - 0.01
        assert more[0]["reward_accuracy"] == pytest.approx(0.5, abs=0.5) and more[-1]["reward_margin"] > 0.01
    for ranks in run(2, take_steps, demo):
        for case, (losses, more, targets, trained) in zip(CASES[2], ranks, strict=True):
            low = case[-1] == "bfloat16"
            wanted = expected[case[1]]
            assert targets == wanted[2] == [18] * STEPS
            assert losses == pytest.approx(wanted[0], rel=2e-2 if low else 1e-5), case
            if low:
                continue
            for one, other in zip(more[1:], wanted[1][1:], strict=True):  # at first all rewards are 0 but for rounding
                assert one == pytest.approx(other, rel=1e-3, abs=1e-4), case
            for name, tensor in trained.items():
                torch.testing.assert_close(tensor, wanted[3][name], rtol=0, atol=2e-4, msg=f"{case} {name}")


def test_labels_are_the_answers_alone() -> None:
    (pair,) = some_pairs(1)
    rows = packed([pair])
    wanted = np.concatenate([one.ids[one.trained] for one in pair])
    assert np.array_equal(labels(rows.input_ids, rows.flags)[rows.flags & 4 != 0], wanted)
