from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ray_ft import hub
from ray_ft.data.render import load_tokenizer
from ray_ft.errors import ModelError, RecipeError
from ray_ft.export.describe import _usage
from ray_ft.model import load
from ray_ft.recipe import Recipe
from serving.models import base_name

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path({mark!r}).touch()


class OwnConfig(LlamaConfig):
    model_type = "own_of_the_test"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture(autouse=True)
def untrusting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_trusted", set())


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A model of a family that transformers does not know, whose code says when it runs."""
    folder = tmp_path / "model"
    folder.mkdir()
    config = {
        "architectures": ["OwnForCausalLM"], "model_type": "own_of_the_test", "hidden_size": 16, "vocab_size": 32,
        "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(CODE.format(mark=str(tmp_path / "ran")))
    return folder


# --------------------------------------------------------------------------------------------------------- recipe


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        (["model.path=org/name", "model.trust_remote_code=true"], "revision is null"),
        (["model.path=org/name", "model.revision=main", "model.trust_remote_code=true"], "revision is main"),
        (["model.path=org/name", "model.revision=abc1234", "model.trust_remote_code=true"], "revision is abc1234"),
        (["model.path=s3://bucket/m", "model.trust_remote_code=true"], "local folder"),
        (["model.revision=main"], "is one of the hub"),
        (["model.path=s3://bucket/m", "model.revision=main"], "is one of the hub"),
        (["model.path=org/name", "model.revision=a b"], "should match pattern"),
    ],
)
def test_what_pins_no_code_is_refused(make_recipe: Callable[..., Recipe], overrides: list[str], what: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make_recipe(*overrides)
    assert what in str(caught.value)


def test_a_commit_pins_it(make_recipe: Callable[..., Recipe]) -> None:
    model = make_recipe("model.path=org/name", f'model.revision="{COMMIT}"', "model.trust_remote_code=true").model
    assert model.location == f"org/name@{COMMIT}"
    assert make_recipe("model.path=org/name").model.location == "org/name"
    assert make_recipe("model.path=org/name").model.trust_remote_code is False


# ------------------------------------------------------------------------------------------------------------ hub


def test_the_revision_is_what_is_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    asked: list[tuple[str, Any, bool]] = []

    def snapshot_download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision, "*.py" in allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    hub.model_folder("org/name")
    hub.model_folder(f"org/name@{COMMIT}", weights=False)
    assert not hub.runs_code(str(tmp_path))
    hub.model_folder(f"org/name@{COMMIT}", code=True)
    assert hub.runs_code(str(tmp_path))
    assert asked == [("org/name", None, False), ("org/name", COMMIT, False), ("org/name", COMMIT, True)]
    with pytest.raises(ModelError, match="is no folder"):
        hub.model_folder("name@main")


def test_a_folder_with_an_at_sign_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "org" / "name@main").mkdir(parents=True)
    folder = str(tmp_path / "org" / "name@main")
    assert hub.model_folder(folder) == folder
    assert hub.split_revision(folder) == (folder, None)
    assert hub.split_revision(f"org/name@{COMMIT}") == ("org/name", COMMIT)
    assert hub.split_revision("s3://key@bucket/x") == ("s3://key@bucket/x", None)


def test_the_revision_goes_with_the_model_not_its_name() -> None:
    assert base_name(f"org/name@{COMMIT}") == "name"
    assert f'from_pretrained("org/name", revision="{COMMIT}")' in _usage("org/name", COMMIT, adapter=True, labels=False)


# ----------------------------------------------------------------------------------------------------------- code


def test_code_is_not_run_unless_the_recipe_says_so(own: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="trust_remote_code is false") as caught:
        load.load_config(hub.model_folder(str(own)))
    assert "own.OwnConfig" in caught.value.what
    assert not (tmp_path / "ran").exists()


def test_nothing_is_asked_on_the_terminal(own: Path, tmp_path: Path) -> None:
    """transformers would ask, and take a y for leave."""
    code = f"from ray_ft.model import load\nfrom ray_ft.errors import ModelError\ntry: load.load_config({str(own)!r})\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "except ModelError as error: print(error.what)"],
        input="y\ny\n", capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert "trust_remote_code is false" in done.stdout, done.stderr
    assert "Do you wish" not in done.stdout + done.stderr
    assert not (tmp_path / "ran").exists()


def test_a_tokenizers_code_is_not_run_either(own: Path, tmp_path: Path) -> None:
    (own / "tokenizer.json").write_text("{}")
    (own / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}))
    with pytest.raises(ModelError, match="no usable tokenizer"):
        load_tokenizer(str(own))
    assert not (tmp_path / "ran").exists()


def test_trusted_code_runs(own: Path, tmp_path: Path, make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe(f"model.path={own}", "model.trust_remote_code=true")
    config = load.load_config(recipe.model.folder())
    assert (tmp_path / "ran").exists()
    model = load.build(config)
    assert type(model).__name__ == "OwnForCausalLM"
    assert sum(parameter.numel() for parameter in model.parameters()) > 0


def test_code_of_another_repository_is_refused(own: Path, tmp_path: Path) -> None:
    """Whose owner may change it, whatever commit the recipe names of this one."""
    content = json.loads((own / "config.json").read_text())
    content["auto_map"]["AutoConfig"] = "someone/else--own.OwnConfig"
    (own / "config.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match="from another repository, someone/else"):
        load.load_config(hub.model_folder(str(own), code=True))
    assert not (tmp_path / "ran").exists()
