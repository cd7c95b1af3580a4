"""Two small classifiers behind the gateway, one of a run trained here, as transformers computes them; and Ctrl-C while
requests are under way.

No vLLM: about 30 s on two free cores, most of it Ray, Serve and two processes that import torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from rich.console import Console

from ray_ft.demo import DemoPaths
from ray_ft.export import export
from ray_ft.recipe import Serve
from ray_ft.train import launch
from ray_ft.view import View
from tests.integration.servers import KEY, Served, descendants, living, serving, update
from tests.integration.test_serving import get
from tests.unit.distributed import recipe_of

pytestmark = [pytest.mark.serve, pytest.mark.timeout(900)]
LABELS = ["negative", "neutral", "positive"]
TEXTS = ["one two three", "ten", "nine eight seven six five four", "two two two two", "four five"]


def write_classifier(folder: Path) -> Any:
    """A random Gemma 3 of three labels, whose context is 64 tokens. Returns what transformers says: text → labels."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import Gemma3TextConfig, Gemma3TextForSequenceClassification, PreTrainedTokenizerFast

    folder.mkdir(parents=True)
    words = ["<pad>", "<eos>", "<bos>", "<unk>", *TEXTS[2].split(), *TEXTS[0].split(), "ten"]
    plain = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.enable_truncation(8)  # as many published folders have it: a long text is to be refused all the same
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        architectures=["Gemma3TextForSequenceClassification"], dtype="float32", vocab_size=len(words), hidden_size=32,
        intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        max_position_embeddings=64, sliding_window=16, initializer_range=0.4, pad_token_id=0, eos_token_id=1,
        id2label=dict(enumerate(LABELS)), label2id={label: at for at, label in enumerate(LABELS)},
    )  # fmt: skip
    model = Gemma3TextForSequenceClassification(config).eval()
    model.save_pretrained(folder)

    def said(text: str) -> dict[str, float]:
        ids = tokenizer(text, truncation=False)["input_ids"]
        with torch.no_grad():
            return dict(zip(LABELS, model(torch.tensor([ids])).logits[0].softmax(-1).tolist(), strict=True))

    manifest = {
        "format": 2, "run": "mood", "step": 4, "base": "none", "recipe_sha256": "0" * 64, "metrics": {},
        "created": "2026-01-01T00:00:00Z", "kind": "model", "checks": {},
        "proof": {"input": TEXTS[2], "probabilities": said(TEXTS[2])},
        "model": {
            "architecture": "Gemma3TextForSequenceClassification", "model_type": "gemma3_text", "dtype": "float32",
            "parameters": sum(each.numel() for each in model.parameters()), "bytes": 0, "max_position_embeddings": 64,
        },
        "serve": Serve(max_num_seqs=4).model_dump(mode="json"),
        "files": {
            path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            for path in sorted(folder.iterdir())
        },
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return said


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("run") / "export"
    found = write_classifier(folder)
    found.folder = folder
    return found


@pytest.fixture(scope="module")
def trained(demo: DemoPaths, label_files: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The run directory of a classifier that was trained for some steps, and exported."""
    train, heldout = ([{"path": file, "format": "labels"}] for file in label_files)
    recipe = recipe_of(
        demo, tmp_path_factory.mktemp("runs"), "run.name=tongues", 'model.labels=["en", "fr", "es", "de"]',
        f"data.train={json.dumps(train)}", f"data.eval={json.dumps(heldout)}", "train.max_steps=12",
        "train.optimizer.lr=1e-2",
    )  # fmt: skip
    view = View(Console(quiet=True))
    launch.train(recipe, view)
    export(recipe.run.dir.root, view)
    return recipe.run.dir.root


@pytest.fixture(scope="module")
def served(said: Any, trained: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("log"), said.folder, trained) as one:
        yield one


def ask(served: Served, body: dict[str, Any], path: str = "/classify") -> httpx.Response:
    headers = {"Authorization": f"Bearer {KEY}"}
    return httpx.post(served.url + path, json=body, headers=headers, trust_env=False, timeout=60)


def test_labels_equal_transformers(served: Served, said: Any) -> None:
    """Alone and in batches of unequal lengths: padding must change nothing."""
    expected = [said(text) for text in TEXTS]
    assert len({max(each, key=each.__getitem__) for each in expected}) > 1, "one label for all would hide faults"
    alone = [ask(served, {"model": "mood", "input": text}).json()["data"][0] for text in TEXTS]
    together = ask(served, {"model": "mood", "input": TEXTS * 3}).json()
    for found in (alone, together["data"][: len(TEXTS)], together["data"][-len(TEXTS) :]):
        for one, wanted in zip(found, expected, strict=True):
            assert one["label"] == max(wanted, key=wanted.__getitem__)
            assert one["probabilities"] == pytest.approx(wanted, abs=1e-5)
    assert together["usage"]["prompt_tokens"] == 3 * sum(len(text.split()) for text in TEXTS)


def test_a_trained_run_answers_with_the_probabilities_of_its_export(served: Served, trained: str) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = f"{trained}/export"
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["ninety-nine thousand", "quatre-vingt-dix", "tres mil cien", "dreihundertvierundzwanzig"]
    found = ask(served, {"model": "tongues", "input": texts}).json()["data"]
    for text, one in zip(texts, found, strict=True):
        with torch.no_grad():
            said = model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0].softmax(-1)
        assert list(one["probabilities"].values()) == pytest.approx(said.tolist(), abs=1e-5)
        assert list(one["probabilities"]) == ["en", "fr", "es", "de"]
    assert [one["label"] for one in found] == ["en", "fr", "es", "de"]
    assert ask(served, {"model": "tongues", "input": "a" * 9000}).status_code == 400  # over the model's context


def test_the_command_shown_asks_for_labels(served: Served) -> None:
    line = next(line for line in served.log.read_text().splitlines() if "try it" in line)
    assert "/v1/classify" in line and '"input": "Hello!"' in line


def test_no_process_of_rays_has_the_key(served: Served) -> None:
    """Neither in its arguments nor in its environment; this command's own is where the person put it."""
    looked = 0
    for process in served.processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            told = [*process.cmdline(), *process.environ().values()]
            looked += "ServeReplica" in " ".join(process.cmdline())
            assert not any(KEY in one for one in told), process
    assert looked >= 2, "the gateway and the classifier"


def test_what_it_cannot_label_is_400(served: Served) -> None:
    for body, word in (
        ({"input": "one " * 65}, "65 tokens"),
        ({"input": " "}, "no token"),
        ({"input": []}, "1 to 64 texts"),
        ({"input": [1]}, "1 to 64 texts"),
        ({}, "'input' is missing"),
    ):
        reply = ask(served, {"model": "mood", **body})
        assert (reply.status_code, word in reply.json()["error"]["message"]) == (400, True), reply.text
    reply = ask(served, {"model": "mood", "messages": [{"role": "user", "content": "a"}]}, "/chat/completions")
    assert reply.status_code == 400 and "/v1/classify" in reply.text
    assert get(served, "/health", key=None).json() == {"status": "ok"}


def test_the_same_again_changes_nothing(served: Served, said: Any) -> None:
    found = update(served, said.folder)
    assert found.returncode == 0, found.stdout
    assert "mood answers as before: mood, step 4" in found.stdout


def test_labels_that_are_not_the_exports_are_refused(served: Served, said: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_classifier(run / "export")
    manifest = json.loads((run / "export/manifest.json").read_text())
    manifest["proof"]["probabilities"] = dict.fromkeys(LABELS, 1 / 3)
    manifest["serve"]["max_num_seqs"] = 5  # another version
    (run / "export/manifest.json").write_text(json.dumps(manifest))
    found = update(served, run)
    assert found.returncode == 1
    assert "refused, and what answered before goes on: 'mood' from" in found.stdout
    assert "does not answer as it was exported" in found.stdout
    assert ask(served, {"model": "mood", "input": "one"}).status_code == 200


def test_ctrl_c_under_load_ends_soon(served: Served) -> None:
    """The last test of the served model: it ends it. What is under way is answered or cut within seconds."""
    over = threading.Event()

    def load() -> None:
        while not over.is_set():
            try:
                ask(served, {"model": "mood", "input": TEXTS * 12})
            except httpx.HTTPError:
                return

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    processes = descendants(served.process)
    served.process.send_signal(signal.SIGINT)
    assert served.process.wait(180) == 0
    over.set()
    for thread in threads:
        thread.join()
    assert served.log.read_text().splitlines()[-1] == "stopped"
    assert living([*served.processes, *processes]) == []
