"""What the quickstarts need, made here without a network: data of a task, and a tiny base model with its tokenizer.

`write_demo` writes a folder that is a small copy of the real situation: training rows in several files and formats,
held-out rows, and a Hugging Face folder with a Gemma 3 and its tokenizer, drawn from a seed. Each of `TASKS` is real,
since no held-out question is in the training rows, yet two cores learn it in a minute or two. Limits: the base's
weights are random, so it answers nothing before training; its tokenizer saw nothing but its task (other text falls into
bytes).

A further task is a module here with its `TASK`, and an entry in `TASKS` (`ray_ft.demo.write`).
"""

from ray_ft.demo.base import SPECIAL_TOKENS
from ray_ft.demo.task import HELDOUT, Part, Row, Task
from ray_ft.demo.translation import LANGUAGES, PROMPT
from ray_ft.demo.write import MARKER, TASKS, DemoPaths, write_demo

__all__ = [
    "HELDOUT",
    "LANGUAGES",
    "MARKER",
    "PROMPT",
    "SPECIAL_TOKENS",
    "TASKS",
    "DemoPaths",
    "Part",
    "Row",
    "Task",
    "write_demo",
]
