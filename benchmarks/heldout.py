"""What a model loses on held-out rows of the demo: one function for all sides of a comparison.

Limit: it knows nothing of packing or of how a side trains; each row stands alone in its line of a padded batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ray_ft import demo


def loss(model: Any, tokenizer: Any, rows: Sequence[Mapping[str, str]], size: int = 50) -> float:
    """Mean negative log-likelihood (nats) of the answers' tokens, the turn's end included; each row by itself."""
    total, targets = 0.0, 0
    for at in range(0, len(rows), size):
        samples = [_tokens(tokenizer, row) for row in rows[at : at + size]]
        width = max(len(ids) for ids, _ in samples)
        ids = torch.full((len(samples), width), tokenizer.pad_token_id)
        labels = torch.full((len(samples), width), -100)
        mask = torch.zeros((len(samples), width), dtype=torch.long)
        for row, (sample, answer) in enumerate(samples):
            ids[row, : len(sample)] = torch.tensor(sample)
            mask[row, : len(sample)] = 1
            labels[row, answer.start : answer.stop] = ids[row, answer.start : answer.stop]
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        wanted = labels[:, 1:]
        total += F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), wanted.flatten(), reduction="sum").item()
        targets += int((wanted != -100).sum())
    return total / targets


def _tokens(tokenizer: Any, row: Mapping[str, str]) -> tuple[list[int], range]:
    """A row as tokens, and which of them are its answer."""
    code = row["target_lang_code"]
    asked = demo.PROMPT.format(target_lang=demo.LANGUAGES[code], tgt_lang_code=code, text=row["source_text"])
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": row["target_text"]}]
    prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template(turns, tokenize=False).rstrip()  # a line break follows every turn
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, whole)]
    assert ids[1][: len(ids[0])] == ids[0]
    return ids[1], range(len(ids[0]), len(ids[1]))
