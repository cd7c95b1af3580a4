"""The checks of the gate, in the order in which they are made: what is cheap and explains most comes first."""

from __future__ import annotations

from ray_ft.export.case import Case
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
from ray_ft.export.checks.text import chat_template, images, stop_ids, text_tokens
from ray_ft.export.gate import Check

#: Of a whole model; `images` besides, where it was trained on some.
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

#: Of a classifier, which has no words to end, to render or to tie, and which vLLM does not serve here. `text_tokens` is
#: for it what `chat_template` is for others.
LABELS: tuple[Check, ...] = (
    base,
    keys,
    shapes,
    dtype,
    finite,
    config,
    text_tokens,
    weights_changed,
    weights_trained,
    logits_transformers,
)


def wanted(case: Case) -> tuple[Check, ...]:
    """The checks for one export."""
    if case.kind == "adapter":
        return ADAPTER
    adapted = case.trained.recipe.model.adapter is not None
    if case.trained.labels:
        at = LABELS.index(weights_changed)
        return (*LABELS[:at], adapter_effect, *LABELS[at:]) if adapted else LABELS
    checks = MERGED if adapted else MODEL
    return (images, *checks) if case.trained.recipe.data.images else checks
