"""Metrics: rates worked out by hand, and files that a resumed run continues instead of repeating steps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from ray_ft.artifacts import RunDir
from ray_ft.data.pack import REAL, START, Rows
from ray_ft.model.flops import flops_per_token
from ray_ft.strategy import Layout
from ray_ft.train import metrics
from ray_ft.train.metrics import Meter, MetricsLog, read_metrics


def row(step: int, loss: float = 1.0) -> dict[str, float]:
    return {"step": step, "loss": loss}


def test_rows_go_to_the_file_at_once_and_to_tensorboard(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path / "run"))
    log = MetricsLog(run, 0)
    log.add(row(1, 3.0))
    assert read_metrics(run) == [row(1, 3.0)]  # before it is closed
    log.add({**row(2, 2.0), "eval_loss": 2.5})
    log.close()
    events = EventAccumulator(run.tensorboard).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 3.0), (2, 2.0)]
    assert [(e.step, e.value) for e in events.Scalars("eval_loss")] == [(2, 2.5)]


def test_a_resumed_run_drops_the_rows_of_steps_that_it_takes_again(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path / "run"))
    log = MetricsLog(run, 0)
    for step in range(1, 7):
        log.add(row(step, 10.0 - step))
    log.close()
    log = MetricsLog(run, 4)
    assert [r["step"] for r in read_metrics(run)] == [1, 2, 3, 4]
    log.add(row(5, 0.5))
    log.close()
    assert [(r["step"], r["loss"]) for r in read_metrics(run)] == [(1, 9), (2, 8), (3, 7), (4, 6), (5, 0.5)]
    events = EventAccumulator(run.tensorboard).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 9), (2, 8), (3, 7), (4, 6), (5, 0.5)]


@pytest.mark.parametrize("rest", ['{"step": 3, "lo', '{"step": 3, "loss": 1.0}'])
def test_a_last_line_that_was_cut_is_left_out(rest: str, tmp_path: Path) -> None:
    run = RunDir(str(tmp_path))
    Path(run.metrics).write_text(json.dumps(row(1)) + "\n" + json.dumps(row(2)) + "\n" + rest)
    assert read_metrics(run) == [row(1), row(2)]
    MetricsLog(run, 2).close()
    assert Path(run.metrics).read_text().endswith("}\n")


def test_no_file_no_rows(tmp_path: Path) -> None:
    assert read_metrics(RunDir(str(tmp_path))) == []


# ---------------------------------------------------------------------------------------------------------- rates


@pytest.mark.parametrize("tied", [True, False])
def test_flops_per_token_by_hand(tied: bool) -> None:
    with torch.device("meta"):
        model = Gemma3ForCausalLM(
            Gemma3TextConfig(
                vocab_size=100,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=8,
                tie_word_embeddings=tied,
            )
        )
    attention = 16 * 16 + 2 * 16 * 8 + 16 * 16  # q, k and v, o
    layer = attention + 3 * 16 * 32  # and gate, up, down
    head = 100 * 16  # the embedding itself where tied; looking words up costs nothing
    assert flops_per_token(model) == 6 * (2 * layer + head)
    for parameter in model.model.layers[0].mlp.parameters():
        parameter.requires_grad_(False)
    assert flops_per_token(model) == 6 * (2 * layer + head) - 2 * 3 * 16 * 32


def test_rates_leave_out_pauses_and_count_real_tokens_of_all_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: clock[0])
    layout = Layout(0, 4, torch.device("cpu"), torch.float32)
    meter = Meter(layout, 100.0)
    flags = np.zeros((2, 10), np.uint8)
    flags[:, :5] = REAL
    flags[:, 0] |= START
    rows = Rows(np.zeros((2, 10), np.int32), flags)

    clock[0] += 0.5
    meter.waited(0.5)
    clock[0] += 1.5
    assert meter.step(1, 2.0, 3.0, 0.1, rows) == {"step": 1, "loss": 2.0, "grad_norm": 3.0, "lr": 0.1}
    clock[0] += 1000.0  # evaluation
    meter.pause()
    clock[0] += 3.0
    found = meter.row(meter.step(2, 2.0, 3.0, 0.1, rows))
    assert found["tokens_per_second"] == pytest.approx(20 * 4 / 5)
    assert found["data_wait_share"] == pytest.approx(0.1)
    assert found["non_pad_share"] == 0.5
    assert 0.01 < found["memory_gib"] < 100
    assert "mfu" not in found  # no figure for a CPU
    clock[0] += 1.0
    assert meter.row(meter.step(3, 2.0, 3.0, 0.1, rows))["tokens_per_second"] == pytest.approx(40)  # began anew


def test_peak_flops_by_the_devices_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert metrics.peak_flops(torch.device("cpu")) is None
    names = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA L4": 121e12, "NVIDIA L40S": 362e12, "Something Else": None}
    for name, flops in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert metrics.peak_flops(torch.device("cuda")) == flops


def test_rows_that_came_with_a_checkpoint_fill_the_gap_that_a_lost_command_left(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path))
    log = MetricsLog(run, 0)
    for step in (1, 2, 3):
        log.add({"step": step, "loss": 1.0 / step})
    log.close()
    known = [{"step": step, "loss": 10.0 + step} for step in range(3, 7)]
    again = MetricsLog(run, 5, known)
    assert [(row["step"], row["loss"]) for row in read_metrics(run)] == [
        (1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3)), (4, 14.0), (5, 15.0)
    ]  # fmt: skip
    again.add({"step": 6, "loss": 0.0})
    again.rewind(4)
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3, 4]
    again.rewind(6, known)
    again.close()
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3, 4, 5, 6]
