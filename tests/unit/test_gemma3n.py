"""Gemma 3n on tiny random models of the true classes: text, and images through a stand-in for timm's tower.

What is peculiar to it: layers that borrow keys and values, a second table of embeddings, AltUp's coefficients that are
read past their layers, soft-capped logits, tokens of images behind the words, and a tower that may be missing.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny3n
import torch
from distributed import build, pictured_recipe, run, run_job
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, Gemma3nForCausalLM, Gemma3nForConditionalGeneration
from typer.testing import CliRunner

from ray_ft import artifacts, cli, paths
from ray_ft import recipe as recipes
from ray_ft.data import pack
from ray_ft.data.images import data_url, picture
from ray_ft.data.pack import Rows
from ray_ft.data.prepare import prepare
from ray_ft.data.render import Tokens, load_tokenizer
from ray_ft.data.stream import in_process
from ray_ft.data.vision import load_vision
from ray_ft.demo import DemoPaths
from ray_ft.errors import ModelError
from ray_ft.export import export
from ray_ft.model import adapt, attention, freeze, gemma3n, load, quantize
from ray_ft.model.flops import flops_per_token
from ray_ft.model.loss import LossModel, decoder_layers
from ray_ft.plan import shapes
from ray_ft.plan.trace import Numbers, Tracer
from ray_ft.recipe import Recipe
from ray_ft.recipe.model import Adapter, Model
from ray_ft.train import launch
from ray_ft.train.objective import tensors
from ray_ft.train.worker import Job
from ray_ft.view import View

COLOURS = ("red", "green", "blue", "white")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Many small layers: threads that wait for each other would take ten times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tower(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny3n.install(monkeypatch)


@pytest.fixture
def no_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemma3n, "missing", lambda: ["timm", "torchvision"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of the whole model, and of its language model alone."""
    with pytest.MonkeyPatch.context() as patch:
        tiny3n.install(patch)
        whole = tiny3n.write(tmp_path_factory.mktemp("whole"), tiny3n.config())
    return {"whole": whole, "text": tiny3n.write(tmp_path_factory.mktemp("text"), tiny3n.text_config())}


def filled(folder: str, implementation: str = "sdpa") -> Any:
    model = load.build(load.load_config(folder), implementation)
    load.allocate(model, torch.device("cpu"))
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data.fill_(float("nan"))  # nothing may stay as it was
    load.fill(model, folder, load.whole_spans(model))
    return model.eval()


def pack_of(lengths: list[int], length: int = 32) -> Rows:
    rng = np.random.default_rng(0)
    samples = [Tokens(rng.integers(3, 60, n).astype(np.int32), np.arange(n) > 1) for n in lengths]
    return pack.pack(samples, length, packing=True, pad_id=0)[0]


def batch(rows: Rows) -> tuple[torch.Tensor, ...]:
    arrays = (rows.input_ids.astype(np.int64), pack.position_ids(rows.flags), pack.labels(rows.input_ids, rows.flags))
    return tuple(torch.from_numpy(array) for array in arrays)


# --------------------------------------------------------------------------------------------------------- loading


def test_what_is_loaded_is_what_transformers_loads(folders: dict[str, str], tower: None) -> None:
    for name, kind in (("whole", Gemma3nForConditionalGeneration), ("text", Gemma3nForCausalLM)):
        expected = kind.from_pretrained(folders[name], dtype=torch.float32).eval()
        found = filled(folders[name])
        assert type(found) is kind
        for mine, theirs in (
            (found.named_parameters, expected.named_parameters),
            (found.named_buffers, expected.named_buffers),
        ):
            tensors = dict(mine())
            assert tensors.keys() == dict(theirs()).keys()
            assert all(torch.equal(tensors[at], tensor) for at, tensor in theirs())
        assert len(decoder_layers(found)) == 6


def test_without_timm_it_is_built_without_a_tower_and_reads_as_it_does_with_one(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.arange(3, 20)[None]
    monkeypatch.setattr(gemma3n, "missing", lambda: ["timm"])
    without = filled(folders["whole"])
    assert gemma3n.lacks_tower(without) and not list(without.base_model.vision_tower.parameters())
    tiny3n.install(monkeypatch)
    assert not gemma3n.lacks_tower(whole := filled(folders["whole"]))
    assert torch.equal(without(input_ids=ids).logits, whole(input_ids=ids).logits)


@pytest.mark.parametrize("change", ["lost", "more", "own"])
def test_only_what_the_model_rightly_has_no_place_for_is_passed_over(
    folders: dict[str, str], tmp_path: Path, no_tower: None, change: str
) -> None:
    tensors = load_file(Path(folders["whole"], "model.safetensors"))
    borrowed = "model.language_model.layers.4.self_attn.k_proj.weight"
    assert borrowed in tensors and any(key.startswith("model.vision_tower.") for key in tensors)
    if change == "lost":
        del tensors["model.language_model.layers.3.self_attn.k_proj.weight"]
    elif change == "more":
        tensors["model.language_model.layers.4.self_attn.k_projection.weight"] = tensors[borrowed].clone()
    else:
        tensors["model.audio_tower.another.weight"] = tensors[borrowed].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes(Path(folders["whole"], "config.json").read_bytes())
    with pytest.raises(ModelError, match="missing" if change == "lost" else "1 unexpected"):
        filled(str(tmp_path))


# ------------------------------------------------------------------------------------------------------------ loss


@pytest.mark.parametrize("name", ["whole", "text"])
def test_the_loss_of_text_is_that_of_transformers_soft_cap_and_all(
    folders: dict[str, str], name: str, tower: None
) -> None:
    model = filled(folders[name])
    kind = Gemma3nForConditionalGeneration if name == "whole" else Gemma3nForCausalLM
    expected = kind.from_pretrained(folders[name], dtype=torch.float32).train()
    ids = torch.from_numpy(np.random.default_rng(1).integers(3, 60, (2, 24)))
    labels = ids.clone()
    labels[:, :5] = -100
    positions = torch.arange(24).expand(2, -1)
    module, targets = LossModel(model, 7).train(), int((labels[:, 1:] != -100).sum())
    ours = module(ids, positions, labels).sum() / targets
    theirs = expected(input_ids=ids, labels=labels).loss
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    ours.backward()
    theirs.backward()
    gradients = {at: parameter.grad for at, parameter in expected.named_parameters()}
    for at, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, gradients[at], rtol=1e-4, atol=1e-6)
    model.config.get_text_config().final_logit_softcapping = 1e9
    assert abs(module(ids, positions, labels).sum() / targets - theirs).item() > 1e-2  # what leaving it out does


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("recompute", [False, True])
def test_packed_documents_do_not_see_each_other_nor_does_recomputing_change_a_gradient(
    folders: dict[str, str], implementation: str, recompute: bool
) -> None:
    """Borrowed keys and values pass between layers in a dictionary, past what checkpointing keeps."""
    both = pack_of([12, 15])
    starts = np.flatnonzero(both.flags[0] & pack.START)[:2].tolist()
    ends = [starts[1], 27]
    alone = [Rows(both.input_ids[:, a:b], both.flags[:, a:b]) for a, b in zip(starts, ends, strict=True)]
    packed, apart = filled(folders["text"], implementation), filled(folders["text"], "eager")
    if recompute:
        packed.gradient_checkpointing_enable({"use_reentrant": False})
    together = LossModel(packed, 7).train()(*batch(both)).sum()
    together.backward()
    module = LossModel(apart, 7).train()
    total = sum(module(*batch(rows)).sum() for rows in alone)
    total.backward()
    assert together.item() == pytest.approx(total.item(), rel=1e-5)
    largest = max(float(p.grad.abs().max()) for p in apart.parameters())
    for (name, mine), theirs in zip(packed.named_parameters(), apart.parameters(), strict=True):
        assert float((mine.grad - theirs.grad).abs().max()) < 1e-5 * largest, name
    leaking = LossModel(packed, 7)(batch(both)[0], torch.arange(32)[None], batch(both)[2])
    assert abs(leaking.sum() - total).item() > 1e-2  # positions that run on are what a leak looks like


# ----------------------------------------------------------------------------------------------- what is trained


def test_text_trains_the_language_model_alone(folders: dict[str, str], no_tower: None) -> None:
    model = load.build(load.load_config(folders["whole"]))
    adapted = adapt.adapt(model, Model(path="m"), torch.float32, torch.float32)
    assert adapted.unreached == ("audio_tower", "embed_audio", "embed_vision")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(name.startswith("model.language_model.") for name in trained)
    assert "model.language_model.embed_tokens_per_layer.weight" in trained


def test_images_train_tower_and_embedder_too_unless_frozen_and_never_audio(
    folders: dict[str, str], tower: None
) -> None:
    for frozen, expected in (
        ([], {"language_model", "vision_tower", "embed_vision"}),
        (["vision_tower", "*embed_vision*"], {"language_model"}),
    ):
        model = load.build(load.load_config(folders["whole"]))
        adapt.adapt(model, Model(path="m", freeze=frozen), torch.float32, torch.float32, images=True)
        assert {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad} == expected


def test_adapters_stay_off_towers_and_off_layers_that_are_read_past(folders: dict[str, str], tower: None) -> None:
    model = load.build(load.load_config(folders["whole"]))
    adapt.adapt(model, Model(path="m", adapter=Adapter(rank=2)), torch.float32, torch.float32, images=True)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names and all(".language_model." in name and ".lora_" in name for name in names)
    assert not any("_coefs" in name for name in names)
    assert any("laurel.linear_left" in name for name in names) and any("per_layer_input_gate" in n for n in names)
    again = load.build(load.load_config(folders["whole"]))
    with pytest.raises(ModelError, match=r"reads past the layer[\s\S]*\*_coefs"):
        adapt.adapt(
            again, Model(path="m", adapter=Adapter(target_modules=["*q_proj", "*coefs"])), torch.float32, torch.float32
        )
    again.requires_grad_(False)
    assert not any("_coefs" in name for name in quantize.targets(again, set(freeze.unreachable(again))))


def test_every_adapter_learns(folders: dict[str, str], no_tower: None) -> None:
    settings = Model(path=folders["whole"], adapter=Adapter(rank=2))
    model = load.build(load.load_config(folders["whole"]))
    adapt.adapt(model, settings, torch.float32, torch.float32)
    load.allocate(model, torch.device("cpu"))
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    load.fill(model, folders["whole"], load.whole_spans(model))
    LossModel(model, 16).train()(*batch(pack_of([20, 11]))).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_a_table_that_is_looked_up_is_no_arithmetic(folders: dict[str, str]) -> None:
    model = load.build(load.load_config(folders["text"]))
    table = model.get_decoder().embed_tokens_per_layer.weight
    used = [p for p in model.parameters() if p.dim() >= 2 and p is not table]
    assert flops_per_token(model) == 6 * sum(p.numel() for p in used)


def test_attention_of_images_is_that_of_text(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: True)
    config = load.load_config(folders["whole"])
    assert attention.choose("auto", "cuda", config, images=True).implementation == "flash_attention_2"


def test_the_tower_attends_as_it_likes_whatever_the_language_model_is_given(
    folders: dict[str, str], tower: None
) -> None:
    """transformers refuses a tower of timm's that is given another implementation than its own."""
    model = load.build(load.load_config(folders["whole"]), "flex_attention")
    assert model.config.get_text_config()._attn_implementation == "flex_attention"
    assert model.get_decoder().layers[0].self_attn.config._attn_implementation == "flex_attention"


# ---------------------------------------------------------------------------------------------------------- images


def png(colour: str, size: tuple[int, int] = (20, 30)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> DemoPaths:
    """A model that talks and sees, and rows: of words alone, then about pictures."""
    folder = tmp_path_factory.mktemp("seeing")
    with pytest.MonkeyPatch.context() as patch:
        tiny3n.install(patch)
        base = tiny3n.write_base(folder / "base", ["what colour is it ?", "a word", *COLOURS] * 30)
    words = [conversation("a word", colour) for colour in COLOURS[:2]]
    asked = [conversation("what colour is it ?", colour, png(colour)) for colour in COLOURS]
    for name, rows in (("words", words), ("asked", asked), ("heldout", asked)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    words_file, asked_file, held_out = (f"{folder}/{name}.jsonl" for name in ("words", "asked", "heldout"))
    return DemoPaths(str(folder), base, (words_file, asked_file, asked_file), held_out)


def conversation(question: str, answer: str, file: bytes | None = None) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "text", "text": question}]
    if file is not None:
        parts.insert(0, {"type": "image", "image": data_url(file)})
    return [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]


def recipe_of(seeing: DemoPaths, storage: Path, *more: str, files: tuple[int, ...] = (0, 1)) -> Recipe:
    """Over files of words (0) and of questions about pictures (1)."""
    sources = [{"path": [seeing.train[at] for at in files], "format": "messages"}]
    return pictured_recipe(seeing, storage, sources, "data.shuffle=false", *more)


def rows_of(seeing: DemoPaths, storage: Path, *more: str, files: tuple[int, ...] = (0, 1)) -> Rows:
    prepared = prepare(recipe_of(seeing, storage, *more, files=files), "train", seeing.base, in_process)
    return prepared.seen(prepared.read(prepared.units))


def answered(seeing: DemoPaths, colour: str) -> dict[str, torch.Tensor]:
    """One row about a picture, as transformers' processor makes it."""
    user = [{"type": "image", "image": picture(png(colour))}, {"type": "text", "text": "what colour is it ?"}]
    turns = [
        {"role": "user", "content": user},
        {"role": "assistant", "content": [{"type": "text", "text": colour}]},
    ]
    processor = AutoProcessor.from_pretrained(seeing.base)
    return dict(processor.apply_chat_template(turns, tokenize=True, return_dict=True, return_tensors="pt"))


def test_tokens_and_pixels_are_those_of_the_processor(seeing: DemoPaths, tmp_path: Path) -> None:
    rows = rows_of(seeing, tmp_path, "data.packing=false")
    assert rows.pixels is not None and len(rows.pixels) == 6
    for at, colour in enumerate(COLOURS, 2):
        expected = answered(seeing, colour)
        real, soft = (rows.flags[at] & pack.REAL) != 0, (rows.flags[at] & pack.IMAGE) != 0
        assert rows.input_ids[at][real].tolist() == expected["input_ids"][0].tolist()
        assert soft[real].tolist() == (expected["token_type_ids"][0] == 1).tolist() and soft.sum() == tiny3n.TOKENS
        np.testing.assert_array_equal(rows.pixels[at], expected["pixel_values"].numpy())
    vision = load_vision(seeing.base, load_tokenizer(seeing.base))
    assert vision.shape == (3, tiny3n.SIDE, tiny3n.SIDE) and vision.mark == "<image_soft_token>"


@pytest.mark.parametrize("packing", [False, True])
def test_the_loss_of_images_is_that_of_transformers(
    seeing: DemoPaths, tmp_path: Path, packing: bool, tower: None
) -> None:
    rows = rows_of(seeing, tmp_path, f"data.packing={str(packing).lower()}", files=(1,))
    assert len(rows.input_ids) == (1 if packing else 4)
    model = filled(seeing.base)
    expected = 0.0
    for colour in COLOURS:
        given = answered(seeing, colour)
        labels = given["input_ids"].clone()
        labels[:, :-3] = -100  # all but the answer and the end of the turn
        labels[:, -1] = -100  # the line end behind it
        with torch.no_grad():
            expected += 2 * float(model(**given, labels=labels).loss)
    with torch.no_grad():
        found = float(LossModel(model, 4)(*tensors(rows, torch.device("cpu"))).sum())
        assert found == pytest.approx(expected, rel=1e-5)
        assert rows.pixels is not None
        if not packing:  # as it would be with two pictures exchanged
            other = Rows(rows.input_ids, rows.flags, pixels=rows.pixels[::-1])
            assert abs(float(LossModel(model, 4)(*tensors(other, torch.device("cpu"))).sum()) - found) > 1e-4 * found


def test_rows_without_images_pass_the_tower_and_count_nothing_of_it(
    seeing: DemoPaths, tmp_path: Path, tower: None
) -> None:
    rows = rows_of(seeing, tmp_path, files=(0,))
    model = filled(seeing.base)
    looked: list[int] = []
    model.model.vision_tower.register_forward_hook(lambda *_: looked.append(1))
    given = tensors(rows, torch.device("cpu"))
    loss = LossModel(model, 4)(*given).sum()
    loss.backward()
    assert looked == [1]
    assert all(float(p.grad.abs().sum()) == 0 for p in model.model.vision_tower.parameters())
    with torch.no_grad():
        assert float(LossModel(model, 4)(*given[:3]).sum()) == pytest.approx(loss.item(), rel=1e-6)


def test_images_without_timm_are_refused_by_its_name(
    seeing: DemoPaths, folders: dict[str, str], tmp_path: Path, no_tower: None
) -> None:
    with pytest.raises(ModelError, match=r"timm and torchvision cannot be imported[\s\S]*install timm"):
        build(recipe_of(seeing, tmp_path))
    with pytest.raises(ModelError, match="timm and torchvision"):  # as whoever asks about an image
        filled(folders["whole"]).get_image_features(torch.zeros(1, 3, tiny3n.SIDE, tiny3n.SIDE))


# -------------------------------------------------------------------------------------------------------- training


def job(rank: int, world: int, given: Job, sees: bool) -> Any:
    if sees:
        tiny3n.install()
    return run_job(rank, world, given)


@pytest.mark.parametrize(("strategy", "sees"), [("fsdp", True), ("zero3", True), ("fsdp", False)])
def test_two_workers_train_as_one_does(
    seeing: DemoPaths, tmp_path: Path, strategy: str, sees: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first step neither has an image, then both; and of text alone, without a tower."""
    if sees:
        tiny3n.install(monkeypatch)
    more = ["data.packing=false", "train.max_steps=3", "train.micro_batch=1", "train.global_batch=2"]
    more += ["train.gradient_checkpointing=true"]
    more += [] if sees else ["data.images=null", "train.epochs=3"]
    files = (0, 1) if sees else (0,)
    alone = recipe_of(seeing, tmp_path / "one", *more, files=files)
    prepared = prepare(alone, "train", seeing.base, in_process)
    _, expected = run_job(0, 1, Job(alone, prepared, None))
    two = recipe_of(seeing, tmp_path / "two", *more, f"train.strategy={strategy}", "train.workers=2", files=files)
    (_, found), _ = run(2, job, Job(two, prepared, None), sees)
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], rel=2e-4)
    assert found[0]["grad_norm"] == pytest.approx(expected[0]["grad_norm"], rel=1e-3)


def test_a_run_of_text_learns_and_goes_on_from_its_checkpoint(
    seeing: DemoPaths, tmp_path: Path, no_tower: None
) -> None:
    more = ("data.images=null", "train.max_steps=8", "train.epochs=8", "train.global_batch=2", "train.micro_batch=2")
    more += ("train.optimizer.lr=5e-3",)
    straight = recipe_of(seeing, tmp_path / "straight", *more, "data.packing=false", files=(0,))
    prepared = prepare(straight, "train", seeing.base, in_process)
    _, expected = run_job(0, 1, Job(straight, prepared, None))
    assert expected[-1]["loss"] < 0.6 * expected[0]["loss"]
    broken = Job(recipe_of(seeing, tmp_path / "broken", *more, "data.packing=false", files=(0,)), prepared, None)
    assert run_job(0, 1, broken, 3)[0] == 3
    finished, rows = run_job(0, 1, broken)
    assert finished == 8 and rows[-1]["loss"] == pytest.approx(expected[-1]["loss"], rel=1e-5)


# ------------------------------------------------------------------------------------------------- export, answers


def quiet() -> View:
    return View(Console(quiet=True))


@pytest.mark.parametrize("sees", [True, False])
def test_an_export_passes_the_gate_and_keeps_all_that_the_base_has(
    seeing: DemoPaths, tmp_path: Path, sees: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter over images, merged; and all of the language model over text, where there is no tower."""
    if sees:
        tiny3n.install(monkeypatch)
    held_out = json.dumps([{"path": seeing.train[1] if sees else seeing.train[0], "format": "messages"}])
    more = ["train.max_steps=4", f"data.eval={held_out}", "train.optimizer.lr=0.02"]
    more += ['model.adapter={"rank": 4}'] if sees else ["data.images=null"]
    recipe = recipe_of(seeing, tmp_path, *more, "train.epochs=4", files=(1,) if sees else (0,))
    assert launch.train(recipe, quiet()).complete
    folder = export(recipe.run.dir.root, quiet(), vllm=False).folder
    measured = paths.read_json(paths.join(folder, artifacts.MANIFEST))["checks"]
    assert measured["logits_transformers"]["passed"] and ("images" in measured) == sees
    before, after = (load_file(Path(where, "model.safetensors")) for where in (seeing.base, folder))
    assert before.keys() == after.keys()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed and all(name.startswith("model.language_model.") for name in changed)
    assert not any(f".{part}." in name for name in changed for part in gemma3n.BORROWED if ".layers.5." in name)
    picture_file = tmp_path / "picture.png"
    picture_file.write_bytes(png("red"))
    asked = ["chat", folder, "what colour is it ?", "--json", "--max-new-tokens", "2"]
    done = CliRunner().invoke(cli.app, [*asked, "--image", str(picture_file)])
    if sees:
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["usage"]["prompt_tokens"] > tiny3n.TOKENS
    else:
        assert isinstance(done.exception, ModelError) and "timm and torchvision" in done.exception.what
        assert CliRunner().invoke(cli.app, asked).exit_code == 0  # of text it answers


# ------------------------------------------------------------------------------------------------------------ plan


@pytest.mark.parametrize(("size", "published", "borrowing"), [("E4B", 7_849_978_192, 15), ("E2B", 5_439_438_272, 10)])
def test_the_shipped_configs_are_of_the_published_sizes(
    size: str, published: int, borrowing: int, no_tower: None
) -> None:
    model = load.build(shapes.find_config(f"google/gemma-3n-{size}-it"))
    tower = 294_126_912  # of MobileNetV5, as timm builds it
    unused = 2 * 2048 * 512 + 256  # keys, values and their norm, which published checkpoints hold for all layers
    found = sum(p.numel() for p in model.parameters())
    assert found + tower + borrowing * unused == published
    assert sum(gemma3n.borrows(part) for part in model.modules()) == borrowing


def test_layers_that_lend_keys_or_leave_most_inactive_are_planned_as_such(folders: dict[str, str]) -> None:
    config = load.load_config(folders["text"])
    recipe = recipes.parse(
        {
            "run": {"name": "r"},
            "model": {"path": "m"},
            "data": {"train": [{"path": "a", "format": "text"}], "seq_len": 64},
        }
    )
    model = load.build(config)
    adapt.adapt(model, recipe.model, torch.float32, torch.float32)
    found = shapes.read(model, recipe, torch.float32)
    assert [found.blocks.index(kind) for kind in found.blocks] == [0, 0, 2, 2, 4, 4]  # sparse, lending, borrowing
    traced = Tracer(model, found.blocks, 64).activations(Numbers(torch.float32, torch.float32, True), 1)
    sparse, lending, borrowing = (traced.blocks[found.blocks[at]] for at in (0, 2, 4))
    lent = 2 * 64 * 2 * 16 * 4  # keys and values: tokens × heads × width × bytes
    assert lending.kept - borrowing.kept == pytest.approx(lent, abs=64)
    assert sparse.kept == pytest.approx(borrowing.kept, abs=64)


def test_the_shipped_recipe_is_refused_by_name_where_it_could_not_see(no_tower: None) -> None:
    recipe = recipes.load(str(Path(__file__).parents[2] / "configs" / "gemma3n_e4b_medpix_lora.yaml"), [])
    config = shapes.find_config(recipe.model.path)
    with pytest.raises(ModelError, match="timm and torchvision"):
        shapes.build(config, recipe, torch.bfloat16)
