"""The recipe's data on Ray Data: work spread over the cluster, and rows streamed to workers in order.

With `preserve_order`, a strict repartition into blocks of one worker's share of one step, and an equal split, Ray Data
deals block after block to worker after worker: step s of worker r is block s × workers + r. Every batch carries the
positions of its rows, and `batches` refuses one that is not the next: an order that broke is an error, never a silently
different run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ray_ft.data.order import Order, Slice
from ray_ft.data.pack import Rows, objects
from ray_ft.errors import RayFtError, TrainingError
from ray_ft.placement import reading_cpus
from ray_ft.placement.capacity import cluster

if TYPE_CHECKING:
    import ray.data

PREFETCH_STEPS = 4  # blocks that wait in each worker; a block is one worker's rows of one step
LIMITS_SECONDS = 0.1  # after which Ray Data looks again at what the cluster has
SEEN_ROWS = 16  # whose images a reading task has unpacked at once: 10 MB an image of Gemma 3


@dataclass(frozen=True)
class Batch:
    """One worker's rows of one step; `first` is the position of the first of them in the order.

    `samples` names those in each row as file:line, where the order keeps a ledger.
    """

    first: int
    rows: Rows
    samples: tuple[tuple[str, ...], ...] | None = None


def start_helpers() -> None:
    """Start the two actors that Ray Data has in every cluster, and waits for when it first needs them.

    By Ray's own functions (of 2.60, not public), since others that come later must find them under their names.
    """
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
        get_or_create_autoscaling_coordinator,
    )
    from ray.data._internal.stats import get_or_create_stats_actor

    get_or_create_autoscaling_coordinator()
    get_or_create_stats_actor()


def know_limits_soon() -> None:
    """Have this process's Ray Data begin with all its tasks at once, by a setting of 2.60 that is not public.

    It does not wait for the answer to what the cluster has, runs one task meanwhile, and looks again a second later: a
    ninth of the time that 50 MB take on two cores (seen).
    """
    try:
        from ray.data._internal.execution.resource_manager import ResourceManager
    except ImportError:  # a Ray that has it elsewhere begins as slowly as it does
        return
    ResourceManager.GLOBAL_LIMITS_UPDATE_INTERVAL_S = LIMITS_SECONDS


def in_process(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterable[Any]:
    """Spread without Ray: one after the other, here."""
    return map(function, items)


def spread(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """Apply a function to every item by Ray Data tasks, anywhere in the cluster; results come in the items' order."""
    return _mapped(lambda row: _applied(function, row), items, reading_cpus(cluster()), num_cpus=1)


def spread_over_actors(
    function: Callable[[Any], Any], items: Sequence[Any], *, actors: int, gpus: int
) -> Iterator[Any]:
    """The same by Ray Data actors, each with a copy of the function, which may keep what is costly to make.

    An actor that is lost is an error: Ray would start it again, but say for each actor that it may fail to.

    Args:
        gpus: of each actor.
    """
    import pickle

    from ray.data import ActorPoolStrategy

    if not items:
        return iter(())
    size = min(actors, len(items))
    return _mapped(
        _Actor,
        items,
        None,
        fn_constructor_args=(pickle.dumps(function),),
        compute=ActorPoolStrategy(size=size),
        num_cpus=1,
        num_gpus=gpus,
        ray_remote_args_fn=lambda: {"max_restarts": 0, "max_task_retries": 0},
    )


class _Actor:
    def __init__(self, function: bytes) -> None:
        import pickle

        self._function = pickle.loads(function)  # noqa: S301 - written above

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return _applied(self._function, row)


def _applied(function: Callable[[Any], Any], row: dict[str, Any]) -> dict[str, Any]:
    import pickle

    try:
        result = function(pickle.loads(row["item"]))  # noqa: S301 - written by `_mapped`
    except RayFtError as error:  # Ray Data would wrap it beyond recognition
        result = error
    return {"result": pickle.dumps(result)}


def _mapped(run: Any, items: Sequence[Any], cpus: float | None, **options: Any) -> Iterator[Any]:
    import pickle

    import ray.data

    know_limits_soon()
    # Opaque bytes both ways: Arrow would otherwise guess a schema for nested results, task by task.
    rows = [{"item": pickle.dumps(item)} for item in items]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    with warnings.catch_warnings():  # Ray has no other name yet for how often an actor is started again
        warnings.filterwarnings("ignore", "`ray_remote_args_fn` is deprecated")
        dataset = dataset.map(run, **options)
    dataset.context.execution_options = in_order(cpus)
    for row in dataset.iter_rows():
        result = pickle.loads(row["result"])  # noqa: S301 - written by `_applied`, in this cluster
        if isinstance(result, RayFtError):
            raise result
        yield result


def in_order(cpus: float | None) -> ray.data.ExecutionOptions:
    """Ray Data's settings for results in the order of their inputs.

    Args:
        cpus: tasks at once, and CPUs that Ray Data asks an autoscaler for; None: no limit but what there is.
    """
    from ray.data import ExecutionOptions, ExecutionResources

    limits = ExecutionResources.for_limits() if cpus is None else ExecutionResources.for_limits(cpu=cpus, gpu=0)
    return ExecutionOptions(preserve_order=True, resource_limits=limits)


def training_dataset(order: Order, start: int, stop: int) -> ray.data.Dataset:
    """Positions [start, stop) of the order as a Ray Dataset, in blocks of whatever size they were read in.

    Columns: ``position`` int64, ``input_ids`` int32 [seq_len], ``flags`` uint8 [seq_len]; where the order keeps a
    ledger, ``samples``: a list of file:line; of pairs with a reference, ``reference`` float32 [documents]; in a run
    with images, ``pixels``: the float32 of a row's images as bytes, since Arrow's tensors of one column have as many
    images in each row.
    """
    import pickle

    import ray.data

    prepared, ledger = order.prepared, order.ledger

    def read(batch: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        for item in batch["slice"]:
            part: Slice = pickle.loads(item)  # noqa: S301 - written below
            rows, samples = part.read_named(prepared) if ledger else (part.read(prepared), [])
            size = SEEN_ROWS if prepared.images else max(len(rows), 1)
            for at in range(0, len(rows), size):
                seen = prepared.seen(rows.take(slice(at, at + size)))
                first = part.position + at
                columns = {
                    "position": np.arange(first, first + len(seen), dtype=np.int64),
                    "input_ids": seen.input_ids,
                    "flags": seen.flags,
                }
                if seen.reference is not None:
                    columns["reference"] = seen.reference
                if seen.pixels is not None:
                    columns["pixels"] = objects([image.tobytes() for image in seen.pixels])
                if ledger:
                    columns["samples"] = objects([list(row) for row in samples[at : at + size]])
                yield columns

    items = [{"slice": pickle.dumps(part)} for part in order.slices(start, stop)]
    # Without any position too: a run that was lost after its last checkpoint is started once more.
    dataset = ray.data.from_items(items, override_num_blocks=max(len(items), 1))
    dataset.context.execution_options.preserve_order = True
    return dataset.map_batches(read, batch_size=1, zero_copy_batch=True)


def deal(rows: ray.data.Dataset, workers: int, share: int, options: ray.data.ExecutionOptions) -> list[Any]:
    """A shard of `training_dataset` for each worker, a `ray.data.DataIterator`, in blocks of its share of a step.

    Args:
        share: rows of a step that one worker has.
    """
    from ray_ft.data.pace import few_ahead

    blocks = rows.repartition(target_num_rows_per_block=share, strict=True)
    blocks.context.execution_options = options
    few_ahead(blocks)
    return blocks.streaming_split(workers, equal=True)


def batches(
    shard: ray.data.DataIterator, order: Order, start: int, rank: int, world: int, rows: int
) -> Iterator[Batch]:
    """One worker's batches from its shard of `training_dataset`, each checked to be the next in the order.

    Raises:
        TrainingError: Ray Data delivered other rows than the order says.
    """
    expected = start + rank * rows
    options: dict[str, Any] = {"batch_size": rows, "prefetch_batches": PREFETCH_STEPS, "batch_format": "numpy"}
    for columns in shard.iter_batches(**options):
        position = columns["position"]
        if position[0] != expected or not np.array_equal(position, np.arange(expected, expected + rows)):
            raise TrainingError(
                f"worker {rank} received rows {position.tolist()[:4]}… where the order has {expected} and on",
                [
                    "train again: it resumes at the newest checkpoint",
                    "report this with the recipe; it should not happen",
                ],
            )
        samples = tuple(tuple(row) for row in columns["samples"]) if order.ledger else None
        pixels = objects([_pixels(item, order) for item in columns["pixels"]]) if order.prepared.images else None
        kept = Rows(columns["input_ids"], columns["flags"], columns.get("reference"), pixels=pixels)
        yield Batch(expected, kept, samples)
        expected += rows * world


def _pixels(item: bytes, order: Order) -> np.ndarray:
    return np.frombuffer(item, np.float32).reshape(-1, *order.prepared.image_shape)


def ahead(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The same batches; the first is fetched in a thread from now on, not only when it is asked for."""
    stream = iter(batches)
    pool = ThreadPoolExecutor(1, thread_name_prefix="first-batch")
    first = pool.submit(next, stream, None)
    pool.shutdown(wait=False)

    def rest() -> Iterator[Batch]:
        batch = first.result()
        while batch is not None:
            yield batch
            batch = next(stream, None)

    return rest()


def local_batches(order: Order, start: int, stop: int, rank: int, world: int, rows: int) -> Iterator[Batch]:
    """The same batches read directly, without Ray Data: for one process, and for held-out rows.

    Every worker reads all slices and keeps its rows, which is right for small data only.
    """
    held, names = order.prepared.blank(0), list[tuple[str, ...]]()
    first, block = start, 0
    for part in order.slices(start, stop):
        read, named = part.read_named(order.prepared) if order.ledger else (part.read(order.prepared), [])
        held, names = Rows.concatenate([held, read]) if len(held) else read, names + named
        whole = len(held) // rows * rows
        for at in range(0, whole, rows):
            if block % world == rank:
                samples = tuple(names[at : at + rows]) if order.ledger else None
                yield Batch(first, order.prepared.seen(held.take(slice(at, at + rows))), samples)
            first, block = first + rows, block + 1
        held, names = held.take(slice(whole, None)), names[whole:]
