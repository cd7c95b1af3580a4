"""How much of the metric's differences between trials each setting explains: fANOVA over a forest of regression trees.

Limits: of few trials it says little, and below `LEAST` nothing. Settings that change on the way (PBT), that follow from
others (expr) or that are no number and differ in every trial are left out. It explains differences between the trials
that were tried, which a searcher may have drawn near one another.

Source: Hutter, Hoos and Leyton-Brown, An Efficient Approach for Assessing Hyperparameter Importance, ICML 2014; as
optuna.importance.FanovaImportanceEvaluator has it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray_ft.tune.journal import Sweep, Trial
from ray_ft.tune.results import by_number, keys

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

LEAST = 10  # trials; fewer split a tree no more than a few times
_SEED = 0  # of the forest: the same records give the same page


@dataclass(frozen=True)
class Importance:
    """
    Attributes:
        shares: setting → its share of the differences that any one setting explains, largest first; their sum is 1.
        trials: that were compared.
        progress: share of the run at which they were: the furthest to which at least half of them came.
        left_out: setting → why it has no share.
    """

    shares: dict[str, float]
    trials: int
    progress: float
    left_out: dict[str, str]


def importance(sweep: Sweep, recipe: Mapping[str, Any]) -> Importance | str:
    """Reckon it from a sweep's records.

    Trials are compared where at least half of those that reported have come (and no fewer than `LEAST`), each by its
    last report up to there: so those that a scheduler stopped later count as well, and none for having run longer.

    Args:
        recipe: the sweep's as a dictionary, of which ``tune.space`` and the values that conditions keep are read.

    Returns:
        it, or a sentence why there is none.
    """
    import optuna

    if any(trial.inherited for trial in sweep.trials.values()):
        return "Settings changed on the way (PBT): no end result belongs to one value of a setting."
    reported = [trial for trial in by_number(sweep) if _known(trial)]
    if len(reported) < LEAST:
        return f"{len(reported)} trials have reported: from {LEAST} on it is reckoned what each setting contributes."
    progress = _common(reported)
    points = [(trial, value) for trial in reported if (value := _value(trial, progress)) is not None]
    if len(points) < LEAST:
        return f"{len(points)} trials can be compared at one place: from {LEAST} on it is reckoned what settings do."
    if len({value for _, value in points}) == 1:
        return f"All trials have the same {sweep.metric}: there is no difference to explain."
    space = (recipe.get("tune") or {}).get("space") or {}
    chosen: dict[str, tuple[list[Any], BaseDistribution]] = {}
    left_out: dict[str, str] = {}
    for key in keys(sweep):
        values = [trial.settings.get(key, own(recipe, key)) for trial, _ in points]
        found = _distribution(values, space.get(key) or {})
        if isinstance(found, str):
            left_out[key] = found
        else:
            chosen[key] = found
    if not chosen:
        return "No setting differs between trials in a way that could be compared."
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # it would tell of the study
    try:
        study = optuna.create_study(direction="minimize" if sweep.mode == "min" else "maximize")
    finally:
        optuna.logging.set_verbosity(level)
    for at, (_, value) in enumerate(points):
        params = {key: values[at] for key, (values, _) in chosen.items()}
        kinds = {key: distribution for key, (_, distribution) in chosen.items()}
        study.add_trial(optuna.trial.create_trial(value=value, params=params, distributions=kinds))
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=_SEED)
    shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return Importance({key: float(share) for key, share in shares.items()}, len(points), progress, left_out)


def _known(trial: Trial) -> bool:
    return any(math.isfinite(report.value) for report in trial.reports)


def _common(trials: Sequence[Trial]) -> float:
    """The furthest share of a run to which at least half of the trials, and at least `LEAST`, have come."""
    reached = sorted((trial.reports[-1].progress for trial in trials), reverse=True)
    return reached[max(math.ceil(len(reached) / 2), LEAST) - 1]


def _value(trial: Trial, progress: float) -> float | None:
    """The metric at the trial's last report up to there; None where it did not come so far, or had none by then."""
    if trial.reports[-1].progress < progress:
        return None
    found = [report.value for report in trial.reports if report.progress <= progress and math.isfinite(report.value)]
    return found[-1] if found else None


def _distribution(values: Sequence[Any], dimension: Mapping[str, Any]) -> tuple[list[Any], BaseDistribution] | str:
    """The values as a parameter of Optuna, or why they cannot be one."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if dimension.get("expr") is not None:
        return "it follows from the others"
    texts = [json.dumps(value, sort_keys=True, ensure_ascii=False) for value in values]
    if len(set(texts)) == 1:
        return "it has one value"
    drawn = any(dimension.get(kind) is not None for kind in ("uniform", "loguniform", "randint"))
    if drawn and all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        # The evaluator takes numbers as they are: the upper end of a logarithmic range would have nearly all weight.
        log = dimension.get("loguniform") is not None and min(values) > 0
        numbers = [math.log(value) if log else float(value) for value in values]
        return numbers, FloatDistribution(min(numbers), max(numbers))
    if len(set(texts)) == len(texts):
        return "it is no number, and differs in every trial"
    return texts, CategoricalDistribution(sorted(set(texts)))


def own(recipe: Mapping[str, Any], key: str) -> Any:
    """The recipe's own value, which a trial keeps where a setting's condition does not hold."""
    node: Any = recipe
    for part in key.split("."):
        if isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        else:
            node = node.get(part) if isinstance(node, dict) else None
    return node
