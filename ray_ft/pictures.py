"""The vision quickstart's model and data: pictures of shapes, with questions about them, made here without a network.

As `demo`, for a Gemma 3 with a vision tower: pictures drawn by PIL, once as Parquet with the files inside and once as
JSON lines of messages that name files, and a Hugging Face folder with a tiny model, its tokenizer and its image
processor, drawn from a seed. Sizes, places, colours and grounds vary without end, so that no held-out picture is a
training one, and a model that answers has learnt to see. Limits: the tower is random too, so it has to be trained,
where a published one is best frozen; all shapes of a picture are alike.
"""

from __future__ import annotations

import io
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ray_ft import demo, paths
from ray_ft.demo import DemoPaths
from ray_ft.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

SIZE = 64  # pixels of a side
PATCH, TOKENS = 8, 16  # of the tower: pixels of a patch's side, and soft tokens of an image
COUNTS = ("one", "two", "three", "four")
SHAPES = ("circle", "cross", "triangle")
PLURALS = {"circle": "circles", "cross": "crosses", "triangle": "triangles"}
COLOURS = {"red": (210, 40, 40), "green": (40, 160, 60), "blue": (50, 70, 210), "yellow": (225, 190, 30)}
QUESTIONS = ("How many shapes are there?", "What colour are they?", "Which shape is it?", "What is in the picture?")
HELDOUT = 240
FORMAT = 1  # of the folder's content

MARKS = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
TEMPLATE = demo.CHAT_TEMPLATE.replace(
    "{%- if item['type'] == 'text' -%}",
    "{%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}{%- elif item['type'] == 'text' -%}",
)
"""Gemma 3's, with its images."""


def write_pictures(folder: str = "demo-pictures", seed: int = 0, *, rows: int = 6_000) -> DemoPaths:
    """Write the pictures, or reuse what an earlier call with the same settings left in `folder`.

    Args:
        folder: as of `demo.write_demo`.
        rows: training rows; a sixth of them are messages that name files, the others are in Parquet.

    Raises:
        DataError: the folder holds something that is no demo, or is remote; or there are too few rows.
    """
    if paths.is_uri(folder):
        raise DataError(f"the demo cannot be written to {folder!r}", ["name a local folder"])
    if rows < 6:
        raise DataError(f"rows = {rows} is too few for both files", ["give at least 6"])
    root = paths.absolute(folder)
    files = tuple(paths.join(root, "train", name) for name in ("part-0.parquet", "part-1.jsonl"))
    made = DemoPaths(root, paths.join(root, "base"), files, paths.join(root, "heldout.parquet"))
    settings = {"pictures": FORMAT, "seed": seed, "rows": rows}
    if demo.is_there(root, demo.key_of(settings)):
        return replace(made, reused=True)
    demo.begin(root, settings)
    drawn = _rows(random.Random(seed))
    heldout = [next(drawn) for _ in range(HELDOUT)]
    train = [next(drawn) for _ in range(rows)]
    inside, named = train[rows // 6 :], train[: rows // 6]
    demo.write_rows(made.heldout, [_inside(row) for row in heldout])
    demo.write_rows(files[0], [_inside(row) for row in inside])
    pictures = paths.join(root, "train", "pictures")
    for number, row in enumerate(named):
        paths.write_bytes(paths.join(pictures, f"{number:05d}.png"), row["image"])
    demo.write_rows(files[1], [_messages(row, f"pictures/{number:05d}.png") for number, row in enumerate(named)])
    _write_base(made.base, seed)
    demo.finish(root, settings, [*files, pictures, made.heldout, made.base])
    return made


def _inside(row: dict[str, Any]) -> dict[str, Any]:
    """With the file inside, as Hugging Face datasets keep it."""
    return {**row, "image": {"bytes": row["image"], "path": None}}


def _messages(row: dict[str, Any], path: str) -> dict[str, Any]:
    content = [{"type": "image", "image": path}, {"type": "text", "text": row["question"]}]
    answer = {"role": "assistant", "content": row["answer"]}
    return {"id": row["id"], "messages": [{"role": "user", "content": content}, answer]}


def _rows(rng: random.Random) -> Iterator[dict[str, Any]]:
    """Rows without end, no two of which show the same picture."""
    seen = set()
    number = 0
    while True:
        count, shape, colour = rng.choice(COUNTS), rng.choice(SHAPES), rng.choice(list(COLOURS))
        question = rng.choice(QUESTIONS)
        buffer = io.BytesIO()
        draw(rng, COUNTS.index(count) + 1, shape, colour).save(buffer, "PNG")
        if buffer.getvalue() in seen:
            continue
        seen.add(buffer.getvalue())
        whole = f"{count} {colour} {shape if count == 'one' else PLURALS[shape]}"
        answer = dict(zip(QUESTIONS, (count, colour, shape, whole), strict=True))[question]
        yield {"id": f"{number:06d}", "image": buffer.getvalue(), "question": question, "answer": answer}
        number += 1


def draw(rng: random.Random, count: int, shape: str, colour: str) -> Image:
    """A picture of some shapes of one kind and colour, each in a quarter of its own."""
    from PIL import Image, ImageDraw

    ground = tuple(rng.randrange(215, 256) for _ in range(3))
    picture = Image.new("RGB", (SIZE, SIZE), ground)
    pen = ImageDraw.Draw(picture)
    half = SIZE // 2
    for quarter in rng.sample(range(4), count):
        radius = rng.uniform(10, 14)
        x, y = (half * at + rng.uniform(radius + 1, half - radius - 1) for at in divmod(quarter, 2))
        fill = tuple(min(max(value + rng.randrange(-20, 21), 0), 255) for value in COLOURS[colour])
        if shape == "circle":
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        elif shape == "cross":
            arm = radius / 3
            pen.rectangle((x - radius, y - arm, x + radius, y + arm), fill=fill)
            pen.rectangle((x - arm, y - radius, x + arm, y + radius), fill=fill)
        else:
            turns = (-1 / 4, 1 / 12, 5 / 12)  # of its corners, up first
            pen.polygon(
                [(x + radius * math.cos(math.tau * t), y + radius * math.sin(math.tau * t)) for t in turns], fill
            )
    return picture


def _published(name: str) -> str:
    name = name.removeprefix("model.")
    name = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    return name.replace("language_model.", "language_model.model.", 1)


def _write_base(folder: str, seed: int) -> None:
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3ImageProcessorPil,
        Gemma3Processor,
        SiglipVisionConfig,
    )

    words = [
        f"{count} {colour} {shape} {PLURALS[shape]} {count} {colour} {shape}"
        for count in COUNTS
        for colour in COLOURS
        for shape in SHAPES
    ]
    bare = [*COUNTS, *SHAPES, *COLOURS, "user", "model"]  # the first of an answer has no space before it
    tokenizer = demo.make_tokenizer([*QUESTIONS * 20, *words * 4, *bare * 40], TEMPLATE, MARKS)
    tokenizer.add_tokens(["\n" * count for count in range(1, 5)])  # as Gemma has them, and vLLM looks for them
    width = 128
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in MARKS.items()}
    config = Gemma3Config(
        text_config=demo.text_config(tokenizer, width, 2, sliding_window=64).to_dict(),
        vision_config=SiglipVisionConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=SIZE,
            patch_size=PATCH,
            vision_use_head=False,  # as Gemma 3 is published
        ).to_dict(),
        mm_tokens_per_image=TOKENS,
        boi_token_index=ids["boi_token"],
        eoi_token_index=ids["eoi_token"],
        image_token_index=ids["image_token"],
        initializer_range=width**-0.5 / 2,
        tie_word_embeddings=True,
    )
    demo.write_model(folder, Gemma3ForConditionalGeneration, config, tokenizer, seed, _published)
    processor = Gemma3ImageProcessorPil(size={"height": SIZE, "width": SIZE})
    Gemma3Processor(processor, tokenizer, chat_template=TEMPLATE, image_seq_length=TOKENS).save_pretrained(folder)
