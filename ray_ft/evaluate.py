"""How good a run is on held-out rows: loss over all of them, answers to some, scored.

The model answers in Ray actors, one per GPU (one in all on CPU). Metrics come from sacrebleu, whose signatures
make them comparable.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ray_ft import paths, session
from ray_ft.data import pack, sources
from ray_ft.data.order import Order
from ray_ft.data.render import Renderer, load_tokenizer, special_tokens
from ray_ft.data.rows import Conversation, Joined, Sample, columns_used, to_sample
from ray_ft.errors import DataError
from ray_ft.model.loss import LossModel
from ray_ft.recipe import Recipe
from ray_ft.train.loop import tensors
from ray_ft.trained import Trained
from ray_ft.view import View

WORST = 10  # examples that the report lists


@dataclass(frozen=True)
class Question:
    """A held-out row to be answered: where it is from, the sample, and the answer that it holds."""

    origin: str
    sample: Sample

    @property
    def reference(self) -> str:
        return self.sample.answer


def held_out_questions(recipe: Recipe, count: int) -> list[Question]:
    """A seeded sample of the usable held-out rows, in their order; the same for everyone who asks.

    Plain text asks nothing, so its rows are not among them.

    Raises:
        DataError: the recipe names no held-out data.
    """
    if not recipe.data.eval:
        raise DataError(
            "the recipe has no data.eval, so there is nothing to evaluate on", ["name held-out sources there"]
        )
    chosen: list[tuple[int, Question]] = []
    generator = random.Random(recipe.run.seed)
    for seen, question in enumerate(_questions(recipe)):  # reservoir sampling: one pass, bounded memory
        if seen < count:
            chosen.append((seen, question))
        elif (at := generator.randrange(seen + 1)) < count:
            chosen[at] = (seen, question)
    return [question for _, question in sorted(chosen, key=lambda pair: pair[0])]


def _questions(recipe: Recipe) -> Iterable[Question]:
    special = special_tokens(load_tokenizer(paths.model_folder(recipe.model.path, weights=False)))
    for number, source in enumerate(recipe.data.eval):
        for file in sources.find_files(source):
            before = 0
            for chunk in sources.chunks_of(file, number):
                line = 0
                for row in sources.read_rows(chunk, columns_used(source)):
                    line = row.line
                    sample = to_sample(source, row.content, special) if isinstance(row.content, dict) else None
                    if isinstance(sample, Conversation) or (isinstance(sample, Joined) and sample.prompt):
                        yield Question(f"{file.name}:{before + line}", sample)
                before += line if file.kind == "jsonl" else 0


def score(answers: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """Exact match (share), chrF and BLEU (0–100) of answers against one reference each, without outer white space."""
    import sacrebleu

    chrf, bleu = sacrebleu.CHRF(), sacrebleu.BLEU(effective_order=True)
    stripped, wanted = [a.strip() for a in answers], [r.strip() for r in references]
    return {
        "rows": len(stripped),
        "exact_match": sum(a == b for a, b in zip(stripped, wanted, strict=True)) / max(len(stripped), 1),
        "chrf": chrf.corpus_score(stripped, [wanted]).score,
        "bleu": bleu.corpus_score(stripped, [wanted]).score,
        "chrf_signature": str(chrf.get_signature()),
        "bleu_signature": str(bleu.get_signature()),
    }


def evaluate(run: str, view: View) -> dict[str, Any]:
    """Evaluate a run's newest checkpoint; writes and returns ``eval/report.json``."""
    trained = Trained.of(run)
    recipe = trained.recipe
    questions = held_out_questions(recipe, recipe.evaluate.max_rows)
    prepared = trained.prepared("eval")
    if prepared is None:
        raise DataError("the run was trained without data.eval", ["train again with it: the same command continues"])
    held_out = Order.once(prepared)
    with session.connected():
        # No more than the run itself had: the cluster may be others' too.
        gpus = min(session.gpus(), recipe.train.world_size) if recipe.train.device != "cpu" else 0
        work: list[tuple[str, Any]] = [("loss", part) for part in held_out.slices(0, held_out.rows)]
        size = recipe.evaluate.batch_size
        work += [("answer", questions[at : at + size]) for at in range(0, len(questions), size)]
        loss, tokens, answers = 0.0, 0, []
        with view.progress("evaluating") as progress:
            for done, (kind, result) in enumerate(_judged(trained.run.root, held_out, work, gpus), start=1):
                if kind == "loss":
                    loss, tokens = loss + result[0], tokens + result[1]
                else:
                    answers += result
                progress(done, len(work))
    return _report(trained, questions, answers, loss / tokens, held_out.rows)


def _judged(run: str, held_out: Order, work: list[tuple[str, Any]], gpus: int) -> Iterable[tuple[str, Any]]:
    """(kind, result) for every (kind, payload) of the work, in its order."""
    import ray
    from ray.util import ActorPool

    judge = ray.remote(num_cpus=1, num_gpus=1 if gpus else 0)(_Judge)
    actors = [judge.remote(run, held_out, gpus > 0) for _ in range(min(max(gpus, 1), len(work)))]
    try:
        yield from ActorPool(actors).map(lambda actor, item: actor.judge.remote(*item), work)
    finally:
        for actor in actors:
            ray.kill(actor)


class _Judge:
    """An actor that holds the trained model and does one piece of evaluation at a time."""

    def __init__(self, run: str, held_out: Order, cuda: bool) -> None:
        self._run, self._held_out = run, held_out
        self._device = torch.device("cuda" if cuda else "cpu")
        self._model: Any = None

    def _load(self) -> None:
        # Not when the actor is made: Ray reports an error there without its class.
        trained = Trained.of(self._run)
        self._settings = trained.recipe
        cuda = self._device.type == "cuda"
        lowered = trained.recipe.model.dtype == "bfloat16" or (cuda and trained.recipe.model.dtype == "auto")
        self._model = trained.model(self._device, torch.bfloat16 if lowered else torch.float32)
        self._loss = LossModel(self._model, trained.recipe.train.loss_chunk)
        self._tokenizer = load_tokenizer(trained.base)
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token  # only fills up a batch; the attention mask hides it

    def judge(self, kind: str, payload: Any) -> tuple[str, Any]:
        if self._model is None:
            self._load()
        return kind, self._losses(payload) if kind == "loss" else self._answers(payload)

    @torch.no_grad()
    def _losses(self, part: Any) -> tuple[float, int]:
        total, rows = 0.0, part.read(self._held_out.prepared)
        for at in range(0, len(rows), self._settings.train.micro_batch):
            micro = rows.take(slice(at, at + self._settings.train.micro_batch))
            total += float(self._loss(*tensors(micro, self._device)))
        return total, int(np.count_nonzero(rows.flags & pack.TRAINED))

    @torch.no_grad()
    def _answers(self, questions: list[Question]) -> list[str]:
        renderer = Renderer(self._tokenizer)
        texts = [renderer.prompt_text(question.sample) for question in questions]
        inputs = self._tokenizer(
            texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
        ).to(self._device)
        output = self._model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=self._settings.evaluate.max_new_tokens,
            do_sample=False,
            eos_token_id=renderer.stop_ids(),
            pad_token_id=self._tokenizer.pad_token_id,
        )
        new = output[:, inputs["input_ids"].shape[1] :]
        return self._tokenizer.batch_decode(new, skip_special_tokens=True)


def _report(trained: Trained, questions: list[Question], answers: list[str], loss: float, rows: int) -> dict[str, Any]:
    import sacrebleu

    scores = score(answers, [q.reference for q in questions]) if questions else {"rows": 0}
    each: list[dict[str, Any]] = [
        {
            "origin": question.origin,
            "prompt": _asked(question.sample),
            "reference": question.reference,
            "answer": answer.strip(),
            "chrf": sacrebleu.sentence_chrf(answer.strip(), [question.reference.strip()]).score,
        }
        for question, answer in zip(questions, answers, strict=True)
    ]
    report = {
        "run": trained.recipe.run.name,
        "step": trained.found.step,
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),  # e^709 is the largest float
        "packed_rows": rows,
        **scores,
        "worst": sorted((e for e in each if e["answer"] != e["reference"].strip()), key=_by_chrf)[:WORST],
    }
    paths.write_json(trained.run.evaluation, report)
    return report


def _by_chrf(example: dict[str, Any]) -> float:
    return example["chrf"]


def _asked(sample: Sample) -> str:
    if isinstance(sample, Conversation):
        return "\n".join(turn["content"] for turn in sample.prompt)
    return sample.prompt
