"""One small Gemma 3, served once for the whole module, as a person would: a process that is asked over HTTP, then told
to stop. Takes about a minute and 3.5 GiB on two free cores; most of it is five processes that import torch and vLLM.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shlex
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from ray_ft.errors import ServeError
from ray_ft.recipe import Serve
from serving import run as serving_run
from tests.integration.servers import KEY, Served, command_line, connections, descendants, living, serving, update

PROMPT = "seven plus two is"
MESSAGES = [{"role": "user", "content": "count to four"}]
pytestmark = [pytest.mark.serve, pytest.mark.timeout(600)]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def write_export(folder: Path, *, hidden_in_config: int = 64, seed: int = 0, step: int = 1) -> None:
    """A random Gemma 3 of 130,432 parameters with tokenizer, chat template and manifest."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

    folder.mkdir(parents=True)
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    # Printable ASCII only ("Ġ" is the space, "Ċ" the newline): a random model that emits half a character would make
    # the comparison one of how each side shows what is no text.
    alphabet = [*map(chr, range(33, 127)), "Ġ", "Ċ"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["one two three four five six seven eight nine ten"] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)

    torch.manual_seed(seed)
    config = Gemma3TextConfig(
        architectures=["Gemma3ForCausalLM"], dtype="float32", vocab_size=len(tokenizer), hidden_size=64,
        intermediate_size=128, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
        max_position_embeddings=512, sliding_window=64, query_pre_attn_scalar=32, initializer_range=0.2,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        pad_token_id=0, eos_token_id=[1, 5], bos_token_id=2,
    )  # fmt: skip
    model = Gemma3ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".post_" in name:  # else the tied embedding drowns the layers, and the answer repeats the last token
                parameter.fill_(8.0)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.hidden_size = hidden_in_config
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)

    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in sorted(folder.iterdir())
    }
    parameters = sum(tensor.numel() for tensor in tensors.values())
    ids = [2, *tokenizer(PROMPT, add_special_tokens=False)["input_ids"]]
    with torch.no_grad():
        rows = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    manifest = {
        "format": 2, "run": "tiny", "step": step, "base": "none", "recipe_sha256": "0" * 64, "metrics": {},
        "created": "2026-01-01T00:00:00Z", "kind": "model", "checks": {},
        "proof": {"token_ids": ids, "logprobs": [float(rows[at, token]) for at, token in enumerate(ids[1:])]},
        "model": {
            "architecture": "Gemma3ForCausalLM", "model_type": "gemma3_text", "dtype": "float32",
            "parameters": parameters, "bytes": files["model.safetensors"]["bytes"], "max_position_embeddings": 512,
            "trained_seq_len": 128, "stop_token_ids": [1, 5],
        },
        "serve": Serve(max_model_len=256).model_dump(mode="json"),
        "files": files,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    write_export(run / "export")
    return run


@pytest.fixture(scope="module")
def served(export: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("log"), export) as one:
        yield one


@pytest.fixture(scope="module")
def reference(export: Path) -> Any:
    """Transformers' greedy answer: token ids of a prompt → text."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(export / "export")
    model = AutoModelForCausalLM.from_pretrained(export / "export", dtype=torch.float32).eval()

    def answer(ids: list[int], tokens: int) -> str:
        prompt = torch.tensor([ids])
        with torch.no_grad():
            out = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                max_new_tokens=tokens,
                eos_token_id=[1, 5],
            )
        return str(tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True))

    answer.tokenizer = tokenizer  # type: ignore[attr-defined]
    return answer


def test_lists_the_model_under_the_runs_name(served: Served) -> None:
    assert [model.id for model in served.client.models.list()] == ["tiny"]


def test_completion_equals_transformers(served: Served, reference: Any) -> None:
    answer = served.client.completions.create(model="tiny", prompt=PROMPT, max_tokens=24, temperature=0)
    expected = reference(reference.tokenizer(PROMPT)["input_ids"], 24)
    assert answer.choices[0].text == expected
    assert len(set(expected)) > 3, "a reference that repeats one token would hide faults"


def test_chat_equals_transformers(served: Served, reference: Any) -> None:
    answer = served.client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=24, temperature=0)
    text = reference.tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert answer.choices[0].message.content == reference(reference.tokenizer(text)["input_ids"], 24)
    # The template already begins with <bos>; a second one would change every answer.
    assert answer.usage.prompt_tokens == len(reference.tokenizer(text)["input_ids"])


def test_streams_token_by_token(served: Served) -> None:
    create = served.client.chat.completions.create
    whole = create(model="tiny", messages=MESSAGES, max_tokens=24, temperature=0).choices[0].message.content
    chunks = [
        chunk.choices[0].delta.content or ""
        for chunk in create(model="tiny", messages=MESSAGES, max_tokens=24, temperature=0, stream=True)
        if chunk.choices
    ]
    assert "".join(chunks) == whole
    assert sum(bool(chunk) for chunk in chunks) > 1  # several tokens may come together where the machine is busy


def test_unknown_model_is_404(served: Served) -> None:
    from openai import NotFoundError

    with pytest.raises(NotFoundError):
        served.client.completions.create(model="another", prompt=PROMPT)


def test_too_long_a_prompt_is_400(served: Served) -> None:
    from openai import BadRequestError

    with pytest.raises(BadRequestError, match="256"):
        served.client.completions.create(model="tiny", prompt="x" * 400, max_tokens=1)


def test_the_command_shown_works(served: Served) -> None:
    line = next(line for line in served.log.read_text().splitlines() if "curl" in line)
    command = shlex.split(line.partition("try it: ")[2])
    command = [word.replace("$RAY_FT_API_KEY", KEY) for word in command]
    answer = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)
    assert answer["choices"][0]["message"]["role"] == "assistant"


def test_says_little(served: Served) -> None:
    lines = served.log.read_text().splitlines()
    assert len(lines) <= 16, lines  # some more where the machine is busy: what it waits for, again


def test_listens_on_loopback_only(served: Served) -> None:
    listening = []
    for process in [psutil.Process(served.process.pid), *served.processes]:
        ends = [one.laddr for one in connections(process) if one.status == psutil.CONN_LISTEN]
        listening += [(command_line(process), end.ip) for end in ends]
    assert listening
    assert [found for found in listening if found[1] not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")] == []


def get(served: Served, path: str, key: str | None = KEY) -> Any:
    import httpx

    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.get(served.url.removesuffix("/v1") + path, headers=headers, trust_env=False, timeout=30)


def test_lets_no_one_in(served: Served) -> None:
    assert get(served, "/v1/models", key=None).status_code == 401
    assert get(served, "/v1/models", key="rft-another-key-0123456789").status_code == 403
    assert get(served, "/v1/models").status_code == 200
    assert get(served, "/metrics").status_code == 403, "the tests' key is no admin's"
    assert get(served, "/health", key=None).json() == {"status": "ok"}
    assert KEY not in served.log.read_text()


def test_engines_answer_only_the_gateway(served: Served) -> None:
    """Whoever finds an engine's own port gets nothing without a ticket, on any path."""
    import httpx

    ports = {
        connection.laddr.port
        for process in served.processes
        if any(word in command_line(process) for word in ("ServeReplica", "VLLM"))
        for connection in connections(process)
        if connection.status == psutil.CONN_LISTEN
    } - {int(served.port)}
    answered, spoke = [], 0
    until = time.monotonic() + 60
    while spoke < 3:  # a busy engine may take longer than a second, and other ports say nothing however long
        assert time.monotonic() < until, "no port of the engine's was found"
        for port in ports:
            for path in ("/v1/models", "/v1/chat/completions", "/v1/load_lora_adapter"):
                with contextlib.suppress(httpx.HTTPError):
                    reply = httpx.post(f"http://127.0.0.1:{port}{path}", json={}, trust_env=False, timeout=1)
                    spoke += 1
                    if reply.status_code < 400 or b"tiny" in reply.content:
                        answered.append((port, path, reply.status_code))
    assert answered == []


def engine_cores(served: Served) -> int:
    return sum("EngineCore" in command_line(process) for process in descendants(served.process))


class Load:
    """Clients that ask without a pause, streamed and whole, and note each failure."""

    def __init__(self, served: Served, clients: int = 4) -> None:
        self._served = served
        self._over = threading.Event()
        self.answers: list[str] = []
        self.failures: list[str] = []
        self._threads = [threading.Thread(target=self._ask, args=(bool(at % 2),)) for at in range(clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, stream: bool) -> None:
        create = self._served.client.chat.completions.create
        while not self._over.is_set():
            try:
                reply = create(model="tiny", messages=MESSAGES, max_tokens=24, temperature=0, stream=stream)
                if stream:
                    reply = list(reply)
                    assert reply[-1].choices[0].finish_reason, "the stream was cut"
                    text = "".join(chunk.choices[0].delta.content or "" for chunk in reply)
                else:
                    text = reply.choices[0].message.content
                self.answers.append(text)
            except Exception as error:  # whatever it is, a client saw it
                self.failures.append(repr(error))


@pytest.mark.timeout(900)
def test_a_version_that_does_not_load_is_refused_and_the_old_one_answers(served: Served, tmp_path: Path) -> None:
    """Its weights do not fit config.json, which only vLLM's worker process finds out."""
    write_export(tmp_path / "run" / "export", hidden_in_config=96, step=3)
    with Load(served) as load:
        found = update(served, tmp_path / "run")
    assert found.returncode == 1
    assert "refused, and what answered before goes on: the model did not start: RuntimeError: The size" in found.stdout
    assert "the whole log is in" in found.stdout and "Engine core initialization failed" not in found.stdout
    assert load.failures == [] and len(set(load.answers)) == 1
    assert get(served, "/v1/models").json()["data"][0]["ray_ft"]["step"] == 1


@pytest.mark.timeout(900)
def test_a_new_version_takes_over_without_a_failed_request(served: Served, tmp_path: Path) -> None:
    write_export(tmp_path / "run" / "export", seed=1, step=2)
    with Load(served) as load:
        found = update(served, tmp_path / "run")
        until = time.monotonic() + 60
        while found.returncode == 0 and len(set(load.answers)) < 2 and time.monotonic() < until:
            time.sleep(0.1)  # who asked before it may still wait for the old weights' answer
    assert found.returncode == 0, found.stdout
    assert "tiny is now tiny, step 2; it was tiny, step 1" in found.stdout
    assert load.failures == []
    assert len(set(load.answers)) == 2, "first the old weights answer, then the new ones, and nothing else"
    assert get(served, "/v1/models").json()["data"][0]["ray_ft"]["step"] == 2
    until = time.monotonic() + 60
    while (engines := engine_cores(served)) != 1 and time.monotonic() < until:
        time.sleep(0.1)  # that of the old weights is on its way out
    assert engines == 1


def test_files_that_changed_are_refused(served: Served, tmp_path: Path) -> None:
    write_export(tmp_path / "run" / "export", seed=1, step=2)
    weights = tmp_path / "run" / "export" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    found = update(served, tmp_path / "run")
    assert found.returncode == 1 and "model.safetensors has another checksum" in found.stdout


def test_sigterm_leaves_nothing_behind(served: Served) -> None:
    """The last test of the served model: it ends it."""
    processes = descendants(served.process)
    assert any("EngineCore" in command_line(process) for process in processes)
    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(180) == 0
    assert served.log.read_text().splitlines()[-1] == "stopped"
    assert living([*served.processes, *processes]) == []


def test_port_in_use_is_refused_before_anything_starts(export: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ServeError, match=f"serve.port {port}.*in use") as caught:
            serving_run.serve_run(str(export), serving_run.Replaced(port=port))
    assert f"--port {port}" not in str(caught.value) and "--port" in str(caught.value)
    assert [child.name() for child in psutil.Process().children() if "gcs" in child.name()] == []


def test_missing_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ServeError, match="ray-ft export"):
        serving_run.serve_run(str(tmp_path))
