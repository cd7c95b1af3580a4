"""Between the workers and whoever started them: what they report one way, what is asked of them the other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from ray_ft.train.asks import Ask

LISTEN_SECONDS = 0.2

#: (kind, content): ("line", text), ("lost", why the workers are gone), ("row", metrics), ("begin", Link.begin's).
Message = tuple[str, Any]


class Board:
    """The actor in the middle. It lives on the driver's node, so that no worker's node takes it along."""

    def __init__(self) -> None:
        self._messages: list[Message] = []
        self._ask = Ask.NOTHING
        self._finished = 0
        self._rows = 0

    def push(self, kind: str, content: Any) -> None:
        self._messages.append((kind, content))
        if kind == "row":
            self._finished = int(content["step"])
            self._rows += 1
        if kind == "begin":
            self._finished = content[0]
            if self._ask is Ask.GROW:  # this is it
                self._ask = Ask.NOTHING

    def take(self) -> list[Message]:
        taken, self._messages = self._messages, []
        return taken

    def finished(self) -> int:
        """Steps finished, as far as a row of metrics told."""
        return self._finished

    def rows(self) -> int:
        """Rows of metrics that came, over all starts of the workers."""
        return self._rows

    def ask(self, what: Ask) -> None:
        """Ask of the workers; a wish to stop is not taken back by one to grow."""
        self._ask = max(self._ask, what)

    def asked(self) -> Ask:
        return self._ask


def place(board: type[Board] = Board) -> Any:
    """The board as an actor on this node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(board).remote()


class BoardLink:
    """A worker's end of the board, which training never waits for. Rank 0 reports and hears what is asked of all.

    Args:
        leaving: says whether this worker has to go soon, because it was told so; asked of every rank.
    """

    def __init__(self, board: Any, rank: int, leaving: Callable[[], bool]) -> None:
        self._board, self._rank, self._leaving = board, rank, leaving
        self._asked = Ask.NOTHING
        self._over = threading.Event()
        self._pushed: Any = None

    def begin(self, step: int, workers: int, model_seconds: float, rows: list[dict[str, float]]) -> None:
        self._push("begin", (step, workers, model_seconds, rows))
        self.flush()  # what was asked before was asked of those who were here before
        threading.Thread(target=self._listen, name="ray-ft-board", daemon=True).start()

    def say(self, line: str) -> None:
        self._push("line", line)

    def log(self, row: dict[str, float]) -> None:
        self._push("row", row)

    def asked(self) -> Ask:
        return max(self._asked, Ask.LEAVE if self._leaving() else Ask.NOTHING)

    def close(self) -> None:
        """Hear no more."""
        self._over.set()

    def flush(self) -> None:
        """Wait until the board has everything."""
        import ray

        if self._pushed is not None:
            ray.get(self._pushed)

    def _push(self, kind: str, content: Any) -> None:
        self._pushed = self._board.push.remote(kind, content)

    def _listen(self) -> None:
        import ray
        from ray.exceptions import RayError

        try:
            while not self._over.wait(LISTEN_SECONDS):
                self._asked = ray.get(self._board.asked.remote())
        except RayError:  # the board is gone, and with it whoever could ask
            return
