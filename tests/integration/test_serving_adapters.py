"""Two adapters and the base that they share, on one engine behind one gateway; and a stranger at its door.

One start of vLLM, about a minute on two free cores.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ray_ft.recipe import Gateway, Serve
from tests.integration import test_hostile as hostile
from tests.integration.servers import KEY, Served, command_line, connections, serving
from tests.integration.test_serving import MESSAGES, get, write_export

pytestmark = [pytest.mark.serve, pytest.mark.timeout(600)]
RANK = 4


def write_adapter(folder: Path, base: Path, name: str, seed: int) -> None:
    """A random adapter on all linear layers of a base, in PEFT's layout, with its manifest."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=RANK, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "lora_B" in key:
                parameter.normal_(0, 0.3)
    adapted.save_pretrained(folder)
    ids = [2, 20, 30, 40, 50, 60]
    with torch.no_grad():
        rows = adapted.eval()(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    facts = json.loads((base / "manifest.json").read_text())
    gateway = Gateway(media_domains=["images.example.org"])  # the one that the hostile requests expect to be allowed
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in sorted(folder.iterdir())
    }
    manifest = {
        **facts,
        "run": name,
        "base": str(base),
        "kind": "adapter",
        "proof": {"token_ids": ids, "logprobs": [float(rows[at, token]) for at, token in enumerate(ids[1:])]},
        "model": {**facts["model"], "rank": RANK},
        "serve": Serve(max_model_len=256, gateway=gateway).model_dump(mode="json"),
        "files": files,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "words"
    write_export(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate(("anna", "bert"), start=7):
        write_adapter(root / name / "adapter", base, name, seed)
    return {name: root / name for name in ("anna", "bert")}


@pytest.fixture(scope="module")
def served(adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("log"), adapters["anna"], adapters["bert"], "--base") as one:
        yield one


def test_one_engine_holds_them_all(served: Served) -> None:
    assert sum("EngineCore" in command_line(process) for process in served.processes) == 1
    entries = {entry["id"]: entry["ray_ft"] for entry in get(served, "/v1/models").json()["data"]}
    assert {name: entry["compare"] for name, entry in entries.items()} == {
        "anna": "words", "bert": "words", "words": None,
    }  # fmt: skip
    assert entries["anna"]["run"] == "anna" and entries["words"]["run"] is None


def test_each_name_answers_with_its_own_weights(served: Served, base: Path, adapters: dict[str, Path]) -> None:
    import peft
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]

    def expected(name: str) -> str:
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if name in adapters:
            model = peft.PeftModel.from_pretrained(model, str(adapters[name] / "adapter"))
        with torch.no_grad():
            out = model.eval().generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=24,
                eos_token_id=[1, 5],
            )  # fmt: skip
        return str(tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True))

    create = served.client.chat.completions.create
    answers = {}
    for name in ("anna", "bert", "words"):
        reply = create(model=name, messages=MESSAGES, max_tokens=24, temperature=0)
        assert reply.model == name
        answers[name] = reply.choices[0].message.content
        assert answers[name] == expected(name)
    assert len(set(answers.values())) == 3, "adapters that change nothing would hide faults"


def test_names_that_share_a_batch_answer_as_alone(served: Served) -> None:
    """vLLM on CPU gives a request for the base to an adapter where no slot is left empty."""
    create = served.client.chat.completions.create

    def ask(name: str) -> str:
        return str(create(model=name, messages=MESSAGES, max_tokens=32, temperature=0).choices[0].message.content)

    names = ("anna", "bert", "words")
    alone = {name: ask(name) for name in names}
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(ask, names * 8))
    assert [(name, answer == alone[name]) for name, answer in zip(names * 8, together, strict=True)] == [
        (name, True) for name in names * 8
    ]


@pytest.mark.parametrize("name", ["..", "anna/../bert", "/etc/passwd", "words:anna", "Anna", "", "anna\0"])
def test_only_names_that_were_served_are_found(served: Served, name: str) -> None:
    import httpx

    reply = httpx.post(
        f"{served.url}/chat/completions", json={"model": name, "messages": MESSAGES, "max_tokens": 1},
        headers={"Authorization": f"Bearer {KEY}"}, trust_env=False, timeout=30,
    )  # fmt: skip
    assert reply.status_code == 404, reply.text


def test_hostile_requests_change_nothing(served: Served) -> None:
    """The gateway's list of hostile requests, at the real thing."""
    found = re.match(r"http://([\d.]+):(\d+)/v1", served.url)
    assert found is not None
    target = hostile.Target(found[1], int(found[2]), "anna", KEY)
    faults = [hostile.check(case, hostile.ask(case, target)) for case in hostile.HOSTILE]
    assert [fault for fault in faults if fault] == []
    remote = [
        (command_line(process), connection.raddr)
        for process in served.processes
        for connection in connections(process)
        if connection.raddr and not connection.raddr.ip.removeprefix("::ffff:").startswith(("127.", "::1"))
    ]
    assert remote == [], "nothing connects to another machine"
    assert get(served, "/health", key=None).json() == {"status": "ok"}
    reply = served.client.chat.completions.create(model="bert", messages=MESSAGES, max_tokens=4, temperature=0)
    assert reply.usage.completion_tokens > 0
