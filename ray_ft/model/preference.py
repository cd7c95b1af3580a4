"""Preference losses over pairs of answers that are packed side by side: DPO, and two that differ in its last step.

All of them see how much more the model prefers the chosen answer than a reference model does. With log-probabilities of
whole answers, h = (log π(chosen) − log ref(chosen)) − (log π(rejected) − log ref(rejected)):

    sigmoid  −log σ(β h), with label smoothing ε: −(1 − ε) log σ(β h) − ε log σ(−β h)
             Rafailov et al. 2023, equation 7; smoothed: Mitchell 2023, "A note on DPO with noisy preferences"
    hinge    max(0, 1 − β h)
             Zhao et al. 2023 (SLiC-HF), normalised by the reference as in Liu et al. 2023 (RSO)
    ipo      (h − 1 ÷ 2β)², of log-probabilities by token
             Azar et al. 2023, equation 17. It is written for answers as wholes, whose 1 ÷ 2β long ones would exceed by
             chance: as TRL does on its authors' advice, log-probabilities are means over an answer's tokens.

An answer's reward is β times how much likelier it is than under the reference (by token for ipo). Names of settings
are TRL's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F

from ray_ft.model import adapter
from ray_ft.model.loss import LossModel
from ray_ft.recipe.train import Preference

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: What `PreferenceLoss` gives beside the loss, in its order.
STATISTICS = ("reward_accuracy", "reward_margin", "chosen_reward", "rejected_reward", "logprob_accuracy")

#: Where the reference's log-probabilities come from: given with the rows; the model itself without its adapter; or the
#: model itself as it is, whose rewards are 0.
Reference = Literal["rows", "adapter off", "itself"]


class PreferenceLoss(LossModel):
    """A causal language model whose forward pass is its preference loss."""

    def __init__(self, model: PreTrainedModel, chunk: int, settings: Preference, reference: Reference) -> None:
        super().__init__(model, chunk)
        self.settings, self.reference = settings, reference

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        labels: torch.Tensor,
        reference: torch.Tensor,
    ) -> torch.Tensor:
        """Sums over the pairs of each row: of losses, then of `STATISTICS`.

        Args:
            input_ids, position_ids, labels: as of `LossModel.forward`. Documents of even number in their row are chosen
                answers, each with the rejected one behind it; what follows the last pair is padding.
            reference: int32 [rows, documents], the bits of float32, as strategies round what they take for inputs of
                the computation: of each document the sum of the reference's log-probabilities of its targets. Its
                values are used for "rows" alone; no row holds more documents.

        Returns:
            float32 [rows, 1 + statistics]. Accuracies count pairs: whose chosen answer has the higher reward, and the
            higher log-probability under the model; equal ones count half, as a guess.
        """
        inputs = (input_ids, position_ids, labels)
        reference = reference.view(torch.float32)
        if self.reference == "adapter off":  # first, so that nothing of the other pass waits in memory meanwhile
            reference = self._without_gradient(*inputs, documents=reference.shape[1])
        sums, counts, nothing = self.log_probabilities(*inputs, documents=reference.shape[1])
        if self.reference == "itself":
            reference = sums.detach()
        settings = self.settings
        scale = counts.clamp(min=1) if settings.loss == "ipo" else torch.ones_like(counts)
        sums, reference = sums / scale, reference / scale
        rewards = settings.beta * (sums - reference)
        chosen, rejected = rewards[:, 0::2], rewards[:, 1::2]
        margin = chosen - rejected
        values = torch.stack(
            [
                preference_loss(margin, settings),
                share_above(margin),
                margin,
                chosen,
                rejected,
                share_above(sums[:, 0::2] - sums[:, 1::2]),
            ],
            dim=-1,
        )
        real = counts[:, 1::2] > 0
        return torch.where(real[..., None], values, 0.0).sum(1) + nothing

    def log_probabilities(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, labels: torch.Tensor, *, documents: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(sums, counts, nothing): of each document's targets the log-probabilities and the number, float32 [rows,
        documents], and what `LossModel.target_losses` calls nothing."""
        losses, at, nothing = self.target_losses(input_ids, position_ids, labels)
        sums = nothing.new_zeros(len(input_ids), documents)
        if not len(losses):
            return sums, sums, nothing
        number = (position_ids == 0).cumsum(1) - 1  # of each token's document in its row
        where = (at[:, 0], number[at[:, 0], at[:, 1] + 1])
        counts = sums.index_put(where, torch.ones_like(losses), accumulate=True)
        return sums.index_put(where, -losses, accumulate=True), counts, nothing

    @torch.no_grad()
    def _without_gradient(self, *inputs: torch.Tensor, documents: int) -> torch.Tensor:
        """What the base says: without the adapter, and without anything that is dropped by chance."""
        training = self.model.training
        self.model.eval()
        try:
            with adapter.switched_off(self.model):
                return self.log_probabilities(*inputs, documents=documents)[0]
        finally:
            self.model.train(training)


def preference_loss(margin: torch.Tensor, settings: Preference) -> torch.Tensor:
    """The loss of pairs, of any shape, from the differences of their answers' rewards (β h)."""
    match settings.loss:
        case "sigmoid":
            smoothing = settings.label_smoothing
            return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)
        case "hinge":
            return F.relu(1 - margin)
        case "ipo":
            return (margin / settings.beta - 1 / (2 * settings.beta)).square()


def share_above(difference: torch.Tensor) -> torch.Tensor:
    """1 where it is above zero, 0 where below, and a half where it is zero."""
    return (difference.sign() + 1) / 2
