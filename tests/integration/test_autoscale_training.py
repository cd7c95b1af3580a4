"""`ray-ft train` on a cluster that has no nodes: they come for it in one step, go after it, and one that is taken away
meanwhile is replaced, with a run that ends as if nothing had been.

Some two minutes on two cores, for all tests together. The autoscaler is Ray's own; its machines are processes.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from growing import Growing

from ray_ft import session
from ray_ft.artifacts import RunDir
from ray_ft.data import ledger
from ray_ft.demo import PROMPT, DemoPaths
from ray_ft.span import Span
from ray_ft.train import checkpoint
from ray_ft.train.metrics import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

STEPS, EVERY = 40, 5
#: Each worker takes a whole node, so that what reads rows has to lie on another: a cheap one, not the one with GPUs.
TYPES = {
    "worker": {"resources": {"CPU": 2}, "max_workers": 2},
    "reader": {"resources": {"CPU": 1}, "max_workers": 1},
    "gpus": {"resources": {"CPU": 4, "GPU": 4}, "max_workers": 2},
}


@dataclass
class Scene:
    """A cluster, what was seen of its nodes, and the runs that were made on it."""

    cluster: Growing
    folder: Path
    recipe: Path
    seconds: dict[str, float] = field(default_factory=dict)
    commands: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def run(self, name: str) -> RunDir:
        return RunDir(str(self.folder / "runs" / name))

    def begin(self, name: str, *overrides: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "ray_ft", "train", str(self.recipe), f"run.name={name}", *overrides]
        with open(self.folder / f"{name}.log", "wb") as log:
            self.commands.append(subprocess.Popen(command, env=self.cluster.env(), stdout=log, stderr=log))
        return self.commands[-1]

    def end(self, name: str, process: subprocess.Popen[bytes]) -> None:
        """Wait until the run is over."""
        self.wait(f"end of {name}", lambda: process.poll() is not None, seconds=420)
        assert process.returncode == 0, self.output(name)

    def output(self, name: str) -> str:
        return " ".join((self.folder / f"{name}.log").read_text(errors="replace").split())

    def seen(self) -> list[tuple[float, dict[str, str]]]:
        """(time, id → type of each node beside the head) as they were, twice a second."""
        lines = (self.folder / "nodes.jsonl").read_text().split("\n")[:-1]
        return [(found["time"], found["nodes"]) for found in map(json.loads, lines)]

    def now(self) -> dict[str, str]:
        return self.seen()[-1][1]

    def wait(self, what: str, condition: Callable[[], Any], process: Any = None, seconds: float = 420) -> None:
        until = time.monotonic() + seconds
        while not condition():
            over = process is not None and process.poll() is not None
            if (over and not condition()) or time.monotonic() > until:
                texts = [log.read_text(errors="replace")[-3000:] for log in self.folder.glob("*.log")]
                texts += [self.cluster.autoscaler_log()[-6000:]]
                pytest.fail(f"no {what}; nodes {self.now()}; " + "\n".join([*texts, self.cluster.output()[-3000:]]))
            time.sleep(0.2)

    def step(self, name: str) -> int:
        return max((int(row["step"]) for row in read_metrics(self.run(name))), default=0)


@pytest.fixture(scope="module")
def scene(demo: DemoPaths, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("growing")
    content = {
        "run": {"name": "x", "storage": str(folder / "runs")},
        "model": {"path": demo.base},
        "data": {
            "train": [{"path": list(demo.train), "format": "translation", "prompt": PROMPT}],
            "seq_len": 128,
            "ledger": True,
        },
        "train": {
            "workers": 2,
            "cpus_per_worker": 2,
            "device": "cpu",
            "global_batch": 16,  # a step of some 0.3 s, so that there is a middle of the run to take a node away in
            "micro_batch": 2,
            "max_steps": STEPS,
            "log_every": 1,
            "checkpoint": {"every": EVERY},
            "failures": {"hang_seconds": 20},
        },
    }
    (folder / "recipe.yaml").write_text(json.dumps(content))
    with Growing(TYPES, max_workers=4) as cluster, open(folder / "nodes.jsonl", "wb") as out:
        commands: list[subprocess.Popen[bytes]] = []
        watching = subprocess.Popen([sys.executable, __file__], env=cluster.env(), stdout=out)
        try:
            one = Scene(cluster, folder, folder / "recipe.yaml")
            one.wait("look at the nodes", lambda: (folder / "nodes.jsonl").stat().st_size, watching)
            commands = one.commands
            yield one
        finally:
            for process in [watching, *commands]:
                process.kill()
                process.wait()


@pytest.fixture(scope="module")
def undisturbed(scene: Scene) -> Scene:
    """One run from no nodes to no nodes."""
    scene.seconds["began"] = time.time()
    process = scene.begin("undisturbed")
    scene.end("undisturbed", process)
    scene.seconds["ended"] = time.time()
    scene.wait("end of the nodes", lambda: not scene.now(), seconds=300)
    scene.seconds["released"] = time.time()
    return scene


def test_what_no_node_type_can_hold_is_refused_at_once(scene: Scene) -> None:
    """Before any data is prepared, and before any node is started."""
    began = time.monotonic()
    process = scene.begin("impossible", "train.workers=8", "train.global_batch=16")
    assert process.wait(300) == 1
    print(f"refused after {time.monotonic() - began:.1f} s, with Python's and Ray's start")
    said = scene.output("impossible")
    assert "train.workers = 8 need 2 CPUs each" in said and "have room for 6" in said
    assert not (scene.folder / "runs").exists()
    assert scene.now() == {}


def test_nodes_come_for_a_run_and_go_after_it(undisturbed: Scene) -> None:
    print({name: round(at - undisturbed.seconds["began"], 1) for name, at in undisturbed.seconds.items()})
    during = [nodes for at, nodes in undisturbed.seen() if at < undisturbed.seconds["released"]]
    assert during[0] == {}
    most = Counter[str]()
    for nodes in during:
        most |= Counter(nodes.values())
    assert most["worker"] == 2  # Counter's | keeps the larger
    assert undisturbed.now() == {}
    # What released them is the idle timeout of three seconds, with the autoscaler's own steps.
    assert undisturbed.seconds["released"] - undisturbed.seconds["ended"] < 120


def test_workers_nodes_are_started_in_one_step(undisturbed: Scene) -> None:
    log = undisturbed.cluster.autoscaler_log()
    assert re.findall(r"Launching (\d+) nodes of type worker", log) == ["2"], log


def test_rows_are_read_on_a_node_without_gpus(undisturbed: Scene) -> None:
    kinds = {kind for _, nodes in undisturbed.seen() for kind in nodes.values()}
    assert kinds == {"worker", "reader"}


def test_a_node_that_is_taken_is_replaced_and_the_run_ends_exact(undisturbed: Scene) -> None:
    scene = undisturbed
    process = scene.begin("disturbed")
    scene.wait("first step", lambda: scene.step("disturbed") >= 1, process)
    before = scene.now()
    raylet = scene.cluster.raylet(next(node for node, kind in before.items() if kind == "worker"))
    scene.wait("checkpoint", lambda: scene.step("disturbed") >= EVERY + 2, process)
    raylet.send_signal(signal.SIGKILL)
    at = time.time()
    scene.end("disturbed", process)
    said = scene.output("disturbed")
    assert "training goes on at step" in said
    after = {node for when, nodes in scene.seen() if when > at for node, kind in nodes.items() if kind == "worker"}
    assert after - before.keys(), "no node took its place"
    print(re.findall(r"training goes on at step [^(]*", said))
    assert difference(scene.run("disturbed"), scene.run("undisturbed")) == ""
    scene.wait("end of the nodes", lambda: not scene.now(), seconds=300)


def test_a_head_without_cpus_drives_the_other_verbs(undisturbed: Scene) -> None:
    """The model answers in an actor, for which a node is brought up, and not one with GPUs."""
    scene = undisturbed
    rows, answers = scene.folder / "rows.jsonl", scene.folder / "answers.jsonl"
    rows.write_text(json.dumps({"prompt": "Translate to French (fr): two"}) + "\n")
    began = time.time()
    asked = ["generate", scene.run("undisturbed").root, str(rows), "--to", str(answers), "--max-new-tokens", "4"]
    asked += ["--device", "cpu"]  # else those of the GPU nodes, which have none
    with open(scene.folder / "generate.log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "ray_ft", *asked], env=scene.cluster.env(), stdout=log, stderr=log
        )
    scene.commands.append(process)
    scene.end("generate", process)
    (answer,) = map(json.loads, answers.read_text().splitlines())
    assert answer["error"] is None and answer["tokens"] > 0
    kinds = {kind for at, nodes in scene.seen() if at > began for kind in nodes.values()}
    assert kinds == {"worker"}
    scene.wait("end of the nodes", lambda: not scene.now(), seconds=300)


def test_the_comparison_sees_another_run(undisturbed: Scene, tmp_path: Path) -> None:
    """A planted fault: one loss and one tensor are changed."""
    import shutil

    copy = RunDir(str(tmp_path / "copy"))
    shutil.copytree(undisturbed.run("undisturbed").root, copy.root)
    assert difference(copy, undisturbed.run("undisturbed")) == ""
    lines = Path(copy.metrics).read_text().splitlines()
    row = json.loads(lines[-1])
    lines[-1] = json.dumps({**row, "loss": row["loss"] * 1.0001})
    Path(copy.metrics).write_text("\n".join(lines) + "\n")
    assert "loss" in difference(copy, undisturbed.run("undisturbed"))


def difference(run: RunDir, other: RunDir) -> str:
    """What tells two finished runs apart; "" where losses, rows of each step and all tensors are equal to the bit."""
    losses = [[(row["step"], row["loss"]) for row in read_metrics(one)] for one in (run, other)]
    if losses[0] != losses[1] or [step for step, _ in losses[0]] != list(range(1, STEPS + 1)):
        return "loss"
    used = [ledger.read(one) for one in (run, other)]
    if used[0] != used[1] or sorted(used[0]) != list(range(1, STEPS + 1)):
        return "rows"
    found, expected = tensors(run), tensors(other)
    if found.keys() != expected.keys() or not all(torch.equal(found[name], expected[name]) for name in expected):
        return "tensors"
    return ""


def tensors(run: RunDir) -> dict[str, torch.Tensor]:
    location = dict(checkpoint.committed(run.checkpoints))[STEPS]
    made = {name: torch.empty(one.shape, dtype=one.dtype) for name, one in checkpoint.index(location).items()}
    checkpoint.restore(location, {name: Span.whole(tensor) for name, tensor in made.items()})
    return made


def watch() -> None:
    """Print which nodes there are beside the head, twice a second."""
    import ray

    # The provider's nodes do not say their type.
    kinds = {tuple(one["resources"].get(key, 0) for key in ("CPU", "GPU")): name for name, one in TYPES.items()}
    while True:
        there = {
            node["NodeID"]: kinds[tuple(node["Resources"].get(key, 0) for key in ("CPU", "GPU"))]
            for node in ray.nodes()
            if node["Alive"] and "node:__internal_head__" not in node["Resources"]
        }
        print(json.dumps({"time": time.time(), "nodes": there}), flush=True)
        time.sleep(0.5)


if __name__ == "__main__":
    with session.connected():
        watch()
