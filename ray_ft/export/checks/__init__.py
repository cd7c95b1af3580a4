"""The checks of the gate, in the order in which they are made: what is cheap and explains most comes first."""

from __future__ import annotations

from ray_ft.export.checks.answers import adapter_effect, logits_transformers, logits_vllm
from ray_ft.export.checks.files import (
    base,
    config,
    dtype,
    finite,
    keys,
    shapes,
    tied_head,
    weights_changed,
    weights_trained,
)
from ray_ft.export.checks.text import chat_template, stop_ids
from ray_ft.export.gate import Check

#: Of a whole model; `text.images` besides, where it was trained on some.
MODEL: tuple[Check, ...] = (
    base,
    keys,
    shapes,
    dtype,
    finite,
    tied_head,
    config,
    stop_ids,
    chat_template,
    weights_changed,
    weights_trained,
    logits_transformers,
    logits_vllm,
)

#: Of a whole model with an adapter merged into it. An adapter of zeros would also leave the weights unchanged; that it
#: is the adapter says more.
MERGED: tuple[Check, ...] = (
    *MODEL[: MODEL.index(weights_changed)],
    adapter_effect,
    *MODEL[MODEL.index(weights_changed) :],
)

#: Of an adapter alone.
ADAPTER: tuple[Check, ...] = (
    base,
    keys,
    shapes,
    dtype,
    finite,
    adapter_effect,
    weights_trained,
    logits_transformers,
    logits_vllm,
)
