"""The chunked loss is plain cross-entropy over all logits, without ever holding them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedModel

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
    return F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1), reduction="sum")


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
    loss = LossModel(model, chunk)(*inputs)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    found = gradients(model, loss)
    assert found.keys() == expected_gradients.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-4, msg=name)


def test_the_soft_cap_matters() -> None:  # else the test above would prove nothing about it
    plain, capped = tiny(), tiny(final_logit_softcapping=2.0)
    capped.load_state_dict(plain.state_dict())
    assert abs(LossModel(plain, 5)(*batch()) - LossModel(capped, 5)(*batch())) > 1


def test_without_a_target_the_loss_is_zero_and_every_parameter_has_a_gradient() -> None:
    model = tiny()
    loss = LossModel(model, 8)(*batch(trained=0.0))
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
        loss = LossModel(model, chunk)(ids, positions, labels)
    assert saved == []  # the forward pass keeps no logits
    assert len(sizes) == -(-targets // chunk)
    loss.backward()
    assert len(sizes) == 2 * -(-targets // chunk)  # each chunk once again in the backward pass
    assert max(sizes) == chunk * VOCAB


def test_decoder_layers_are_the_repeated_blocks() -> None:
    model = tiny()
    assert decoder_layers(model) == list(model.model.layers)
