"""Sequence classification: a model whose last layer gives each label a score, and its loss.

What is classified is a document's last token but the label behind it (`ray_ft.data.render`): as the model is causal,
that token's state has seen the whole text and nothing else. The class is transformers' own for the family, so that an
export is loaded by `AutoModelForSequenceClassification` like any other. Limits: decoders with one linear layer on top,
`score`; a text has exactly one label.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from ray_ft.errors import ModelError
from ray_ft.model.loss import IGNORE, documents

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

#: What transformers' classes end in, and their last layer's weight.
CLASS, HEAD = "ForSequenceClassification", "score.weight"
#: A language model's own last layer, which a classifier has not.
WORDS = "lm_head.weight"


def is_classifier(config: PretrainedConfig) -> bool:
    """Whether the config is a classifier's: of a folder that is one, or of `labelled`."""
    return any(name.endswith(CLASS) for name in config.architectures or ())


def labels_of(config: PretrainedConfig) -> list[str]:
    """A classifier's labels, by number."""
    return [str(config.id2label[number]) for number in range(config.num_labels)]


def labelled(config: PretrainedConfig, labels: Sequence[str], where: str) -> PretrainedConfig:
    """The config of a classifier of these labels on top of a model.

    Args:
        where: the model's folder, for people.

    Raises:
        ModelError: it is a classifier of other labels, or transformers has no classifier of its family.
    """
    if is_classifier(config) and labels_of(config) != list(labels):
        raise ModelError(
            f"{where!r} classifies by {', '.join(map(repr, labels_of(config)))}, and model.labels is "
            f"{', '.join(map(repr, labels))}",
            ["name its labels, in that order, to train it further", "name the language model that it was trained from"],
        )
    from transformers import AutoModelForSequenceClassification

    mapping = AutoModelForSequenceClassification._model_mapping
    if getattr(config, "is_encoder_decoder", False) or type(config) not in mapping:
        raise ModelError(
            f"model_type {config.model_type!r} has no classifier in transformers",
            ["name a decoder, such as google/gemma-3-1b-it, or one with a vision tower, such as google/gemma-3-4b-it"],
        )
    config = copy.deepcopy(config)
    for name, value in settings(config, labels).items():
        setattr(config, name, value)
    return config


def settings(config: PretrainedConfig, labels: Sequence[str]) -> dict[str, Any]:
    """What a classifier's config.json says otherwise than its base's."""
    from transformers import AutoModelForSequenceClassification

    return {
        "architectures": [AutoModelForSequenceClassification._model_mapping[type(config)].__name__],
        "id2label": dict(enumerate(labels)),
        "label2id": {name: number for number, name in enumerate(labels)},
        "problem_type": "single_label_classification",
    }


def head(model: PreTrainedModel) -> Any:
    """A model's last layer: its output embeddings, or a classifier's scores.

    Raises:
        ModelError: there is no such layer.
    """
    found = model.get_output_embeddings() or getattr(model, HEAD.partition(".")[0], None)
    if found is None:
        raise ModelError(
            f"a {type(model).__name__} has no last layer that is known here: neither output embeddings nor 'score'",
            ["name a decoder of another family, such as Gemma, Llama or Qwen"],
        )
    return found


def new_names(model: PreTrainedModel, stored: Collection[str]) -> set[str]:
    """Parameters that a classifier has and its base, a language model, has not.

    Raises:
        ModelError: they are frozen, and would stay as they begin.
    """
    if not is_classifier(model.config) or HEAD in stored:
        return set()
    if not head(model).weight.requires_grad:
        raise ModelError(
            f"model.freeze covers {HEAD}, which is new: the base has none, so that nothing would tell labels apart",
            ["leave it out of model.freeze", "name it in model.unfreeze"],
        )
    return {HEAD}


class LabelLoss(nn.Module):
    """A classifier whose forward pass is its loss, for each row; see `ray_ft.model.loss.LossModel`.

    Args:
        weights: by how much each label counts in training; None: all alike. Losses of evaluations have no weights, so
            that runs with different ones can be compared.

    Raises:
        ModelError: there are more labels than the model has tokens, by whose numbers rows hold them.
    """

    def __init__(self, model: PreTrainedModel, weights: Sequence[float] | None = None) -> None:
        super().__init__()
        words, labels = model.get_input_embeddings().num_embeddings, head(model).out_features
        if labels > words:
            raise ModelError(f"{labels:,} labels are more than the model's {words:,} tokens", ["name fewer labels"])
        self.model = model
        self.weights = None if weights is None else tuple(weights)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Sums of the negative log-likelihoods of the labels, in nats; and counts by label: of right answers, of
        targets, of answers.

        Args:
            input_ids, position_ids, labels: int64 [rows, tokens], as of `LossModel.forward`; a target is the number of
                a label, which stands behind its text.

        Returns:
            float32 [rows, 1 + 3 labels]. It depends on every trained parameter also where there is no target.
        """
        hidden = self.model.get_decoder()(
            input_ids=input_ids, use_cache=False, **documents(self.model, position_ids)
        ).last_hidden_state
        wanted = labels[:, 1:] != IGNORE
        numbers, scores = labels[:, 1:][wanted], self._scores(hidden[:, :-1][wanted])
        weight = scores.new_tensor(self.weights) if self.weights and self.training else None
        losses = F.cross_entropy(scores, numbers, weight, reduction="none")
        targets, answers = (F.one_hot(each, scores.shape[1]).float() for each in (numbers, scores.argmax(-1)))
        counts = torch.cat((losses[:, None], targets * answers, targets, answers), dim=1)
        found = counts.new_zeros(len(input_ids), counts.shape[1])
        if not len(numbers):
            return found + hidden.sum().float() * 0.0 + scores.sum()
        return found.index_add(0, wanted.nonzero()[:, 0], counts)

    @torch.no_grad()
    def log_probabilities(self, input_ids: torch.Tensor, position_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        """float32 [targets, labels]: of every label for each text, row by row. Arguments as of `forward`."""
        hidden = self.model.get_decoder()(
            input_ids=input_ids, use_cache=False, **documents(self.model, position_ids)
        ).last_hidden_state
        return torch.log_softmax(self._scores(hidden[:, :-1][labels[:, 1:] != IGNORE]), -1)

    def _scores(self, states: torch.Tensor) -> torch.Tensor:
        """In the precision that the head is held in, not a lower one that autocast would choose."""
        layer = head(self.model)
        with torch.autocast(states.device.type, enabled=False):
            return layer(states.to(layer.weight.dtype)).float()


def initialise(spans: Mapping[str, Any], names: Collection[str]) -> None:
    """Give what is new its first values, in place: zeros, so that training begins with all labels alike, at a loss of
    ln(labels), under any seed and any cut of the tensors (Kolesnikov et al. 2020, "Big Transfer", section 3.3)."""
    for name in names:
        if name in spans:
            spans[name].data.zero_()
