"""Answers from transformers: checkpoints, exports, base models and adapters, alone and in batches."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ray_ft import answers
from ray_ft.answers import Answer, Prompt, Sampling, Target, found, local
from ray_ft.data.images import BadImage
from ray_ft.demo import DemoPaths
from ray_ft.errors import CheckpointError, ModelError, ResourceError
from ray_ft.recipe import Recipe
from ray_ft.train import launch
from ray_ft.view import View
from tests.unit import tiny

WORDS = ("seven", "ninety-nine thousand, three hundred and forty-six", "forty", "eleven hundred")
PROMPTS = [Prompt(messages=[{"role": "user", "content": f"Translate to French (fr): {word}"}]) for word in WORDS]
SHORT = Sampling(max_new_tokens=8)


def ask(target: str, prompts: list[Prompt], sampling: Sampling = SHORT, **options: Any) -> list[Answer]:
    with answers.opened(Target.of(target), "transformers", device="cpu", **options) as engine:
        return list(engine.answers(prompts, sampling))


def by_hand(folder: str, prompt: Prompt) -> tuple[str, list[int]]:
    """What transformers' own classes give, one prompt at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = tokenizer.apply_chat_template(
        prompt.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    new = model.generate(ids, max_new_tokens=8, do_sample=False, top_k=None, top_p=None)[0, ids.shape[1] :].tolist()
    return tokenizer.decode(new, skip_special_tokens=True), new


def test_a_batch_is_what_transformers_gives_one_by_one(demo: DemoPaths) -> None:
    """Prompts of several lengths, padded on the left, and a last batch that is not full."""
    found = ask(demo.base, PROMPTS, batch_size=3)
    assert len({one.prompt_tokens for one in found}) > 1
    for prompt, one in zip(PROMPTS, found, strict=True):
        text, new = by_hand(demo.base, prompt)
        assert (one.text, one.tokens, one.error) == (text, len(new), None)
    assert len({one.text for one in found}) > 1


def test_a_prompt_that_cannot_be_answered_is_one_answer(demo: DemoPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(found, "CONTEXT", 64)
    twice = Prompt(messages=[{"role": "user", "content": "a"}] * 2)
    answered = ask(demo.base, [PROMPTS[0], Prompt(text="seven " * 80), twice, PROMPTS[2]])
    assert [one.finish == "error" for one in answered] == [False, True, True, False]
    assert "no room in a context of 64" in str(answered[1].error) and "chat template" in str(answered[2].error)
    assert answered[0] == ask(demo.base, PROMPTS[:1])[0]


def test_prompts_are_read_batch_by_batch(demo: DemoPaths) -> None:
    read: list[int] = []

    def stream() -> Iterator[Prompt]:
        for number in range(100):
            read.append(number)
            yield PROMPTS[number % 4]

    with answers.opened(Target.of(demo.base), batch_size=4, device="cpu") as engine:
        next(engine.answers(stream(), Sampling(max_new_tokens=1)))
    assert len(read) == 4


def test_a_seed_draws_the_same_again(demo: DemoPaths) -> None:
    hot = Sampling(max_new_tokens=8, temperature=2.0, seed=1)
    first = ask(demo.base, PROMPTS, hot)
    assert first == ask(demo.base, PROMPTS, hot)
    assert first != ask(demo.base, PROMPTS, Sampling(max_new_tokens=8, temperature=2.0, seed=2))
    assert first != ask(demo.base, PROMPTS)
    # Next to nothing is drawn from: the likeliest token alone.
    narrow = Sampling(max_new_tokens=8, temperature=1.0, top_p=1e-6, seed=1)
    assert ask(demo.base, PROMPTS, narrow) == ask(demo.base, PROMPTS)


def test_what_the_folder_suggests_is_not_sampled_with(demo: DemoPaths, tmp_path: Path) -> None:
    """Greedy is greedy, also where generation_config.json asks for draws and penalties; its stop ids count."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in Path(demo.base).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    plain = ask(str(folder), PROMPTS)
    suggested = {"do_sample": True, "temperature": 9.0, "top_k": 5, "repetition_penalty": 9.0, "eos_token_id": [1, 5]}
    (folder / "generation_config.json").write_text(json.dumps(suggested))
    assert ask(str(folder), PROMPTS) == plain
    tokenizer = AutoTokenizer.from_pretrained(folder)
    first = by_hand(demo.base, PROMPTS[0])[1][0]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [first]}))
    stopped = ask(str(folder), PROMPTS[:1])[0]
    assert (stopped.finish, stopped.tokens) == ("stop", 1), tokenizer.decode([first])


@pytest.fixture
def trained(make_recipe: Callable[..., Recipe]) -> Callable[..., Recipe]:
    def train(*overrides: str) -> Recipe:
        settings = make_recipe(
            "train.max_steps=3", "train.optimizer.lr=0.05", "train.checkpoint.every=3", "data.eval=[]", *overrides
        )
        launch.train(settings, View())
        return settings

    return train


@pytest.mark.parametrize("adapted", [False, True])
def test_a_run_answers_with_its_checkpoint(
    trained: Callable[..., Recipe], demo: DemoPaths, tmp_path: Path, adapted: bool
) -> None:
    lora = (
        ["model.adapter={name: lora, rank: 4, target_modules: ['*q_proj', '*v_proj', '*down_proj']}"] if adapted else []
    )
    settings = trained(*lora)
    run = settings.run.dir.root
    answered = ask(run, PROMPTS)
    assert answered != ask(demo.base, PROMPTS)
    with answers.opened(Target.of(run), device="cpu") as engine:
        assert engine.identity == {"run": run, "step": 3} and engine.name == "transformers"
        assert "checkpoint of step 3" in engine.model
    with pytest.raises(CheckpointError, match=r"it has no export[\s\S]*ray-ft export"):
        found.find(Target.of(run), export_only=True)
    # The trained weights as one plain folder, through another way than ours.
    from ray_ft.trained import Trained

    model = Trained.of(run).model(torch.device("cpu"), torch.float32)
    ids = AutoTokenizer.from_pretrained(demo.base).apply_chat_template(
        PROMPTS[1].messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    new = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert answered[1].text == AutoTokenizer.from_pretrained(demo.base).decode(new, skip_special_tokens=True)


def test_an_export_of_the_newest_checkpoint_answers_an_older_one_does_not(
    trained: Callable[..., Recipe], demo: DemoPaths
) -> None:
    run = trained().run.dir
    export = Path(run.export)
    export.mkdir()
    for path in Path(demo.base).iterdir():  # the base's weights, so that it shows which of the two has answered
        (export / path.name).write_bytes(path.read_bytes())
    content = {
        "format": 2, "kind": "model", "run": "test", "step": 3, "files": {}, "serve": {"max_model_len": 96},
        "model": {"trained_seq_len": 128},
    }  # fmt: skip
    (export / "manifest.json").write_text(json.dumps(content))
    what = found.find(Target.of(run.root), export_only=True)
    assert (what.run, what.source, what.context) == (None, run.export, 96)
    assert ask(run.root, PROMPTS) == ask(demo.base, PROMPTS) == ask(run.export, PROMPTS)
    (export / "manifest.json").write_text(json.dumps(content | {"step": 2}))
    assert ask(run.root, PROMPTS) != ask(demo.base, PROMPTS)
    with pytest.raises(CheckpointError, match="export is of step 2, its newest checkpoint of step 3"):
        found.find(Target.of(run.root), export_only=True)


def test_an_adapter_answers_over_its_base(demo: DemoPaths, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(demo.base), LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.5)
    model.save_pretrained(tmp_path / "adapter")
    answered = ask(str(tmp_path / "adapter"), PROMPTS)
    assert answered != ask(demo.base, PROMPTS)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    for path in Path(demo.base).glob("token*"):
        (tmp_path / "merged" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "merged" / "chat_template.jinja").write_bytes((Path(demo.base) / "chat_template.jinja").read_bytes())
    assert [one.text for one in ask(str(tmp_path / "merged"), PROMPTS)] == [one.text for one in answered]
    with pytest.raises(ModelError, match="an adapter alone"):
        found.find(Target.of(str(tmp_path / "adapter")), export_only=True)


def test_weights_that_lack_a_tensor_are_refused(demo: DemoPaths, tmp_path: Path) -> None:
    """Where `from_pretrained` would warn and answer with random weights."""
    from safetensors.torch import load_file, save_file

    for path in Path(demo.base).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 missing \(model.norm.weight\)"):
        ask(str(tmp_path), PROMPTS)


def test_no_gpu_and_no_vllm_are_said(demo: DemoPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ResourceError, match="no GPU"), answers.opened(Target.of(demo.base), device="cuda"):
        pass
    with (
        pytest.raises(ModelError, match=r"neither|hub"),
        answers.opened(Target.of("nobody/nothing-here"), device="cpu"),
    ):
        pass


# ------------------------------------------------------------------------------------------------------------ images


def test_a_model_without_eyes_refuses_images(demo: DemoPaths) -> None:
    with pytest.raises(ModelError, match=r"does not see[\s\S]*gemma-3-4b"):
        ask(demo.base, [picture("red")])


def test_nothing_is_fetched_for_an_image() -> None:
    with pytest.raises(BadImage, match="nothing is fetched"):
        local._image("http://127.0.0.1/cat.png")
    with pytest.raises(BadImage, match="not a PNG"):
        local._image("data:image/png;base64,AAAA")


def picture(colour: str) -> Prompt:
    from io import BytesIO

    from PIL import Image

    buffer = BytesIO()
    Image.new("RGB", (40, 30), colour).save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "seven"}]
    return Prompt(messages=[{"role": "user", "content": content}])


@pytest.fixture
def seeing(tmp_path: Path) -> str:
    """A tiny Gemma 3 with a vision tower, its tokenizer and processor."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import Gemma3Processor, PreTrainedTokenizerFast
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_image>", "<end_of_image>", "<image_soft_token>", "<turn>"]
    letters = [*map(chr, range(97, 123)), "Ġ", "Ċ", ":", "."]
    vocabulary = {token: at for at, token in enumerate([*special, *letters])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>",
        extra_special_tokens={
            "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>",
            "turn_token": "<turn>",
        },
    )  # fmt: skip
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<turn>{% if m['content'] is string %}{{ m['content'] }}{% else %}"
        "{% for p in m['content'] %}{{ '<start_of_image>' if p['type'] == 'image' else p['text'] }}{% endfor %}"
        "{% endif %}<turn>{% endfor %}"
    )
    images = Gemma3ImageProcessorPil(size={"height": 28, "width": 28}, image_seq_length=4)
    Gemma3Processor(images, tokenizer, chat_template=tokenizer.chat_template, image_seq_length=4).save_pretrained(
        tmp_path
    )
    torch.manual_seed(5)
    config = tiny.config("gemma3")
    config.image_token_id, config.boi_token_id, config.eoi_token_id = 6, 4, 5
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3 if "projector" in name or "vision" in name else 0.2)
        embedding = model.get_input_embeddings().weight  # tied: a token of zeros is never the likeliest
        embedding[: len(special)] = embedding[len(vocabulary) :] = 0
    model.save_pretrained(tmp_path)
    return str(tmp_path)


def test_a_model_that_sees_answers_about_images(seeing: str) -> None:
    red, blue = (ask(seeing, [picture(colour)])[0] for colour in ("red", "blue"))
    assert red.error is None and red.prompt_tokens > 4
    assert red.text != blue.text
    words = Prompt(messages=[{"role": "user", "content": "seven"}])
    longer = picture("blue")
    assert longer.messages is not None
    longer.messages[0]["content"].append({"type": "text", "text": " and how many"})
    broken = picture("red")
    assert broken.messages is not None
    broken.messages[0]["content"][0]["image_url"]["url"] = "data:image/png;base64,AAAA"
    mixed = ask(seeing, [words, picture("red"), words, longer, broken])
    assert mixed[1] == red and mixed[0] == mixed[2] == ask(seeing, [words])[0]
    assert mixed[3] == ask(seeing, [longer])[0]  # beside a shorter one as alone
    assert "not a PNG" in (mixed[4].error or "")
