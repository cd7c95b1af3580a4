"""What turns text into tokens and ends an answer: chat template, tokenizer and stop ids."""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image
from transformers import AutoTokenizer

from ray_ft import paths
from ray_ft.data import pack, sources
from ray_ft.data.formats import columns_used
from ray_ft.data.images import ImageReader
from ray_ft.data.lines import Reject
from ray_ft.data.order import Order
from ray_ft.data.render import Renderer, Tokens, load_tokenizer
from ray_ft.data.rows import to_sample
from ray_ft.data.samples import Asked, Conversation, Joined, Labelled, Pair, Sample, preferred
from ray_ft.data.vision import Vision, load_vision
from ray_ft.errors import DataError, ExportError, StorageError
from ray_ft.export.case import Case
from ray_ft.export.gate import check
from ray_ft.trained import Trained

ROWS = 16  # of each source that are rendered, at most
PACKED_ROWS = 4  # that are, where the raw data is gone


def stop_ids_of(base: str) -> list[int]:
    """Tokens that end an answer: those of the folder's generation_config.json, and the chat template's."""
    return sorted({*_listed(base), *Renderer(load_tokenizer(base)).stop_ids()})


def _listed(folder: str) -> list[int]:
    generation = os.path.join(folder, "generation_config.json")
    known = paths.read_json(generation).get("eos_token_id") if os.path.exists(generation) else None
    return known if isinstance(known, list) else [] if known is None else [known]


@check("stop_ids")
def stop_ids(case: Case) -> dict[str, Any]:
    """The exported generation_config.json keeps the base's stop ids and the template's end of turn."""
    expected, found = stop_ids_of(case.trained.base), _listed(case.folder)
    if lost := [token for token in expected if token not in found]:
        raise ExportError(
            f"generation_config.json has eos_token_id {found} and lacks {', '.join(map(str, lost))}, without which "
            "answers would not end where they were trained to",
            [f"eos_token_id is to hold {expected}: check generation_config.json of {case.trained.base}"],
        )
    return {"stop_token_ids": found}


@check("images")
def images(case: Case) -> dict[str, Any]:
    """The exported folder makes the same tokens and pixels of an image as the base did in training."""
    trained, exported = (load_vision(folder, _tokenizer(folder)) for folder in (case.trained.base, case.folder))
    if trained.tokens != exported.tokens or trained.token_id != exported.token_id:
        raise ExportError(
            "the exported folder puts other tokens in place of an image than training did",
            [f"its tokenizer_config.json and processor_config.json are to be those of {case.trained.base}"],
        )
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)).save(file, "PNG")
    pixels = [one.pixels([file.getvalue()]) for one in (trained, exported)]
    if not np.array_equal(pixels[0], pixels[1]):
        raise ExportError(
            "the exported folder scales images otherwise than training did",
            [f"its preprocessor_config.json and processor_config.json are to be those of {case.trained.base}"],
        )
    return {"tokens": int(case.trained.image_tokens), "shape": list(pixels[0].shape[1:])}


@check("chat_template")
def chat_template(case: Case) -> dict[str, Any]:
    """Real rows give the same text and the same token ids by the exported folder as by the base in training."""
    trained, exported = (
        Renderer(tokenizer, vision=_vision(case, folder, tokenizer))
        for folder, tokenizer in (
            (case.trained.base, load_tokenizer(case.trained.base)),
            (case.folder, _tokenizer(case.folder)),
        )
    )
    origin, samples = real_samples(case.trained)
    tokens = 0
    for sample, ours, theirs in zip(samples, trained.encode(samples), exported.encode(samples), strict=True):
        assert not isinstance(sample, Labelled)
        texts = [_text(renderer, sample) for renderer in (trained, exported)]
        if texts[0] != texts[1]:
            at = next((at for at, pair in enumerate(zip(*texts, strict=False)) if pair[0] != pair[1]), 0)
            raise ExportError(
                f"the exported chat template renders a row as …{texts[1][max(at - 20, 0) : at + 40]!r}, training saw "
                f"…{texts[0][max(at - 20, 0) : at + 40]!r}",
                [f"the folder's chat_template.jinja and tokenizer_config.json are to be those of {case.trained.base}"],
            )
        ids = [getattr(one, "ids", np.empty(0)) for one in (ours, theirs)]
        if not np.array_equal(ids[0], ids[1]):
            raise ExportError(
                f"the exported tokenizer makes {len(ids[1])} other tokens of a row than training saw ({len(ids[0])})",
                [f"the folder's tokenizer.json and tokenizer_config.json are to be those of {case.trained.base}"],
            )
        tokens += len(ids[0])
    return {"rows": len(samples), "tokens": tokens, "rows_from": origin}


@check("text_tokens")
def text_tokens(case: Case) -> dict[str, Any]:
    """Real rows give the same token ids by the exported folder's tokenizer, as it is called where labels are served, as
    training saw before their labels."""
    trained, exported = Renderer(load_tokenizer(case.trained.base)), _tokenizer(case.folder)
    origin, samples = real_samples(case.trained)
    tokens = 0
    for sample, ours in zip(samples, trained.encode(samples), strict=True):
        if not isinstance(sample, Labelled) or not isinstance(ours, Tokens):
            continue  # a row that training rejected
        theirs = exported(sample.text)["input_ids"]
        if ours.ids[:-1].tolist() != theirs:
            raise ExportError(
                f"the exported tokenizer makes {len(theirs)} other tokens of a row than training saw ({len(ours) - 1})",
                [f"the folder's tokenizer.json and tokenizer_config.json are to be those of {case.trained.base}"],
            )
        tokens += len(theirs)
    return {"rows": len(samples), "tokens": tokens, "rows_from": origin}


def _vision(case: Case, folder: str, tokenizer: Any) -> Vision | None:
    return load_vision(folder, tokenizer) if case.trained.recipe.data.images else None


def _tokenizer(folder: str) -> Any:
    # Not through `load_tokenizer`, which keeps what it loaded by the folder's name.
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ExportError(
            f"the exported tokenizer does not load: {str(error).splitlines()[0]}", ["export again"]
        ) from error
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _text(renderer: Renderer, sample: Asked | Pair) -> str:
    """With the prompt as it is asked for an answer: the two differ in what begins the assistant's turn."""
    import jinja2

    asked = preferred(sample)
    if isinstance(asked, Joined):
        return renderer.prompt_text(asked) + asked.answer
    render = renderer.tokenizer.apply_chat_template
    try:
        parts = [render(list(asked.turns), tokenize=False)]
        parts.append(render(list(asked.prompt), tokenize=False, add_generation_prompt=True))
        return "".join(map(str, parts))
    except (jinja2.TemplateError, TypeError, ValueError) as error:  # a row that training rejected; so must the export
        return f"refused: {error}"


def real_samples(trained: Trained) -> tuple[str, list[Sample]]:
    """(Where they are from, some samples that the run was trained on).

    Where the raw rows cannot be read any more, they are the texts of packed rows: what was asked, as one user turn, and
    what was trained, as its answer.
    """
    try:
        if samples := list(_raw(trained)):
            return "data.train", samples
    except (DataError, StorageError, OSError):
        pass  # gone, moved or changed since: the packed rows are what was trained on as well
    return "prepared rows", list(_packed(trained))


def _raw(trained: Trained) -> Iterator[Sample]:
    special = Renderer(load_tokenizer(trained.base)).special
    for number, source in enumerate(trained.recipe.data.train):
        rows = (
            (row, ImageReader.of(file, trained.recipe.data.images))
            for file in sources.find_files(source)
            for chunk in sources.chunks_of(file, number)
            for row in sources.read_rows(chunk, columns_used(source))
        )
        labels = trained.labels
        made = (
            to_sample(source, row.content, special, labels=labels, images=images)
            for row, images in rows
            if isinstance(row.content, dict)
        )
        yield from itertools.islice((one for one in made if not isinstance(one, Reject)), ROWS)


def _packed(trained: Trained) -> Iterator[Sample]:
    tokenizer = load_tokenizer(trained.base)
    prepared = trained.prepared("train")
    assert prepared is not None
    for part in Order.once(prepared).slices(0, PACKED_ROWS):
        rows = part.read(prepared)
        for ids, flags in zip(rows.input_ids, rows.flags, strict=True):
            real = (flags & pack.REAL) != 0
            for which in np.split(np.arange(len(ids)), np.flatnonzero(flags & pack.START)[1:]):
                trained_on = (flags[which] & pack.TRAINED) != 0
                if trained.labels and trained_on.any():
                    text = tokenizer.decode(ids[which][real[which] & ~trained_on], skip_special_tokens=True)
                    yield Labelled(text, int(ids[which][trained_on][0]))
                elif real[which].all() and trained_on.any():
                    asked, said = (
                        tokenizer.decode(ids[which][chosen], skip_special_tokens=True)
                        for chosen in (~trained_on, trained_on)
                    )
                    if tokenizer.chat_template:
                        yield Conversation(({"role": "user", "content": asked}, {"role": "assistant", "content": said}))
                    else:
                        yield Joined(asked, said)
