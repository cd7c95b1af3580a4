"""Pictures of shapes, with questions about them, and a Gemma 3 that sees.

Pictures are drawn by PIL and kept in three ways: as files that messages name, in messages as data: URLs, in Parquet.
Sizes, places, colours and grounds vary without end, so that no held-out picture is a training one, and a model that
answers has learnt to see. Limits: the model's tower is random too, so it has to be trained, where a published one is
best frozen; all shapes of a picture are alike.
"""

from __future__ import annotations

import base64
import io
import math
import random
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from ray_ft.demo import base
from ray_ft.demo.task import Part, Row, Task
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
HELDOUT = 240  # rows

MARKS = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
TEMPLATE = base.CHAT_TEMPLATE.replace(
    "{%- if item['type'] == 'text' -%}",
    "{%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}{%- elif item['type'] == 'text' -%}",
)
"""Gemma 3's, with its images."""


def draw(rows: int, seed: int) -> dict[str, Part]:
    """`rows` training rows and HELDOUT held-out ones, each with a picture of its own.

    Raises:
        DataError: there are too few rows.
    """
    if rows < 3:
        raise DataError(f"rows = {rows:,} is too few: at least one is in each file", ["give 3 or more"])
    each = list(islice(_rows(random.Random(seed)), rows + HELDOUT))
    return {"": Part(each[:rows], each[rows:], lambda row: [row["question"], row["answer"]], _stored)}


def _stored(row: Row, ending: str) -> tuple[Row, dict[str, bytes]]:
    """In Parquet with the file inside, as Hugging Face datasets keep it; else as messages, which name a file of their
    own, or, compressed, hold it."""
    content: bytes = row["image"]
    if ending == ".parquet":
        return {**row, "image": {"bytes": content, "path": None}}, {}
    name = f"pictures/{row['id']}.png"
    if ending == ".jsonl":
        part: dict[str, Any] = {"type": "image", "image": name}
        files = {name: content}
    else:
        url = f"data:image/png;base64,{base64.b64encode(content).decode()}"
        part, files = {"type": "image_url", "image_url": {"url": url}}, {}
    asked = {"role": "user", "content": [part, {"type": "text", "text": row["question"]}]}
    return {"id": row["id"], "messages": [asked, {"role": "assistant", "content": row["answer"]}]}, files


def _rows(rng: random.Random) -> Iterator[Row]:
    """Rows without end, no two of which show the same picture."""
    seen = set[bytes]()
    while True:
        count, shape, colour = rng.choice(COUNTS), rng.choice(SHAPES), rng.choice(list(COLOURS))
        question = rng.choice(QUESTIONS)
        buffer = io.BytesIO()
        picture(rng, COUNTS.index(count) + 1, shape, colour).save(buffer, "PNG")
        if buffer.getvalue() in seen:
            continue
        whole = f"{count} {colour} {shape if count == 'one' else PLURALS[shape]}"
        answer = dict(zip(QUESTIONS, (count, colour, shape, whole), strict=True))[question]
        yield {"id": f"{len(seen):06d}", "image": buffer.getvalue(), "question": question, "answer": answer}
        seen.add(buffer.getvalue())


def picture(rng: random.Random, count: int, shape: str, colour: str) -> Image:
    """A picture of some shapes of one kind and colour, each in a quarter of its own."""
    from PIL import Image, ImageDraw

    ground = tuple(rng.randrange(215, 256) for _ in range(3))
    drawn = Image.new("RGB", (SIZE, SIZE), ground)
    pen = ImageDraw.Draw(drawn)
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
    return drawn


def write_base(folder: str, texts: Iterable[str], seed: int, hidden_size: int, layers: int) -> None:
    """Write the model's folder, with its processor's settings; arguments as of `base.write_base`.

    Its tower is as wide as the language model, and has two layers.
    """
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3ImageProcessorPil,
        Gemma3Processor,
        SiglipVisionConfig,
    )

    tokenizer = base.make_tokenizer([*texts, *_words()], TEMPLATE, MARKS)
    tokenizer.add_tokens(["\n" * count for count in range(1, 5)])  # as Gemma has them, and vLLM looks for them
    width = hidden_size
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in MARKS.items()}
    config = Gemma3Config(
        text_config=base.text_config(tokenizer, width, layers, sliding_window=64).to_dict(),
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
    base.write_model(folder, Gemma3ForConditionalGeneration, config, tokenizer, seed, _published)
    processor = Gemma3ImageProcessorPil(size={"height": SIZE, "width": SIZE})
    Gemma3Processor(processor, tokenizer, chat_template=TEMPLATE, image_seq_length=TOKENS).save_pretrained(folder)


def _words() -> list[str]:
    """All of the task, often enough to be tokens, since few rows may lack some."""
    bare = [*COUNTS, *SHAPES, *COLOURS, "user", "model"]  # the first of an answer has no space before it
    phrases = [
        f"{count} {colour} {shape} {PLURALS[shape]} {count} {colour} {shape}"
        for count in COUNTS
        for colour in COLOURS
        for shape in SHAPES
    ]
    return [*QUESTIONS * 20, *phrases * 4, *bare * 40]


def _published(name: str) -> str:
    name = name.removeprefix("model.")
    name = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    return name.replace("language_model.", "language_model.model.", 1)


TASK = Task("pictures of shapes, to be asked about", 6_000, draw, write_base=write_base, layers=2)
