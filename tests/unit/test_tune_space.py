"""The space of a sweep: what is drawn, enumerated, suggested; every fault named before anything starts."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.tune.search.sample import Domain

from ray_ft import recipe as recipes
from ray_ft.errors import RecipeError
from ray_ft.recipe import Recipe
from ray_ft.tune.expression import FUNCTIONS, Expression
from ray_ft.tune.keys import FIXED, look, put
from ray_ft.tune.space import MOST_COMBINATIONS, Space, check

SMALL: dict[str, Any] = {
    "run": {"name": "a", "storage": "/storage"},
    "model": {"path": "org/model"},
    "data": {
        "train": [
            {"path": "/data/a.jsonl", "format": "messages"},
            {"path": ["/data/b.parquet"], "format": "translation"},
        ],
        "eval": [{"path": "/data/c.jsonl", "format": "messages"}],
    },
}
LR = {"train.optimizer.lr": {"loguniform": [1e-5, 1e-3]}}
#: One dimension of each kind, one under a condition, one computed.
ALL: dict[str, Any] = {
    **LR,
    "train.optimizer.name": {"choice": ["adamw", "adafactor"]},
    "train.optimizer.betas": {"choice": [[0.9, 0.95], [0.9, 0.999]], "when": "train.optimizer.name == 'adamw'"},
    "train.optimizer.weight_decay": {"uniform": [0, 0.2]},
    "train.schedule.warmup_steps": {"randint": [0, 3]},
    "model.adapter": {"choice": [None, {"name": "lora"}]},
    "model.adapter.rank": {"choice": [8, 16], "when": "model.adapter"},
    "model.adapter.alpha": {"expr": "2 * model.adapter.rank", "when": "model.adapter"},
}
GRID: dict[str, Any] = {
    "train.optimizer.name": {"grid": ["adamw", "adafactor"]},
    "train.optimizer.eps": {"choice": [1e-8, 1e-6], "when": "train.optimizer.name == 'adamw'"},
    "train.global_batch": {"grid": [8, 16]},
    "train.micro_batch": {"expr": "train.global_batch // 4"},
}


def make(space: dict[str, Any], *overrides: str, **tune: Any) -> Recipe:
    content = {**copy.deepcopy(SMALL), "tune": {"space": copy.deepcopy(space), **tune}}
    for override in overrides:
        recipes.apply_override(content, override)
    return recipes.parse(content)


def faults(space: dict[str, Any], *overrides: str, **tune: Any) -> list[str]:
    """What loading the recipe, or the check of its space, says against it."""
    with pytest.raises(RecipeError) as caught:
        check(make(space, *overrides, **tune))
    assert caught.value.exit_code == 2
    return list(caught.value.ways_out)


# ------------------------------------------------------------------------------------------------------------ drawing


def test_a_draw_is_a_function_of_seed_and_number() -> None:
    space = check(make(ALL))
    drawn = [space.draw(number) for number in range(20)]
    assert drawn == [check(make(ALL)).draw(number) for number in range(20)]
    assert drawn != [check(make(ALL, seed=1)).draw(number) for number in range(20)]
    assert len({json.dumps(one) for one in drawn}) == 20


def test_a_draw_is_the_same_in_another_process() -> None:
    code = (
        "import json, sys; from ray_ft import recipe; from ray_ft.tune.space import Space\n"
        "space = Space(recipe.parse(json.loads(sys.argv[1])))\n"
        "print(json.dumps([space.draw(number) for number in range(5)]))"
    )
    given = json.dumps(make(ALL).model_dump(mode="json"))
    out = subprocess.run([sys.executable, "-c", code, given], capture_output=True, text=True, check=True)
    space = check(make(ALL))
    assert json.loads(out.stdout) == [space.draw(number) for number in range(5)]


def test_another_dimension_leaves_what_the_others_draw() -> None:
    alone = check(make(LR)).draw(3)
    assert (
        check(make({"run.seed": {"randint": [0, 9]}, **LR})).draw(3)["train.optimizer.lr"]
        == alone["train.optimizer.lr"]
    )


@given(st.integers(0, 10_000))
def test_what_is_drawn_lies_in_the_space(number: int) -> None:
    found = SPACE.draw(number)
    assert 1e-5 <= found["train.optimizer.lr"] <= 1e-3
    assert 0 <= found["train.optimizer.weight_decay"] <= 0.2
    assert found["train.schedule.warmup_steps"] in (0, 1, 2, 3)
    assert ("train.optimizer.betas" in found) == (found["train.optimizer.name"] == "adamw")
    if found["model.adapter"] is None:
        assert "model.adapter.rank" not in found
        assert "model.adapter.alpha" not in found
    else:
        assert found["model.adapter.alpha"] == 2 * found["model.adapter.rank"]
    recipes.parse(SPACE.apply(found))


SPACE = Space(make(ALL))


def test_ends_are_drawn_and_logarithms_are_uniform() -> None:
    drawn = [SPACE.draw(number) for number in range(400)]
    assert {one["train.schedule.warmup_steps"] for one in drawn} == {0, 1, 2, 3}
    below = sum(one["train.optimizer.lr"] < 1e-4 for one in drawn)  # half of a logarithmic range
    assert 160 < below < 240
    small = sum(one["train.optimizer.weight_decay"] < 0.1 for one in drawn)
    assert 160 < small < 240


# --------------------------------------------------------------------------------------------------------------- grid


def test_a_grid_is_every_combination_in_the_order_written() -> None:
    found = check(make(GRID, search="grid")).grid()
    assert [tuple(one.values()) for one in found] == [
        ("adamw", 1e-8, 8, 2),
        ("adamw", 1e-8, 16, 4),
        ("adamw", 1e-6, 8, 2),
        ("adamw", 1e-6, 16, 4),
        ("adafactor", 8, 2),  # eps has no effect here, so that each batch is tried once
        ("adafactor", 16, 4),
    ]
    assert list(found[-1]) == ["train.optimizer.name", "train.global_batch", "train.micro_batch"]


def test_a_grid_too_large_to_be_meant_is_refused_unless_trials_says_how_many() -> None:
    side = {"grid": list(range(1, 102))}
    large = {"run.seed": side, "train.global_batch": side}
    assert MOST_COMBINATIONS < 101 * 101
    [fault] = faults(large, search="grid")
    assert "more than 10,000 combinations" in fault
    check(make(large, search="grid", trials=5))


# ----------------------------------------------------------------------------------------------- laid over a recipe


def test_settings_are_laid_over_the_recipe() -> None:
    recipe = make(ALL)
    settings = {"train.optimizer.lr": 5e-4, "model.adapter": {"name": "dora"}, "model.adapter.rank": 8}
    content = check(recipe).apply(settings)
    assert "tune" not in content
    found = recipes.parse(content)
    assert found.train.optimizer.lr == 5e-4
    assert found.model.adapter is not None
    assert (found.model.adapter.name, found.model.adapter.rank) == ("dora", 8)
    assert recipes.parse(check(recipe).apply({})) == recipe.model_copy(update={"tune": None})
    assert check(recipe).apply(settings) == content  # the first result, and the settings, were not changed by it
    assert settings["model.adapter"] == {"name": "dora"}


def test_a_section_is_applied_before_its_keys_in_whatever_order_they_come() -> None:
    settings = {"model.adapter.rank": 8, "model.adapter": {"name": "dora"}}  # as JSON may give them
    assert check(make(ALL)).apply(settings)["model"]["adapter"] == {"name": "dora", "rank": 8}


def test_list_items_by_index() -> None:
    recipe = make({"data.train.1.weight": {"choice": [0.5, 2]}, "train.optimizer.betas.1": {"uniform": [0.9, 0.99]}})
    found = recipes.parse(check(recipe).apply({"data.train.1.weight": 2, "train.optimizer.betas.1": 0.98}))
    assert [source.weight for source in found.data.train] == [1, 2]
    assert found.train.optimizer.betas == (0.9, 0.98)


def test_paths_are_absolute_from_where_the_sweep_was_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    space = {
        "model.path": {"choice": ["base", "org/base"]},
        "data.train.0.path": {"choice": ["a/*.jsonl", ["b", "/c"]]},
        "data.train.1": {"choice": [{"path": "d", "format": "text"}]},
    }
    found = make(space)
    assert found.tune is not None
    assert found.tune.space["model.path"].choice == [f"{tmp_path}/base", "org/base"]
    assert found.tune.space["data.train.0.path"].choice == [f"{tmp_path}/a/*.jsonl", [f"{tmp_path}/b", "/c"]]
    assert found.tune.space["data.train.1"].choice == [{"path": f"{tmp_path}/d", "format": "text"}]
    assert recipes.parse(found.model_dump(mode="json")) == found


def test_look_and_put() -> None:
    content: dict[str, Any] = {"a": [{"b": None}], "c": 1}
    assert look(content, "a.0.b") == (True, None)
    assert [look(content, key)[0] for key in ("a.1", "a.x", "c.d", "e")] == [False] * 4
    put(content, "a.0.b", 2)
    put(content, "e.f", 3)
    assert content == {"a": [{"b": 2}], "c": 1, "e": {"f": 3}}
    for key, said in [("c.d", "c is no section but 1"), ("a.1", "a list of 1"), ("a.-1", "a list of 1")]:
        with pytest.raises(RecipeError, match=said):
            put(content, key, 0)


# -------------------------------------------------------------------------------------------------------------- Optuna


def test_optuna_suggests_what_is_in_the_space_and_only_where_the_condition_holds() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(40):
        trial = study.ask()
        settings = SPACE.suggest(trial)
        assert SPACE.parameters(settings) == trial.params
        assert ("train.optimizer.betas" in settings) == (settings["train.optimizer.name"] == "adamw")
        recipes.parse(SPACE.apply(settings))
        assert SPACE.suggest(optuna.trial.FixedTrial(SPACE.parameters(settings))) == settings
        study.tell(trial, 0.0)
    assert isinstance(study.trials[0].distributions["train.optimizer.lr"], optuna.distributions.FloatDistribution)
    assert study.trials[0].distributions["train.optimizer.lr"].log


def test_values_that_python_takes_for_equal_stay_apart() -> None:
    space = check(make({"train.fsdp.reshard_after_forward": {"choice": [True, 2]}, "run.seed": {"choice": [0, 1]}}))
    for value in (True, 2):
        fixed = optuna.trial.FixedTrial(space.parameters({"train.fsdp.reshard_after_forward": value, "run.seed": 1}))
        assert space.suggest(fixed)["train.fsdp.reshard_after_forward"] is value


# ----------------------------------------------------------------------------------------------------------------- PBT


PBT_SPACE: dict[str, Any] = {
    **LR,
    "train.schedule.warmup_steps": {"randint": [0, 200]},
    "train.optimizer.betas.0": {"uniform": [0.8, 0.95]},
    "train.clip_norm": {"choice": [0.5, 1.0, None]},
}


def test_what_a_population_changes() -> None:
    space = check(make({**PBT_SPACE, "train.optimizer.weight_decay": {"choice": [0, 0.1]}}, scheduler="pbt"))
    found = space.mutations()
    assert list(found) == [*PBT_SPACE, "train.optimizer.weight_decay"]
    assert found["train.clip_norm"] == [0.5, 1.0, None]
    warmup = {found["train.schedule.warmup_steps"].sample() for _ in range(3000)}
    assert min(warmup) == 0
    assert max(warmup) == 200  # Ray's own randint leaves its upper end out
    for key, low, high in [("train.optimizer.lr", 1e-5, 1e-3), ("train.optimizer.betas.0", 0.8, 0.95)]:
        assert isinstance(found[key], Domain)
        assert all(low <= found[key].sample() <= high for _ in range(100))


def test_few_whole_numbers_are_changed_to_a_neighbour_since_a_fifth_of_them_is_nothing() -> None:
    space = {"train.schedule.warmup_steps": {"randint": [1, 4]}}
    assert Space(make(space, scheduler="pbt")).mutations() == {"train.schedule.warmup_steps": [1, 2, 3, 4]}


def test_what_a_fifth_carries_out_of_its_range_is_brought_back() -> None:
    space = Space(make(PBT_SPACE, scheduler="pbt"))
    given = {"train.optimizer.lr": 1.2e-3, "train.schedule.warmup_steps": 160, "train.optimizer.betas.0": 0.7}
    assert space.within({**given, "train.clip_norm": None}) == {
        "train.optimizer.lr": 1e-3,
        "train.schedule.warmup_steps": 160,
        "train.optimizer.betas.0": 0.8,
        "train.clip_norm": None,
    }
    assert given["train.optimizer.lr"] == 1.2e-3


@pytest.mark.parametrize(
    ("space", "tune", "said"),
    [
        (LR, {"search": "optuna"}, "scheduler: pbt changes settings itself, from a first draw, and search is optuna"),
        (LR, {"trials": 1}, "trials is 1; set trials to 2 or more"),
        ({"model.adapter.rank": {"choice": [8, 16]}}, {}, "does not fit another model.adapter.rank; leave it out"),
        ({"train.optimizer.name": {"choice": ["adamw"]}}, {}, "does not fit another train.optimizer.name"),
        ({"train.clip_normal": {"choice": [1]}}, {}, "does not fit another train.clip_normal"),
        ({**LR, "train.optimizer.eps": {"expr": "1e-8"}}, {}, "space.train.optimizer.eps has expr"),
        ({**LR, "train.clip_norm": {"choice": [1], "when": "true"}}, {}, "space.train.clip_norm has when"),
    ],
)
def test_what_a_population_cannot_search(space: dict[str, Any], tune: dict[str, Any], said: str) -> None:
    [fault] = faults(space, scheduler="pbt", **tune)
    assert said in fault
    assert fault.startswith("tune")


# --------------------------------------------------------------------------------------------------------- expressions


CONTENT = recipes.parse(SMALL).model_dump(mode="json")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2 * train.global_batch", 32),
        ("max(1, train.global_batch // 5)", 3),
        ("train.optimizer.lr ** 2", 1e-4**2),
        ("data.train[1].weight", 1.0),
        ("data.train.0.weight + 1", 2.0),
        ("train.optimizer.name.startswith('adam')", True),
        ("8 if model.adapter else none", None),
        ("[0.9, 0.99]", [0.9, 0.99]),
        ("{'name': 'lora', 'rank': train.global_batch}", {"name": "lora", "rank": 16}),
        ("train['optimizer']['name'] ~ '_8bit'", "adamw_8bit"),
        ("int(round(2.6))", 3),
    ],
)
def test_expressions(text: str, value: object) -> None:
    assert Expression(text)(CONTENT) == value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1 / 0", "division by zero"),
        ("train.lr", "has no attribute 'lr'"),
        ("model.adapter.rank > 3", "has no attribute 'rank'"),
        ("rank", "'rank' is undefined"),
        ("train.items", "gives a builtin_function_or_method"),
        ("data.train | map('length')", "gives a generator"),
        ("1e308 * train.optimizer.lr * 1e308", "gives inf"),
        ("().__class__.__subclasses__()", "unsafe"),
        ("train.update({'epochs': 3})", "unsafe"),
        ("lipsum()", "'lipsum' is undefined"),
    ],
)
def test_expressions_that_cannot_be_computed(text: str, said: str) -> None:
    before = copy.deepcopy(CONTENT)
    with pytest.raises(RecipeError) as caught:
        Expression(text)(before)
    assert said in caught.value.what
    assert text in caught.value.what.replace('"', "'")
    assert caught.value.ways_out
    assert before == CONTENT


@pytest.mark.parametrize("text", ["", "1 +", "a b", "{{ train }}", "train }} {{ x", "[1, 2] | random", "1 | nothing"])
def test_what_is_no_expression(text: str) -> None:
    with pytest.raises(RecipeError, match="is no expression") as caught:
        Expression(text)
    assert caught.value.ways_out


def test_names_that_an_expression_reads() -> None:
    assert Expression("max(model.adapter.rank, data.train[0].weight) + train['epochs']").names() == [
        "model.adapter.rank",
        "data.train.0.weight",
        "train.epochs",
    ]
    assert Expression("train.optimizer.name.startswith(run.name)").names() == ["train.optimizer.name", "run.name"]


def test_no_key_of_a_recipe_is_hidden_by_what_mappings_can_do() -> None:
    def keys(schema: dict[str, Any]) -> set[str]:
        return {key for one in [schema, *schema["$defs"].values()] for key in one.get("properties", {})}

    found = keys(recipes.json_schema())
    assert "warmup_steps" in found
    assert not found & set(dir({}))
    assert not found & set(FUNCTIONS)


# -------------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("space", "fault"),
    [
        ({"train.optimizer.learning_rate": {"choice": [1]}}, "unknown key; known here: betas, eps, in_backward, lr"),
        ({"train.optimizer.lrr": {"choice": [1]}}, "unknown key; did you mean 'lr'?"),
        ({"lr": {"uniform": [0, 1]}}, "unknown key; did you mean 'train.optimizer.lr'?"),
        ({"trian.epochs": {"choice": [1]}}, "trian: unknown key; did you mean 'train'?"),
        ({"data.train.0.wieght": {"choice": [1]}}, "unknown key; did you mean 'weight'?"),
        ({"data.train.2.weight": {"choice": [1]}}, "data.train is a list of 2, and has no '2'; use 0…1"),
        ({"train.epochs.x": {"choice": [1]}}, "train.epochs is no section but 1"),
        ({"model.adapter.rank": {"choice": [8]}}, "model.adapter is null, so that it has no rank; set model.adapter"),
    ],
)
def test_unknown_keys(space: dict[str, Any], fault: str) -> None:
    [found] = faults(space)
    assert found.startswith(f"tune.space.{next(iter(space))}: {fault}")


@pytest.mark.parametrize("key", [*FIXED, "run", "data", "train", "tune.seed", "data.eval.0.path", "serve.port"])
def test_keys_that_may_not_be_searched(key: str) -> None:
    [found] = faults({key: {"choice": [1]}})
    assert found.startswith(f"tune.space.{key}: ")
    assert "may not be searched" in found


@pytest.mark.parametrize(
    ("key", "dimension", "fault"),
    [
        (
            "train.optimizer.lr",
            {"uniform": [0, 1]},
            "uniform: train.optimizer.lr = 0.0: Input should be greater than 0",
        ),
        ("train.optimizer.lr", {"choice": [1, -1, "fast"]}, "choice: train.optimizer.lr = -1: Input should be gr"),
        ("model.adapter", {"choice": [{"rank": 0}]}, "choice: model.adapter.rank = 0: "),
        ("train.workers", {"choice": [[2, 0]]}, "choice: train.workers.1 = 0: "),
        ("train.epochs", {"uniform": [1, 3]}, "uniform: train.epochs = 1.636"),
        ("train.zero", {"choice": [{"offload_optimizer": "nvme"}]}, "choice: train.zero: offloading to nvme needs"),
        (
            "train.optimizer.name",
            {"choice": ["adam"]},
            "choice: train.optimizer.name = 'adam': Input should be 'adamw'",
        ),
    ],
)
def test_values_that_the_recipe_refuses(key: str, dimension: dict[str, Any], fault: str) -> None:
    found = faults({key: dimension})
    assert found[0].startswith(f"tune.space.{key}.{fault}")
    assert len(found) == (2 if "fast" in str(dimension) else 1)  # each value is named, and nothing is named twice
    if key == "train.epochs":
        assert found[0].endswith("; use randint")


@pytest.mark.parametrize(
    ("dimension", "said"),
    [
        ({}, "exactly one of choice, grid, uniform, loguniform, randint, expr, and this is none"),
        ({"when": "true"}, "and this is none"),
        ({"choice": [1], "uniform": [0, 1]}, "and this is choice and uniform"),
        ({"choice": []}, "at least 1 item"),
        ({"choice": [8, 16, 8]}, "8 stands twice"),
        ({"choice": [math.nan]}, "nan is no number"),
        ({"uniform": [2, 1]}, "uniform: [2.0, 1.0] is [low, high], and holds nothing between them; write [1.0, 2.0]"),
        ({"uniform": [1, 1]}, "holds nothing between them; one value is set in the recipe itself"),
        ({"randint": [3, 3]}, "randint: [3, 3] is [low, high], and holds nothing"),
        ({"randint": [1, 2.5]}, "valid integer"),
        ({"uniform": [0, math.inf]}, "finite number"),
        ({"loguniform": [0, 1]}, "loguniform: [0.0, 1.0] has no logarithm at 0.0; raise low above 0, or use uniform"),
        ({"loguniform": [1e-3]}, "loguniform.1: missing"),
        ({"chioce": [1], "choice": [1]}, "chioce: unknown key"),
    ],
)
def test_dimensions_that_are_none(dimension: dict[str, Any], said: str) -> None:
    [found] = faults({"train.optimizer.lr": dimension})
    assert found.startswith("tune.space.train.optimizer.lr")
    assert said in found


@pytest.mark.parametrize(
    ("space", "tune", "said"),
    [
        (LR, {"metric": "evalloss"}, "did you mean 'eval_loss'?"),
        (LR, {"metric": "perplexity"}, "no run reports it; one of eval_loss, eval_accuracy, "),
        (LR, {"metric": "tokens_per_second"}, "looks for the worst; set mode: max"),
        (LR, {"search": "grid"}, "space.train.optimizer.lr is loguniform, which has no end of values"),
        ({"run.seed": {"grid": [1, 2]}}, {}, "space.run.seed is grid, and search is random"),
        ({"run.seed": {"grid": [1, 2]}}, {"search": "optuna"}, "space.run.seed is grid, and search is optuna"),
        (LR, {"median": {"trials": 5}}, "median: is read by scheduler median, and scheduler is asha"),
        (LR, {"scheduler": "none", "asha": {"eta": 2}}, "asha: is read by scheduler asha, and scheduler is none"),
        (LR, {"pbt": {"every": 5}}, "pbt: is read by scheduler pbt, and scheduler is asha"),
        ({}, {}, "at least 1 item"),
        (LR, {"trials": 0}, "greater than or equal to 1"),
    ],
)
def test_settings_of_a_sweep_that_contradict_each_other(space: dict[str, Any], tune: dict[str, Any], said: str) -> None:
    [found] = faults(space, **tune)
    assert found.startswith("tune")
    assert said in found


def test_a_metric_that_is_never_reported() -> None:
    [found] = faults(LR, "data.eval=[]")
    assert found == (
        "tune.metric: eval_loss is never reported, since data.eval names no held-out rows; name some, or set "
        "tune.metric: loss"
    )
    check(make(LR, "data.eval=[]", metric="loss"))
    [found] = faults(LR, metric="eval_macro_f1", mode="max")
    assert found.startswith("tune.metric: eval_macro_f1 is never reported: it is of the task labels, and the recipe's ")


@pytest.mark.parametrize(
    ("space", "fault"),
    [
        ({"run.seed": {"expr": "1 +"}}, "run.seed.expr: '1 +' is no expression: "),
        ({"run.seed": {"choice": [1], "when": "a b"}}, "run.seed.when: 'a b' is no expression: "),
        ({"run.seed": {"expr": "lr * 2"}}, "run.seed.expr: 'lr * 2' reads lr, which is no key of a recipe; did you "),
        ({"run.seed": {"expr": "3 * sead"}}, "run.seed.expr: '3 * sead' reads sead, which is no key of a recipe; nam"),
        ({"run.seed": {"expr": "train.epoch"}}, "run.seed.expr: 'train.epoch' reads train.epoch: unknown key; did you"),
        (
            {"run.seed": {"choice": [1], "when": "model.adapter.rank > 8"}},
            "run.seed.when: 'model.adapter.rank > 8' reads model.adapter.rank: model.adapter is null",
        ),
        (
            {"train.micro_batch": {"expr": "train.global_batch // 8"}, "train.global_batch": {"choice": [8, 16]}},
            "train.micro_batch.expr: 'train.global_batch // 8' reads train.global_batch, which is searched below it; ",
        ),
        ({"run.seed": {"expr": "1 / (train.epochs - 1)"}}, "run.seed.expr: '1 / (train.epochs - 1)' cannot be comp"),
        (
            {"model.adapter": {"choice": [None, {"rank": 8}]}, "model.adapter.rank": {"choice": [8, 16]}},
            "model.adapter.rank: model.adapter is null, so that it has no rank; ",
        ),
        (
            {"train.optimizer.lr": {"choice": [0.1, 0.2]}, "train.optimizer": {"choice": [{"name": "adafactor"}]}},
            "train.optimizer.lr: is overwritten by tune.space.train.optimizer, which holds it; write it below that",
        ),
    ],
)  # fmt: skip
def test_expressions_and_places_are_checked(space: dict[str, Any], fault: str) -> None:
    [found] = faults(space)
    assert found.startswith(f"tune.space.{fault}")


def test_all_faults_at_once() -> None:
    found = faults(
        {
            "train.optimizer.lrr": {"choice": [1]},
            "train.epochs": {"randint": [0, 3]},
            "run.seed": {"expr": "1 +"},
            "run.name": {"choice": ["a"]},
        },
        "data.eval=[]",
    )
    assert [one.split(":")[0] for one in found] == [
        "tune.metric",
        "tune.space.train.optimizer.lrr",
        "tune.space.train.epochs.randint",
        "tune.space.run.seed.expr",
        "tune.space.run.name",
    ]


def test_rules_between_sections_are_left_to_the_trial_unless_all_break_them() -> None:
    odd = {"train.global_batch": {"choice": [15, 16]}}
    check(make(odd, "train.workers=2"))
    [found] = faults({"train.global_batch": {"choice": [15, 17]}}, "train.workers=2", trials=4)
    assert found.startswith("none of the 4 settings drawn makes a recipe; the first, {'train.global_batch': 1")
    assert "is not a whole number" in found


def test_a_recipe_without_a_sweep() -> None:
    with pytest.raises(RecipeError, match="has no tune section") as caught:
        check(recipes.parse(SMALL))
    assert caught.value.ways_out


def test_a_sweep_survives_being_written_out() -> None:
    recipe = make(ALL, trials=5, search="optuna")
    again = recipes.parse(json.loads(json.dumps(recipe.model_dump(mode="json"))))
    assert again == recipe
    assert again.tune is not None
    assert list(again.tune.space) == list(ALL)  # their order has a meaning
    assert check(again).draw(2) == check(recipe).draw(2)
