"""The quickstart's model and data: number words from English into French and Spanish, made here, without a network.

`write_demo` writes a folder that is a small copy of the real situation: training rows in several files and formats,
held-out rows, pairs of answers of which one is preferred, and a Hugging Face folder with a Gemma 3 and its tokenizer,
drawn from a seed. The task is real, since no held-out number is in the training rows, yet two cores learn it in about a
minute. Limits: the base's weights are random, so it answers nothing before training; its tokenizer saw nothing but this
task (other text falls into bytes); the words are num2words' own, which inflects less than people do ("veintiuno mil").
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ray_ft import paths
from ray_ft.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LANGUAGES = {"fr": "French", "es": "Spanish"}
"""Target languages: code → name. The source is English."""

PROMPT = "Translate to {target_lang} ({tgt_lang_code}): {text}"
"""Prompt template of the quickstart's recipe; the tokenizer learns its words too."""
SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
"""In order of their ids; pad, eos and bos have the ids that they have in Gemma 3."""

MARKER = "demo.json"
FORMAT = 2  # of the folder's content; raised whenever the same settings would give something else
LARGEST, SMALL, SMALL_SHARE = 99_999, 1_000, 0.15  # share of numbers below 1,000, which people type first
HELDOUT = 150  # numbers, each asked in every language
PAIRS = 1_500  # of answers, at most, to train preferences on
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
        preferences: folder with pairs of answers to some of the same questions, in train.jsonl and heldout.jsonl.
        reused: all of it was there already, from the same settings.
    """

    folder: str
    base: str
    train: tuple[str, ...]
    heldout: str
    reused: bool = False

    @property
    def preferences(self) -> str:
        return paths.join(self.folder, "preferences")


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
    marker = paths.join(root, MARKER)
    settings = {"format": FORMAT, "seed": seed, "rows": rows, "hidden_size": hidden_size, "layers": layers}
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    if paths.exists(marker):
        found = paths.read_json(marker)
        complete = found["files"] and all(paths.exists(paths.join(root, name)) for name in found["files"])
        if complete and found["key"] == key:
            return replace(demo, reused=True)
    elif paths.list_dir(root):
        raise DataError(f"{folder!r} holds files, but no {MARKER}: it is no demo", ["name another folder"])

    train, heldout = _rows(rows, seed)
    # Named before anything is written, so that an interrupted call leaves a folder that the next one may replace.
    paths.write_json(marker, {"key": key, "settings": settings, "files": []})
    for i, file in enumerate(files):
        _write_rows(file, train[i :: len(files)])
    _write_rows(demo.heldout, heldout)
    for name, some in (("train.jsonl", train), ("heldout.jsonl", heldout)):
        _write_rows(paths.join(demo.preferences, name), _preferences(some)[:PAIRS])
    _write_base(demo.base, train, seed, hidden_size, layers)
    made = [paths.join(folder, name) for folder in (demo.preferences, demo.base) for name in paths.list_dir(folder)]
    written = [*files, demo.heldout, *made]
    paths.write_json(marker, {"key": key, "settings": settings, "files": [os.path.relpath(n, root) for n in written]})
    return demo


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


def _preferences(rows: Iterable[Row]) -> list[Row]:
    """Swiss French preferred to France's, where a number differs: nonante-deux, not quatre-vingt-douze."""
    from num2words import num2words

    found = []
    for row in rows:
        number, code = row["id"].split("-")
        if code == "fr" and (swiss := num2words(int(number), lang="fr_CH")) != row["target_text"]:
            prompt = PROMPT.format(target_lang=LANGUAGES[code], tgt_lang_code=code, text=row["source_text"])
            found.append({"prompt": prompt, "chosen": swiss, "rejected": row["target_text"]})
    return found


def _write_rows(file: str, rows: Sequence[Row]) -> None:
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
    import torch
    from safetensors.torch import save_file
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GenerationConfig

    tokenizer = _tokenizer(train)
    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")],
    }
    config = Gemma3TextConfig(
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
        **special,
        dtype=torch.float32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Gemma3ForCausalLM(config)
    # Not save_pretrained: it draws a bar, and imports DeepSpeed wherever that is installed.
    weights = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
    os.makedirs(folder, exist_ok=True)
    save_file(weights, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    GenerationConfig(**special).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer(train: Sequence[Row]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the training texts and prompts: every word of the task one token, any text representable."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    corpus = []
    for row in train:
        code = row["target_lang_code"]
        prompt = PROMPT.format(target_lang=LANGUAGES[code], tgt_lang_code=code, text=row["source_text"])
        corpus += [prompt, row["target_text"], "user", "model"]  # the roles as often as the template writes them
    trainer = trainers.BpeTrainer(
        vocab_size=960,  # at most: about 620 make every word one token
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    # Adds <bos> to plain text, as Gemma 3's does: rendered conversations have theirs and need add_special_tokens=False.
    bpe.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", bpe.token_to_id("<bos>"))])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        **{f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")},
        extra_special_tokens=["<start_of_turn>", "<end_of_turn>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
