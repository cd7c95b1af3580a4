"""The quickstart's model and data: number words from English into French and Spanish, made here, without a network.

`write_demo` writes a folder that is a small copy of the real situation: training rows in several files and formats,
held-out rows, and a Hugging Face folder with a Gemma 3 and its tokenizer, drawn from a seed. The task is real, since no
held-out number is in the training rows, yet two cores learn it in about a minute. Limits: the base's weights are
random, so it answers nothing before training; its tokenizer saw nothing but this task (other text falls into bytes);
the words are num2words' own, which inflects less than people do ("veintiuno mil").
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ray_ft import paths
from ray_ft.errors import DataError

if TYPE_CHECKING:
    from transformers import Gemma3TextConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

LANGUAGES = {"fr": "French", "es": "Spanish"}
"""Target languages: code → name. The source is English."""

PROMPT = "Translate to {target_lang} ({tgt_lang_code}): {text}"
"""Prompt template of the quickstart's recipe; the tokenizer learns its words too."""
SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
"""In order of their ids; pad, eos and bos have the ids that they have in Gemma 3."""
TURNS = {"sot_token": "<start_of_turn>", "eot_token": "<end_of_turn>"}

MARKER = "demo.json"
FORMAT = 1  # of the folder's content; raised whenever the same settings would give something else
LARGEST, SMALL, SMALL_SHARE = 99_999, 1_000, 0.15  # share of numbers below 1,000, which people type first
HELDOUT = 150  # numbers, each asked in every language
HEADS, HEAD_DIM = 4, 32  # 32 is the smallest head that vLLM's CPU attention takes
Row = dict[str, str]

CHAT_TEMPLATE = r"""{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set system = messages[0]['content'] -%}
    {%- set first_user_prefix = (system if system is string else system[0]['text']) + '\n\n' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = '' -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else '') }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- else -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}
"""
"""Gemma 3's, less its images."""


@dataclass(frozen=True)
class DemoPaths:
    """What `write_demo` made.

    Attributes:
        folder: the folder that holds everything below.
        base: Hugging Face folder of the untrained model and its tokenizer.
        train: files of training rows: JSONL, gzipped JSONL, Parquet.
        heldout: Parquet file of held-out rows.
        reused: all of it was there already, from the same settings.
    """

    folder: str
    base: str
    train: tuple[str, ...]
    heldout: str
    reused: bool = False


def write_demo(
    folder: str = "demo", seed: int = 0, *, rows: int = 12_000, hidden_size: int = 128, layers: int = 4
) -> DemoPaths:
    """Write the demo, or reuse what an earlier call with the same settings left in `folder`.

    Args:
        folder: a local folder, created where missing. An earlier demo in it is replaced; anything else is refused.
        seed: of the numbers drawn, the order of the rows and the base's weights.
        rows: training rows, as many into each language.
        hidden_size: width of the base.
        layers: layers of the base, with sliding-window and with full attention in turn.

    Raises:
        DataError: the folder holds something that is no demo, or is remote; or there are not that many rows.
    """
    if paths.is_uri(folder):
        raise DataError(f"the demo cannot be written to {folder!r}", ["name a local folder"])
    root = paths.absolute(folder)
    files = tuple(paths.join(root, "train", name) for name in ("part-0.jsonl", "part-1.jsonl.gz", "part-2.parquet"))
    demo = DemoPaths(root, paths.join(root, "base"), files, paths.join(root, "heldout.parquet"))
    settings = {"format": FORMAT, "seed": seed, "rows": rows, "hidden_size": hidden_size, "layers": layers}
    key = key_of(settings)
    if is_there(root, key):
        return replace(demo, reused=True)
    train, heldout = _rows(rows, seed)
    begin(root, settings)
    for i, file in enumerate(files):
        write_rows(file, train[i :: len(files)])
    write_rows(demo.heldout, heldout)
    _write_base(demo.base, train, seed, hidden_size, layers)
    finish(root, settings, [*files, demo.heldout, demo.base])
    return demo


def key_of(settings: Mapping[str, Any]) -> str:
    """What tells a folder made with these settings from others."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def is_there(root: str, key: str) -> bool:
    """Whether a folder holds the whole demo of this key.

    Raises:
        DataError: it holds something that is no demo.
    """
    marker = paths.join(root, MARKER)
    if paths.exists(marker):
        found = paths.read_json(marker)
        complete = found["files"] and all(paths.exists(paths.join(root, name)) for name in found["files"])
        return bool(complete and found["key"] == key)
    if paths.list_dir(root):
        raise DataError(f"{root!r} holds files, but no {MARKER}: it is no demo", ["name another folder"])
    return False


def begin(root: str, settings: Mapping[str, Any]) -> None:
    """Name the folder a demo before anything is written, so that the next call may replace what an interrupted one
    left."""
    paths.write_json(paths.join(root, MARKER), {"key": key_of(settings), "settings": settings, "files": []})


def finish(root: str, settings: Mapping[str, Any], written: Sequence[str]) -> None:
    """Say that the demo is whole: `written` are its files and folders of files."""
    files = [
        os.path.relpath(found, root)
        for one in written
        for found in ([paths.join(one, name) for name in paths.list_dir(one)] if os.path.isdir(one) else [one])
    ]
    paths.write_json(paths.join(root, MARKER), {"key": key_of(settings), "settings": settings, "files": files})


def _rows(rows: int, seed: int) -> tuple[list[Row], list[Row]]:
    """`rows` training rows and HELDOUT × languages held-out ones; a held-out number is in no training row."""
    rng = random.Random(seed)
    small, large = (rng.sample(numbers, len(numbers)) for numbers in (range(SMALL), range(SMALL, LARGEST + 1)))

    def draw(count: int) -> Iterable[Row]:
        few = min(round(count * SMALL_SHARE), len(small))
        for number in [small.pop() for _ in range(few)] + [large.pop() for _ in range(count - few)]:
            yield from _translations(number)

    heldout = list(draw(HELDOUT))
    most = len(LANGUAGES) * (len(small) + len(large))
    if not 3 <= rows <= most:  # at least one in each file
        raise DataError(f"rows = {rows:,} is not between 3 and {most:,}, all that numbers up to {LARGEST:,} give")
    train = list(draw(-(-rows // len(LANGUAGES))))[:rows]
    rng.shuffle(train)
    rng.shuffle(heldout)  # so that its first rows stand for the rest
    return train, heldout


def _translations(number: int) -> Iterable[Row]:
    from num2words import num2words

    for code in LANGUAGES:
        yield {
            "id": f"{number}-{code}",
            "source_text": num2words(number, lang="en"),
            "target_text": num2words(number, lang=code),
            "source_lang_code": "en",
            "target_lang_code": code,
        }


def write_rows(file: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows in the format that the file's name tells; the same rows give the same bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if file.endswith(".parquet"):
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(list(rows)), sink)
        content = sink.getvalue().to_pybytes()
    else:
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8")
        content = gzip.compress(content, mtime=0) if file.endswith(".gz") else content
    paths.write_bytes(file, content)


def _write_base(folder: str, train: Sequence[Row], seed: int, hidden_size: int, layers: int) -> None:
    from transformers import Gemma3ForCausalLM

    corpus = []
    for row in train:
        code = row["target_lang_code"]
        prompt = PROMPT.format(target_lang=LANGUAGES[code], tgt_lang_code=code, text=row["source_text"])
        corpus += [prompt, row["target_text"], "user", "model"]  # the roles as often as the template writes them
    tokenizer = make_tokenizer(corpus)
    write_model(folder, Gemma3ForCausalLM, text_config(tokenizer, hidden_size, layers), tokenizer, seed)


def text_config(tokenizer: PreTrainedTokenizerFast, hidden_size: int, layers: int, **more: Any) -> Gemma3TextConfig:
    """Of a small language model; `more` replaces settings."""
    import torch
    from transformers import Gemma3TextConfig

    settings: dict[str, Any] = dict(
        vocab_size=-(-len(tokenizer) // 64) * 64,  # rows beyond the tokenizer's, as Gemma 3 has them too
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        layer_types=[("sliding_attention", "full_attention")[i % 2] for i in range(layers)],
        sliding_window=32,  # shorter than a conversation here, so that a layer of the wrong type changes the answers
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        head_dim=HEAD_DIM,
        query_pre_attn_scalar=48,  # not head_dim, as in Gemma 3 27B
        max_position_embeddings=2048,
        initializer_range=hidden_size**-0.5 / 2,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
        },
        tie_word_embeddings=True,
        **_special(tokenizer),
        dtype=torch.float32,
    )
    return Gemma3TextConfig(**{**settings, **more})


def _special(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")],
    }


def write_model(
    folder: str,
    kind: type[PreTrainedModel],
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    published: Callable[[str], str] = str,
) -> None:
    """Write a Hugging Face folder of a model of this class whose weights are drawn from the seed.

    Args:
        published: name in memory → name in published checkpoints, for which other readers look.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config)
        for part in filter(lambda part: hasattr(part, "mm_input_projection_weight"), model.modules()):
            # transformers begins with zeros, which a norm then divides by their length.
            part.mm_input_projection_weight.data.normal_(std=part.mm_input_projection_weight.shape[0] ** -0.5)
    # Not save_pretrained: it draws a bar, and imports DeepSpeed wherever that is installed.
    tied = model.all_tied_weights_keys
    weights = {published(name): tensor for name, tensor in model.state_dict().items() if name not in tied}
    os.makedirs(folder, exist_ok=True)
    save_file(weights, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    GenerationConfig(**_special(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_tokenizer(
    corpus: Sequence[str], template: str = CHAT_TEMPLATE, marks: Mapping[str, str] | None = None
) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the training texts and prompts: every word of the task one token, any text representable.

    Args:
        marks: further special tokens by the names that transformers has for them, such as ``boi_token``.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=960,  # at most: about 620 make every word one token
        special_tokens=[*SPECIAL_TOKENS, *(marks or {}).values()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    # Adds <bos> to plain text, as Gemma 3's does: rendered conversations have theirs and need add_special_tokens=False.
    bpe.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", bpe.token_to_id("<bos>"))])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        **{f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")},
        extra_special_tokens={**TURNS, **marks} if marks else list(TURNS.values()),
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )
