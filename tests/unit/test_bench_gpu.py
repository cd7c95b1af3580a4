"""The benchmark of one GPU: its arithmetic, its search, its processes, and all of its parts in small."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
import types
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import cases, longest, loss, matmul, predict, running, steps, tables, training
from benchmarks.gpu import device as devices
from benchmarks.gpu.cases import ABLATION, FULL_27B, LONG_FULL, LORA_27B, TRAINED
from benchmarks.gpu.parts import FIRST, PARTS, SECOND, Part, Setting
from benchmarks.result import Result, read
from ray_ft.data import pack
from ray_ft.train.keeper import Keeper

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def setting(folder: Path, seconds: float = 60, device: str = "cpu") -> tuple[Setting, list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    return Setting(device, True, 1, time.monotonic() + seconds, folder, rows.append), rows


# ------------------------------------------------------------------------------------------------ the true models


def test_the_true_27b_is_built_and_counted(tmp_path: Path) -> None:
    """By the code of the parts, on the device without memory: weights, and FLOPs per token as they are known."""
    meta = torch.device("meta")
    lora = steps.Built(LORA_27B, meta, tmp_path, False, 1)
    module = lora.built.strategy.module
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert sum(p.numel() for p in module.parameters()) == 27_432_406_640 + trained
    assert 113e6 < trained < 114e6
    # Of the language model alone, 4 for each weight, and of attention 3 times what it takes forwards: 111 GFLOP.
    assert (lora.flops - 6 * trained + lora.score_flops) / 1e9 == pytest.approx(111, abs=0.5)
    full = steps.Built(FULL_27B, meta, tmp_path, False, 1)
    assert (full.flops + full.score_flops) / 1e9 == pytest.approx(165, abs=0.5)
    assert {p.dtype for p in full.built.strategy.module.parameters()} == {torch.bfloat16}
    # 54 GB of weights cannot stand beside 54 GB of gradients and an H200's 141 GB hold activations too.
    assert predict.planned(FULL_27B).fits
    beside = FULL_27B.variant("", "train.optimizer.in_backward=false", seq_len=16384)
    assert not predict.planned(beside).fits
    assert predict.planned(LORA_27B).fits
    assert not predict.planned(LORA_27B.variant("", "train.gradient_checkpointing=false")).fits


def test_all_cases_are_recipes() -> None:
    everything = (*TRAINED, *ABLATION, cases.LONG_LORA, LONG_FULL)
    assert len({case.name for case in everything}) == len(everything)
    for case in everything:
        recipe = cases.recipe_of(case, f"google/gemma-3-{case.size}-it")
        assert recipe.train.in_process
        assert recipe.train.global_batch == case.rows
        assert recipe.data.seq_len == 4096
        assert recipe.train.optimizer.in_backward == (recipe.train.clip_norm is None)
    assert [case.name for case in ABLATION if "liger" in case.patches] == [ABLATION[-1].name]  # it stays in force


# ------------------------------------------------------------------------------------------------- rows and steps


def test_mock_rows_are_full_of_targets_and_documents_begin_where_they_should() -> None:
    rows = steps.mock_rows(3, 8, 40, documents=2, seed=1)
    assert ((rows.flags & pack.REAL) != 0).all()
    assert (rows.flags & pack.START).nonzero()[1].tolist() == [0, 4] * 3
    assert pack.position_ids(rows.flags)[0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert rows.input_ids.max() < 40
    stream = steps.batches(rows, 1)
    first = [next(stream) for _ in range(4)]
    assert [batch.first for batch in first] == [0, 1, 2, 3]
    assert first[3].rows.input_ids.tolist() == first[0].rows.input_ids.tolist()


def test_what_stands_for_the_keeper_has_all_that_the_loop_calls() -> None:
    wanted = {name for name, value in vars(Keeper).items() if not name.startswith("_") and callable(value)}
    assert wanted <= set(dir(steps._Nothing))


def test_a_case_is_timed_step_by_step_without_its_warm_up(tmp_path: Path) -> None:
    case = cases.tiny(LORA_27B)
    one, rows = setting(tmp_path)
    one.steps = 3
    row = steps.measured(case, one)
    assert len(row["step_seconds"]) == 3
    assert row["tokens"] == cases.TINY_SEQ
    assert row["settings"] == "gradient_checkpointing=0.25"
    assert abs(row["loss"][0] - 6.24) < 0.3  # random weights: the logarithm of 512 words
    # Each step is a row as it comes, with those before: a process that is killed leaves the last one.
    assert [len(one["step_seconds"]) for one in rows] == [1, 2, 3]
    assert running.newest([{"case": "x", "why": ""}, *rows]) == [{"case": "x", "why": ""}, row]
    late, _ = setting(tmp_path, seconds=-1)
    with pytest.raises(RuntimeError, match="after 2 steps"):
        steps.measured(case, late)


def test_steps_are_timed_until_they_are_enough_or_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(steps, "time", types.SimpleNamespace(monotonic=lambda: now))

    def after(durations: list[float], left: float, least: float = 10) -> bool:
        """Of the step that follows the first and those of `durations`, when `left` seconds are left."""
        times = [now - sum(durations[at:]) for at in range(len(durations) + 1)]
        return steps.is_last([{"at": at} for at in times], 3, least, now + left)

    assert not after([], 5)  # the first step may have compiled: nothing is known
    assert after([], -1)
    assert not after([4.0, 4.0, 4.0], 100, least=13)  # the first of them is warm-up; 12 seconds are timed with the next
    assert after([4.0, 4.0, 4.0], 100, least=12)
    assert not after([4.0, 40.0], 1000)  # seconds enough, steps not
    assert not after([4.0], 10.1)  # after the one under way 6.1 would be left, over one and a half times 4
    assert after([4.0], 9.9)


def test_a_full_case_updates_every_weight_of_the_language_model_within_the_backward_pass(tmp_path: Path) -> None:
    case = cases.tiny(FULL_27B).variant("", "train.optimizer.lr=0.01", rows=1, micro=1)
    ready = steps.Built(case, CPU, tmp_path, True, 1)
    weights = dict(ready.built.strategy.named_parameters())
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    ready.run(1, case.seq_len)
    changed = {name for name, weight in weights.items() if not torch.equal(weight, before[name])}
    assert changed == {name for name in weights if "language_model" in name}
    assert all(weight.grad is None for weight in weights.values())


def test_what_fails_costs_its_own_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = steps.measured

    def planted(case: Any, one: Setting) -> Any:
        if case.name in ("bad", LORA_27B.name):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …")
        return real(case, one)

    monkeypatch.setattr(steps, "measured", planted)
    one, rows = setting(tmp_path)
    training.measure(one, LORA_27B.variant("bad"), cases.FULL_27B_8BIT, LORA_27B)
    half = LORA_27B.instead
    assert half is not None
    assert [row["case"] for row in rows] == ["bad", cases.FULL_27B_8BIT.name, LORA_27B.name, half.name]
    assert rows[0]["why"] == "out of memory: Tried to allocate 2.00 GiB"
    assert "is for weights on a GPU" in rows[1]["why"]
    assert rows[3]["settings"] == "gradient_checkpointing=0.5"  # what does not fit is tried with more recomputed
    assert half.instead is not None
    assert half.instead.instead is None


def test_nothing_more_is_tried_on_a_device_that_fails_whatever_it_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planted(case: Any, one: Setting) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(steps, "measured", planted)
    one, rows = setting(tmp_path)
    training.measure(one, LORA_27B, FULL_27B)
    assert all("illegal memory access" in row["why"] for row in rows)  # the device still answers
    monkeypatch.setattr(devices, "is_broken", lambda _: True)
    one, rows = setting(tmp_path)
    training.measure(one, LORA_27B, FULL_27B)
    assert rows[1]["why"] == f"not tried: the device was unusable after {LORA_27B.name}"


def test_a_case_leaves_nothing_of_its_model_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[weakref.ref[Any]] = []
    real = steps.Built.__init__

    def noting(self: Any, *given: Any) -> None:
        real(self, *given)
        held.extend(weakref.ref(parameter) for parameter in self.built.strategy.module.parameters())

    monkeypatch.setattr(steps.Built, "__init__", noting)
    one, rows = setting(tmp_path)
    training.measure(one, FULL_27B, LORA_27B)
    assert [len(row["step_seconds"]) for row in rows] == [1, 1]
    assert len(held) > 100
    assert all(ref() is None for ref in held)


# ------------------------------------------------------------------------------------------------------- searching


@pytest.mark.parametrize("limit", [700, 1024, 5000, 40_000, 131_072, 10**6])
@pytest.mark.parametrize("guess", [100, 4096, 30_000, 10**6])
def test_the_longest_row_is_found_from_any_guess(limit: int, guess: int) -> None:
    tried: list[int] = []

    def fits(tokens: int) -> bool:
        tried.append(tokens)
        return tokens <= limit

    longest.search(guess, 1024, 131_072, fits, lambda _: False)
    low, high, close = found_in(tried, limit)
    assert close
    assert low <= limit
    assert low >= min(limit, 131_072) * 0.9 - 1024
    assert high is None if limit >= 131_072 else high is not None and high > limit
    assert len(tried) == len(set(tried)) <= 16
    if 0.9 * limit <= guess <= 1.1 * limit:  # as near as a plan is to be
        assert len(tried) <= 5


def found_in(tried: list[int], limit: int) -> tuple[int, int | None, bool]:
    return longest.found([{"tokens": one, "fits": one <= limit, "unit": 1024, "most": 131_072} for one in tried])


def test_a_search_without_time_says_what_it_knows() -> None:
    tried: list[int] = []
    longest.search(8192, 1024, 131_072, lambda at: not tried.append(at), lambda tokens: tokens > 20_000)
    assert tried == [8192, 10_240]
    assert found_in(tried, 10**6) == (10_240, None, False)
    longest.search(8192, 1024, 131_072, lambda _: True, lambda _: True)


def test_a_length_that_runs_out_of_memory_is_a_row_and_the_search_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = steps.Built.run

    def planted(self: Any, count: int, seq_len: int, *more: Any, **named: Any) -> Any:
        if seq_len > 100:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB. GPU 0")
        return real(self, count, seq_len, *more, **named)

    monkeypatch.setattr(steps.Built, "run", planted)
    one, rows = setting(tmp_path)
    longest.measure(one, cases.tiny(LONG_FULL), 2**31, lambda: 180)
    assert [(row["tokens"], row["fits"]) for row in rows] == [(160, False), (128, False), (64, True), (96, True),
                                                              (112, False)]  # fmt: skip
    assert rows[0]["why"].startswith("out of memory")
    assert longest.found(rows) == (96, 112, True)


def test_what_the_head_and_the_loss_take_is_without_what_layers_keep() -> None:
    class Decoder(torch.nn.Module):
        """Keeps 4 MB for its backward pass."""

        def __init__(self) -> None:
            super().__init__()
            self.words = torch.nn.Parameter(torch.ones(10, 25_000), requires_grad=False)

        def forward(self, given: torch.Tensor) -> Any:
            kept = given.expand(1000, 1000) * 1.0
            return type("Output", (), {"last_hidden_state": (kept * kept)[:1, :10] * 1.0})

    given, decoder = torch.ones(1, requires_grad=True), Decoder()
    row = loss.taken(lambda: (decoder(given).last_hidden_state @ decoder.words).exp().sum(), decoder, CPU)
    assert 2e5 <= row["bytes"] <= 2.1e5  # 25,000 logits with what is made of them, and not the 4 MB


# ------------------------------------------------------------------------------------------------------ arithmetic


def test_the_products_of_a_model_are_its_weights_and_their_rate_is_the_harmonic_mean() -> None:
    products = matmul.layer_products(cases.config_of("27b"), 4096)
    flops = sum(2 * rows * inner * columns * times for rows, inner, columns, times in products.values())
    assert flops / 4096 / 1e9 == pytest.approx(54.0, rel=0.01)  # 2 for each of the language model's 27.0B
    rows = [
        {"part": "matmul", "model": "27b", "rate": 1e14, "share": 0.5},
        {"part": "matmul", "model": "27b", "rate": 3e14, "share": 0.5},
    ]
    assert matmul.harmonic(rows, "27b") == pytest.approx(1.5e14)
    assert matmul.harmonic([*rows, {"part": "matmul", "model": "27b", "why": "…"}], "27b") is None
    assert matmul.harmonic(rows, "4b") is None


EAGER = next(case for case in ABLATION if case.name.endswith("eager"))


def row_of(case: cases.Case, part: str, seconds: float, gib: float) -> dict[str, Any]:
    return {
        "part": part, "case": case.name, "tokens": case.rows * case.seq_len, "step_seconds": [seconds] * 3,
        "settings": case.said, "flops": 100e9, "score_flops": 3e9, "clip": 1.0,
        "attention": "attention: sdpa, as the recipe says",
        "allocated": int(gib * 2**30), "reserved": int(gib * 2**30),
    }  # fmt: skip


def test_figures_are_computed_from_given_timings() -> None:
    rows = [
        {"part": "matmul", "name": "square", "shape": [1, 1, 1], "rate": 800e12},
        row_of(LORA_27B, "lora27", 1.0, 100),  # 4,096 × 100e9 ÷ 800e12
        row_of(cases.LORA_WAYS[1], "lora27-ways", 0.5, 100),  # faster, but a recipe cannot say it
        row_of(FULL_27B, "full27", 4.0, 80),
        {"part": "plan", "case": FULL_27B.name, "tensors": 88 * 2**30, "total": 90 * 2**30, "fullest": "loss",
         "fits": True, "tokens_per_second": 1.0},
        row_of(ABLATION[0], "ablation", 1.0, 20),
        row_of(ABLATION[1], "ablation", 1.25, 10),
        row_of(EAGER, "ablation", 2.5, 20),
        *({"part": "lora27", "case": "long", "tokens": tokens, "fits": True, "guess": 4096, "unit": 1024,
           "most": 131_072, "seconds": 1.0} for tokens in (3072, 4096)),
        {"part": "full27-8bit", "case": "x", "why": "no bitsandbytes"},
    ]  # fmt: skip
    result = Result("gpu", "", {})
    tables.fill(result, rows)
    figures = {figure.name: figure for figure in result.figures}
    lora = next(figure for name, figure in figures.items() if name.startswith("LoRA 27B"))
    assert lora.median == pytest.approx(0.512)
    assert lora.reached is False
    assert figures[f"{FULL_27B.name}, tokens/s"].median == pytest.approx(4096)
    memory = figures[f"{FULL_27B.name}, most memory in tensors"]
    assert memory.median == pytest.approx(85.9, abs=0.1)
    assert memory.reached is False  # of 80 GB
    (off,) = (figure for name, figure in figures.items() if "largest difference" in name)
    assert off.median == pytest.approx(0.1)
    by_title = {table.title: table for table in result.tables}
    (brings,) = (table for title, table in by_title.items() if title.startswith("What each"))
    # Eager attention recomputes all layers, and is compared with what does so.
    assert [line[3:5] for line in brings.rows] == [("1.000", "4B"), ("0.800", "4B"), ("0.500", ABLATION[1].name)]
    (long,) = (figure for name, figure in figures.items() if name.startswith("long,"))
    assert "at least: the time ended the search" in long.name
    assert "≥ 4,096" in long.cells()[1]
    assert by_title["Not measured"].rows == [("full27-8bit", "x", "no bitsandbytes")]
    assert list(by_title)[-1] == "Not measured"


def test_without_a_ceiling_nothing_is_a_share_of_it() -> None:
    result = Result("gpu", "", {})
    tables.fill(result, [row_of(LORA_27B, "lora27", 1.0, 100)])
    assert not [figure for figure in result.figures if "share" in figure.name]
    assert "no ceiling" in next(table for table in result.tables if table.title.startswith("Training")).rows[0]


# ------------------------------------------------------------------------------------------------------- processes


def test_parts_that_hang_or_fail_or_do_not_fit_say_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The processes are stand-ins; what they wrote before they hung stays."""
    script = tmp_path / "child.py"
    script.write_text(
        "import sys, time\n"
        "name, rows = sys.argv[1:3]\n"
        'open(rows, \'w\').write(\'{"part": "%s", "rate": 1.0}\\n{"cut\' % name)\n'
        "if name == 'hangs': time.sleep(60)\n"
        "if name == 'fails': raise SystemExit('it broke')\n"
    )
    real = subprocess.Popen

    def written(asked: list[str], **options: Any) -> subprocess.Popen[bytes]:
        process = real(asked, **options)
        while not Path(asked[3]).stat().st_size:  # its time begins then
            time.sleep(0.01)
        return process

    monkeypatch.setattr(running.subprocess, "Popen", written)
    monkeypatch.setattr(running, "GRACE", 0.2)
    monkeypatch.setattr(running, "REST", 0.0)
    monkeypatch.setattr(running, "child_command", lambda name, rows, *more: [sys.executable, str(script), name, rows])
    known = {
        name: Part(seconds, least, "", "")
        for name, seconds, least in (("good", 20, 0), ("fails", 20, 0), ("hangs", 0.5, 0), ("long", 900, 800))
    }
    found = running.run(known, list(known), 60, "cpu", True, 1)
    whys = {row["part"]: row["why"] for row in found if "why" in row}
    assert [row["part"] for row in found if "rate" in row] == ["good", "fails", "hangs"]
    assert "good" not in whys
    assert whys["fails"] == "failed (1): it broke"
    assert "did not end by itself" in whys["hangs"]
    assert whys["long"].startswith("did not fit in the time")


def test_a_command_that_is_told_to_end_gives_what_it_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "child.py"
    script.write_text(
        "import os, signal, sys, time\n"
        "name, rows = sys.argv[1:3]\n"
        'open(rows, \'w\').write(\'{"part": "%s", "rate": 1.0}\\n\' % name)\n'
        "os.kill(os.getppid(), signal.SIGTERM) if name == 'second' else None\n"
        "time.sleep(60) if name == 'second' else None\n"
    )
    monkeypatch.setattr(running, "child_command", lambda name, rows, *more: [sys.executable, str(script), name, rows])
    before = signal.getsignal(signal.SIGTERM)
    try:
        known = {name: Part(30, 0, "", "") for name in ("first", "second", "third")}
        found = running.run(known, list(known), 60, "cpu", True, 1)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [row["part"] for row in found if "rate" in row] == ["first", "second"]
    assert [(row["part"], row["why"]) for row in found if "why" in row] == [
        ("second", running.TOLD),
        ("third", running.TOLD),
    ]


def test_what_several_calls_wrote_is_one_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The ceiling of the first is that of what the second trained."""
    machine = {"gpu": "one", "packages": {}, "cores": 1, "cpu": "", "memory_gib": 1, "python": ""}
    square = {"part": "matmul", "name": "square", "shape": [1, 1, 1], "rate": 800e12}
    calls = [[square, {"part": "ablation", "why": "…"}], [row_of(LORA_27B, "lora27", 1.0, 100)]]
    for number, raw in enumerate([*calls, calls[0]]):
        about = {**machine, "gpu": "another" if number == 2 else "one"}
        Result("gpu", "", {}, raw=raw, machine=about, load=(0, 0)).write(tmp_path / f"{number}.json")
    files = [str(tmp_path / f"{number}.json") for number in range(3)]
    command.joined(command.parsed(["--join", *files[:2], "--to", str(tmp_path / "all.json")]))
    assert "0.512" in capsys.readouterr().out
    assert read(tmp_path / "all.json").raw == [row for call in calls for row in call]
    with pytest.raises(SystemExit, match="different GPUs"):
        command.joined(command.parsed(["--join", *files]))


def test_the_limits_of_a_call_fit_into_its_time() -> None:
    """As README.md says: all parts of the first call in nine minutes, all of the second in five."""
    spare = running.REST + running.GRACE
    assert sum(part.limit for part in FIRST.values()) <= command.MINUTES * 60 - spare
    assert sum(part.limit for part in SECOND.values()) <= 5 * 60 - spare


def test_the_command_runs_parts_in_the_order_of_their_worth() -> None:
    given = command.parsed(["--part", "loss", "matmul", "--minutes", "3"])
    assert given.part == ["matmul", "loss"]
    assert command.parsed([]).part == list(PARTS)
    assert next(iter(PARTS)) == "matmul"


BLOCKED = """
import importlib.util, sys
missing = {"ray", "deepspeed", "vllm", "bitsandbytes", "liger_kernel", "flash_attn", "datasets"}
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Refuse())
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name.split(".")[0] in missing else find(name, *more)
import json, tempfile, time
import torch
from pathlib import Path
from benchmarks.gpu import cases, parts, training
torch.set_num_threads(1)
with tempfile.TemporaryDirectory() as folder:
    rows = []
    setting = parts.Setting("cpu", True, 1, time.monotonic() + 800, Path(folder), rows.append)
    for name in ("matmul", "loss"):
        parts.PARTS[name].measure(setting)
    wanted = [one for one in cases.ABLATION if one.name in sys.argv[1:]]
    training.measure(setting, cases.FULL_27B, *wanted)
    print(json.dumps(rows))
"""


@pytest.mark.timeout(900)  # it compiles; half a minute on a quiet machine
def test_neither_ray_nor_a_kernel_package_is_needed() -> None:
    """In a process in which importing any of them fails: as on a bare machine."""
    wanted = ["4B", "torch.compile, layer by layer", "Liger's RMSNorm, GeGLU, RoPE", EAGER.name]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, *wanted], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    by_case = {row["case"]: row for row in rows if "case" in row}
    assert "No module named 'liger_kernel'" in by_case.pop("Liger's RMSNorm, GeGLU, RoPE")["why"]
    for name, row in by_case.items():
        assert row.get("step_seconds"), (name, row)
    losses = {row["name"]: row for row in rows if "bytes" in row}
    chunked, whole, theirs = losses.values()
    assert chunked["bytes"] < whole["bytes"]
    assert chunked["loss"] == pytest.approx(theirs["loss"], rel=1e-2)
    assert statistics.fmean(row["rate"] for row in rows if "rate" in row) > 0
