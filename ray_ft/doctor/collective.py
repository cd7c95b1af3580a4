"""One process of a measurement: joins a group of torch.distributed, and times what training does most.

Bandwidths are those of nccl-tests (its doc/PERFORMANCE.md): the algorithm bandwidth is the message's bytes over the
seconds, and for an all-reduce of n ranks the bus bandwidth is 2 (n - 1) / n times that, which is what the slowest link
carried and so can be held against a link's speed whatever n is. For an exchange between two ranks both are the same.
A size is timed until `BUDGET` seconds are used, and the fastest repetition counts: it is asked what a link can do, on
machines that may have other work.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Sequence
from typing import Any

BUDGET = 0.5  # seconds for one size
MOST = 20  # repetitions
GIVE_UP = 4.0  # seconds for one message, after which no larger one is sent


def host(address: str, world: int) -> Any:
    """A store at this address, on a free port (its `.port`), where `world` processes meet while it is kept."""
    import torch.distributed as dist

    return dist.TCPStore(address, 0, world, is_master=True, wait_for_workers=False)


def join(address: str, port: int, rank: int, world: int, backend: str, seconds: float) -> None:
    """Become `rank` of `world` processes that meet at the store of `host`.

    Raises:
        RuntimeError: torch's, with what its backend says, where they cannot connect within `seconds`.
    """
    import torch.distributed as dist

    wait = datetime.timedelta(seconds=seconds)
    store = dist.TCPStore(address, port, world, is_master=False, timeout=wait)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=wait)


def leave() -> None:
    """Leave the group."""
    import torch.distributed as dist

    dist.destroy_process_group()


def all_reduce(sizes: Sequence[int], ranks: Sequence[int] | None = None) -> list[dict[str, float]]:
    """Time all-reduces in the group of `ranks`; of all, if None.

    Every process of the world has to call it with the same arguments; those that are not in `ranks` get [].

    Args:
        sizes: in bytes, of float32, ascending.

    Returns:
        {bytes, seconds, algbw, busbw} of each size, bandwidths in bytes a second; sizes after one that took longer than
        `GIVE_UP` are left out.
    """
    import torch
    import torch.distributed as dist

    group = dist.new_group(list(ranks)) if ranks is not None else dist.group.WORLD
    members = len(ranks) if ranks is not None else dist.get_world_size()
    if ranks is not None and dist.get_rank() not in ranks:
        return []
    rows = []
    for size in sizes:
        data = torch.ones(size // 4, dtype=torch.float32, device=_device())

        def send(data: Any = data) -> None:
            data.fill_(1.0)  # else sums of sums overflow
            dist.all_reduce(data, group=group)

        seconds = _timed(send, group)
        if not torch.all(data == members):
            raise RuntimeError(f"an all-reduce of {size} bytes over {members} ranks gave a wrong sum")
        algbw = size / seconds
        rows.append({"bytes": size, "seconds": seconds, "algbw": algbw, "busbw": algbw * 2 * (members - 1) / members})
        if seconds > GIVE_UP:
            break
    return rows


def exchange(rounds: Sequence[Sequence[tuple[int, int]]], size: int) -> dict[tuple[int, int], float]:
    """Let pairs of ranks send one another `size` bytes at once: the pairs of a round together, round after round.

    Every process has to call it with the same arguments; a rank is in one pair of a round at most.

    Returns:
        Of the pairs that this process is in: bytes a second in each direction.
    """
    import torch
    import torch.distributed as dist

    found = {}
    rank = dist.get_rank()
    sent = torch.ones(size // 4, dtype=torch.float32, device=_device())
    received = torch.empty_like(sent)
    for pairs in rounds:
        for one, other in pairs:
            if rank in (one, other):
                found[one, other] = size / _swapped(sent, received, other if rank == one else one, rank == one)
        dist.barrier()
    return found


def _swapped(sent: Any, received: Any, peer: int, leads: bool) -> float:
    """Seconds of the fastest exchange with `peer`; the one that leads tells the other how often."""
    import torch
    import torch.distributed as dist

    def swap() -> None:
        both = [dist.P2POp(dist.isend, sent, peer), dist.P2POp(dist.irecv, received, peer)]
        for work in dist.batch_isend_irecv(both):
            work.wait()

    first = torch.tensor([_seconds(swap)], dtype=torch.float64, device=_device())
    if leads:
        dist.send(first, peer)
    else:
        dist.recv(first, peer)
    return min((_seconds(swap) for _ in range(_repetitions(float(first)))), default=float(first))


def _device() -> str:
    import torch.distributed as dist

    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def _timed(work: Callable[[], None], group: Any) -> float:
    """Seconds of the fastest repetition on the slowest rank, the same on all ranks."""
    import torch
    import torch.distributed as dist

    def slowest(seconds: float) -> float:
        each = torch.tensor([seconds], dtype=torch.float64, device=_device())
        dist.all_reduce(each, op=dist.ReduceOp.MAX, group=group)
        return float(each)

    first = slowest(_seconds(work))  # also connects, where the backend does that at first use
    times = []
    for _ in range(_repetitions(first)):
        dist.barrier(group=group)
        times.append(slowest(_seconds(work)))
    return min(times, default=first)


def _repetitions(first: float) -> int:
    """None after a slow one: it shows what it has to show."""
    return 0 if first > GIVE_UP else max(2, min(MOST, int(BUDGET / max(first, 1e-6))))


def _seconds(work: Callable[[], None]) -> float:
    import torch

    cuda = _device() == "cuda"
    if cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began
