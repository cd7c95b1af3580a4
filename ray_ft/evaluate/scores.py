"""Answers against references: exact match, chrF, BLEU, ROUGE, of labels accuracy and F1, after thinking answer match.

Every metric is a sum over rows of statistics, from whose total the score of any set of rows follows: of all, of one
language pair, of a bootstrap's draw. chrF and BLEU are sacrebleu's, with its signatures; ROUGE is rouge-score's.
Shares (exact match, accuracy, F1) are 0 to 1; chrF, BLEU and ROUGE 0 to 100. White space around a text does not count;
an empty answer is an answer, and a wrong one. Where answers think first, exact match is of the whole text, and every
other score of what follows the thinking.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ray_ft.data.thinking import split
from ray_ft.recipe import Thinking

OTHER = "(none of the labels)"  # stands for answers that are no label
ROUGE = ("rouge1", "rouge2", "rougeL")
SHARES = ("exact_match", "answer_match", "accuracy", "macro_f1")

#: BLEU's tokenizers of languages whose words the default 13a, made for spaces and European punctuation, does not find:
#: (sacrebleu's name, module that it needs). The last is of characters, which needs nothing.
TOKENIZERS: dict[str, tuple[tuple[str, str | None], ...]] = {
    "zh": (("zh", None),),
    "yue": (("zh", None),),
    "ja": (("ja-mecab", "MeCab"), ("char", None)),
    "ko": (("ko-mecab", "mecab_ko"), ("char", None)),
    "th": (("char", None),),
    "lo": (("char", None),),
    "km": (("char", None),),
    "my": (("char", None),),
}


class Metric(ABC):
    """One score over some rows, made for their references."""

    name: str

    @abstractmethod
    def statistics(self, answers: Sequence[str]) -> np.ndarray:
        """float64 [rows, k] of one system's answers, as many as there are references."""

    @abstractmethod
    def score(self, sums: np.ndarray) -> float:
        """The score of statistics summed over rows, [k]; nan where no row of them counts."""


class Mean(Metric):
    """The mean of a value per row, over the rows that count."""

    def score(self, sums: np.ndarray) -> float:
        return float(sums[0] / sums[1]) if sums[1] else float("nan")


class ExactMatch(Mean):
    name = "exact_match"

    def __init__(self, references: Sequence[str]) -> None:
        self._references = references

    def statistics(self, answers: Sequence[str]) -> np.ndarray:
        return _column([float(a == r) for a, r in zip(answers, self._references, strict=True)])


class AnswerMatch(Mean):
    """What follows the thinking, of the rows whose answers may think."""

    name = "answer_match"

    def __init__(self, references: Sequence[str], thinking: Sequence[Thinking | None]) -> None:
        self._references, self._thinking = references, thinking

    def statistics(self, answers: Sequence[str]) -> np.ndarray:
        rows = zip(answers, self._references, self._thinking, strict=True)
        return np.array([(a == r, 1) if tags else (0, 0) for a, r, tags in rows], np.float64).reshape(-1, 2)


class Accuracy(Mean):
    """Over the rows whose reference is a label."""

    name = "accuracy"

    def __init__(self, references: Sequence[str], labels: Sequence[str]) -> None:
        self._references, self._labels = references, set(labels)

    def statistics(self, answers: Sequence[str]) -> np.ndarray:
        pairs = zip(answers, self._references, strict=True)
        return np.array([(a == r, 1) if r in self._labels else (0, 0) for a, r in pairs], np.float64).reshape(-1, 2)


class MacroF1(Metric):
    """The mean of F1 over the labels that occur among the references of the rows that are scored.

    Statistics are, label after label, its right answers; then its references; then the answers that are it. Not the
    whole confusion matrix, whose size is the square of the number of labels.
    """

    name = "macro_f1"

    def __init__(self, references: Sequence[str], labels: Sequence[str]) -> None:
        self._references, self._labels = references, list(dict.fromkeys(labels))

    def statistics(self, answers: Sequence[str]) -> np.ndarray:
        at = {label: number for number, label in enumerate(self._labels)}
        counts = np.zeros((len(answers), 3, len(at)))
        for row, (answer, reference) in enumerate(zip(answers, self._references, strict=True)):
            if reference not in at:
                continue
            counts[row, 0, at[reference]] = answer == reference
            counts[row, 1, at[reference]] = 1
            if answer in at:
                counts[row, 2, at[answer]] = 1
        return counts.reshape(len(answers), -1)

    def score(self, sums: np.ndarray) -> float:
        hits, asked, answered = sums.reshape(3, -1)
        there = asked > 0
        return float(np.mean(2 * hits[there] / (asked + answered)[there])) if there.any() else float("nan")


class Rouge(Mean):
    """The F-measure of Lin (2004), "ROUGE: A Package for Automatic Evaluation of Summaries", mean over rows."""

    def __init__(self, kind: str, references: Sequence[str]) -> None:
        self.name, self._references = kind, references

    def statistics(self, answers: Sequence[str]) -> np.ndarray:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer([self.name], tokenizer=Words())
        pairs = zip(answers, self._references, strict=True)
        return _column([100 * scorer.score(r, a)[self.name].fmeasure for a, r in pairs])


class Words:
    """ROUGE's words in any script: rouge-score's own keep a-z and 0-9 alone, so that Korean has none.

    Letters, marks and digits of any script, lower case; of scripts without spaces, each character is a word.
    """

    def tokenize(self, text: str) -> list[str]:
        words: list[str] = []
        within = joined = False  # whether the last character was a word's; and one that the next may continue
        for character in unicodedata.normalize("NFC", text).casefold():
            kind = unicodedata.category(character)[0]
            if kind == "M" and within:  # a vowel sign, an accent: of the letter before it
                words[-1] += character
                continue
            within = kind in "LN"
            alone = bool(_UNSPACED.match(character))
            if within and joined and not alone:
                words[-1] += character
            elif within:
                words.append(character)
            joined = within and not alone
        return words


#: Thai and Lao, Burmese, Khmer, kana, and Han characters.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)


class ChrF(Metric):
    """Popović (2015), "chrF: character n-gram F-score for automatic MT evaluation"."""

    name = "chrf"

    def __init__(self, references: Sequence[str]) -> None:
        from sacrebleu import CHRF

        self._metric, self._references = CHRF(), references

    def statistics(self, answers: Sequence[str]) -> np.ndarray:
        return _statistics(self._metric, answers, self._references)

    def score(self, sums: np.ndarray) -> float:
        return float(self._metric._compute_score_from_stats(sums.tolist()).score) if sums[1::3].any() else float("nan")

    @property
    def signature(self) -> str:
        return str(self._metric.get_signature())


class Bleu(Metric):
    """Papineni et al. (2002), "BLEU: a Method for Automatic Evaluation of Machine Translation".

    Effective order: texts of fewer than four words have a score. Each row is cut into words as its target language
    wants (`tokenizer_for`), so that languages may be mixed; the signature names all tokenizers.
    """

    name = "bleu"

    def __init__(self, references: Sequence[str], languages: Sequence[str | None]) -> None:
        from sacrebleu import BLEU

        self._references = references
        self._names = [tokenizer_for(language) for language in languages]
        self._metrics = {name: BLEU(effective_order=True, tokenize=name, force=True) for name in set(self._names)}

    def statistics(self, answers: Sequence[str]) -> np.ndarray:
        found = np.zeros((len(answers), 10))
        for name, metric in self._metrics.items():
            index = [row for row, other in enumerate(self._names) if other == name]
            found[index] = _statistics(metric, [answers[i] for i in index], [self._references[i] for i in index])
        return found

    def score(self, sums: np.ndarray) -> float:
        metric = next(iter(self._metrics.values()))  # tokenizers have had their part
        return float(metric._compute_score_from_stats(sums.tolist()).score) if sums[1] else float("nan")

    def signature(self, rows: Sequence[int]) -> str:
        """Of the score over some rows."""
        used = sorted({self._names[row] for row in rows})
        text = str(self._metrics[used[0]].get_signature())
        own = self._metrics[used[0]].tokenizer_signature
        joined = "+".join(self._metrics[name].tokenizer_signature for name in used)
        return text.replace(f"|tok:{own}|", f"|tok:{joined}|")


def _statistics(metric: Any, answers: Sequence[str], references: Sequence[str]) -> np.ndarray:
    # sacrebleu offers them to its own significance test alone; the lock pins its version, and a test its scores.
    return np.array(metric._extract_corpus_statistics(answers, [references]), np.float64)


def _column(values: Sequence[float]) -> np.ndarray:
    return np.stack([np.array(values, np.float64), np.ones(len(values))], axis=1)


def tokenizer_for(language: str | None) -> str:
    """sacrebleu's BLEU tokenizer for a target language (``zh``, ``zh_Hant``, ``pt-BR``); 13a, its default, otherwise.

    Scores under different tokenizers cannot be compared, which is why the signature names it: for Japanese and Korean
    it depends on whether MeCab is installed (``pip install sacrebleu[ja]``, ``sacrebleu[ko]``).
    """
    code = re.split("[-_]", language or "")[0].lower()
    for name, module in TOKENIZERS.get(code, (("13a", None),)):
        if module is None or importlib.util.find_spec(module):
            return name
    raise AssertionError(f"no tokenizer for {language!r}")


@dataclass(frozen=True)
class Scored:
    """One system's answers, as statistics of each metric."""

    statistics: dict[str, np.ndarray]


class Scorer:
    """The metrics for some references.

    Args:
        references: the right answers.
        languages: the references' language codes, where known.
        labels: the answers that are labels; none: no label metrics.
        thinking: how thinking is marked in each reference and its answer, where they may think.
    """

    def __init__(
        self,
        references: Sequence[str],
        languages: Sequence[str | None] | None = None,
        labels: Sequence[str] = (),
        thinking: Sequence[Thinking | None] | None = None,
    ) -> None:
        self._thinking = list(thinking or [None] * len(references))
        self.references = self._said(references)
        self._whole = ExactMatch([reference.strip() for reference in references])
        self._chrf = ChrF(self.references)
        self._bleu = Bleu(self.references, languages or [None] * len(references))
        self.metrics: list[Metric] = [self._whole]
        if any(self._thinking):
            self.metrics.append(AnswerMatch(self.references, self._thinking))
        self.metrics += [self._chrf, self._bleu]
        self.metrics += [Rouge(kind, self.references) for kind in ROUGE]
        if labels:
            self.metrics += [kind(self.references, labels) for kind in (Accuracy, MacroF1)]

    def scored(self, answers: Sequence[str]) -> Scored:
        if not answers:
            return Scored({})
        whole, said = [answer.strip() for answer in answers], self._said(answers)
        return Scored(
            {metric.name: metric.statistics(whole if metric is self._whole else said) for metric in self.metrics}
        )

    def _said(self, texts: Sequence[str]) -> list[str]:
        return [split(text, tags)[1] for text, tags in zip(texts, self._thinking, strict=True)]

    def scores(self, scored: Scored, rows: Sequence[int] | None = None) -> dict[str, float]:
        """Name → score over some rows, by default all; without those that no row of them counts for."""
        index = slice(None) if rows is None else list(rows)
        found = {
            metric.name: metric.score(scored.statistics[metric.name][index].sum(0))
            for metric in self.metrics
            if metric.name in scored.statistics
        }
        return {name: value for name, value in found.items() if not np.isnan(value)}

    def signatures(self, rows: Sequence[int] | None = None) -> dict[str, str]:
        """What has to agree for scores to be comparable; after `scored`."""
        rows = range(len(self.references)) if rows is None else rows
        if not len(rows):
            return {}
        rouge = f"rouge-score:{importlib.metadata.version('rouge-score')}|tok:unicode words|case:lc|stem:no|f1"
        return {"chrf": self._chrf.signature, "bleu": self._bleu.signature(rows), "rouge": rouge}


def score(answers: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """All scores of answers against one reference each, the number of rows, and the signatures."""
    scorer = Scorer(references)
    scores = scorer.scores(scorer.scored(answers))
    signatures = {f"{name}_signature": text for name, text in scorer.signatures().items()}
    return {"rows": len(answers), **scores, **signatures}


def sentence_chrf(answer: str, reference: str) -> float:
    """chrF of one row, 0 to 100, to find the worst ones."""
    metric = ChrF([reference.strip()])
    found = metric.score(metric.statistics([answer.strip()])[0])
    return 0.0 if np.isnan(found) else found


def label_report(answers: Sequence[str], references: Sequence[str], labels: Sequence[str]) -> dict[str, Any] | None:
    """Of the rows whose reference is a label: accuracy, macro F1, per label precision, recall, F1 and number of rows,
    and the confusion (references down; answers across, the last column being all that is no label).

    Macro F1 is the mean over the labels that occur among the references. None where no reference is a label.
    """
    from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, precision_recall_fscore_support

    known = set(labels)
    pairs = [(a.strip(), r.strip()) for a, r in zip(answers, references, strict=True) if r.strip() in known]
    if not pairs:
        return None
    predicted, wanted = [a if a in known else OTHER for a, _ in pairs], [r for _, r in pairs]
    present = [label for label in labels if label in set(wanted)]
    each = precision_recall_fscore_support(wanted, predicted, labels=list(labels), zero_division=0)
    per_label = {
        label: {"precision": float(p), "recall": float(r), "f1": float(f), "rows": int(n)}
        for label, p, r, f, n in zip(labels, *each, strict=True)
    }
    columns = [*labels, OTHER]
    cells = confusion_matrix(wanted, predicted, labels=columns)
    return {
        "rows": len(pairs),
        "accuracy": float(accuracy_score(wanted, predicted)),
        "macro_f1": float(f1_score(wanted, predicted, labels=present, average="macro", zero_division=0)),
        "per_label": per_label,
        "confusion": {"labels": list(labels), "answers": columns, "counts": cells[: len(labels)].tolist()},
    }
