"""What can never be placed is refused, what is only not there yet is waited for, and reading starts no GPU nodes."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from ray_ft import placement
from ray_ft.errors import ResourceError
from ray_ft.placement import feasible
from ray_ft.placement.capacity import Nodes
from ray_ft.recipe import Recipe

HEAD = Nodes({}, 1, "head")
CPUS = Nodes({"CPU": 16}, 4, "cpus", together=6)
GPUS = Nodes({"CPU": 96, "GPU": 8}, 2, "h100", together=6)
FIXED = Nodes({"CPU": 8, "GPU": 2}, 1)
OWN = Nodes({"CPU": 3}, 1, spare_cpus=1)


@pytest.fixture
def recipe(make_recipe: Callable[..., Recipe]) -> Callable[..., Recipe]:
    def made(workers: object = 2, *overrides: str) -> Recipe:
        return make_recipe(f"train.workers={workers}", "train.global_batch=96", "train.micro_batch=1", *overrides)

    return made


@pytest.mark.parametrize(
    ("nodes", "workers", "overrides", "says"),
    [
        ([HEAD, CPUS, GPUS], 24, ["train.device=cuda"], "train.workers = 24 .* room for 16, .*'h100'"),
        ([HEAD, CPUS, GPUS], 2, ["train.cpus_per_worker=97"], "needs 97 CPUs and 1 GPU"),
        ([HEAD, CPUS], 2, ["train.device=cuda"], "needs 1 CPU and 1 GPU"),
        ([HEAD, CPUS, GPUS], "[24,48]", ["train.device=cuda"], "train.workers = 24 "),
        ([HEAD, FIXED], 2, ["train.cpus_per_worker=16", "train.device=cpu"], "needs 16 CPUs, .* 8 CPUs, 2 GPUs"),
        ([OWN], 4, [], "train.workers = 4 .* room for 2"),  # a laptop gets no nodes
    ],
)
def test_what_can_never_be_placed_is_refused(
    recipe: Callable[..., Recipe], nodes: list[Nodes], workers: object, overrides: list[str], says: str
) -> None:
    with pytest.raises(ResourceError, match=says) as refused:
        placement.lacking(recipe(workers, *overrides), nodes)
    assert refused.value.ways_out


@pytest.mark.parametrize(
    ("nodes", "workers", "overrides"),
    [
        ([HEAD, CPUS, GPUS], 16, []),  # from nothing to two nodes
        ([HEAD, CPUS, GPUS], "[8,48]", []),
        ([HEAD, CPUS], 2, []),
        ([FIXED], 2, []),
        ([OWN], 2, []),
    ],
)
def test_what_fits_lacks_nothing(
    recipe: Callable[..., Recipe], nodes: list[Nodes], workers: object, overrides: list[str]
) -> None:
    assert placement.lacking(recipe(workers, *overrides), nodes) == ""


@pytest.mark.parametrize(
    ("nodes", "workers", "known", "says"),
    [
        ([HEAD, FIXED], 4, True, "train.workers = 4 .* room for 2"),  # another host of a fixed cluster may be started
        ([HEAD], 2, True, "no CPUs and no GPUs"),  # a head alone: its workers are on their way
        ([HEAD, FIXED], 4, False, "room for 2"),
        ([HEAD, CPUS], 400, False, "room for 64"),  # who knows what the autoscaler may add
    ],
)
def test_what_may_still_come_is_waited_for(
    recipe: Callable[..., Recipe], nodes: list[Nodes], workers: int, known: bool, says: str
) -> None:
    overrides = ["train.global_batch=400"] if workers == 400 else []
    assert re.search(says, placement.lacking(recipe(workers, *overrides), nodes, known))


def test_a_run_says_what_it_waits_for(recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(feasible, "cluster", lambda say: [HEAD, FIXED])
    placement.refuse_impossible(recipe(2), lines.append)
    assert lines == []
    placement.refuse_impossible(recipe(4, "train.failures.wait_seconds=60"), lines.append)
    assert len(lines) == 1 and "room for 2" in lines[0] and "train.failures.wait_seconds = 60" in lines[0]


def test_limits_that_cannot_be_read_refuse_nothing(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unread(say: Callable[[str], None]) -> list[Nodes]:
        say("the autoscaler's limits cannot be read (403)")
        return [HEAD, FIXED]

    lines: list[str] = []
    monkeypatch.setattr(feasible, "cluster", unread)
    placement.refuse_impossible(recipe(2, "train.cpus_per_worker=64"), lines.append)
    assert len(lines) == 2 and "403" in lines[0] and "waiting for nodes" in lines[1]


def test_a_run_without_workers_asks_nothing(recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feasible, "cluster", lambda say: pytest.fail("it asked the cluster"))
    placement.refuse_impossible(recipe(0))


def test_gpus_for_a_command_that_takes_any_number() -> None:
    small = Nodes({"CPU": 4, "GPU": 1}, 3, "l4", together=6)
    assert placement.within_reach(4, [HEAD, GPUS]) == 4  # what is there is enough
    assert placement.within_reach(0, [HEAD, CPUS, GPUS, small]) == 1
    assert placement.within_reach(0, [HEAD, CPUS, GPUS]) == 8
    assert placement.within_reach(0, [HEAD, CPUS]) == 0
    assert placement.within_reach(0, [Nodes({"CPU": 8, "GPU": 8}, 0, "off", together=6)]) == 0


def test_reading_asks_for_no_more_than_nodes_without_gpus_have(recipe: Callable[..., Recipe]) -> None:
    assert placement.reading_cpus([HEAD, CPUS, GPUS]) == 64
    assert placement.reading_cpus([Nodes({"CPU": 4}, 1), CPUS, GPUS]) == 68  # the head's own
    assert placement.reading_cpus([HEAD, Nodes({"CPU": 16}, 40, "cpus", together=6)]) == 96
    assert placement.reading_cpus([HEAD, GPUS]) == 96  # one node's: there are no others to read on
    assert placement.reading_cpus([HEAD, FIXED]) is None  # nothing grows
    on_cpus = recipe(3, "train.cpus_per_worker=16", "train.device=cpu")
    assert placement.reading_cpus([HEAD, CPUS, GPUS], on_cpus) == 16  # its workers hold three of the four nodes
    assert placement.reading_cpus([HEAD, CPUS, GPUS], recipe(16)) == 64  # they are on GPUs
    assert placement.reading_cpus([HEAD, CPUS], recipe(4, "train.cpus_per_worker=16")) == 1
