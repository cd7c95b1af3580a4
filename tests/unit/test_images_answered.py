"""What a model that was trained on images answers: its export and the gate, held-out questions, one question."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from distributed import pictured_recipe
from rich.console import Console
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ray_ft import answers, artifacts, cli, paths
from ray_ft.answers import Sampling, Target
from ray_ft.demo import DemoPaths
from ray_ft.errors import ExportError
from ray_ft.evaluate.questions import held_out_questions
from ray_ft.export import checks, export
from ray_ft.export.case import Case
from ray_ft.export.checks import text
from ray_ft.recipe import Recipe
from ray_ft.train import launch
from ray_ft.trained import Trained
from ray_ft.view import View


@pytest.fixture(scope="module")
def trained(pictures: DemoPaths, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    held_out = json.dumps([{"path": pictures.heldout, "format": "image_question"}])
    storage = tmp_path_factory.mktemp("runs")
    recipe = pictured_recipe(pictures, storage, None, "train.max_steps=4", f"data.eval={held_out}")
    assert launch.train(recipe, View(Console(quiet=True))).complete
    export(recipe.run.dir.root, View(Console(quiet=True)), vllm=False)
    return recipe


@pytest.fixture
def case(trained: Recipe, tmp_path: Path) -> Case:
    """A copy of the export, which a test may damage."""
    copy = shutil.copytree(trained.run.dir.export, tmp_path / "export")
    return Case(Trained.of(trained.run.dir.root), str(copy))


def test_an_export_brings_its_processor_and_is_compared_on_pictures(trained: Recipe) -> None:
    measured = paths.read_json(paths.join(trained.run.dir.export, artifacts.MANIFEST))["checks"]
    assert list(measured) == ["images", *(check.name for check in checks.MODEL)]
    assert measured["images"] == {"passed": True, "tokens": 16, "shape": [3, 64, 64]}
    assert measured["logits_transformers"]["rows_with_images"] == 2
    assert measured["chat_template"]["rows"] == 32  # of each source as many


def test_another_scaling_of_images_is_refused(case: Case) -> None:
    settings = Path(case.folder, "processor_config.json")
    content = json.loads(settings.read_text())
    content["image_processor"]["image_mean"] = [0.4, 0.5, 0.5]
    settings.write_text(json.dumps(content))
    with pytest.raises(ExportError, match="check 'images' failed: the exported folder scales images otherwise"):
        text.images(case)
    settings.unlink()
    with pytest.raises(ExportError, match=r"check 'images' failed.*cannot prepare images"):
        text.images(Case(case.trained, case.folder))


def test_a_tower_that_sees_otherwise_is_noticed_where_text_notices_nothing(case: Case) -> None:
    file = Path(case.folder, "model.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("patch_embedding.weight"))
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ExportError, match="check 'logits_transformers' failed"):
        checks.logits_transformers(case)
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    assert checks.logits_transformers(Case(case.trained, case.folder))["passed"]


def test_held_out_questions_bring_their_pictures_to_the_engine(trained: Recipe) -> None:
    questions = held_out_questions(trained, 6)
    for question in questions:
        assert question.prompt.has_images and question.reference
        assert str(question.asked[0]["content"]).startswith("[image] ")  # type: ignore[index]
        assert "base64" not in json.dumps(question.asked)  # reports hold no pictures
    with answers.opened(Target.of(trained.run.dir.root), "transformers", batch_size=4, device="cpu") as engine:
        together = list(engine.answers([question.prompt for question in questions], Sampling(max_new_tokens=3)))
        alone = [next(iter(engine.answers([q.prompt], Sampling(max_new_tokens=3)))) for q in questions]
    assert together == alone
    assert all(answer.error is None and answer.prompt_tokens > 16 for answer in together)


def test_one_question_about_a_file_on_the_command_line(trained: Recipe, pictures: DemoPaths) -> None:
    picture = str(Path(pictures.train[0]).parent / "pictures" / "000000.png")
    asked = ["chat", trained.run.dir.export, "How many shapes are there?", "--image", picture, "--json"]
    done = CliRunner().invoke(cli.app, [*asked, "--max-new-tokens", "3"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["usage"]["prompt_tokens"] > 16 and found["usage"]["completion_tokens"] <= 3
