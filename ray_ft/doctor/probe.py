"""Asks every node of the cluster the same question at once, each by a task of its own that reserves nothing.

An answer carries how far the node's clock is ahead of this one, by the four times of one exchange, as NTP reckons it
(RFC 5905, section 8). A question that fails, or a node that keeps silent, is an answer too: its `error` says why.
Limits: nodes that the autoscaler may still add cannot be asked.
"""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray_ft import session
from ray_ft.errors import first_line

#: Seconds until a node that has not answered is given up: a busy machine takes ten to start a worker process.
ANSWER_SECONDS = 60.0


@dataclass(frozen=True)
class Node:
    """One node that is alive.

    Attributes:
        name: what findings call it: its address; longer where several nodes have the same.
        id: Ray's, in hex; "" for this process, which is asked without a task.
        resources: by Ray's names: CPU, GPU, object_store_memory (bytes).
    """

    name: str
    id: str
    address: str
    head: bool
    resources: Mapping[str, float]

    @property
    def gpus(self) -> int:
        return int(self.resources.get("GPU", 0))


@dataclass(frozen=True)
class Answer:
    """What a node said, or why it did not.

    Attributes:
        ahead: seconds that its clock is ahead of this process's; `slack`: it may be so many more or fewer.
    """

    value: Any = None
    error: str = ""
    ahead: float = 0.0
    slack: float = float("inf")


def here() -> Node:
    """This process, where no Ray is connected or needed: looked at without a task."""
    return Node(socket.gethostname(), "", "127.0.0.1", True, {})


def nodes(*, start_nothing: bool = False) -> list[Node]:
    """The nodes that are alive, the head first; this process alone where Ray is not connected.

    Args:
        start_nothing: ask a Ray that runs only for this command without starting a worker process.
    """
    import ray

    if not ray.is_initialized():
        return [here()]
    alive = [node for node in ray.nodes() if node["Alive"]]
    shared = Counter(node["NodeManagerAddress"] for node in alive)
    private = start_nothing and not session.address() and len(alive) == 1
    found = []
    for node in alive:
        address, identity = node["NodeManagerAddress"], node["NodeID"]
        name = address if shared[address] == 1 else f"{address} ({identity[:6]})"
        head = "node:__internal_head__" in node["Resources"]
        found.append(Node(name, "" if private else identity, address, head, node["Resources"]))
    return sorted(found, key=lambda node: (not node.head, node.name))


def ask(
    nodes: Sequence[Node], question: Callable[..., Any], *arguments: Any, seconds: float = ANSWER_SECONDS
) -> dict[str, Answer]:
    """Call `question(*arguments)` on each node, all at once.

    Args:
        question: a function of a module that every node can import.
        seconds: to wait for the slowest node.

    Returns:
        By the nodes' names: one answer each.
    """
    return ask_each([(node, arguments) for node in nodes], question, seconds=seconds)


def ask_each(
    asked: Sequence[tuple[Node, Sequence[Any]]], question: Callable[..., Any], *, seconds: float = ANSWER_SECONDS
) -> dict[str, Answer]:
    """Like `ask`, with arguments of its own for each node."""
    answers: dict[str, Answer] = {}
    pending: dict[Any, tuple[str, float]] = {}
    for node, arguments in asked:
        sent = time.time()
        if node.id:
            pending[_task(node, question, arguments)] = node.name, sent
        else:
            answers[node.name] = _answer(sent, _on_node(question, arguments), time.time())
    if pending:
        answers |= _gather(pending, seconds)
    return {node.name: answers[node.name] for node, _ in asked}


def _task(node: Node, question: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node.id, soft=False)
    remote = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(_on_node)
    return remote.remote(question, tuple(arguments))


def _gather(pending: dict[Any, tuple[str, float]], seconds: float) -> dict[str, Answer]:
    import ray

    answers: dict[str, Answer] = {}
    end = time.monotonic() + seconds
    while pending and (left := end - time.monotonic()) > 0:
        (*ready,), _ = ray.wait(list(pending), timeout=left)
        arrived = time.time()
        for reference in ready:
            name, sent = pending.pop(reference)
            try:
                answers[name] = _answer(sent, ray.get(reference), arrived)
            except Exception as error:  # of Ray: the node died, or cannot import what it is asked with
                answers[name] = Answer(error=_why(error))
    for reference, (name, _) in pending.items():
        ray.cancel(reference, force=True)
        answers[name] = Answer(error=f"it did not answer within {seconds:.0f} s")
    return answers


def _on_node(question: Callable[..., Any], arguments: Sequence[Any]) -> tuple[Any, str, float, float]:
    """The task: the answer, why there is none, and this node's clock before and after."""
    began, value, why = time.time(), None, ""
    try:
        value = question(*arguments)
    except Exception as error:  # carried to whoever asked, who makes a finding of it
        why = f"{type(error).__name__}: {first_line(error)}"
    return value, why, began, time.time()


def _answer(sent: float, said: tuple[Any, str, float, float], arrived: float) -> Answer:
    value, why, began, ended = said
    return Answer(value, why, ((began - sent) + (ended - arrived)) / 2, ((arrived - sent) - (ended - began)) / 2)


def _why(error: BaseException) -> str:
    """The line of Ray's many that says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "Error" in line.split(":", 1)[0] and not line.startswith("ray.")]
    return (telling[-1] if telling else first_line(error))[:300]
