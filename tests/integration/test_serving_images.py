"""Questions about pictures over OpenAI's API: the gateway lets them to vLLM, which answers as transformers does.

Trains a tiny Gemma 3 for some steps, exports and serves it: two starts of vLLM, about a minute each on two free cores.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ray_ft import answers
from ray_ft.answers import Prompt, Sampling, Target
from ray_ft.data.images import data_url
from ray_ft.demo import DemoPaths
from ray_ft.export import export
from ray_ft.recipe import parse
from ray_ft.train import launch
from ray_ft.view import View
from tests.integration.servers import Served, serving

pytestmark = [
    pytest.mark.serve,
    pytest.mark.slow,
    pytest.mark.timeout(600),
]
QUESTION = "What is in the picture?"


@pytest.fixture(scope="module")
def run(pictures: DemoPaths, tmp_path_factory: pytest.TempPathFactory) -> Path:
    content: dict[str, Any] = {
        "run": {"name": "pictures", "storage": str(tmp_path_factory.mktemp("runs"))},
        "model": {"path": pictures.base},
        "data": {"train": [{"path": pictures.train[2], "format": "image_question"}], "images": {}, "seq_len": 128},
        "train": {
            "strategy": "none", "workers": 0, "device": "cpu", "global_batch": 8, "micro_batch": 8, "max_steps": 12,
            "optimizer": {"lr": 3e-3},
        },
        "serve": {"max_model_len": 256},
    }  # fmt: skip
    recipe = parse(content)
    quiet = View(Console(quiet=True))
    assert launch.train(recipe, quiet).complete
    checks = export(recipe.run.dir.root, quiet).content["checks"]
    assert checks["logits_vllm"]["difference_rms"] < 1e-4, checks["logits_vllm"]
    return Path(recipe.run.dir.root)


@pytest.fixture(scope="module")
def served(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("log"), run) as one:
        yield one


def test_pictures_are_answered_as_transformers_answers_them(served: Served, run: Path, pictures: DemoPaths) -> None:
    files = sorted(Path(pictures.train[0]).parent.glob("pictures/*.png"))[:4]
    asked = [
        [{"type": "image_url", "image_url": {"url": data_url(file.read_bytes())}}, {"type": "text", "text": QUESTION}]
        for file in files
    ]
    found = []
    for content in asked:
        said = served.client.chat.completions.create(
            model="pictures", messages=[{"role": "user", "content": content}], max_tokens=8, temperature=0
        )
        found.append((said.choices[0].message.content, said.usage.prompt_tokens))
    prompts = [Prompt(messages=[{"role": "user", "content": content}]) for content in asked]
    with answers.opened(Target.of(str(run / "export")), "transformers", device="cpu") as engine:
        expected = [(one.text, one.prompt_tokens) for one in engine.answers(prompts, Sampling(max_new_tokens=8))]
    assert found == expected


def test_an_address_that_is_not_allowed_reaches_no_engine(served: Served) -> None:
    import openai

    content = [{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}]
    with pytest.raises(openai.BadRequestError) as refused:
        served.client.chat.completions.create(model="pictures", messages=[{"role": "user", "content": content}])
    assert json.loads(refused.value.response.text)["error"]["code"] == "media_not_allowed"
