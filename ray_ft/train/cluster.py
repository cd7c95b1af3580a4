"""Training on Ray: the workers of a run, started again as long as the recipe's budgets allow.

Ray Train's controller watches the workers and starts them again (see `controller`), each time at the newest checkpoint;
this module gives it what they need, and runs it.
"""

from __future__ import annotations

import contextlib
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Protocol

import torch

from ray_ft import artifacts, paths
from ray_ft.data import stream
from ray_ft.data.order import Order
from ray_ft.errors import RayFtError, ResourceError, TrainingError
from ray_ft.placement import capacity, reading_cpus
from ray_ft.recipe import Recipe
from ray_ft.strategy import Layout
from ray_ft.train import worker
from ray_ft.train.asks import Ask, Restart
from ray_ft.train.board import BoardLink, Message, place
from ray_ft.train.schedule import total_steps

RELAY_SECONDS = 0.25


class Watcher(Protocol):
    """Who started the run."""

    def take(self, messages: list[Message]) -> None:
        """Take what the workers reported."""

    def asked(self) -> Ask:
        """STOP or DROP where the run should end after the step under way."""

    def can_cancel(self, cancel: Callable[[], None]) -> None:
        """Training begins; `cancel`, from any thread, ends it at once and without a checkpoint."""


def run(job: worker.Job, watcher: Watcher) -> int:
    """Train on the connected cluster to the end. Returns the steps finished.

    Raises:
        RayFtError: what a worker raised, or a TrainingError that says how the workers failed.
    """
    board = place()
    try:
        with _relaying(board, watcher):
            return _fit(job, board, on_gpus(job.recipe), watcher)
    except Exception as error:
        raise _as_ours(error, job.recipe.run.dir) from error
    finally:
        import ray

        ray.kill(board)


def _fit(job: worker.Job, board: Any, cuda: bool, watcher: Watcher) -> int:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig

    from ray_ft.train.controller import Dealer, Surroundings, Trainer

    recipe, settings = job.recipe, job.recipe.train
    total = total_steps(recipe, job.order)
    backend = "nccl" if cuda else "gloo"
    if cuda and settings.fsdp.cpu_offload:
        backend = "cpu:gloo,cuda:nccl"  # the norm of gradients that lie in host memory is summed there

    def start() -> Any:
        found = job.start(lambda aside, why: board.push.remote("line", f"set aside {aside}: {why}"))
        begin = (found.step if found else 0) * settings.global_batch
        return found, stream.training_dataset(job.order, begin, total * settings.global_batch)

    options = stream.in_order(reading_cpus(capacity.cluster(), recipe))
    sizes = settings.sizes
    attempt = f"attempt-{time.time_ns()}"
    trainer = Trainer(
        _ray_worker,
        train_loop_config={"job": job, "board": board, "cuda": cuda},
        torch_config=TorchConfig(backend=backend, timeout_s=int(settings.failures.collective_seconds)),
        scaling_config=ScalingConfig(
            num_workers=sizes[0] if len(sizes) == 1 else (sizes[0], sizes[-1]),
            use_gpu=cuda,
            resources_per_worker={"CPU": settings.cpus_per_worker, **({"GPU": 1} if cuda else {})},
            elastic_resize_monitor_interval_s=settings.failures.grow_seconds,
        ),
        # Ray's own snapshots are not needed to resume and stop a run when they are damaged, so each start has new ones.
        run_config=RunConfig(
            name=attempt,
            storage_path=recipe.run.dir.at("ray"),
            failure_config=FailureConfig(max_failures=settings.failures.max_failures),
            callbacks=[Surroundings()],
        ),
        dealer=Dealer(start, settings.global_batch, options),
        sizes=sizes,
        failures=settings.failures,
        board=board,
        checkpoints=recipe.run.dir.checkpoints,
    )
    watcher.can_cancel(trainer.cancel)
    try:
        trainer.fit()
    finally:
        with contextlib.suppress(OSError):  # a few empty folders, which the next run does not read
            paths.delete_dir(recipe.run.dir.at("ray", attempt))
    return ray.get(board.finished.remote())


@contextlib.contextmanager
def _relaying(board: Any, watcher: Watcher) -> Iterator[None]:
    """Carries messages from the board to the watcher, and its wish to stop to the board, until the block ends."""
    import ray

    ended = threading.Event()
    failed: list[BaseException] = []

    def relay() -> None:
        told, over = Ask.NOTHING, False
        try:
            while not over:
                over = ended.wait(RELAY_SECONDS)
                if (wish := watcher.asked()) > told:
                    board.ask.remote(wish)
                    told = wish
                watcher.take(ray.get(board.take.remote()))
        except Exception as error:  # nobody sees the run any more: it ends, with a checkpoint
            failed.append(error)
            board.ask.remote(Ask.STOP)

    relaying = threading.Thread(target=relay, name="ray-ft-relay", daemon=True)
    relaying.start()
    try:
        yield
    finally:
        ended.set()
        relaying.join(10)
    if failed:
        raise failed[0]


def on_gpus(recipe: Recipe) -> bool:
    """Whether the recipe trains on GPUs of the connected cluster; those that may come count."""
    return recipe.train.device == "cuda" or (
        recipe.train.device == "auto" and capacity.on_gpus(recipe, capacity.cluster())
    )


def compute_dtype(recipe: Recipe, cuda: bool) -> torch.dtype:
    """Of the forward and backward pass."""
    name = recipe.model.dtype
    if name == "auto":
        name = "bfloat16" if cuda else "float32"
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def _as_ours(error: BaseException, run: artifacts.RunDir) -> BaseException:
    """The deliberate error inside whatever Ray wrapped around it, if there is one."""
    from ray_ft.train.survival import WorkerGroupStartupTimeoutError, causes

    for fault in causes(error):
        if isinstance(fault, RayFtError):
            return fault
        if isinstance(fault, WorkerGroupStartupTimeoutError):
            return ResourceError(
                f"there is no room for train.workers = {fault.num_workers}, also not after waiting",
                ["add nodes to the cluster", "fewer train.workers", "the same command continues the run"],
            )
    last = str(error).strip().splitlines()[-12:]
    return TrainingError(
        "the workers failed:\n    " + "\n    ".join(last),
        [
            f"each worker's whole traceback: {run.logs}",
            "train again to resume at the newest checkpoint",
            "train.failures.max_failures says how many failures in a row are survived",
            "train.workers=0 runs the same loop here, for a debugger",
        ],
    )


def _ray_worker(config: dict[str, Any]) -> None:
    """The function that Ray Train runs on every worker."""
    import ray
    import ray.train
    from ray.train.torch import get_device

    from ray_ft.train.controller import leaving, part

    job: worker.Job = config["job"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    job = replace(job, recipe=job.recipe.sized(world))
    device = get_device() if config["cuda"] else torch.device("cpu")
    nodes = 1
    if job.recipe.train.fsdp.replicas == "nodes":
        if config["cuda"]:
            torch.cuda.set_device(device)  # over which NCCL talks
        ranks: list[Any] = [None] * world
        torch.distributed.all_gather_object(ranks, context.get_node_rank())
        nodes = len(set(ranks))
    layout = Layout(rank, world, device, compute_dtype(job.recipe, config["cuda"]), nodes)
    given = part()

    def batches(order: Order, start: int, total: int) -> Any:
        settings = job.recipe.train
        return stream.batches(given.rows, order, start * settings.global_batch, rank, world, settings.rows_per_worker)

    link = BoardLink(config["board"], rank, leaving)
    try:
        worker.run(job, given.found, layout, batches, link)
        link.flush()
    except Restart:
        link.flush()
        raise
    except Exception:
        # Ray shortens tracebacks; the whole one is kept with the run, unless it is the storage that failed.
        with contextlib.suppress(OSError, RayFtError):
            paths.write_text(job.recipe.run.dir.at("logs", f"worker-{rank}.txt"), traceback.format_exc())
        raise
    finally:
        link.close()
