"""The training loss: summed cross-entropy over target tokens, never holding the logits of a whole batch.

Only positions with a target are projected onto the vocabulary, `chunk` of them at a time, and each chunk's logits are
computed again in the backward pass. For Gemma 3's 262,208 words and 8,192 target tokens, logits in float32 would take
8 GiB; a chunk of 1,024 takes 1 GiB.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ray_ft.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORE = -100

#: Factors that some families' heads apply to their logits, and the chunked loss does not.
FACTORS = ("logits_scaling", "logit_scale", "lm_head_multiplier")


class LossModel(nn.Module):
    """A causal language model whose forward pass is its loss.

    It wraps the model rather than calling parts of it from outside, because sharding strategies gather parameters in
    the forward hooks of the outermost module.

    Raises:
        ModelError: the family's logits have a factor that would be left out.
    """

    def __init__(self, model: PreTrainedModel, chunk: int) -> None:
        super().__init__()
        text = model.config.get_text_config()
        for name in FACTORS:
            if (factor := getattr(text, name, None)) not in (None, 1):
                raise ModelError(
                    f"model_type {text.model_type!r} scales its logits ({name} = {factor}), which is not done here",
                    ["name a model of another family, such as Gemma, Llama or Qwen"],
                )
        self.model = model
        self.chunk = chunk

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        labels: torch.Tensor,
        soft: torch.Tensor | None = None,
        pixels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Sums of the negative log-likelihoods of the target tokens, in nats.

        Args:
            input_ids: int64 [rows, tokens].
            position_ids: int64 [rows, tokens], restarting at 0 with each document. They alone keep documents apart: an
                attention mask, even of ones, would let them see each other.
            labels: int64 [rows, tokens], not shifted; `IGNORE` where there is no target.
            soft: bool [rows, tokens], which tokens stand for parts of images; None in a run without images.
            pixels: float32 [images, channels, height, width], in the order of their tokens.

        Returns:
            float32 [rows, 1]: of each row. It depends on every trained parameter also where no token is a target, so
            that no worker leaves a collective operation out.
        """
        losses, at, nothing = self.target_losses(input_ids, position_ids, labels, soft, pixels)
        total = nothing.new_zeros(len(input_ids)) + nothing
        if len(losses):
            total = total.index_add(0, at[:, 0], losses)
        return torch.stack([total], dim=1)  # no view: FSDP's hooks want an output of its own

    def target_losses(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        labels: torch.Tensor,
        soft: torch.Tensor | None = None,
        pixels: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(losses, at, nothing) of n target tokens; arguments as of `forward`.

        Returns:
            The negative log-likelihood of each, float32 [n]; its row and the position before it, int64 [n, 2]; and a
            zero, float32 [], on which the result has to depend: where there is no target it ties it to the model.
        """
        if soft is None or pixels is None:
            # The language model itself: text passes by a vision-language model's towers, and has the masks of text.
            decoder, given = self.model.get_decoder(), documents(self.model, position_ids)
            hidden = decoder(input_ids=input_ids, use_cache=False, **given).last_hidden_state
        else:
            hidden = self._seeing(input_ids, position_ids, soft, pixels)
        targets = labels[:, 1:]
        wanted = targets != IGNORE
        states, words = hidden[:, :-1][wanted], targets[wanted]
        losses = [
            checkpoint(self._chunk_loss, states[start : start + self.chunk], words[start : start + self.chunk],
                       use_reentrant=False)
            for start in range(0, max(len(words), 1), self.chunk)
        ]  # fmt: skip
        nothing = hidden.new_zeros((), dtype=torch.float32)
        if not len(words):
            nothing = nothing + hidden.sum().float() * 0.0 + losses[0].sum()
        return torch.cat(losses), wanted.nonzero(), nothing

    def _seeing(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, soft: torch.Tensor, pixels: torch.Tensor
    ) -> torch.Tensor:
        """The last hidden states, the tokens of one image seeing each other in both directions (Gemma 3n's do not).

        Where there is no image, a black one is looked at and counts nothing: a tower that lies in shards is gathered by
        all workers together, and the others may have images.
        """
        inner = self.model.base_model
        given = {"input_ids": input_ids, "token_type_ids": soft.long(), **documents(self.model, position_ids)}
        if len(pixels):
            return inner(**given, pixel_values=pixels, use_cache=False).last_hidden_state
        black = inner.get_image_features(pixels.new_zeros(1, *pixels.shape[1:])).pooler_output
        return inner(**given, use_cache=False).last_hidden_state + black.sum() * 0.0

    def _chunk_loss(self, states: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        logits = self.model.get_output_embeddings()(states).float()
        cap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        return F.cross_entropy(logits, words, reduction="none")


def documents(model: PreTrainedModel, position_ids: torch.Tensor) -> dict[str, Any]:
    """Position ids, and what else the family or the attention needs to keep documents apart."""
    text = model.config.get_text_config()
    positions: dict[str, Any] = {"position_ids": position_ids}
    if "mrope_section" in (getattr(text, "rope_parameters", None) or {}):
        # Qwen's vision-language models turn by time, height and width; a fourth, first one tells documents apart.
        positions["position_ids"] = position_ids.expand(4, *position_ids.shape)
    if text._attn_implementation.startswith("flash_attention"):
        # It has no mask, and transformers looks for documents in position ids only where there is a single row.
        from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

        (bounds, _), (longest, _) = prepare_fa_kwargs_from_position_ids(position_ids)
        length = int(longest)  # waits for the GPU once, not in each layer
        positions |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
        positions |= {"max_length_q": length, "max_length_k": length}
    return positions


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a transformer and its towers, in order: what is sharded and recomputed as a unit."""
    names = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return [block for blocks in lists for block in blocks if type(block).__name__ in names]
