"""Which failures a run survives, how many workers it takes, and what is asked of it, without a cluster."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray
import torch
from ray.exceptions import ActorDiedError, ObjectLostError, RaySystemError
from ray.train.v2._internal.exceptions import (
    UserExceptionWithTraceback,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution import preemption
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from ray_ft.errors import CheckpointError, ResourceError
from ray_ft.recipe import Failures
from ray_ft.train import board as board_module
from ray_ft.train import checkpoint, controller
from ray_ft.train import sizes as sizes_module
from ray_ft.train import survival as survival_module
from ray_ft.train.asks import Ask, Restart
from ray_ft.train.board import Board, BoardLink

RETRY, RAISE = FailureDecision.RETRY, FailureDecision.RAISE


class Here:
    """A board in this process, called as an actor is."""

    def __init__(self) -> None:
        self.board = Board()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.board, name)

        class Remote:
            remote = staticmethod(method)

        return Remote

    @property
    def lines(self) -> list[str]:
        return [content for kind, content in self.board.take() if kind in ("line", "lost")]


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Here:
    monkeypatch.setattr(ray, "get", lambda value, **_: value)
    return Here()


def survival(board: Here, folder: Path, **settings: Any) -> Any:
    return survival_module.Survival(Failures(**settings), str(folder), board)


def died(rank: int = 1) -> WorkerGroupError:
    return WorkerGroupError("text", {rank: WorkerHealthCheckFailedError("text", ActorDiedError())})


def raised(error: Exception, ranks: int = 2) -> WorkerGroupError:
    return WorkerGroupError("text", {rank: UserExceptionWithTraceback(error, "a traceback") for rank in range(ranks)})


def committed(folder: Path, step: int) -> None:
    (folder / checkpoint.name(step)).mkdir()
    (folder / checkpoint.name(step) / checkpoint.COMMITTED).touch()


# ---------------------------------------------------------------------------------------------------------- failures


def test_failures_in_a_row_are_counted_anew_with_each_new_checkpoint(board: Here, tmp_path: Path) -> None:
    policy = survival(board, tmp_path, max_failures=2)
    assert [policy.make_decision(died()) for _ in range(2)] == [RETRY, RETRY]
    committed(tmp_path, 5)
    assert [policy.make_decision(died()) for _ in range(3)] == [RETRY, RETRY, RAISE]
    lines = board.lines
    assert lines[0].startswith("worker 1 died; failure 1 of 2 ") and "starting again" in lines[0]
    assert lines[2].startswith("worker 1 died; failure 1 of 2 ")
    assert lines[4].startswith("worker 1 died; failure 3 of 2 ") and lines[4].endswith("giving up")


def test_no_failure_is_survived_with_a_budget_of_none(board: Here, tmp_path: Path) -> None:
    assert survival(board, tmp_path, max_failures=0).make_decision(died()) is RAISE


def test_an_error_that_says_what_is_wrong_is_not_tried_again(board: Here, tmp_path: Path) -> None:
    error = WorkerGroupError(
        "text",
        {0: died().worker_failures[1], 1: UserExceptionWithTraceback(CheckpointError("wrong", ["mend it"]), "")},
    )
    assert survival(board, tmp_path).make_decision(error) is RAISE
    assert survival(board, tmp_path).make_decision(ControllerError(ResourceError("no room", []))) is RAISE


def test_preemptions_do_not_touch_the_budget_of_failures(board: Here, tmp_path: Path) -> None:
    policy = survival(board, tmp_path, max_failures=0, max_preemptions=2)
    told = raised(Restart("a worker was told to go", preempted=True))
    assert [policy.make_decision(told) for _ in range(3)] == [RETRY, RETRY, RAISE]
    unlimited = survival(board, tmp_path, max_failures=0)
    assert {unlimited.make_decision(told) for _ in range(20)} == {RETRY}
    assert {unlimited.make_decision(raised(Restart("there is room"))) for _ in range(20)} == {RETRY}
    gone = ActorDiedError()
    gone._preempted = True
    assert unlimited.make_decision(WorkerGroupError("", {0: WorkerHealthCheckFailedError("", gone)})) is RETRY
    assert unlimited.make_decision(died()) is RAISE


def test_code_that_fails_before_the_first_step_is_not_started_again_and_lost_peers_are(
    board: Here, tmp_path: Path
) -> None:
    policy = survival(board, tmp_path)
    assert policy.make_decision(raised(TypeError("unsupported operand"))) is RAISE
    for lost in (ObjectLostError("00" * 28, "", ""), RaySystemError("gcs"), torch.distributed.DistNetworkError("peer")):
        assert policy.make_decision(raised(lost)) is RETRY
        board.board._rows = 0
        policy._failures.count = 0
    assert policy.make_decision(raised(RuntimeError("gloo: Connection closed by peer"))) is RETRY
    assert policy.make_decision(died()) is RETRY
    board.board.push("row", {"step": 1})
    assert policy.make_decision(raised(TypeError("unsupported operand"))) is RETRY


def test_workers_that_cannot_be_placed_are_waited_for_until_the_limit_or_a_wish_to_stop(
    board: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = survival(board, tmp_path, wait_seconds=100)
    now = [1000.0]
    monkeypatch.setattr(survival_module.time, "monotonic", lambda: now[0])
    late = ControllerError(WorkerGroupStartupTimeoutError(2))
    assert policy.make_decision(late) is RETRY
    now[0] += 99
    assert policy.make_decision(late) is RETRY
    assert board.lines == ["waiting for room for the workers, at most 100 s"]
    now[0] += 2
    assert policy.make_decision(late) is RAISE
    again = survival(board, tmp_path, wait_seconds=100)
    board.board.ask(Ask.STOP)
    assert again.make_decision(late) is RAISE


def test_a_line_names_the_lost_workers_and_not_what_the_others_say_of_it() -> None:
    hung = WorkerHealthCheckTimeoutError("text")
    peer = UserExceptionWithTraceback(RuntimeError("Connection reset by peer"), "")
    assert survival_module.describe(WorkerGroupError("", {0: peer, 1: hung})) == "worker 1 does not answer"
    assert "worker 0 failed" in survival_module.describe(WorkerGroupError("", {0: peer}))


# ------------------------------------------------------------------------------------------------------------- sizes


def test_workers_hear_that_their_node_was_told_to_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preemption, "_get_draining_nodes", lambda: {"a": 0})
    monkeypatch.setattr(ray, "nodes", list)
    told: queue.Queue[Any] = queue.Queue()
    workers = [
        SimpleNamespace(
            metadata=SimpleNamespace(node_id=node),
            distributed_context=SimpleNamespace(world_rank=rank),
            actor=SimpleNamespace(mark_preempt=SimpleNamespace(remote=lambda info, rank=rank: told.put((rank, info)))),
        )
        for rank, node in enumerate("ab")
    ]
    drains = controller._Drains()
    drains.after_worker_group_start(SimpleNamespace(get_workers=lambda: workers))
    heard = dict(told.get(timeout=60) for _ in workers)
    assert [heard[rank].preempted_ranks for rank in (0, 1)] == [[0], [0]]
    watching = drains._watcher._monitor_thread
    drains.before_worker_group_shutdown(None)
    watching.join(60)
    assert not watching.is_alive()


class Sizes(sizes_module.EvenSizes):
    """With room that the test sets; Ray's reservations do not know of nodes that are lost or drain."""

    room: dict[str, dict[str, float]]
    free: dict[str, dict[str, float]]

    def _get_reserved_resources(self) -> Any:
        return self.room

    def _maybe_send_resource_request(self) -> None:
        pass


@pytest.fixture
def sizes(board: Here, monkeypatch: pytest.MonkeyPatch) -> Sizes:
    from ray.train import ScalingConfig

    monkeypatch.setattr(sizes_module, "LOOK_SECONDS", 0)
    monkeypatch.setattr(sizes_module, "draining_nodes", lambda: {"draining"})
    monkeypatch.setattr(sizes_module, "free_resources", lambda: found.free)
    nodes = [
        {"NodeID": name, "Alive": name != "lost", "Resources": {"CPU": 8}} for name in ("a", "b", "lost", "draining")
    ]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    settings = ScalingConfig(num_workers=(2, 8), resources_per_worker={"CPU": 1}, elastic_resize_monitor_interval_s=0)
    found = Sizes(settings, (2, 4, 8), board, Failures(wait_seconds=50), "runs/a")
    found.room, found.free = {}, {}
    return found


@pytest.mark.parametrize(
    ("cpus", "expected"),
    [
        ({"a": 1}, None),
        ({"a": 2}, 2),
        ({"a": 3}, 2),
        ({"a": 3, "b": 3}, 4),
        ({"a": 9, "b": 9}, 8),
        ({"a": 2, "lost": 6}, 2),
        ({"a": 2, "draining": 6}, 2),
    ],
)
def test_the_largest_size_that_shares_the_batch_and_fits_on_nodes_that_stay(
    sizes: Sizes, cpus: dict[str, float], expected: int | None
) -> None:
    sizes.room = {node: {"CPU": number} for node, number in cpus.items()}
    decision = sizes.make_decision_for_non_running_worker_group()
    if expected is None:
        assert isinstance(decision, NoopDecision)
    else:
        assert isinstance(decision, ResizeDecision) and decision.num_workers == expected


def test_a_cpu_is_left_to_those_who_read_rows(sizes: Sizes, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes.room = {"a": {"CPU": 8}}
    for cpus, expected in ((8, 4), (9, 8)):
        monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": "a", "Alive": True, "Resources": {"CPU": cpus}}])  # noqa: B023
        decision = sizes.make_decision_for_non_running_worker_group()
        assert isinstance(decision, ResizeDecision) and decision.num_workers == expected
        sizes._tried = False


def test_a_size_that_could_not_be_placed_is_not_tried_again_where_others_hold_the_room(sizes: Sizes) -> None:
    sizes.room, sizes.free = {"a": {"CPU": 8}}, {"a": {"CPU": 5}, "draining": {"CPU": 8}}
    decisions = [sizes.make_decision_for_non_running_worker_group() for _ in range(2)]
    assert [decision.num_workers for decision in decisions if isinstance(decision, ResizeDecision)] == [8, 4]


def test_too_little_room_is_waited_for_and_is_an_error_in_the_end(
    sizes: Sizes, board: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(sizes_module.time, "monotonic", lambda: now[0])
    for _ in range(3):
        assert isinstance(sizes.make_decision_for_non_running_worker_group(), NoopDecision)
    assert board.lines == ["waiting for room for 2 workers, at most 50 s"]
    now[0] += 51
    with pytest.raises(ResourceError, match="wait_seconds = 50"):
        sizes.make_decision_for_non_running_worker_group()


def test_resources_are_reserved_under_the_runs_own_name(sizes: Sizes, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []
    monkeypatch.setattr(sizes, "_send_resource_request", lambda: sent.append(str(sizes._requester_id)))
    sizes.after_controller_start(None)
    assert sent == ["train-runs/a"]
    assert sizes._coordinator_client is not None and sizes._coordinator_client._requester_id == "train-runs/a"


@pytest.mark.parametrize(
    ("running", "free", "asked"),
    [(2, 2, Ask.GROW), (2, 1, Ask.NOTHING), (4, 4, Ask.NOTHING), (8, 4, Ask.NOTHING)],
)
def test_a_running_group_is_asked_to_make_way_for_a_larger_one_that_fits_and_never_killed(
    sizes: Sizes, board: Here, running: int, free: int, asked: Ask
) -> None:
    sizes.room, sizes.free = {"a": {"CPU": 5}}, {"a": {"CPU": free}}

    class State:
        num_workers = running
        start_time = float("-inf")

    assert isinstance(sizes.make_decision_for_running_worker_group(State, None), NoopDecision)  # type: ignore[arg-type]
    assert board.board.asked() is asked


# ------------------------------------------------------------------------------------------------ board, surroundings


def test_workers_hear_what_is_asked_and_a_new_start_does_not_hear_what_it_fulfils(
    board: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(board_module, "LISTEN_SECONDS", 0.01)
    told = [False]
    link = BoardLink(board, 0, lambda: told[0])
    board.board.ask(Ask.GROW)
    link.begin(3, 2, 0.1, [])
    for _ in range(20):
        time.sleep(0.01)
        assert link.asked() is Ask.NOTHING  # it is the larger group
    told[0] = True
    assert link.asked() is Ask.LEAVE
    board.board.ask(Ask.STOP)
    deadline = time.monotonic() + 60
    while link.asked() is not Ask.STOP:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    [listening] = [thread for thread in threading.enumerate() if thread.name == "ray-ft-board"]
    link.close()
    listening.join()  # else it would call Ray itself after this test
    assert BoardLink(board, 1, lambda: told[0]).asked() is Ask.LEAVE


def test_a_wish_to_stop_outlives_one_to_grow_which_a_new_start_fulfils() -> None:
    board = Board()
    board.ask(Ask.GROW)
    assert board.asked() is Ask.GROW
    board.push("begin", (7, 2, 0.5, []))
    assert (board.asked(), board.finished()) == (Ask.NOTHING, 7)
    board.ask(Ask.STOP)
    board.ask(Ask.GROW)
    board.push("begin", (7, 2, 0.5, []))
    assert board.asked() is Ask.STOP


def test_gloo_and_nccl_talk_over_the_interface_that_has_the_nodes_address(monkeypatch: pytest.MonkeyPatch) -> None:
    loopback = next(
        name for name, found in psutil.net_if_addrs().items() if any(one.address == "127.0.0.1" for one in found)
    )
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(variable, raising=False)
    controller.choose_interface("203.0.113.9")  # nobody's
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    controller.choose_interface("127.0.0.1")
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == (loopback, f"={loopback}")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine")
    controller.choose_interface("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "mine"
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.pop(variable)


def test_the_actor_in_the_middle_loads_next_to_nothing() -> None:
    """It is a process of its own, started with every run before the workers are."""
    code = "import sys, ray_ft.train.board; print({'torch', 'ray', 'transformers', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
