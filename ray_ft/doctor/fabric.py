"""How fast the nodes are to one another, and by which transport: measured as training would use them.

On GPUs each free one becomes a rank of a group over NCCL; in a cluster without, each node one over gloo. They reduce
together, then exchange in pairs along a ring, so that a slow node shows: both its pairs are slow, and only its own.
NCCL's own log says which transport it took; TCP sockets in spite of a faster network are an error, since nothing else
tells (the run just takes many times as long). Limits: GPUs that are in use are left out; a minute or two.
"""

from __future__ import annotations

import os
import socket
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_ft.doctor import collective, nccl_log
from ray_ft.doctor.measured import check
from ray_ft.errors import first_line
from ray_ft.hosts import choose_interface

__all__ = ["check", "measure"]

MOST_RANKS = 128  # beyond it one GPU of each node takes part
MOST_NODES = 64
START_SECONDS = 180.0  # for worker processes to start and to import torch, on machines that are busy
JOIN_SECONDS = 60.0
MEASURE_SECONDS = 300.0
DIAL_SECONDS = 5.0
RELEASE_SECONDS = 10.0
KIB, MIB = 1 << 10, 1 << 20
SIZES = {"gloo": (64 * KIB, MIB, 8 * MIB), "nccl": (MIB, 32 * MIB, 256 * MIB)}  # of all-reduces
EXCHANGED = {"gloo": 8 * MIB, "nccl": 64 * MIB}


@dataclass(frozen=True)
class _Place:
    id: str
    address: str
    ranks: int


class Rank:
    """What runs as an actor in each process of the measurement."""

    def open(self, address: str) -> int:
        """Get ready, and listen at a free port of this node; returns it."""
        choose_interface(address)
        self._log = Path(tempfile.mkdtemp(prefix="ray-ft-doctor-"), "nccl.log")
        os.environ.update(NCCL_DEBUG="INFO", NCCL_DEBUG_SUBSYS="INIT,NET,ENV", NCCL_DEBUG_FILE=str(self._log))
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._listening = socket.create_server((address, 0), family=family, backlog=MOST_NODES)
        threading.Thread(target=self._accept, daemon=True).start()
        return int(self._listening.getsockname()[1])

    def _accept(self) -> None:
        while True:
            self._listening.accept()[0].close()

    def dial(self, ends: Sequence[tuple[str, int]]) -> dict[str, str]:
        """Why the others cannot be connected to, by address; those that can are left out."""
        lost = {}
        for address, port in ends:
            try:
                socket.create_connection((address, port), timeout=DIAL_SECONDS).close()
            except OSError as error:
                lost[address] = first_line(error)
        return lost

    def host(self, address: str, world: int) -> int:
        self._store = collective.host(address, world)
        return int(self._store.port)

    def join(self, address: str, port: int, rank: int, world: int, backend: str) -> None:
        import torch

        torch.set_num_threads(1)
        collective.join(address, port, rank, world, backend, JOIN_SECONDS)

    def all_reduce(self, sizes: Sequence[int], ranks: Sequence[int] | None = None) -> list[dict[str, float]]:
        return collective.all_reduce(sizes, ranks)

    def exchange(self, rounds: Sequence[Sequence[tuple[int, int]]], size: int) -> dict[tuple[int, int], float]:
        return collective.exchange(rounds, size)

    def log(self) -> str:
        """What NCCL said, once; the file goes."""
        text = self._log.read_text(errors="replace") if self._log.exists() else ""
        self._log.unlink(missing_ok=True)
        self._log.parent.rmdir()
        return text


class _Failed(Exception):
    """A step failed on some places: `why` by their addresses."""

    def __init__(self, step: str, why: dict[str, str]) -> None:
        super().__init__(step)
        self.step, self.why = step, why


def measure(say: Callable[[str], None]) -> dict[str, Any]:
    """Measure on the connected cluster, from the driver.

    Args:
        say: takes a line of what is being done.

    Returns:
        backend: "nccl" or "gloo". nodes: {id, address, ranks} of those that took part.
        skipped: nodes that did not, with why, by address; nothing: why nothing was measured, or "".
        blocked: by address, then by the other's address: why it cannot be connected to.
        failed: {step, why (by address)} of what stopped the measurement, or None.
        all_reduce: rows of `collective.all_reduce` over all ranks.
        pairs: [address, address, bytes a second in each direction].
        within: by address, the bus bandwidth between the GPUs of one node, in bytes a second.
        logs: by address, `nccl_log.read` of its ranks.
    """
    backend, places, skipped = _places()
    world = sum(place.ranks for place in places)
    measured: dict[str, Any] = {"backend": backend, "skipped": skipped, "nothing": "", "blocked": {}, "failed": None}
    measured |= {"nodes": [{"id": place.id, "address": place.address, "ranks": place.ranks} for place in places]}
    measured |= {"all_reduce": [], "pairs": [], "within": {}, "logs": {}}
    if world < 2:
        measured["nothing"] = "it takes two nodes, or two free GPUs of one"
        return measured
    kind = "GPUs" if backend == "nccl" else "processes"
    say(f"measuring the network: {world} {kind} on {len(places)} nodes, by {backend}")
    ranks = [place for place in places for _ in range(place.ranks)]
    actors = [_actor(place, backend) for place in ranks]
    try:
        _measure(measured, actors, ranks, places)
    except _Failed as failure:
        measured["failed"] = {"step": failure.step, "why": failure.why}
    finally:
        _end(actors, {place.id: place.ranks for place in places} if backend == "nccl" else {})
    return measured


def _places() -> tuple[str, list[_Place], dict[str, str]]:
    """The backend, who takes part, and who does not."""
    import ray

    alive = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: node["NodeManagerAddress"])
    skipped: dict[str, str] = {}
    if not any(node["Resources"].get("GPU", 0) >= 1 for node in alive):
        # A head that is given no CPUs runs no workers.
        taking = [node for node in alive if node["Resources"].get("CPU", 0)]
        places = [_Place(node["NodeID"], node["NodeManagerAddress"], 1) for node in taking]
        backend = "gloo"
    else:
        backend, places = "nccl", []
        for node in alive:
            if node["Resources"].get("GPU", 0) >= 1:
                if count := _free_gpus(node["NodeID"]):
                    places.append(_Place(node["NodeID"], node["NodeManagerAddress"], count))
                else:
                    skipped[node["NodeManagerAddress"]] = "all its GPUs are in use"
        if sum(place.ranks for place in places) > MOST_RANKS:
            places = [_Place(place.id, place.address, 1) for place in places]
    skipped |= {place.address: f"{MOST_NODES} nodes are measured at most" for place in places[MOST_NODES:]}
    return backend, places[:MOST_NODES], skipped


def _actor(place: _Place, backend: str) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(place.id, soft=False)
    gpus = 1 if backend == "nccl" else 0
    return ray.remote(Rank).options(num_cpus=0, num_gpus=gpus, scheduling_strategy=there).remote()


def _measure(measured: dict[str, Any], actors: list[Any], ranks: list[_Place], places: list[_Place]) -> None:
    backend, world = measured["backend"], len(ranks)
    firsts = [ranks.index(place) for place in places]  # the first rank of each node
    ports = _call(actors, "open", [(place.address,) for place in ranks], ranks, START_SECONDS)
    ends = [(ranks[first].address, ports[first]) for first in firsts]
    dialled = _call(
        [actors[first] for first in firsts],
        "dial",
        [(ends[place + 1 :] + ends[:place],) for place in range(len(ends))],
        places,
        START_SECONDS + DIAL_SECONDS * len(ends),
    )
    measured["blocked"] = {place.address: lost for place, lost in zip(places, dialled, strict=True) if lost}
    if measured["blocked"]:
        return  # gloo would try for a minute and say less
    address = ranks[0].address
    (port,) = _call(actors[:1], "host", [(address, world)], ranks[:1], START_SECONDS)
    joined = [(address, port, rank, world, backend) for rank in range(world)]
    _call(actors, "join", joined, ranks, START_SECONDS + JOIN_SECONDS)
    asked = [(SIZES[backend],)] * world
    measured["all_reduce"] = _call(actors, "all_reduce", asked, ranks, MEASURE_SECONDS)[0]
    if len(places) > 1:
        asked_pairs = [(rounds(firsts), EXCHANGED[backend])] * world
        exchanged = _call(actors, "exchange", asked_pairs, ranks, MEASURE_SECONDS)
        slower: dict[tuple[int, int], float] = {}
        for pair, speed in (item for found in exchanged for item in found.items()):
            slower[pair] = min(speed, slower.get(pair, speed))
        measured["pairs"] = [[ranks[one].address, ranks[two].address, speed] for (one, two), speed in slower.items()]
    for place, first in zip(places, firsts, strict=True):
        if place.ranks > 1 and len(places) > 1:
            mine = list(range(first, first + place.ranks))
            rows = _call(actors, "all_reduce", [(SIZES[backend][-1:], mine)] * world, ranks, MEASURE_SECONDS)[first]
            measured["within"][place.address] = rows[-1]["busbw"]
        elif place.ranks > 1:
            measured["within"][place.address] = measured["all_reduce"][-1]["busbw"]
    if backend == "nccl":
        texts: defaultdict[str, str] = defaultdict(str)
        for place, text in zip(ranks, _call(actors, "log", [()] * world, ranks, JOIN_SECONDS), strict=True):
            texts[place.address] += text
        measured["logs"] = {where: nccl_log.read(text) for where, text in texts.items()}


def rounds(ranks: Sequence[int]) -> list[list[tuple[int, int]]]:
    """The neighbours on a ring, in rounds in which nobody has two partners at once; two are neighbours once."""
    count = len(ranks)
    ring = [(ranks[place], ranks[(place + 1) % count]) for place in range(count if count > 2 else count - 1)]
    last = [ring.pop()] if count > 2 and count % 2 else []
    return [one for one in (ring[::2], ring[1::2], last) if one]


def _call(
    actors: Sequence[Any], method: str, arguments: Sequence[Any], where: Sequence[_Place], wait: float
) -> list[Any]:
    """One method of all at once.

    Raises:
        _Failed: it raised somewhere, or somebody did not answer in time.
    """
    import ray

    calls = [getattr(actor, method).remote(*its) for actor, its in zip(actors, arguments, strict=True)]
    pending = {call: place for place, call in enumerate(calls)}
    answers: dict[int, Any] = {}
    why: dict[str, str] = {}
    end = time.monotonic() + wait
    while pending and not why:
        ready, _ = ray.wait(list(pending), timeout=max(end - time.monotonic(), 0))
        if not ready:
            why |= {where[place].address: f"no answer within {wait:.0f} s" for place in pending.values()}
        for call in ready:
            place = pending.pop(call)
            try:
                answers[place] = ray.get(call)
            except Exception as error:  # the actor's own, or that its node or process died: both are findings
                why[where[place].address] = _last_line(error)
    if why:
        raise _Failed(method, why)
    return [answers[place] for place in range(len(calls))]


def _last_line(error: BaseException) -> str:
    cause = getattr(error, "cause", None)
    return f"{type(cause).__name__}: {first_line(cause)}" if cause is not None else first_line(error)


def _end(actors: Sequence[Any], held: Mapping[str, int]) -> None:
    """End the processes, and wait a while until the GPUs that they held, by node, are free for whoever comes next."""
    import ray

    for actor in actors:
        ray.kill(actor)  # no leaving by turns: a group that failed does not end
    end = time.monotonic() + RELEASE_SECONDS
    while any(_free_gpus(node) < count for node, count in held.items()) and time.monotonic() < end:
        time.sleep(0.1)


def _free_gpus(node: str) -> int:
    import ray._private.state

    return int(ray._private.state.available_resources_per_node().get(node, {}).get("GPU", 0))
