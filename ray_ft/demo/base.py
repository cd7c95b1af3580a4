"""A tiny Gemma 3 with random weights, and a tokenizer that knows the words of its task."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import Gemma3TextConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
"""In order of their ids; pad, eos and bos have the ids that they have in Gemma 3."""
TURNS = {"sot_token": "<start_of_turn>", "eot_token": "<end_of_turn>"}

HEADS, HEAD_DIM = 4, 32  # 32 is the smallest head that vLLM's CPU attention takes

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


def write_base(folder: str, texts: Iterable[str], seed: int, hidden_size: int, layers: int) -> None:
    """Write the model's folder.

    Args:
        texts: what the tokenizer learns its words from.
        seed: of the weights.
        hidden_size: its width.
        layers: with sliding-window and with full attention in turn.
    """
    from transformers import Gemma3ForCausalLM

    tokenizer = make_tokenizer(texts)
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
    texts: Iterable[str], template: str = CHAT_TEMPLATE, marks: Mapping[str, str] | None = None
) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every frequent word of the texts one token, every digit one, any text representable.

    Args:
        marks: further special tokens by the names that transformers has for them, such as ``boi_token``.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    # Digits one by one, as Gemma's tokenizer has them.
    words = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    bpe.pre_tokenizer = pre_tokenizers.Sequence(words)
    bpe.decoder = decoders.ByteLevel()
    corpus = []
    for text in texts:
        corpus += [text, "user", "model"]  # the roles at least as often as the template writes them
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
