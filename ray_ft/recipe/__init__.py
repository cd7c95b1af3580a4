"""The recipe: every setting, typed and checked once, in one place.

Relative paths start at the folder the command runs in and are made absolute here, because workers run elsewhere.

A recipe is a YAML file; any key can be overridden as ``key.path=value``. Everything downstream receives these objects,
never dictionaries. Nothing here imports torch or ray.
"""

from ray_ft.recipe.data import (
    AnswerSource,
    AnySource,
    Data,
    ImageQuestionSource,
    Images,
    LabelsSource,
    MessagesSource,
    PreferenceSource,
    PromptCompletionSource,
    Source,
    Task,
    TemplateSource,
    TextSource,
    Thinking,
    TranslationSource,
    template_fields,
)
from ray_ft.recipe.loading import apply_override, json_schema, load, parse
from ray_ft.recipe.model import Adapter, Model
from ray_ft.recipe.recipe import Recipe
from ray_ft.recipe.run import Run
from ray_ft.recipe.serve import During, Evaluate, Gateway, Serve
from ray_ft.recipe.train import FSDP, Checkpoint, Failures, Optimizer, Preference, Schedule, Train, Zero
from ray_ft.recipe.tune import ASHA, PBT, Budget, Dimension, Median, Tune

__all__ = [
    "ASHA",
    "FSDP",
    "PBT",
    "Adapter",
    "AnswerSource",
    "AnySource",
    "Budget",
    "Checkpoint",
    "Data",
    "Dimension",
    "During",
    "Evaluate",
    "Failures",
    "Gateway",
    "ImageQuestionSource",
    "Images",
    "LabelsSource",
    "Median",
    "MessagesSource",
    "Model",
    "Optimizer",
    "Preference",
    "PreferenceSource",
    "PromptCompletionSource",
    "Recipe",
    "Run",
    "Schedule",
    "Serve",
    "Source",
    "Task",
    "TemplateSource",
    "TextSource",
    "Thinking",
    "Train",
    "TranslationSource",
    "Tune",
    "Zero",
    "apply_override",
    "json_schema",
    "load",
    "parse",
    "template_fields",
]
