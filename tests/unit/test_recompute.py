"""Which layers are computed again in the backward pass, and that nothing but memory depends on it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import filled

from ray_ft.errors import ModelError
from ray_ft.model import recompute
from ray_ft.model.loss import LossModel, decoder_layers


def passes(setting: bool | float, family: str = "gemma3_text") -> tuple[list[int], list[torch.Tensor]]:
    """How often each layer runs forwards in a step, and the gradients."""
    model = filled(family, layers=4)
    recompute.enable(model, setting)
    text = {id(part) for part in model.get_decoder().modules()}
    layers = [layer for layer in decoder_layers(model) if id(layer) in text]
    ran = [0] * len(layers)

    def count(at: int) -> Any:
        def hook(*_: Any) -> None:
            ran[at] += 1

        return hook

    for at, layer in enumerate(layers):
        layer.self_attn.register_forward_hook(count(at))
    ids = torch.arange(24).view(2, 12)
    positions = torch.arange(12).expand(2, -1)
    LossModel(model.train(), 5)(ids, positions, ids).sum().backward()
    return ran, [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("family", ["gemma3_text", "llama", "gemma3"])
def test_the_first_layers_are_recomputed_up_to_the_share(family: str) -> None:
    none, expected = passes(False, family)
    assert none == [1, 1, 1, 1]
    for setting, wanted in ((True, [2, 2, 2, 2]), (0.5, [2, 2, 1, 1]), (0.3, [2, 2, 1, 1]), (0.01, [2, 1, 1, 1])):
        ran, gradients = passes(setting, family)
        assert ran == wanted, setting
        for one, other in zip(gradients, expected, strict=True):
            assert torch.equal(one, other)


def test_a_share_of_a_family_that_has_one_switch_for_all_layers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = filled("llama")
    monkeypatch.setattr(recompute, "decoder_layers", lambda _: [])
    with pytest.raises(ModelError, match="all layers or none"):
        recompute.enable(model, 0.5)


@pytest.mark.parametrize(("layers", "setting", "wanted"), [(62, 0.2, 13), (62, True, 62), (62, False, 0), (4, 0.5, 2)])
def test_a_share_is_rounded_up(layers: int, setting: bool | float, wanted: int) -> None:
    assert recompute.recomputed(layers, setting) == wanted
