"""What of a model is trained: counts, precisions, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import LINEAR, meta

from ray_ft.errors import ModelError
from ray_ft.model import adapter, quantize
from ray_ft.model.adapt import Adapted, adapt
from ray_ft.recipe.model import Model

HIGH, LOW = torch.float32, torch.bfloat16


def settings_of(**settings: Any) -> Model:
    return Model(path="some/model", **settings)


def adapted(family: str, **settings: Any) -> tuple[Any, Adapted]:
    model = meta(family)
    return model, adapt(model, settings_of(**settings), HIGH, LOW)


def trained(model: Any) -> set[str]:
    """Names of trained parameters; checks precisions and that nothing was allocated."""
    for name, parameter in model.named_parameters():
        assert parameter.is_meta
        assert parameter.dtype == (HIGH if parameter.requires_grad else LOW), name
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def elements(model: Any, names: Any = None) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if names is None or name in names)


def test_without_settings_all_is_trained() -> None:
    before = dict(meta("llama").named_buffers())
    model, found = adapted("llama")
    assert len(trained(model)) == len(list(model.named_parameters()))
    assert found.trained == found.total == elements(model)
    assert found.lines == [found.summary] == [f"training all {found.total / 1000:.1f}K parameters"]
    assert {name: b.dtype for name, b in model.named_buffers()} == {name: b.dtype for name, b in before.items()}


def test_what_is_frozen_is_kept_in_the_lower_precision_and_counted() -> None:
    model, found = adapted("gemma3_text", freeze=["*embed_tokens*", "*mlp*"], unfreeze=["*layers.1.mlp.up_proj*"])
    names = trained(model)
    assert "model.layers.1.mlp.up_proj.weight" in names and "model.layers.0.mlp.up_proj.weight" not in names
    assert model.model.embed_tokens.weight.dtype == LOW
    assert (found.trained, found.total) == (elements(model, names), elements(model))
    share = f"{100 * found.trained / found.total:.2f}%"
    assert found.summary.startswith("training ") and found.summary.endswith(f"parameters ({share})")


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_an_adapter_is_trained_alone_over_a_frozen_base(kind: str) -> None:
    base = elements(meta("gemma3"))
    model, found = adapted("gemma3", adapter={"name": kind, "rank": 2})
    names = trained(model)
    assert names == {name for name, _ in model.named_parameters() if adapter.stored_name(name) is None}
    assert len(names) == 14 * (3 if kind == "dora" else 2)
    assert found.trained == elements(model, names)
    assert found.total == base + found.trained
    assert found.summary.endswith(f"%): {kind} rank 2 on 14 layers")
    assert found.lines == [found.summary]  # that the base's vision tower is frozen goes without saying


def test_parts_of_the_base_can_be_trained_beside_an_adapter() -> None:
    model, _ = adapted("gemma3", adapter={"rank": 2}, freeze=["*k_norm*"], unfreeze=["*norm*", "*q_proj.weight"])
    names = {name for name in trained(model) if adapter.stored_name(name)}
    # Patterns are of the base's names; what no text reaches stays frozen although "*norm*" names it too.
    assert "model.language_model.layers.0.self_attn.q_proj.base_layer.weight" in names
    assert "model.language_model.norm.weight" in names
    assert not any("vision" in name for name in names)
    kept = {name.rpartition(".layers.")[2].partition(".")[2] for name in names if ".layers." in name}
    assert {name.split(".")[-2] for name in kept} >= {"input_layernorm", "q_norm", "base_layer"}
    model, _ = adapted("gemma3", adapter={"rank": 2}, unfreeze=["*norm*"], freeze=["*q_norm*"])
    assert any("input_layernorm" in name for name in trained(model))


def test_what_text_never_reaches_is_frozen_and_said() -> None:
    model, found = adapted("gemma3")
    names = trained(model)
    assert names == {name for name, _ in model.named_parameters() if "language_model" in name}
    assert found.unreached == ("multi_modal_projector", "vision_tower")
    assert found.lines[1].endswith("reach them: multi_modal_projector, vision_tower")
    assert adapted("gemma3", freeze=["vision_tower"])[1].unreached == ("multi_modal_projector",)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"unfreeze": ["vision_tower"], "adapter": {}},
            "unfreeze 'vision_tower' names vision_tower, which rows of text",
        ),
        ({"unfreeze": ["*projector*"]}, "unfreeze '*projector*' names multi_modal_projector, which rows of text never"),
        ({"unfreeze": ["*nothing*"], "adapter": {}}, "'*nothing*'"),
        ({"freeze": ["*nothing*"], "adapter": {}}, "'*nothing*'"),
        ({"freeze": ["*"]}, "freeze"),
        ({"freeze": ["*language_model*"]}, "freeze ['*language_model*'] leaves nothing to train"),
        ({"adapter": {"target_modules": ["*x_proj"]}}, "'*x_proj' matches no module"),
    ],
)
def test_what_cannot_be_trained_is_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError) as error:
        adapted("gemma3", **settings)
    assert says in str(error.value)


def test_a_base_to_be_rounded_elsewhere_stays_as_it_is_and_is_named() -> None:
    model = meta("gemma3")
    settings = settings_of(quantize="nf4", adapter={"rank": 2}, unfreeze=["*layers.0.mlp.up_proj*"])
    found = adapt(model, settings, HIGH, LOW, packed=False)
    trained(model)
    assert not any(quantize.layers(model))
    assert {name.split(".")[-2] for name in found.quantized} == set(LINEAR)
    assert len(found.quantized) == 13  # less the one that is trained whole


def test_a_4_bit_base_is_counted_by_its_weights() -> None:
    pytest.importorskip("bitsandbytes")
    _, plain = adapted("gemma3", adapter={"rank": 2})
    model, found = adapted("gemma3", adapter={"rank": 2}, quantize="nf4")
    assert (found.trained, found.total) == (plain.trained, plain.total)
    assert found.summary.endswith("lora rank 2 on 14 layers, 14 layers of the base in 4 bits")
    codes = dict(quantize.layers(model))
    assert len(codes) == 14
    for name, parameter in model.named_parameters():
        own = adapter.stored_name(name) is None
        assert parameter.requires_grad == own
        assert parameter.dtype == (HIGH if own else torch.uint8 if name in codes else LOW)
