"""The chunked loss is plain cross-entropy over all logits, without ever holding them."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GraniteConfig, GraniteForCausalLM, PreTrainedModel

from ray_ft.errors import ModelError
from ray_ft.model.loss import IGNORE, LossModel, decoder_layers

VOCAB = 48


def tiny(**settings: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=8,
        initializer_range=0.3,
        **settings,
    )
    return Gemma3ForCausalLM(config)


def batch(trained: float = 0.5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCAB, (2, 24), generator=generator)
    positions = torch.arange(24).expand(2, 24)
    labels = torch.where(torch.rand(2, 24, generator=generator) < trained, ids, IGNORE)
    return ids, positions, labels


def reference(model: PreTrainedModel, ids: torch.Tensor, positions: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, position_ids=positions).logits.float()  # applies the soft cap by itself
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].reshape(-1), reduction="sum")


def gradients(model: PreTrainedModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_loss_and_gradients_equal_plain_cross_entropy(chunk: int, cap: float | None) -> None:
    model = tiny(final_logit_softcapping=cap)
    inputs = batch()
    expected = reference(model, *inputs)
    expected_gradients = gradients(model, expected)
    loss = LossModel(model, chunk)(*inputs).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    found = gradients(model, loss)
    assert found.keys() == expected_gradients.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-4, msg=name)


def test_the_soft_cap_matters() -> None:  # else the test above would prove nothing about it
    plain, capped = tiny(), tiny(final_logit_softcapping=2.0)
    capped.load_state_dict(plain.state_dict())
    assert abs(LossModel(plain, 5)(*batch()).sum() - LossModel(capped, 5)(*batch()).sum()) > 1


def test_without_a_target_the_loss_is_zero_and_every_parameter_has_a_gradient() -> None:
    model = tiny()
    loss = LossModel(model, 8)(*batch(trained=0.0)).sum()
    assert loss.item() == 0.0
    found = gradients(model, loss)
    assert found.keys() == {name for name, _ in model.named_parameters()}
    assert all(not gradient.any() for gradient in found.values())


@pytest.mark.parametrize("chunk", [3, 7])
def test_never_more_than_one_chunk_of_logits_is_alive(chunk: int) -> None:
    model = tiny(tie_word_embeddings=False)
    head = model.get_output_embeddings()
    sizes: list[int] = []
    head.register_forward_hook(lambda module, inputs, output: sizes.append(output.numel()))
    saved: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() and tensor.shape[-1] == VOCAB and tensor.shape[0] != VOCAB:
            saved.append(tensor.numel())
        return tensor

    ids, positions, labels = batch()
    targets = int((labels[:, 1:] != IGNORE).sum())
    assert targets > 2 * chunk  # several chunks
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = LossModel(model, chunk)(ids, positions, labels).sum()
    assert saved == []  # the forward pass keeps no logits
    assert len(sizes) == -(-targets // chunk)
    loss.backward()
    assert len(sizes) == 2 * -(-targets // chunk)  # each chunk once again in the backward pass
    assert max(sizes) == chunk * VOCAB


def test_decoder_layers_are_the_repeated_blocks() -> None:
    model = tiny()
    assert decoder_layers(model) == list(model.model.layers)


def test_text_passes_by_the_vision_tower_with_the_loss_of_the_whole_model() -> None:
    model = models.model("gemma3")
    inputs = batch()
    expected = reference(model, *inputs)  # through the whole model, without an image
    called: list[str] = []
    for name in ("vision_tower", "multi_modal_projector"):
        model.get_submodule(f"model.{name}").register_forward_hook(lambda *_, name=name: called.append(name))
    found = gradients(model, LossModel(model, 5)(*inputs).sum())
    torch.testing.assert_close(LossModel(model, 5)(*inputs).sum(), expected, rtol=1e-5, atol=1e-5)
    assert called == []
    assert found.keys() == {name for name, _ in model.named_parameters() if "language_model" in name}


@pytest.mark.parametrize("family", ["gemma3", "gemma3_text"])
def test_checkpointing_recomputes_each_layer_once_and_changes_nothing(family: str) -> None:
    model = models.model(family).train()
    inputs = batch()
    expected = gradients(model, LossModel(model, 5)(*inputs).sum())
    calls: dict[str, int] = {}
    for name, module in model.named_modules():
        if module in decoder_layers(model) or module is model.get_decoder():
            calls[name] = 0
            module.register_forward_pre_hook(lambda *_, name=name: calls.__setitem__(name, calls[name] + 1))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = gradients(model, LossModel(model, 5)(*inputs).sum())
    for name, count in calls.items():  # a layer again in the backward pass, the language model as a whole not
        assert count == (0 if "vision" in name else 2 if "layers" in name else 1), name
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_logits_with_a_factor_are_refused_rather_than_trained_without_it() -> None:
    config = GraniteConfig(**models.TEXT, logits_scaling=8.0, bos_token_id=1, eos_token_id=2)
    with pytest.raises(ModelError, match=r"'granite' scales its logits \(logits_scaling = 8\.0\)") as caught:
        LossModel(GraniteForCausalLM(config), 5)
    assert caught.value.ways_out
    config.logits_scaling = 1.0
    model = GraniteForCausalLM(config)
    torch.testing.assert_close(LossModel(model, 5)(*batch()).sum(), reference(model, *batch()), rtol=1e-5, atol=1e-5)
