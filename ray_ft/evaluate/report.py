"""What an evaluation found: report.json, the examples for the playground, and a short table for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.markup import escape
from rich.table import Table

from ray_ft import paths
from ray_ft.answers.target import Answer
from ray_ft.data.thinking import split
from ray_ft.evaluate.compare import Difference, compare
from ray_ft.evaluate.labels import tables
from ray_ft.evaluate.losses import Loss
from ray_ft.evaluate.questions import Question, groups
from ray_ft.evaluate.scores import SHARES, Scored, Scorer, label_report, sentence_chrf
from ray_ft.model.preference import STATISTICS
from ray_ft.recipe import Recipe
from ray_ft.view import View

WORST = 10  # examples that a report lists
SAMPLES = 20
SHOWN_GROUPS = 12  # language pairs, and sources, in the tables for people
GROUP_SCORES = ("exact_match", "answer_match", "chrf", "bleu")  # which of their scores
LABEL_SCORES = ("accuracy", "macro_f1")  # the same of a classifier
TITLES = {
    "loss": "loss",
    "perplexity": "perplexity",
    "reward_accuracy": "reward accuracy",
    "reward_margin": "reward margin",
    "chosen_reward": "reward of chosen",
    "rejected_reward": "reward of rejected",
    "logprob_accuracy": "accuracy by probability",
    "exact_match": "exact match",
    "answer_match": "answer match",
    "chrf": "chrF",
    "bleu": "BLEU",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
}


@dataclass(frozen=True)
class System:
    """One model's part in an evaluation.

    Attributes:
        name: what was asked, for people.
        engine: what answered.
        loss: or why there is none.
        answers: one for each question.
    """

    name: str
    engine: str
    loss: Loss | str
    answers: Sequence[Answer]

    @property
    def texts(self) -> list[str]:
        return [answer.text.strip() for answer in self.answers]


def build(
    head: dict[str, Any], recipe: Recipe, questions: Sequence[Question], model: System, base: System | None
) -> dict[str, Any]:
    """The content of report.json.

    Args:
        head: what stands first: the run and the step.
        base: None: it was not asked.
    """
    labels = recipe.evaluate.labels
    references = [question.reference for question in questions]
    tags = [question.thinking for question in questions]
    scorer = Scorer(references, [question.target_language for question in questions], labels, tags)
    scored, base_scored = (scorer.scored(one.texts) if one else None for one in (model, base))
    assert scored is not None
    each = [_example(number, question, model, base) for number, question in enumerate(questions)]
    wrong = [row for row in each if row["answer"] != row["reference"].strip()]
    everything = list(range(len(questions)))
    said, base_said = ([row[key] for row in each] for key in ("answer", "base_answer"))
    found_labels = label_report(said, scorer.references, labels) if labels else None
    if found_labels is not None and base:
        found_labels["base"] = label_report(base_said, scorer.references, labels)
    return {
        **head,
        "engine": model.engine,
        "rows": len(questions),
        "model": _of(model, scorer, scored),
        "base": _of(base, scorer, base_scored) if base and base_scored else None,
        "difference": _differences(scorer, scored, base_scored, everything, recipe),
        "signatures": scorer.signatures(),
        "groups": {
            kind: {
                name: {
                    "rows": len(rows),
                    "model": scorer.scores(scored, rows),
                    "base": scorer.scores(base_scored, rows) if base_scored else None,
                    "difference": _differences(scorer, scored, base_scored, rows, recipe),
                    "bleu_signature": scorer.signatures(rows)["bleu"],
                }
                for name, rows in members.items()
            }
            for kind, members in groups(questions).items()
        },
        "labels": found_labels,
        "worst": sorted(wrong, key=lambda row: row["chrf"])[:WORST],
        "samples": each[:SAMPLES],
    }


def _of(system: System, scorer: Scorer, scored: Scored) -> dict[str, Any]:
    loss = system.loss
    judged: dict[str, Any] = {"loss": None, "perplexity": None, "no_loss": loss}
    if isinstance(loss, Loss):
        judged = {
            "loss": loss.loss,
            "perplexity": loss.perplexity,
            "packed_rows": loss.rows,
            f"target_{loss.unit}": loss.targets,
            "statistics": dict(loss.statistics),
        }
    failed = [answer.error for answer in system.answers if answer.error]
    return {
        "name": system.name,
        **judged,
        "scores": scorer.scores(scored),
        "cut_off": sum(answer.finish == "length" for answer in system.answers),
        "failed": len(failed),
        **({"first_failure": failed[0]} if failed else {}),
    }


def _differences(
    scorer: Scorer, model: Scored, base: Scored | None, rows: Sequence[int], recipe: Recipe
) -> dict[str, dict[str, float]]:
    if base is None:
        return {}
    found: dict[str, Difference | None] = {
        metric.name: compare(
            model.statistics[metric.name][rows],
            base.statistics[metric.name][rows],
            metric.score,
            recipe.evaluate.resamples,
            recipe.run.seed,
        )
        for metric in scorer.metrics
        if metric.name in model.statistics
    }
    return {name: difference.as_json() for name, difference in found.items() if difference is not None}


def _example(number: int, question: Question, model: System, base: System | None) -> dict[str, Any]:
    thought, said = split(base.texts[number], question.thinking) if base else (None, None)
    found = sample(question, model.answers[number])
    before = {"base_answer": said, **({"base_thinking": thought} if question.thinking else {})}
    return {**found, **before, "chrf": sentence_chrf(found["answer"], found["reference"])}


def sample(question: Question, answer: Answer) -> dict[str, Any]:
    """What is compared, and beside it, where answers may think, the thinking of each."""
    tags = question.thinking
    thought, said = split(answer.text, tags)
    wanted_thought, wanted = split(question.reference, tags) if tags else (None, question.reference)
    return {
        "prompt": question.asked,
        "reference": wanted,
        "answer": said,
        "origin": question.origin,
        **({"thinking": thought, "reference_thinking": wanted_thought} if tags else {}),
        **({"error": answer.error} if answer.error else {}),
    }


def examples(questions: Sequence[Question]) -> dict[str, Any]:
    """The content of examples.json: held-out prompts with their references."""
    return {
        "examples": [
            {"prompt": question.asked, "reference": question.reference, "origin": question.origin}
            for question in questions[:SAMPLES]
        ]
    }


def write(found: dict[str, Any], shown: dict[str, Any], report: str, beside: str) -> None:
    """Write a report and its examples at two locations; the report, which says that all is there, last."""
    paths.write_json(beside, shown)
    paths.write_json(report, found)


# --------------------------------------------------------------------------------------------------------- for people


def show(found: dict[str, Any], view: View) -> None:
    """Print a report: each score of base and model, each language pair and each source where there are several,
    two worst examples."""
    model, base = found["model"], found["base"]
    step = f"step {found['step']}, " if found.get("step") is not None else ""
    labels = found.get("task") == "labels"
    view.line(f"{step}{found['rows']} held-out rows {'classified' if labels else 'answered'} by {found['engine']}")
    view.console.print(_table(found))
    for name, text in found["signatures"].items():
        view.line(f"{TITLES.get(name, name.upper() if name == 'rouge' else name)} {text}")
    for who, system in (("model", model), ("base", base)):
        if system and system.get("no_loss"):
            view.line(f"no loss of the {who}: {system['no_loss']}")
        if system and system["failed"]:
            view.line(f"{who}: {system['failed']} without an answer, such as: {system['first_failure']}")
        if system and system["cut_off"]:
            view.line(f"{who}: {system['cut_off']} answers cut off at evaluate.max_new_tokens")
    for kind, title in (("language_pair", "languages"), ("source", "source")):
        if len(found["groups"].get(kind, ())) > 1:
            view.console.print(_groups(title, found["groups"][kind], LABEL_SCORES if labels else GROUP_SCORES))
    for table in tables(found["labels"]) if labels else ():
        view.console.print(table)
    for example in found["worst"][:2]:
        sure = f", {example['probability']:.1%} sure: {short(example['prompt'])!r}" if labels else ""
        thought = f", thought {short(example['thinking'])!r}" if example.get("thinking") else ""
        said = f"{short(example['answer'])!r} for {short(example['reference'])!r}"
        view.line(f"worst: {said} ({example['origin']}){sure}{thought}")


def _table(found: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    base = found["base"] and found["base"].get("title", "base")
    columns = ["", base, "model", "difference [95 %]", "p"] if base else ["", "model"]
    for title in columns:
        table.add_column(title, justify="left" if not title else "right")
    values, others = (_values(found[side]) if found[side] else {} for side in ("model", "base"))
    for name, value in values.items():
        cells = [TITLES[name]]
        if found["base"]:
            difference = found["difference"].get(name)
            cells += [form(name, others.get(name)), form(name, value), _interval(name, difference)]
            cells.append(f"{difference['p']:.3f}" if difference else "")
        else:
            cells.append(form(name, value))
        table.add_row(*cells)
    return table


def _groups(title: str, groups: dict[str, Any], names: tuple[str, ...]) -> Table:
    # The more rows, the more is known; those left out, and all other scores, are in report.json.
    most = sorted(groups, key=lambda name: (-groups[name]["rows"], name))[:SHOWN_GROUPS]
    compared = any(group["base"] for group in groups.values())
    scores = [name for name in names if any(name in group["model"] for group in groups.values())]
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(title)
    told = "chrf" if "chrf" in scores else scores[0]  # whose difference is shown
    for heading in ("rows", *(TITLES[n] for n in scores), *([f"{TITLES[told]}'s difference [95 %]"] * compared)):
        table.add_column(heading, justify="right")
    for name in most:
        group = groups[name]
        cells = [_arrow(score, group) for score in scores]
        cells += [_interval(told, group["difference"].get(told))] * compared
        table.add_row(escape(name), str(group["rows"]), *cells)
    if len(groups) > len(most):
        table.add_row(f"… and {len(groups) - len(most)} more")
    return table


def _values(system: dict[str, Any]) -> dict[str, float]:
    losses = {name: system[name] for name in ("loss", "perplexity") if system[name] is not None}
    return {**losses, **system.get("statistics", {}), **system["scores"]}


def _arrow(name: str, group: dict[str, Any]) -> str:
    model = form(name, group["model"].get(name))
    if name not in group["model"]:  # none of the group's rows counts for it
        return model
    return f"{form(name, group['base'].get(name))} → {model}" if group["base"] else model


def form(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    if name == "loss":
        return f"{value:.4f}"
    return f"{value:.3f}" if name in (*SHARES, *STATISTICS, "perplexity") else f"{value:.1f}"


def _interval(name: str, difference: dict[str, float] | None) -> str:
    if difference is None:
        return ""
    form = "{:+.3f}" if name in SHARES else "{:+.1f}"
    value, low, high = (form.format(difference[key]) for key in ("value", "low", "high"))
    return escape(f"{value} [{low}, {high}]")


def short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 70 else line[:69] + "…"
