"""Scores: those of the libraries they come from, in every script, and nothing that makes them fail."""

from __future__ import annotations

import importlib.util
import json
import math
from typing import Any

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from ray_ft.evaluate import scores
from ray_ft.evaluate.scores import OTHER, Scorer, Words, label_report, score, tokenizer_for

ANSWERS = ["The cat sat on the mat.", "un deux trois", "", "Der schnelle braune Fuchs"]
REFERENCES = ["The cat sat on a mat.", "un deux trois", "quatre", "Der braune Fuchs springt"]


def test_scores_are_those_of_sacrebleu_and_their_signatures() -> None:
    found = score(ANSWERS, REFERENCES)
    assert found["rows"] == 4 and found["exact_match"] == 0.25
    chrf, bleu = sacrebleu.CHRF(), sacrebleu.BLEU(effective_order=True)
    assert found["chrf"] == pytest.approx(chrf.corpus_score(ANSWERS, [REFERENCES]).score, rel=1e-12)
    assert found["bleu"] == pytest.approx(bleu.corpus_score(ANSWERS, [REFERENCES]).score, rel=1e-12)
    assert found["chrf_signature"] == str(chrf.get_signature())
    assert found["bleu_signature"] == str(bleu.get_signature())
    assert "tok:13a" in found["bleu_signature"] and "tok:unicode words" in found["rouge_signature"]


def test_rouge_is_the_papers_measure_in_any_script() -> None:
    found = score(["the cat was under the bed"], ["the cat was found under the bed"])
    assert found["rouge1"] == pytest.approx(100 * 2 * 6 / (6 + 7))
    assert found["rouge2"] == pytest.approx(100 * 2 * 4 / (5 + 6))
    assert found["rougeL"] == pytest.approx(100 * 2 * 6 / (6 + 7))
    assert score(["고양이가 매트 위에 앉았다"], ["고양이가 매트 위에 앉았다"])["rouge1"] == 100  # rouge-score alone: 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't stop, Straße!", ["don", "t", "stop", "strasse"]),
        ("猫が座った", ["猫", "が", "座", "っ", "た"]),
        ("ab猫cd 12", ["ab", "猫", "cd", "12"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),  # vowel signs stay with their consonants
        ("cafe\u0301 café", ["café", "café"]),
        ("", []),
        ("\u0301 — 🙂", []),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    assert Words().tokenize(text) == words


def test_bleu_cuts_words_as_the_target_language_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    there: set[str] = set()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in there or None)
    codes = ["en", None, "", "zh", "zh_Hant", "zh-CN", "ja", "ko-KR", "th", "xx"]
    assert [tokenizer_for(code) for code in codes] == (
        ["13a", "13a", "13a", "zh", "zh", "zh", "char", "char", "char", "13a"]
    )
    there |= {"MeCab", "mecab_ko"}
    assert [tokenizer_for(code) for code in ("ja", "ko")] == ["ja-mecab", "ko-mecab"]


def test_languages_may_be_mixed_and_the_signature_says_so() -> None:
    answers, references = ["猫坐在垫子上", "the cat sat"], ["猫坐在桌子上", "the cat sits"]
    scorer = Scorer(references, ["zh", "en"])
    scored = scorer.scored(answers)
    chinese = sacrebleu.BLEU(effective_order=True, tokenize="zh")
    assert scorer.scores(scored, [0])["bleu"] == pytest.approx(
        chinese.corpus_score(answers[:1], [references[:1]]).score
    )
    assert scorer.signatures([0])["bleu"] == str(chinese.get_signature())
    assert "|tok:13a+zh|" in scorer.signatures()["bleu"]
    assert scorer.scores(scored)["bleu"] > 0


def test_labels_and_answers_that_are_none() -> None:
    labels = ["yes", "no", "maybe"]
    references = ["yes", "yes", "no", "no", "free text"]
    answers = ["yes", " Yes", "no", "yes", "yes"]
    found = label_report(answers, references, labels)
    assert found is not None
    assert found["rows"] == 4 and found["accuracy"] == 0.5
    assert found["confusion"] == {
        "labels": labels,
        "answers": [*labels, OTHER],
        "counts": [[1, 0, 0, 1], [1, 1, 0, 0], [0, 0, 0, 0]],  # "Yes" is none of the labels, and is not dropped
    }
    assert found["per_label"]["yes"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "rows": 2}
    assert found["macro_f1"] == pytest.approx((0.5 + 2 / 3) / 2)
    scorer = Scorer(references, labels=labels)
    summed = scorer.scores(scorer.scored(answers))
    assert summed["accuracy"] == found["accuracy"]
    assert summed["macro_f1"] == pytest.approx(found["macro_f1"])
    assert "accuracy" not in scorer.scores(scorer.scored(answers), [4])  # no label among these rows
    assert label_report(["yes"], ["free text"], labels) is None


@settings(max_examples=50)
@given(st.lists(st.tuples(st.sampled_from("abx"), st.sampled_from("abc")), min_size=1, max_size=20))
def test_macro_f1_from_sums_is_scikit_learns(pairs: list[tuple[str, str]]) -> None:
    answers, references = [a for a, _ in pairs], [r for _, r in pairs]
    scorer = Scorer(references, labels=["a", "b", "c"])
    expected = f1_score(references, answers, labels=sorted(set(references)), average="macro", zero_division=0)
    assert scorer.scores(scorer.scored(answers))["macro_f1"] == pytest.approx(expected)


def test_macro_f1_of_a_group_counts_no_label_that_the_group_has_not() -> None:
    references, answers = ["a", "a", "b", "c"], ["a", "c", "b", "c"]
    scorer = Scorer(references, labels=["a", "b", "c"])
    scored = scorer.scored(answers)
    assert scorer.scores(scored, [2])["macro_f1"] == 1  # not a third, for want of rows with a and c
    expected = f1_score(["a", "a"], ["a", "c"], labels=["a"], average="macro")
    assert scorer.scores(scored, [0, 1])["macro_f1"] == pytest.approx(expected)


def test_statistics_of_many_labels_stay_small() -> None:
    labels = [f"label {number}" for number in range(1000)]
    metric = scores.MacroF1(labels[:200], labels)
    assert metric.statistics(labels[:200]).nbytes < 10 << 20


@settings(max_examples=60)
@given(
    pairs=st.lists(st.tuples(st.text(max_size=20), st.text(max_size=20)), max_size=5),
    language=st.sampled_from([None, "en", "zh", "ja", "ko", "th", "not a code"]),
)
def test_no_text_makes_a_metric_fail(pairs: list[tuple[str, str]], language: str | None) -> None:
    answers, references = [a for a, _ in pairs], [r for _, r in pairs]
    scorer = Scorer(references, [language] * len(pairs), labels=["a", ""])
    found = scorer.scores(scorer.scored(answers))
    assert all(math.isfinite(value) and -1e-9 <= value <= 100 + 1e-6 for value in found.values())
    json.dumps(found, allow_nan=False)
    scorer.signatures()
    label_report(answers, references, ["a", ""])
    for answer, reference in pairs:
        assert 0 <= scores.sentence_chrf(answer, reference) <= 100 + 1e-6


def test_empty_answers_count() -> None:
    half = score(["un", ""], ["un", "un"])
    assert half["exact_match"] == 0.5
    assert 0 < half["chrf"] < 100 and half["rouge1"] == 50
    none: dict[str, Any] = score(["", ""], ["un", "deux"])
    assert {none[name] for name in ("exact_match", "chrf", "bleu", "rouge1", "rougeL")} == {0}
    assert score([], []) == {"rows": 0}


def test_a_groups_score_is_that_of_its_rows_alone() -> None:
    scorer = Scorer(REFERENCES)
    part = scorer.scores(scorer.scored(ANSWERS), [0, 3])
    alone = score([ANSWERS[0], ANSWERS[3]], [REFERENCES[0], REFERENCES[3]])
    assert all(value == pytest.approx(alone[name]) for name, value in part.items())
    assert np.isclose(
        part["chrf"], sacrebleu.corpus_chrf([ANSWERS[0], ANSWERS[3]], [[REFERENCES[0], REFERENCES[3]]]).score
    )
