"""The paired bootstrap: against sacrebleu's own, and what must hold of any."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.significance import PairedTest

from ray_ft.evaluate import compare as compare_module
from ray_ft.evaluate.compare import compare, resampled
from ray_ft.evaluate.scores import Scorer

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


def corpus(rows: int, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randrange(4, 12))) for _ in range(rows)]


def spoilt(texts: list[str], share: float, seed: int) -> list[str]:
    """Each word replaced by another with a probability."""
    generator = random.Random(seed)
    return [
        " ".join(generator.choice(WORDS) if generator.random() < share else word for word in text.split())
        for text in texts
    ]


def mean(sums: np.ndarray) -> float:
    return float(sums[0] / sums[1])


def column(values: list[float]) -> np.ndarray:
    return np.array([(value, 1.0) for value in values])


def test_draws_scores_and_intervals_are_those_of_sacrebleus_paired_bootstrap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SACREBLEU_SEED", "12345")
    references = corpus(60)
    base, model = spoilt(references, 0.4, 1), spoilt(references, 0.25, 2)
    metrics = {"BLEU": BLEU(effective_order=True), "CHRF": CHRF()}
    paired = PairedTest([("base", base), ("model", model)], metrics, [references], test_type="bs", n_samples=300)
    theirs = paired()[1]

    scorer = Scorer(references)
    for metric, name in ((scorer.metrics[2], "BLEU"), (scorer.metrics[1], "chrF2")):
        ours = [resampled(metric.statistics(answers), metric.score, 300, 12345) for answers in (base, model)]
        for drawn, result in zip(ours, theirs[name], strict=True):
            cut = len(drawn) // 40
            low, high = np.sort(drawn)[[cut, -cut - 1]]
            assert drawn.mean() == pytest.approx(result.mean, rel=1e-5)
            assert (high - low) / 2 == pytest.approx(result.ci, rel=1e-4)
        drawn = np.abs(ours[1] - ours[0])
        found = compare(metric.statistics(model), metric.statistics(base), metric.score, 300, 12345)
        assert found is not None
        assert found.value == pytest.approx(theirs[name][1].score - theirs[name][0].score, rel=1e-9)
        p = (np.count_nonzero(drawn - drawn.mean() > abs(found.value)) + 1) / 301
        assert p == pytest.approx(theirs[name][1].p_value)  # theirs, from our draws
        assert (found.p < 0.05) == (theirs[name][1].p_value < 0.05)


def test_identical_systems_do_not_differ() -> None:
    references = corpus(20)
    answers = spoilt(references, 0.5, 3)
    scorer = Scorer(references)
    for metric in scorer.metrics:
        statistics = metric.statistics(answers)
        found = compare(statistics, statistics, metric.score, 200, 0)
        assert found is not None
        assert (found.value, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_a_clearly_better_system_is_found_better_and_the_other_worse() -> None:
    references = corpus(80)
    scorer = Scorer(references)
    for metric in scorer.metrics:
        model, base = (metric.statistics(spoilt(references, share, 4)) for share in (0.02, 0.6))
        found, other = (compare(*pair, metric.score, 200, 0) for pair in ((model, base), (base, model)))
        assert found is not None and other is not None
        assert 0 < found.low <= found.value <= found.high and found.p == pytest.approx(2 / 201)
        assert (other.value, other.low, other.high, other.p) == pytest.approx(
            (-found.value, -found.high, -found.low, found.p)
        )


def test_chance_alone_is_seldom_called_a_difference() -> None:
    generator = np.random.default_rng(0)
    significant = 0
    for seed in range(200):
        model, base = generator.normal(size=(2, 60)).tolist()
        found = compare(column(model), column(base), mean, 200, seed)
        assert found is not None
        significant += found.p < 0.05
    assert 2 <= significant <= 24  # 10 are expected


def test_many_statistics_of_few_rows_are_drawn_a_block_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = np.random.default_rng(0).normal(size=(3, 50))
    whole = resampled(wide, lambda sums: float(sums.sum()), 40, 0)
    seen: list[int] = []
    draws = compare_module._draws

    def counted(*given: Any) -> Any:
        for counts in draws(*given):
            seen.append(len(counts))
            yield counts

    monkeypatch.setattr(compare_module, "_draws", counted)
    monkeypatch.setattr(compare_module, "BLOCK", 500)
    assert np.array_equal(resampled(wide, lambda sums: float(sums.sum()), 40, 0), whole)
    assert seen == [10] * 4


def test_one_row_says_nothing() -> None:
    found = compare(column([1.0]), column([0.0]), mean, 100, 0)
    assert found is not None
    assert (found.value, found.low, found.high, found.p) == (1, 1, 1, 1)
    assert compare(column([])[:0].reshape(0, 2), column([])[:0].reshape(0, 2), mean, 100, 0) is None


def test_rows_have_to_be_the_same() -> None:
    with pytest.raises(ValueError, match="not of the same rows"):
        compare(column([1.0, 2.0]), column([1.0]), mean, 100, 0)


@settings(max_examples=40)
@given(
    pairs=st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=2, max_size=30),
    seed=st.integers(0, 1000),
)
def test_properties(pairs: list[tuple[float, float]], seed: int) -> None:
    model, base = (column(list(values)) for values in zip(*pairs, strict=True))
    found = compare(model, base, mean, 100, seed)
    assert found is not None
    assert found == compare(model, base, mean, 100, seed)  # seeded
    assert found.low <= found.high and 0 < found.p <= 1
    differences = [a - b for a, b in pairs]
    assert min(differences) - 1e-9 <= found.low and found.high <= max(differences) + 1e-9
    if found.low > 1e-9 or found.high < -1e-9:
        assert found.p < 0.1  # interval and p tell the same
