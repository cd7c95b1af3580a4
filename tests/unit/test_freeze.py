"""Freezing by parts and patterns: what is named is frozen, what is misspelt is refused."""

from __future__ import annotations

from typing import Any

import pytest
import tiny

from ray_ft.errors import ModelError
from ray_ft.model.freeze import freeze, unreachable


def trained(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_parts_of_a_vision_language_model() -> None:
    names = set(dict(tiny.meta("gemma3").named_parameters()))
    vision = {name for name in names if ".vision_tower." in name}
    projector = {name for name in names if "multi_modal_projector" in name}
    assert vision and projector
    for part, expected in {
        "vision_tower": vision,
        "input_embeddings": {"model.language_model.embed_tokens.weight"},
        "output_embeddings": {"model.language_model.embed_tokens.weight"},  # tied
        "language_model": names - vision - projector,
    }.items():
        model = tiny.meta("gemma3")
        assert freeze(model, [part], []) == expected, part
        assert trained(model) == names - expected
    assert set(unreachable(tiny.meta("gemma3"))) == vision | projector


def test_an_untied_head_is_a_part_of_its_own() -> None:
    model = tiny.meta("llama")
    assert freeze(model, ["output_embeddings"], []) == {"lm_head.weight"}
    assert freeze(tiny.meta("llama"), ["input_embeddings"], []) == {"model.embed_tokens.weight"}
    assert unreachable(model) == []


def test_patterns_match_whole_names_and_unfreeze_wins() -> None:
    model = tiny.meta("llama")
    frozen = freeze(model, ["*.layers.0.*", "*norm*"], ["*.layers.0.mlp.*", "model.norm.weight"])
    assert all(".layers.0.self_attn" in name or "norm" in name for name in frozen)
    assert {name for name in trained(model) if ".layers.0." in name} == {
        f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")
    }
    assert "model.norm.weight" not in frozen and "model.layers.1.input_layernorm.weight" in frozen


@pytest.mark.parametrize(
    ("frozen", "free", "said"),
    [
        (["*embed_token"], [], r"model\.freeze pattern '\*embed_token' matches no parameter"),
        (["vision_tower"], [], "names vision_tower, and a Gemma3ForCausalLM has none"),
        ([], ["*lora*"], r"model\.unfreeze pattern '\*lora\*' matches no parameter"),
        (["input_embeddings"], ["output_embeddings"], "one tensor"),
        (["output_embeddings"], ["input_embeddings"], "one tensor"),
        (["*embed_tokens*"], ["lm_head*"], r"one tensor in this model: lm_head\.weight is model\.embed_tokens\.weight"),
        (
            ["*norm*", "lm_head*"],
            ["*embed_tokens*", "*q_norm*"],
            r"freeze names lm_head\* and model.unfreeze \*embed_tok",
        ),
    ],
)
def test_what_matches_nothing_or_contradicts_itself_is_refused(frozen: list[str], free: list[str], said: str) -> None:
    with pytest.raises(ModelError, match=said) as caught:
        freeze(tiny.meta("gemma3_text"), frozen, free)
    assert caught.value.ways_out


def test_a_tied_tensor_goes_by_either_name_and_unfreezing_one_of_all_is_no_contradiction() -> None:
    for entry in ("lm_head*", "*embed_tokens*", "output_embeddings"):
        assert freeze(tiny.meta("gemma3_text"), [entry], []) == {"model.embed_tokens.weight"}, entry
    for unfrozen in ("input_embeddings", "lm_head*"):
        model = tiny.meta("gemma3_text")
        freeze(model, ["*"], [unfrozen])
        assert trained(model) == {"model.embed_tokens.weight"}
    model = tiny.meta("llama")  # untied: each goes its own way
    freeze(model, ["input_embeddings"], ["output_embeddings"])
    assert "lm_head.weight" in trained(model) and "model.embed_tokens.weight" not in trained(model)
