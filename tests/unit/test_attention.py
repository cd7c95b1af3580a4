"""Attention: what is chosen and refused, and that it keeps packed documents apart however many rows there are."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import pairwise

import models
import pytest
import torch
import torch.nn.functional as F
from transformers import Gemma2Config, PreTrainedModel, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers import modeling_flash_attention_utils as flash

from ray_ft.errors import ModelError
from ray_ft.model import attention
from ray_ft.model.loss import LossModel

LENGTHS = ((10, 14), (3, 9, 12))  # documents of two rows; longer than the sliding window, and shorter


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(Ids, positions that restart with each document, labels) of two packed rows."""
    ids = torch.randint(3, 59, (2, 24), generator=torch.Generator().manual_seed(1))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])
    labels = torch.where(positions > 0, ids, -100)
    return ids, positions, labels


def separate() -> list[tuple[torch.Tensor, ...]]:
    """The same documents, each in a row of its own."""
    found = []
    for row, lengths in enumerate(LENGTHS):
        end = 0
        for n in lengths:
            end += n
            found.append(tuple(tensor[row : row + 1, end - n : end] for tensor in batch()))
    return found


def losses(model: PreTrainedModel) -> tuple[float, float]:
    """(Loss of the packed rows, sum of the documents' own losses), in nats."""
    module = LossModel(model, 7)
    with torch.no_grad():
        return float(module(*batch()).sum()), sum(float(module(*document).sum()) for document in separate())


# ------------------------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_documents_of_several_rows_do_not_see_each_other(
    family: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.model(family)
    model.set_attn_implementation(implementation)
    packed, alone = losses(model)
    assert packed == pytest.approx(alone, rel=1e-5)
    # The planted fault: with an attention mask, even of ones, transformers no longer looks for documents.
    decoder = model.get_decoder()
    forward = decoder.forward
    monkeypatch.setattr(decoder, "forward", lambda **given: forward(attention_mask=torch.ones(2, 24), **given))
    with torch.no_grad():
        leaking = float(LossModel(model, 7)(*batch()).sum())
    assert abs(leaking - alone) > 1e-2


def varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int, int] = (-1, -1), deterministic: bool = False,
) -> torch.Tensor:  # fmt: skip
    """What flash_attn_varlen_func computes, by the definition: [tokens, heads, head_dim], documents one by one."""
    bounds = cu_seqlens_q.tolist()
    assert torch.equal(cu_seqlens_q, cu_seqlens_k) and max_seqlen_q == max(b - a for a, b in pairwise(bounds))
    parts = [
        row(*(tensor[None, a:b] for tensor in (q, k, v)), softmax_scale=softmax_scale, window_size=window_size)[0]
        for a, b in pairwise(bounds)
    ]
    return torch.cat(parts)


def row(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = True, window_size: tuple[int, int] = (-1, -1), deterministic: bool = False,
) -> torch.Tensor:  # fmt: skip
    """What flash_attn_func computes: [rows, tokens, heads, head_dim], each row as one document."""
    at = torch.arange(q.shape[1])
    seen = at[:, None] >= at
    if window_size[0] >= 0:
        seen &= at[:, None] - at <= window_size[0]
    heads = [tensor.transpose(1, 2) for tensor in (q, k, v)]
    out = F.scaled_dot_product_attention(*heads, attn_mask=seen, scale=softmax_scale, enable_gqa=True)
    return out.transpose(1, 2)


@pytest.fixture
def with_flash(monkeypatch: pytest.MonkeyPatch) -> Callable[[PreTrainedModel], PreTrainedModel]:
    """Sets a model to flash-attention, whose kernels are replaced by their definition: they need a GPU."""
    process = flash._lazy_define_process_function(varlen)
    assert "window_size" in inspect.signature(varlen).parameters
    monkeypatch.setattr(
        flash, "lazy_import_flash_attention", lambda *args, **kwargs: ((row, varlen, None, None, None), (process, dict))
    )

    def switch(model: PreTrainedModel) -> PreTrainedModel:
        model.config._attn_implementation = "flash_attention_2"
        assert model.get_decoder().config._attn_implementation == "flash_attention_2"
        return model

    return switch


@pytest.mark.parametrize("family", models.FAMILIES)
def test_flash_attention_gets_the_bounds_of_documents_also_of_several_rows(
    family: str, with_flash: Callable[[PreTrainedModel], PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, alone = losses(models.model(family))
    packed, _ = losses(with_flash(models.model(family)))
    assert packed == pytest.approx(expected, rel=1e-5) == pytest.approx(alone, rel=1e-5)
    # Left to itself, transformers looks for documents only where there is a single row.
    monkeypatch.setattr("ray_ft.model.loss.documents", lambda model, position_ids: {"position_ids": position_ids})
    leaking, _ = losses(with_flash(models.model(family)))
    assert abs(leaking - alone) > 1e-2


def qwen_vl() -> PreTrainedModel:
    text = {key: value for key, value in models.TEXT.items() if key != "head_dim"}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    torch.manual_seed(0)
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    config = Qwen2_5_VLConfig(text_config={**text, **ends, "rope_parameters": rope}, vision_config=vision)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def test_positions_of_three_dimensions_get_a_fourth_that_tells_documents_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, alone = losses(qwen_vl())
    assert packed == pytest.approx(alone, rel=1e-5)
    monkeypatch.setattr("ray_ft.model.loss.documents", lambda model, position_ids: {"position_ids": position_ids})
    leaking, _ = losses(qwen_vl())
    assert abs(leaking - alone) > 1e-2


# -------------------------------------------------------------------------------------------------------- choice


@pytest.fixture
def flash_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: True)


@pytest.mark.usefixtures("flash_installed")
def test_flash_attention_is_for_16_bits_and_new_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    config = models.config("gemma3")
    assert attention.choose("auto", "cuda", config).implementation == "flash_attention_2"
    found = attention.choose("auto", "cuda", config, torch.float32)
    assert found.implementation == "sdpa" and "16 bits, and the computation is in float32" in found.reason
    with pytest.raises(ModelError, match="computation is in float32"):
        attention.choose("flash_attention_2", "cuda", config, torch.float32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    found = attention.choose("auto", "cuda", config)
    assert found.implementation == "sdpa" and "this is a Tesla T4" in found.reason


def test_sdpa_is_not_taken_where_it_would_drop_the_soft_cap() -> None:
    config = Gemma2Config(**models.TEXT)
    assert config.attn_logit_softcapping == 50
    found = attention.choose("auto", "cpu", config)
    assert found.implementation == "eager" and "attn_logit_softcapping = 50" in found.reason
    with pytest.raises(ModelError, match="'sdpa' cannot be used: it leaves out the model's soft cap") as caught:
        attention.choose("sdpa", "cpu", config)
    assert "model.attention=eager works here" in caught.value.ways_out
    config.attn_logit_softcapping = None
    assert attention.choose("sdpa", "cpu", config).implementation == "sdpa"


def test_flex_attention_is_refused_where_it_cannot_train() -> None:
    config = models.config("gemma3_text")
    with pytest.raises(ModelError, match="'flex_attention' cannot be used: PyTorch's flex_attention has no backward"):
        attention.choose("flex_attention", "cpu", config)
    assert attention.choose("flex_attention", "cuda", config).implementation == "flex_attention"
    config.attention_dropout = 0.1
    with pytest.raises(ModelError, match=r"attention_dropout = 0\.1"):
        attention.choose("flex_attention", "cuda", config)


@pytest.mark.usefixtures("flash_installed")
def test_what_a_family_does_not_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Qwen3ForCausalLM

    config = models.config("qwen3")
    for name in ("flash_attn", "sdpa", "flex_attn"):
        monkeypatch.setattr(Qwen3ForCausalLM, f"_supports_{name}", False)
    assert attention.choose("auto", "cuda", config).implementation == "eager"
    for name in ("flash_attention_2", "sdpa", "flex_attention"):
        with pytest.raises(ModelError, match="transformers has none for model_type 'qwen3'"):
            attention.choose(name, "cuda", config)
