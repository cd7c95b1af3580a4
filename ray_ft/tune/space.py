"""The space of a sweep: recipe keys and their values, drawn, enumerated or suggested, and laid over the recipe.

Dimensions are taken in the order written, each seeing the recipe with those above it applied; one whose condition is
false is left out, and the recipe's own value stays. `check` finds every fault of a space before anything starts. What
only goes wrong between sections (a batch that some drawn number of workers does not divide) is left to the trial that
drew it, unless no drawn setting makes a recipe at all.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ray_ft import recipe as recipes
from ray_ft.errors import RecipeError
from ray_ft.recipe import Dimension, Recipe
from ray_ft.recipe.tune import METRICS
from ray_ft.tune.expression import FUNCTIONS, Expression
from ray_ft.tune.keys import as_line, changed, fixed, put, refused, unknown

if TYPE_CHECKING:
    import optuna

Settings = dict[str, Any]
"""Recipe key → value; a key whose condition is false is absent."""

#: More combinations than these are a slip, unless the recipe says how many trials it wants.
MOST_COMBINATIONS = 10_000
#: A range of so few whole numbers is searched by neighbours: a fifth of a small number rounds to no change.
FEW = 10


class Space:
    """The dimensions of `recipe.tune`, compiled.

    Raises:
        RecipeError: an expression does not parse.
    """

    def __init__(self, recipe: Recipe) -> None:
        assert recipe.tune is not None
        self.seed = recipe.tune.seed
        self._content = recipe.model_dump(mode="json", exclude={"tune"})
        self._dimensions: dict[str, Dimension] = recipe.tune.space
        self._expressions = {
            text: Expression(text)
            for dimension in self._dimensions.values()
            for text in (dimension.expr, dimension.when)
            if text is not None
        }

    def draw(self, number: int) -> Settings:
        """Random settings of trial `number`: a function of the seed, the number and each key alone.

        So resuming needs no state, and a dimension that is added leaves what the others draw.

        Raises:
            RecipeError: an expression cannot be computed for them.
        """

        def pick(key: str, dimension: Dimension) -> Any:
            generator = random.Random(f"{self.seed}/{number}/{key}")  # of a text: the same in every process
            if dimension.values:
                return dimension.values[generator.randrange(len(dimension.values))]
            if dimension.randint:
                return generator.randint(*dimension.randint)
            if dimension.uniform:
                return generator.uniform(*dimension.uniform)
            assert dimension.loguniform
            low, high = dimension.loguniform
            return min(max(math.exp(generator.uniform(math.log(low), math.log(high))), low), high)

        return self._settle(pick)

    def combinations(self) -> Iterator[Settings]:
        """Every combination of a grid, the last dimension changing fastest; where a condition is false, one.

        Raises:
            RecipeError: an expression cannot be computed for one.
        """
        keys = list(self._dimensions)

        def below(at: int, settings: Settings, content: dict[str, Any]) -> Iterator[Settings]:
            if at == len(keys):
                yield settings
                return
            key = keys[at]
            for value in self._values(key, content):
                if value is _ABSENT:
                    yield from below(at + 1, settings, content)
                else:
                    yield from below(at + 1, {**settings, key: value}, self._changed(content, key, value))

        return below(0, {}, self._content)

    def grid(self) -> list[Settings]:
        """Every combination, in the order of `combinations`."""
        return list(self.combinations())

    def suggest(self, trial: optuna.Trial | optuna.trial.FixedTrial) -> Settings:
        """Settings that Optuna draws: its parameters are the keys; a choice is known there by its JSON text.

        Raises:
            RecipeError: an expression cannot be computed for them.
        """

        def pick(key: str, dimension: Dimension) -> Any:
            if dimension.values:
                texts = [_text(value) for value in dimension.values]
                return dimension.values[texts.index(trial.suggest_categorical(key, texts))]
            if dimension.randint:
                return trial.suggest_int(key, *dimension.randint)
            if dimension.uniform:
                return trial.suggest_float(key, *dimension.uniform)
            assert dimension.loguniform
            return trial.suggest_float(key, *dimension.loguniform, log=True)

        return self._settle(pick)

    def parameters(self, settings: Settings) -> dict[str, Any]:
        """Settings as the parameters under which `suggest` has them, without what is computed."""
        found = {}
        for key, value in settings.items():
            dimension = self._dimensions[key]
            if dimension.kind != "expr":
                found[key] = _text(value) if dimension.values else value
        return found

    def apply(self, settings: Settings) -> dict[str, Any]:
        """The recipe with settings, as a dictionary, without `tune`; to be checked by `recipe.parse`.

        Raises:
            RecipeError: a key lies in a section that is null.
        """
        content = copy.deepcopy(self._content)
        for key in sorted(settings, key=list(self._dimensions).index):
            put(content, key, settings[key])
        return content

    def mutations(self) -> dict[str, Any]:
        """What PopulationBasedTraining draws anew and changes: key → values in their order, or a Domain of ray.tune."""
        from ray import tune

        found: dict[str, Any] = {}
        for key, dimension in self._dimensions.items():
            if dimension.values:
                found[key] = list(dimension.values)
            elif dimension.randint:
                low, high = dimension.randint
                few = high - low < FEW
                found[key] = list(range(low, high + 1)) if few else tune.randint(low, high + 1)
            elif dimension.uniform:
                found[key] = tune.uniform(*dimension.uniform)
            else:
                assert dimension.loguniform
                found[key] = tune.loguniform(*dimension.loguniform)
        return found

    def within(self, settings: Settings) -> Settings:
        """Settings with each number brought back into its range: a change by a fifth may leave it."""
        found = dict(settings)
        for key, dimension in self._dimensions.items():
            if dimension.range is not None and key in found:
                low, high = dimension.range
                found[key] = min(max(found[key], low), high)
        return found

    def _settle(self, pick: Callable[[str, Dimension], Any]) -> Settings:
        """Settings of one trial; `pick` gives the value of a dimension that is neither computed nor left out."""
        settings: Settings = {}
        content = self._content
        for key, dimension in self._dimensions.items():
            if dimension.when is not None and not self._computed(key, "when", dimension.when, content):
                continue
            if dimension.expr is not None:
                settings[key] = self._computed(key, "expr", dimension.expr, content)
            else:
                settings[key] = pick(key, dimension)
            content = self._changed(content, key, settings[key])
        return settings

    def _values(self, key: str, content: dict[str, Any]) -> list[Any]:
        dimension = self._dimensions[key]
        if dimension.when is not None and not self._computed(key, "when", dimension.when, content):
            return [_ABSENT]
        if dimension.expr is not None:
            return [self._computed(key, "expr", dimension.expr, content)]
        return dimension.values

    def _changed(self, content: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
        try:
            return changed(content, key, value)
        except RecipeError as error:
            raise RecipeError(f"tune.space.{key}: {error.what}", error.ways_out) from error

    def _computed(self, key: str, kind: str, text: str, content: dict[str, Any]) -> Any:
        try:
            return self._expressions[text](content)
        except RecipeError as error:
            raise RecipeError(f"tune.space.{key}.{kind}: {error.what}", error.ways_out) from error


_ABSENT = object()


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def check(recipe: Recipe) -> Space:
    """The space of a recipe in which no fault was found.

    Raises:
        RecipeError: with every fault found: of keys, values, expressions, the metric, and what is drawn from them.
    """
    if recipe.tune is None:
        raise RecipeError(
            "the recipe has no tune section, so that nothing is searched",
            [
                "add for example tune: {space: {train.optimizer.lr: {loguniform: [1e-5, 1e-3]}}}",
                "train it: ray-ft train",
            ],
        )
    faults = list(itertools.chain(_metric(recipe), _keys(recipe)))
    if not faults:
        space = Space(recipe)
        faults = list(_drawn(space, recipe))
    if faults:
        raise RecipeError(f"{len(faults)} fault{'s' if len(faults) > 1 else ''} in the sweep's settings", faults)
    return space


def _metric(recipe: Recipe) -> Iterator[str]:
    assert recipe.tune is not None
    metric, task = recipe.tune.metric, METRICS[recipe.tune.metric]
    if metric.startswith("eval_") and not recipe.data.eval:
        yield (
            f"tune.metric: {metric} is never reported, since data.eval names no held-out rows; name some, or set "
            "tune.metric: loss"
        )
    if task not in (None, recipe.data.task):
        yield (
            f"tune.metric: {metric} is never reported: it is of the task {task}, and the recipe's sources are for "
            f"{recipe.data.task}; set tune.metric: eval_loss"
        )


def _keys(recipe: Recipe) -> Iterator[str]:
    """Faults of each dimension by itself, and of its place among the others."""
    assert recipe.tune is not None
    space = recipe.tune.space
    content = recipe.model_dump(mode="json", exclude={"tune"})
    names = list(space)
    for at, (key, dimension) in enumerate(space.items()):
        where = f"tune.space.{key}"
        later = names[at + 1 :]
        wrong = fixed(key) or unknown(content, key)
        if wrong:
            yield f"{where}: {wrong.removeprefix(f'{key}: ')}"
        else:
            yield from (f"{where}.{dimension.kind}: {fault}" for fault in _values(content, key, dimension))
            sections = [value for value in dimension.values if isinstance(value, dict)]
            if sections:  # keys below are those of such a section, where the recipe itself has null
                content = changed(content, key, sections[0])
        for other in later:
            if key.startswith(other + "."):
                yield f"{where}: is overwritten by tune.space.{other}, which holds it; write it below that"
        for kind in ("expr", "when"):
            text = getattr(dimension, kind)
            if text is not None:
                yield from (f"{where}.{kind}: {fault}" for fault in _expression(content, text, later))


def _values(content: dict[str, Any], key: str, dimension: Dimension) -> Iterator[str]:
    tried = dimension.values
    if dimension.range is not None:
        tried = [*dimension.range]
    faults = dict.fromkeys(fault for value in tried for fault in refused(content, key, value))
    if not faults and dimension.range is not None and not dimension.randint:
        low, high = dimension.range  # ends may be whole where numbers between them are not
        faults = {f"{fault}; use randint": None for fault in refused(content, key, low + (high - low) / math.pi)}
    yield from faults


def _expression(content: dict[str, Any], text: str, later: list[str]) -> Iterator[str]:
    try:
        names = Expression(text).names()
    except RecipeError as error:
        yield as_line(error)
        return
    for name in names:
        below = next((key for key in later if name == key or name.startswith(key + ".")), None)
        if below:
            yield f"{text!r} reads {below}, which is searched below it; write that dimension above this one"
        elif name.split(".")[0] not in content:
            near = [key for key in _leaves(content) if key.split(".")[-1] == name.split(".")[-1]]
            hint = f"did you mean {near[0]}?" if near else f"names are {', '.join([*content, *FUNCTIONS])}"
            yield f"{text!r} reads {name}, which is no key of a recipe; {hint}"
        elif wrong := unknown(content, name):
            yield f"{text!r} reads {name}: {wrong.removeprefix(f'{name}: ')}"


def _leaves(content: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in content.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")


def _drawn(space: Space, recipe: Recipe) -> Iterator[str]:
    """Faults that only show in settings: of computing them, and of all recipes made of them."""
    assert recipe.tune is not None
    wanted = recipe.tune.wanted
    drawn: list[Settings] = []
    if recipe.tune.search == "grid":
        try:
            drawn = list(itertools.islice(space.combinations(), wanted or MOST_COMBINATIONS + 1))
        except RecipeError as error:
            yield as_line(error)
        if wanted is None and len(drawn) > MOST_COMBINATIONS:
            yield f"the grid has more than {MOST_COMBINATIONS:,} combinations; list fewer values, or set tune.trials"
    else:
        faults: dict[str, None] = {}
        for number in range(wanted or 0):
            try:
                drawn.append(space.draw(number))
            except RecipeError as error:
                faults[as_line(error)] = None
        yield from faults
    first = ""
    for settings in drawn:
        try:
            recipes.parse(space.apply(settings))
        except RecipeError as error:
            first = first or f"{settings}: {'; '.join(error.ways_out)}"
        else:
            return
    if drawn:
        yield f"none of the {len(drawn)} settings drawn makes a recipe; the first, {first}"
