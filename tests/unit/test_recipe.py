"""The recipe: every key typed, overridable and read somewhere; every fault named at once, with the way out."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ray_ft import recipe
from ray_ft.errors import RecipeError
from ray_ft.recipe import Recipe

ROOT = Path(__file__).parents[2]
SMALL: dict[str, Any] = {
    "run": {"name": "a", "storage": "/storage"},
    "model": {"path": "org/model"},
    "data": {
        "train": [
            {"path": "/data/a.jsonl", "format": "messages"},
            {"path": ["/data/b.parquet", "s3://bucket/c"], "format": "translation"},
        ]
    },
}


def faults(*overrides: str, **sections: Any) -> list[str]:
    """The faults of SMALL with overrides, or with whole sections replaced."""
    content = {**copy.deepcopy(SMALL), **sections}
    for override in overrides:
        recipe.apply_override(content, override)
    with pytest.raises(RecipeError) as caught:
        recipe.parse(content)
    assert caught.value.exit_code == 2
    return list(caught.value.ways_out)


def parse(*overrides: str) -> Recipe:
    content = copy.deepcopy(SMALL)
    for override in overrides:
        recipe.apply_override(content, override)
    return recipe.parse(content)


# -------------------------------------------------------------------------------------------------- values


def test_defaults() -> None:
    found = parse()
    assert (found.run.seed, found.run.dir.root) == (0, "/storage/a")
    assert (found.model.dtype, found.model.attention, found.model.freeze) == ("auto", "auto", [])
    assert (found.data.seq_len, found.data.packing, found.data.long_rows, found.data.eval) == (1024, True, "drop", [])
    assert (found.train.strategy, found.train.workers, found.train.epochs, found.train.max_steps) == (
        "fsdp",
        1,
        1,
        None,
    )
    assert (found.train.optimizer.name, found.train.schedule.name, found.train.clip_norm) == ("adamw", "cosine", 1.0)
    assert (found.train.checkpoint.every, found.train.checkpoint.keep) == (100, 2)
    assert (found.evaluate.max_rows, found.serve.host, found.serve.port) == (200, "127.0.0.1", 8000)


def test_values_cannot_be_changed_after_the_check() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse().train.workers = 3  # type: ignore[misc]


def test_relative_paths_start_where_the_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    found = parse("run.storage=runs", "data.train.0.path=rows/*.jsonl", "model.path=base")
    assert found.run.storage == f"{tmp_path}/runs"
    assert found.data.train[0].path == [f"{tmp_path}/rows/*.jsonl"]
    assert found.model.path == f"{tmp_path}/base"
    assert parse("model.path=org/base").model.path == "org/base"  # no such folder: a hub id
    assert parse("run.storage=s3://bucket/runs").run.dir.root == "s3://bucket/runs/a"
    assert found.data.train[1].path == ["/data/b.parquet", "s3://bucket/c"]


# -------------------------------------------------------------------------------------------------- overrides


def test_overrides_are_read_as_yaml_at_any_depth() -> None:
    found = parse(
        "train.optimizer.lr=1e-3",
        "train.schedule={name: linear, warmup_steps: 5}",
        "train.clip_norm=null",
        "data.packing=false",
        "data.train.1.source_lang_code=en",
        "data.train.0={path: /data/d.txt, format: text}",
        "model.freeze=['*embed*']",
        "serve.model_name=a=b",
    )
    assert found.train.optimizer.lr == 1e-3
    assert (found.train.schedule.name, found.train.schedule.warmup_steps) == ("linear", 5)
    assert found.train.clip_norm is None
    assert found.data.packing is False
    assert found.data.train[1].source_lang_code == "en"  # type: ignore[union-attr]
    assert found.data.train[0].format == "text"
    assert found.model.freeze == ["*embed*"]
    assert found.serve.model_name == "a=b"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.workers", "'train.workers' is not of the form key.path=value"),
        ("=3", "not of the form"),
        ("train.workers=[1", "not valid YAML"),
        ("data.train.7.path=a", "data.train.7 is not a section"),
        ("data.train.first.path=a", "data.train.first is not a section"),
        ("data.train.2={}", "data.train is a list of 2"),
        ("data.train.x={}", "data.train is a list of 2"),
        ("run.name.first=a", "run.name is not a section"),
    ],
)
def test_bad_overrides(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)) as caught:
        parse(override)
    assert override in str(caught.value)
    assert caught.value.ways_out


def test_a_file_and_overrides(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(SMALL))
    assert recipe.load(str(file), ["run.seed=3"]).run.seed == 3
    with pytest.raises(RecipeError, match=r"no recipe at .*mime\.yaml") as caught:
        recipe.load(str(tmp_path / "mime.yaml"))
    assert caught.value.ways_out == (f"there is {file}",)
    for text, message in [("a: [", "not valid YAML"), ("- a", "holds list"), ("", "holds NoneType")]:
        file.write_text(text)
        with pytest.raises(RecipeError, match=message):
            recipe.load(str(file))


# -------------------------------------------------------------------------------------------------- unknown keys


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("train.worker=2", "train.worker: unknown key; did you mean 'workers'?"),
        ("trian={}", "trian: unknown key; did you mean 'train'?"),
        (
            "train.optimizer.learning_rate=1",
            "train.optimizer.learning_rate: unknown key; known here: betas, eps, in_backward, lr",
        ),
        ("train.lr=1", "train.lr: unknown key; did you mean 'train.optimizer.lr'?"),
        pytest.param("seq_len=8", "seq_len: unknown key; did you mean 'data.seq_len'?"),
        ("data.train.0.feild=a", "data.train.0.feild: unknown key; did you mean 'field'?"),
        ("data.train.1.target_lang=fr", "data.train.1.target_lang: unknown key; did you mean 'target_lang_"),
        ("data.train.0.source_field=a", "data.train.0.source_field: unknown key; "),
        ("data.eval=[{path: a, format: text, fild: b}]", "data.eval.0.fild: unknown key; did you mean 'field'?"),
        ("serve.prot=1", "serve.prot: unknown key; did you mean 'port'?"),
    ],
)
def test_an_unknown_key_names_the_nearest(override: str, fault: str) -> None:
    [found] = faults(override)
    assert found.startswith(fault)


def test_the_nearest_key_is_one_of_that_place() -> None:
    [found] = faults("data.train.0.source_field=a")  # translation has it, messages has not
    assert "'source_field'" not in found


@pytest.mark.parametrize("key", ["messages", "text", "template"])
def test_an_unknown_key_that_is_also_a_formats_name(key: str) -> None:
    [found] = faults(f"data.train.0.{key}=turns")
    assert found.startswith(f"data.train.0.{key}: unknown key; known here: ")


def test_formats() -> None:
    [found] = faults("data.train.0.format=translations")
    assert found.startswith("data.train.0.format: 'translations' is unknown; one of messages, ")
    assert found.endswith("did you mean 'translation'?")
    [found] = faults("data.train.0={path: a}")
    assert found.startswith("data.train.0: no format; one of messages, ")


def test_all_faults_at_once() -> None:
    found = faults(
        "train.workers=-1",
        "train.optimizer.lr=fast",
        "data.seq_len=4",
        "data.train.1.colour=red",
        "serve.port=70000",
        "model={}",
        "run.name=a//b",
    )
    keys = ["run.name", "model.path", "data.train.1.colour", "data.seq_len", "train.workers", "train.optimizer.lr"]
    assert [line.split(" = ")[0].split(":")[0] for line in found] == [*keys, "serve.port"]
    assert "model.path: missing" in found
    assert any(line.startswith("train.workers = -1: ") and "greater than or equal to 0" in line for line in found)
    with pytest.raises(RecipeError, match="7 faults in the recipe"):
        parse("train.workers=-1", "train.optimizer.lr=fast", "data.seq_len=4", "data.train.1.colour=red",
              "serve.port=70000", "model={}", "run.name=a//b")  # fmt: skip


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("run.name=../up", "pattern"),
        ("train.strategy=ddp", "'fsdp', 'zero1', 'zero2', 'zero3' or 'none'"),
        ("train.optimizer.betas=[0.9]", "betas"),
        ("train.optimizer.lr=0", "greater than 0"),
        ("train.schedule.min_lr_ratio=1.5", "less than or equal to 1"),
        ("data.max_bad_rows=2", "less than or equal to 1"),
        ("data.train=[]", "at least 1 item"),
        ("data.train.1.prompt=Translate {source}{text}", "unknown field ['source']"),
        ("data.train.1.prompt=Translate", "never uses {text}"),
        ("data.train.1.prompt='{text} {0}'", "is not a plain name"),
        ("data.train.1.prompt='{text} {'", "Single '{' encountered"),
        ("train.workers=two", "valid integer"),
        ("train.checkpoint.keep=0", "greater than or equal to 1"),
    ],
)
def test_refused_values(override: str, word: str) -> None:
    [found] = faults(override)
    assert word in found


# -------------------------------------------------------------------------------------------------- accumulation


def test_accumulation_is_derived() -> None:
    found = parse("train.workers=4", "train.global_batch=48", "train.micro_batch=3").train
    assert (found.accumulation, found.rows_per_worker, found.world_size) == (4, 12, 4)
    found = parse("train.workers=0", "train.global_batch=6", "train.micro_batch=2").train
    assert (found.accumulation, found.rows_per_worker, found.world_size) == (3, 6, 1)


@pytest.mark.parametrize(
    ("batch", "micro", "workers", "numbers", "ways"),
    [
        (18, 4, 2, "18 ÷ (4 × 2)", "nearest valid global_batch: 16 or 24; or keep it with micro_batch: 3"),
        (10, 4, 2, "10 ÷ (4 × 2)", "nearest valid global_batch: 8 or 16; or keep it with micro_batch: 5"),
        (7, 1, 2, "7 ÷ (1 × 2)", "nearest valid global_batch: 6 or 8"),
        (2, 2, 4, "2 ÷ (2 × 4)", "nearest valid global_batch: 8"),
        (5, 2, 0, "5 ÷ (2 × 1)", "nearest valid global_batch: 4 or 6; or keep it with micro_batch: 1"),
    ],
)
def test_an_indivisible_batch_is_refused_with_the_numbers_and_the_nearest_valid(
    batch: int, micro: int, workers: int, numbers: str, ways: str
) -> None:
    base = [f"train.global_batch={batch}", f"train.micro_batch={micro}", f"train.workers={workers}"]
    [found] = faults(*base)
    assert found == (
        f"train: accumulation = global_batch ÷ (micro_batch × workers) = {numbers} is not a whole number; {ways}"
    )
    for value in re.findall(r"global_batch: (\d+)(?: or (\d+))?", ways)[0]:
        if value:
            parse(*base, f"train.global_batch={value}")  # what it proposes is valid
    for value in re.findall(r"micro_batch: (\d+)", ways):
        parse(*base, f"train.micro_batch={value}")


# -------------------------------------------------------------------------------------------------- as a whole


def test_yaml_round_trip_keeps_the_identity() -> None:
    first = parse("train.optimizer.betas=[0.8, 0.99]", "data.train.1.prompt='{text}: é, {{x}}'", "train.clip_norm=null")
    again = recipe.parse(yaml.safe_load(first.to_yaml()))
    assert again == first
    assert again.sha256 == first.sha256
    assert parse("run.seed=1").sha256 != parse().sha256
    assert parse("train.epochs=1").sha256 == parse().sha256  # a default, written out


def test_the_resolved_recipe_is_saved_and_loads_as_the_same(tmp_path: Path) -> None:
    first = parse(f"run.storage={tmp_path}")
    first.save()
    text = Path(first.run.dir.recipe).read_text()
    assert text.splitlines()[0] == f"# resolved by ray-ft; sha256 {first.sha256}"
    assert recipe.load(first.run.dir.recipe).sha256 == first.sha256


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("**/*.yaml")), ids=lambda f: f.name)
def test_every_shipped_recipe_parses_and_begins_with_its_command(file: Path) -> None:
    verb = "train" if recipe.load(str(file)).tune is None else "tune"
    assert file.read_text().startswith(f"# ray-ft {verb} configs/{file.name}")


PAIRS = "data.train=[{path: /a, format: preference}]"
#: What does not go together: overrides, and what the error says (the values, and a way out).
TOGETHER = [
    (["train.zero.offload_optimizer=cpu"], "read by zero1, zero2 and zero3, and strategy is fsdp"),
    (["train.strategy=zero2", "train.fsdp.cpu_offload=true"], "read by strategy fsdp, and strategy is zero2"),
    (["train.strategy=zero2", "train.zero.offload_parameters=cpu"], "set strategy: zero3"),
    (["train.strategy=zero3", "train.zero.offload_optimizer=nvme"], "needs nvme_path"),
    (["train.workers=4", "train.fsdp.replicas=3"], "fsdp.replicas: 3 does not divide workers: 4"),
    (
        ["train.workers=4", "train.fsdp={replicas: 2, reshard_after_forward: 4}"],
        "fsdp.reshard_after_forward: 4 does not divide a group of 2 workers",
    ),
    (["train.optimizer.weights=bfloat16"], "set optimizer.name: adafactor or adamw_8bit"),
    (["train.strategy=zero3", "train.optimizer={name: adafactor, weights: bfloat16}"], "set strategy: fsdp"),
    (["train.strategy=zero3", "train.optimizer.name=adamw_8bit"], "optimizer.name: adamw_8bit is for strategy fsdp"),
    (["train.optimizer={name: adafactor, in_backward: true}"], "set clip_norm: null"),
    (["train.clip_norm=null", "train.optimizer={name: adafactor, in_backward: true}"], "set micro_batch: 16"),
    (["train.preference.beta=0.2"], "train.preference is read for sources of format preference"),
    ([PAIRS, "data.long_rows=truncate"], "set long_rows: drop"),
    (["data.train.0={path: /a, format: preference}"], "one run trains for one of them"),
    ([PAIRS, "train.preference={loss: ipo, label_smoothing: 0.1}"], "label_smoothing: 0, or loss: sigmoid"),
    (["data.train=[{path: /a, format: preference, prompt_field: null, chat: false}]"], "names no prompt"),
    (
        [PAIRS, "train.strategy=none", "model={path: a, quantize: nf4, adapter: {name: lora}, unfreeze: ['*norm*']}"],
        "set unfreeze: [], or quantize: null",
    ),
    (["model.quantize=nf4"], "add adapter: {name: lora}"),
    (["model.quantize=nf4", "model.adapter={name: lora}"], "set train.strategy: none"),
]


@pytest.mark.parametrize(
    ("overrides", "said"), TOGETHER, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_settings_that_contradict_each_other_are_refused_with_a_way_out(overrides: list[str], said: str) -> None:
    [fault] = faults(*overrides)
    assert said in fault


def test_settings_that_go_together_are_taken() -> None:
    parse(PAIRS, "train.preference={beta: 0.3, label_smoothing: 0.1}", "model.adapter={name: lora}")
    parse(PAIRS, "train.preference.loss=hinge", "model={path: a, adapter: {name: lora}, unfreeze: ['*norm*']}")
    parse("train.workers=0", "train.fsdp={replicas: 2, cpu_offload: true}")  # for a debugger, of any recipe
    parse("train.workers=0", "model.quantize=nf4", "model.adapter={name: lora}")
    parse("train.strategy=zero3", "train.zero={offload_optimizer: nvme, offload_parameters: cpu, nvme_path: /nvme}")
    parse("train.clip_norm=null", "train.micro_batch=16", "train.optimizer={name: adafactor, in_backward: true}")
    parse("train.strategy=none", "model.quantize=nf4", "model.adapter={name: dora}")
    parse("train.workers=4", "train.fsdp={replicas: 2, cpu_offload: true, reshard_after_forward: 2}")


def test_there_are_shipped_recipes() -> None:
    assert list((ROOT / "configs").glob("**/*.yaml"))


def properties(schema: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for name, section in {"Recipe": schema, **schema["$defs"]}.items():
        for key, field in section.get("properties", {}).items():
            yield name, key, field


def test_the_schema_describes_every_key() -> None:
    schema = recipe.json_schema()
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert schema["additionalProperties"] is False
    for section, key, field in properties(schema):
        known = "description" in field or "$ref" in field or key == "format"  # sections and their tags speak themselves
        assert known, f"{section}.{key} has no description"
    assert len(list(properties(schema))) > 60


def test_no_key_is_dead() -> None:
    sources = [p for folder in ("ray_ft", "serving", "jobs") for p in (ROOT / folder).rglob("*.py")]
    text = "\n".join(p.read_text() for p in sources if p.parent.name != "recipe")
    dead = [
        f"{section}.{key}" for section, key, _ in properties(recipe.json_schema()) if not is_read(section, key, text)
    ]
    # Read by properties of the recipe itself, which others call: world_size, rows_per_worker, Run.dir.
    assert [key for key in dead if key not in ("Run.name", "Run.storage")] == []
    assert not is_read("Train", "no_such_key", text)


def is_read(section: str, key: str, text: str) -> bool:
    """An attribute of that name, or for what travels in the manifest a string."""
    patterns = [rf"\.{key}\b"] + ([rf"""["']{key}["']"""] if section in ("Serve", "Gateway") else [])
    return any(re.search(pattern, text) for pattern in patterns)


def test_importing_the_recipe_loads_neither_torch_nor_ray() -> None:
    code = "import sys, ray_ft.recipe; print({'torch', 'ray', 'transformers'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


@pytest.mark.parametrize("text", ["1e-4", "1E+5", "1.0e5", "1.e5", ".5e3", "-2.5e3", "+1e5"])
def test_powers_of_ten_are_numbers_however_they_are_written(text: str) -> None:
    """YAML 1.1 takes most of them for text."""
    content: dict[str, Any] = {}
    recipe.apply_override(content, f"key={text}")
    assert content == {"key": float(text)}
