"""Training on images: tokens and pixels as transformers' processor makes them, and the loss as its model does."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from distributed import pictured_recipe as recipe_of
from distributed import run, run_job
from PIL import Image
from transformers import AutoProcessor, Gemma3ForConditionalGeneration

from ray_ft import inspect
from ray_ft.data import images, pack
from ray_ft.data.images import BadImage, ImageReader, picture
from ray_ft.data.order import Order
from ray_ft.data.prepare import Prepared, prepare
from ray_ft.data.render import load_tokenizer
from ray_ft.data.stream import in_process, local_batches
from ray_ft.data.vision import load_vision
from ray_ft.demo import DemoPaths
from ray_ft.errors import ModelError, RecipeError, StorageError
from ray_ft.model import adapt, attention, load
from ray_ft.model.loss import LossModel
from ray_ft.recipe import Images
from ray_ft.train.objective import tensors
from ray_ft.train.worker import Job

ANSWER = {"role": "assistant", "content": "two"}


def png(colour: Any = (200, 30, 30), size: tuple[int, int] = (20, 30), mode: str = "RGB", kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, kind)
    return buffer.getvalue()


def url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


Messages = Callable[..., Prepared]


@pytest.fixture
def of_messages(pictures: DemoPaths, tmp_path: Path) -> Messages:
    """Prepared rows of conversations: each given by the parts of what the user says."""

    def prepared(*rows: Any, more: tuple[str, ...] = ()) -> Prepared:
        file = tmp_path / "rows.jsonl"
        turns = [row if isinstance(row, list) else [{"role": "user", "content": row["parts"]}, ANSWER] for row in rows]
        file.write_text("".join(json.dumps({"messages": one}) + "\n" for one in turns))
        recipe = recipe_of(pictures, tmp_path / "runs", [{"path": str(file), "format": "messages"}], *more)
        return prepare(recipe, "train", pictures.base, in_process)

    return prepared


def asking(*parts: Any) -> dict[str, Any]:
    named = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": url(p)} for p in parts]
    return {"parts": named}


def rejects(prepared: Prepared) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(prepared.rejects).read_text().splitlines()]


# ------------------------------------------------------------------------------------------------- rows to tensors


def test_tokens_and_pixels_are_those_of_the_processor(pictures: DemoPaths, of_messages: Messages) -> None:
    red, wide = png(), png((0, 90, 200), (200, 40))
    prepared = of_messages(
        asking(red, "What is it?"), asking(wide, "and ", red, " which?"), more=("data.packing=false",)
    )
    rows = prepared.seen(prepared.read(prepared.units))
    processor = AutoProcessor.from_pretrained(pictures.base)
    assert rows.pixels is not None
    for at, parts in enumerate([[red, "What is it?"], [wide, "and ", red, " which?"]]):
        content = [
            {"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": picture(p)} for p in parts
        ]
        turns = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": "two"}]},
        ]
        expected = processor.apply_chat_template(turns, tokenize=True, return_dict=True, return_tensors="np")
        real = (rows.flags[at] & pack.REAL) != 0
        assert rows.input_ids[at][real].tolist() == expected["input_ids"][0].tolist()
        soft = (rows.flags[at] & pack.IMAGE) != 0
        assert soft[real].tolist() == (expected["token_type_ids"][0] == 1).tolist()
        assert soft.sum() == 16 * len([part for part in parts if isinstance(part, bytes)])
        np.testing.assert_array_equal(rows.pixels[at], expected["pixel_values"])
        trained = (rows.flags[at] & pack.TRAINED) != 0
        assert load_tokenizer(pictures.base).decode(rows.input_ids[at][trained]) == "two<end_of_turn>"
        assert not (trained & soft).any()


def test_the_published_processors_settings_are_read_as_transformers_reads_them(
    pictures: DemoPaths, tmp_path: Path
) -> None:
    for file in Path(pictures.base).glob("*"):
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    own = {**settings.pop("image_processor"), "image_seq_length": 16, "do_pan_and_scan": None, "image_mean": [0.4] * 3}
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(own))
    tokenizer = load_tokenizer(pictures.base)
    vision = load_vision(str(tmp_path), tokenizer)
    expected = AutoProcessor.from_pretrained(tmp_path).image_processor(picture(png()), return_tensors="np")
    np.testing.assert_array_equal(vision.pixels([png()]), expected["pixel_values"])
    assert vision.pixels([]).shape == (0, 3, 64, 64)
    assert vision.identity() != load_vision(pictures.base, tokenizer).identity()
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**own, "do_pan_and_scan": True}))
    load_vision.cache_clear()
    with pytest.raises(ModelError, match="pan_and_scan"):
        load_vision(str(tmp_path), tokenizer)


def test_a_model_that_sees_nothing_is_refused(demo: DemoPaths, pictures: DemoPaths, tmp_path: Path) -> None:
    recipe = recipe_of(pictures, tmp_path, None, f"model.path={demo.base}")
    with pytest.raises(ModelError, match=r"vision-language models[\s\S]*data.images=null"):
        prepare(recipe, "train", demo.base, in_process)


def test_pictures_are_upright_and_opaque() -> None:
    tall = Image.new("RGB", (10, 20), "blue")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    buffer = io.BytesIO()
    tall.save(buffer, "JPEG", exif=exif)
    assert picture(buffer.getvalue()).size == (20, 10)
    assert picture(png((255, 0, 0, 0), mode="RGBA")).getpixel((3, 3)) == (255, 255, 255)
    assert picture(png(77, mode="L")).getpixel((0, 0)) == (77, 77, 77)
    assert images.data_url(png()) == url(png())


def test_all_rows_of_both_formats_come_with_their_pictures(pictures: DemoPaths, tmp_path: Path) -> None:
    prepared = prepare(recipe_of(pictures, tmp_path), "train", pictures.base, in_process)
    assert prepared.counts.used == prepared.counts.rows == 90
    rows = prepared.seen(prepared.read(prepared.units))
    assert rows.pixels is not None
    assert [len(one) for one in rows.pixels] == ((rows.flags & pack.IMAGE) != 0).sum(1).__floordiv__(16).tolist()
    again = prepare(recipe_of(pictures, tmp_path), "train", pictures.base, in_process)
    assert again.reused and again.location == prepared.location
    other = prepare(
        recipe_of(pictures, tmp_path, None, "data.images.max_pixels=1000000"), "train", pictures.base, in_process
    )
    assert other.location != prepared.location
    # What the loop receives, in any order and with padding: each row with its own pictures.
    order = Order(prepared, seed=1, shuffle=True, window_rows=4, epochs=2)
    found = [batch.rows for batch in local_batches(order, 0, 4 * (-(-order.rows // 4)), 0, 1, 4)]
    known = {ids.tobytes(): one for ids, one in zip(rows.input_ids, rows.pixels, strict=True)}
    for batch in found:
        assert batch.pixels is not None
        for ids, flags, pixels in zip(batch.input_ids, batch.flags, batch.pixels, strict=True):
            if (flags & pack.REAL).any():
                assert len(known[ids.tobytes()]) == len(pixels)
            else:
                assert pixels.shape == (0, 3, 64, 64)


def test_rows_that_differ_in_their_picture_alone_are_no_duplicates(of_messages: Messages) -> None:
    prepared = of_messages(asking(png("red"), "what?"), asking(png("blue"), "what?"), asking(png("red"), "what?"))
    assert (prepared.counts.used, prepared.counts.duplicates) == (3, 1)


def test_a_row_with_an_image_is_never_cut(of_messages: Messages) -> None:
    long = "what " * 200
    prepared = of_messages(asking(png(), long), asking(long), more=("data.long_rows=truncate", "data.seq_len=64"))
    assert [one["reason"] for one in rejects(prepared)] == ["longer than seq_len", "nothing to train on"]


# --------------------------------------------------------------------------------------------------------- rejects


def test_what_is_no_image_is_rejected_at_its_line(of_messages: Messages, tmp_path: Path) -> None:
    good = png()
    (tmp_path / "good.png").write_bytes(good)
    (tmp_path / "text.png").write_text("not a picture")
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 30, 3), np.uint8)).save(buffer, "PNG")
    noise = buffer.getvalue()
    image = lambda value: {"parts": [{"type": "image", "image": value}, {"type": "text", "text": "what?"}]}  # noqa: E731
    cases: list[tuple[Any, str | None]] = [
        (image("good.png"), None),
        (image(str(tmp_path / "good.png")), None),
        (image(f"file://{tmp_path}/good.png"), None),
        ({"parts": [{"type": "image_url", "image_url": {"url": url(good)}}, {"type": "text", "text": "what?"}]}, None),
        (image(url(noise[:-200])), "image is damaged"),
        (image(url(good[:40] + b"\xff" * 9 + good[49:])), "image is damaged"),
        (image("missing.png"), "image not found"),
        (image("text.png"), "not a PNG, JPEG, WebP or GIF image"),
        (image(url(png(kind="TIFF"))), "not a PNG, JPEG, WebP or GIF image"),
        (image(url(png(size=(300, 200)))), "image too large"),
        (image(url(b"x" * 5001)), "image too large"),
        (image("http://example.org/a.png"), "image address not allowed"),
        (image("https://example.org/a.png"), "image address not allowed"),
        (image("s3://bucket/a.png"), "image on another storage than its data file"),
        (image("simplecache::https://example.org/a.png"), "image on another storage than its data file"),
        (
            image(f"file://{tmp_path}/good.png?endpoint_override=evil.example"),
            "image on another storage than its data file",
        ),
        (image("data:image/png;base64,%%%"), "data: URL without base64"),
        (image(""), "no image"),
        (image(7), "no image"),
        ({"parts": [{"type": "image"}]}, "no image"),
        ({"parts": [{"type": "audio", "audio": "a.wav"}]}, "message part is neither text nor image"),
        ({"parts": [{"type": "text", "text": "<start_of_image> what?"}]}, "holds the special token '<start_of_image>'"),
        (
            [
                {"role": "user", "content": "draw"},
                {"role": "assistant", "content": [{"type": "image", "image": url(good)}]},
            ],
            "image in a message that is not the user's",
        ),
    ]
    prepared = of_messages(*(row for row, _ in cases), more=("data.images={max_pixels: 50000, max_bytes: 5000}",))
    found = {one["line"]: one["reason"] for one in rejects(prepared)}
    assert found == {line: reason for line, (_, reason) in enumerate(cases, start=1) if reason}
    assert prepared.counts.used + prepared.counts.rejected.total() == len(cases)
    assert prepared.counts.used == 4


def test_without_the_section_images_are_rejected_as_before(of_messages: Messages) -> None:
    prepared = of_messages(asking(png(), "what?"), asking("what?"), more=("data.images=null",))
    assert [one["reason"] for one in rejects(prepared)] == ["row with an image"]
    assert prepared.processor is None and prepared.read(prepared.units).images is None


def test_a_bomb_is_not_unpacked() -> None:
    reader = ImageReader("/data/rows.jsonl", Images())
    bomb = png(0, (9_000, 9_000), "1")  # 12 KB, of which 240 MB would be made
    assert len(bomb) < 100_000
    with pytest.raises(BadImage, match="too large"):
        reader.read(bomb)


def test_parquet_keeps_images_as_datasets_do(pictures: DemoPaths, tmp_path: Path) -> None:
    (tmp_path / "b.png").write_bytes(png("blue"))
    rows = [
        {"image_id": {"bytes": png(), "path": None}, "q": "what?", "a": "red"},
        {"image_id": {"bytes": None, "path": "b.png"}, "q": "what?", "a": "blue"},
        {"image_id": None, "q": "what?", "a": "red"},
        {"image_id": {"bytes": png()[:-30], "path": None}, "q": "what?", "a": "red"},
        {"image_id": {"bytes": png(), "path": None}, "q": " ", "a": "red"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    source = {"path": str(tmp_path / "rows.parquet"), "format": "image_question", "image_field": "image_id"}
    recipe = recipe_of(pictures, tmp_path / "runs", [{**source, "question_field": "q", "answer_field": "a"}])
    prepared = prepare(recipe, "train", pictures.base, in_process)
    assert prepared.counts.used == 2
    assert [(one["line"], one["reason"]) for one in rejects(prepared)] == [
        (3, "no image"), (4, "image is damaged"), (5, "field 'q' is empty")
    ]  # fmt: skip


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A server that stands for https://pictures.test; what it is asked."""
    import httpx

    asked: list[str] = []

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            status = {"/gone.png": 404, "/moved.png": 302, "/down.png": 503}.get(self.path, 200)
            self.send_response(status)
            if status == 302:
                self.send_header("Location", "http://127.0.0.1/secret")
            self.end_headers()
            self.wfile.write(png() if status == 200 else b"")

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    real = httpx.stream
    to = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(
        httpx, "stream", lambda method, url, **k: real(method, url.replace("https://pictures.test", to), **k)
    )
    monkeypatch.setattr("ray_ft.retry.FIRST_WAIT", 0.001)
    monkeypatch.setattr("ray_ft.retry.LONGEST_WAIT", 0.001)
    yield asked
    server.shutdown()
    server.server_close()


def test_addresses_are_fetched_from_allowed_hosts_alone_and_never_followed(host: list[str]) -> None:
    reader = ImageReader("/data/rows.jsonl", Images(hosts=["pictures.test"]))
    assert reader.read("https://pictures.test/a.png") == png()
    for path in ("gone.png", "moved.png"):
        with pytest.raises(BadImage, match="image not found"):
            reader.read(f"https://pictures.test/{path}")
    for other in ("http://pictures.test/a.png", "https://pictures.test:8443/a.png", "https://a@pictures.test/a.png"):
        with pytest.raises(BadImage, match="not allowed"):
            reader.read(other)
    assert host == ["/a.png", "/gone.png", "/moved.png"]
    with pytest.raises(StorageError, match="503"):  # of the host, not of the row
        reader.read("https://pictures.test/down.png")
    with pytest.raises(BadImage, match="too large"):
        ImageReader("/data/rows.jsonl", Images(hosts=["pictures.test"], max_bytes=9)).read(
            "https://pictures.test/a.png"
        )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.cache=off", "cache: off would fetch and check every image again"),
        ("data.images=null", "images: null rejects every row"),
        ("data.images.hosts=['https://a.org']", "hosts"),
    ],
)
def test_settings_that_contradict_each_other(pictures: DemoPaths, tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_of(pictures, tmp_path, None, override)


@pytest.mark.parametrize(
    "override",
    ["data.train=[{path: a, format: labels}]", "data.train=[{path: a, format: preference}]"],
)
def test_tasks_whose_rows_are_text_alone_take_no_images(pictures: DemoPaths, tmp_path: Path, override: str) -> None:
    with pytest.raises(RecipeError, match="images is for rows that are answered"):
        recipe_of(pictures, tmp_path, None, override)


# ------------------------------------------------------------------------------------------------------------ loss


def published(pictures: DemoPaths) -> Any:
    model = Gemma3ForConditionalGeneration.from_pretrained(
        pictures.base, dtype=torch.float32, attn_implementation="sdpa"
    )
    return model.eval()


def losses_apart(
    model: Any, pictures: DemoPaths, rows: list[tuple[bytes, str, str]], *, types: bool = True
) -> list[float]:
    """Summed losses of what transformers' own model says to its own processor's output, each conversation alone."""
    processor = AutoProcessor.from_pretrained(pictures.base)
    found = []
    for file, question, answer in rows:
        user = [{"type": "image", "image": picture(file)}, {"type": "text", "text": question}]
        turns = [
            {"role": "user", "content": user},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        given = processor.apply_chat_template(turns, tokenize=True, return_dict=True, return_tensors="pt")
        before = processor.apply_chat_template(
            turns[:1], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )["input_ids"].shape[1]
        labels = given["input_ids"].clone()
        labels[:, :before] = -100
        labels[:, -1] = -100  # the line end behind the turn
        if not types:
            given.pop("token_type_ids")
        with torch.no_grad():
            loss = model(**given, labels=labels).loss
        found.append(float(loss) * int((labels != -100).sum()))
    return found


ROWS = [(png("red"), "What colour are they?", "red"), (png("blue", (90, 40)), "How many shapes are there?", "three")]
ROWS += [(png("green"), "Which shape is it?", "circle"), (png("white"), "What is in the picture?", "two red circles")]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("packing", [False, True])
def test_the_loss_is_that_of_transformers(
    pictures: DemoPaths, of_messages: Messages, packing: bool, implementation: str
) -> None:
    conversations = [[asking(f, q)["parts"], a] for f, q, a in ROWS]
    turns = [[{"role": "user", "content": p}, {"role": "assistant", "content": a}] for p, a in conversations]
    prepared = of_messages(*turns, more=(f"data.packing={str(packing).lower()}",))
    assert prepared.rows == (2 if packing else 4)
    rows = prepared.seen(prepared.read(prepared.units))
    model = published(pictures)
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        found = LossModel(model, 4)(*tensors(rows, torch.device("cpu"))).sum()
    expected = sum(losses_apart(published(pictures), pictures, ROWS))
    assert float(found) == pytest.approx(expected, rel=1e-5)
    # Were the tokens of an image to see each other one way alone, it would be another loss.
    assert abs(sum(losses_apart(published(pictures), pictures, ROWS, types=False)) - expected) > 1e-3 * expected
    # As it would be with another picture, or with two of them exchanged.
    assert rows.pixels is not None
    other = pack.Rows(rows.input_ids, rows.flags, pixels=rows.pixels[::-1])
    with torch.no_grad():
        assert abs(float(LossModel(model, 4)(*tensors(other, torch.device("cpu"))).sum()) - expected) > 1e-3 * expected


def test_a_batch_without_images_passes_the_tower_and_counts_nothing_of_it(
    pictures: DemoPaths, of_messages: Messages
) -> None:
    prepared = of_messages(asking("How many shapes are there?"), asking("What colour are they?"))
    seen = prepared.seen(prepared.read(prepared.units))
    model = published(pictures)
    module = LossModel(model, 4)
    looked: list[int] = []
    model.model.vision_tower.register_forward_hook(lambda *_: looked.append(1))
    loss = module(*tensors(seen, torch.device("cpu"))).sum()
    loss.backward()
    assert looked == [1]
    text = pack.Rows(seen.input_ids, seen.flags)
    assert module(*tensors(text, torch.device("cpu"))).sum().item() == pytest.approx(loss.item(), rel=1e-6)
    tower = [p.grad for p in model.model.vision_tower.parameters()]
    assert all(grad is not None and not grad.any() for grad in tower)


def test_what_is_trained_follows_from_whether_rows_have_images(pictures: DemoPaths, tmp_path: Path) -> None:
    def trained(*overrides: str) -> set[str]:
        recipe = recipe_of(pictures, tmp_path, None, *overrides)
        model = load.build(load.load_config(pictures.base))
        adapt.adapt(model, recipe.model, torch.float32, torch.float32, images=recipe.data.images is not None)
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    everything = trained()
    assert {name.split(".")[1] for name in everything} == {"vision_tower", "multi_modal_projector", "language_model"}
    assert {name.split(".")[1] for name in trained("model.freeze=[vision_tower]")} == {
        "multi_modal_projector", "language_model"
    }  # fmt: skip
    excluded = ["*vision_tower*", "*vision*", "*visual*", "*audio*", "*image_encoder*", "*lm_head*"]  # NeMo's
    adapted = trained(f"model.adapter={{rank: 8, alpha: 32, exclude_modules: {json.dumps(excluded)}}}")
    assert adapted and all(".language_model.layers." in name and ".lora_" in name for name in adapted)


def test_an_attention_without_a_mask_for_images_is_refused(pictures: DemoPaths) -> None:
    config = load.load_config(pictures.base)
    with pytest.raises(ModelError, match=r"flash_attention_2.*tokens of an image[\s\S]*sdpa works"):
        attention.choose("flash_attention_2", "cuda", config, images=True)
    assert attention.choose("auto", "cuda", config, images=True).implementation == "sdpa"


# -------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("strategy", ["fsdp", "zero3"])
def test_two_workers_train_as_one_does(pictures: DemoPaths, tmp_path: Path, strategy: str) -> None:
    """In the first step, one of the two has no image."""
    words = tmp_path / "words.jsonl"
    words.write_text(
        "".join(json.dumps({"messages": [{"role": "user", "content": f"shape {n}"}, ANSWER]}) + "\n" for n in range(2))
    )
    sources = [{"path": str(words), "format": "messages"}, {"path": pictures.train[2], "format": "image_question"}]
    common = (
        "data.packing=false",
        "data.shuffle=false",
        "train.max_steps=3",
        "train.micro_batch=1",
        "train.gradient_checkpointing=true",
    )
    alone = recipe_of(pictures, tmp_path / "one", sources, *common)
    prepared = prepare(alone, "train", pictures.base, in_process)
    _, expected = run_job(0, 1, Job(alone, prepared, None))
    two = recipe_of(pictures, tmp_path / "two", sources, *common, f"train.strategy={strategy}", "train.workers=2")
    (_, found), _ = run(2, run_job, Job(two, prepared, None))
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], rel=2e-4)
    assert found[0]["grad_norm"] == pytest.approx(expected[0]["grad_norm"], rel=1e-3)


def test_a_tiny_model_learns_to_see(pictures: DemoPaths, tmp_path: Path) -> None:
    """Colours alone, in seconds: the loss of rows whose question never tells falls below what guessing gives."""
    colours = {"red": (210, 40, 40), "green": (40, 160, 60), "blue": (50, 70, 210), "yellow": (225, 190, 30)}
    rng = np.random.default_rng(0)
    rows = []
    for number in range(96):
        name, value = list(colours.items())[number % 4]
        shade = tuple(int(v) for v in np.clip(np.array(value) + rng.integers(-20, 20, 3), 0, 255))
        rows.append({"image": {"bytes": png(shade, (32, 32)), "path": None}, "question": "colour?", "answer": name})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    source = {"path": str(tmp_path / "rows.parquet"), "format": "image_question"}
    recipe = recipe_of(
        pictures, tmp_path / "runs", [source], "train.max_steps=30", "train.optimizer.lr=3e-3", "train.global_batch=8",
        "train.micro_batch=8",
    )  # fmt: skip
    prepared = prepare(recipe, "train", pictures.base, in_process)
    _, found = run_job(0, 1, Job(recipe, prepared, None))
    # Two targets a row, the colour and the end of the turn: guessing among four gives ln 4 ÷ 2 = 0.69.
    assert found[-1]["loss"] < 0.35


def test_what_training_will_see_shows_one_token_of_an_image(of_messages: Messages, pictures: DemoPaths) -> None:
    order = Order.once(of_messages(asking(png(), "Which shape is it?"), more=("data.packing=false",)))
    (text,) = inspect._examples(order, load_tokenizer(pictures.base), 1, [], coloured=False)
    seen = "<start_of_image><image_soft_token><end_of_image>⏎⏎Which shape is it?<end_of_turn>⏎<start_of_turn>model⏎⟦two"
    assert seen in str(text)
