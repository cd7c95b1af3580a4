"""How good a model is on held-out rows: its loss over all of them, answers to some, scored, beside its base's.

Answers come from `ray_ft.answers` (vLLM, transformers or an endpoint), losses from Ray actors, scores from sacrebleu,
rouge-score and scikit-learn; `compare` says which differences are more than chance.
"""

from ray_ft.evaluate.questions import Question, held_out_questions
from ray_ft.evaluate.report import show
from ray_ft.evaluate.run import evaluate
from ray_ft.evaluate.scores import score

__all__ = ["Question", "evaluate", "held_out_questions", "score", "show"]
