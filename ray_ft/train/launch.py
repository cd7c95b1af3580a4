"""A recipe to a finished run: check, prepare, start the workers on Ray Train (or none), show, wait."""

from __future__ import annotations

import threading
import time
import traceback
from dataclasses import dataclass, replace
from typing import Any

import torch

from ray_ft import paths, session
from ray_ft.data import stream
from ray_ft.data.order import Order
from ray_ft.data.prepare import Prepared, Split, check, prepare
from ray_ft.errors import RayFtError, ResourceError, TrainingError
from ray_ft.recipe import Recipe
from ray_ft.strategy import Layout
from ray_ft.train import checkpoint, worker
from ray_ft.train.metrics import MetricsLog
from ray_ft.train.schedule import total_steps
from ray_ft.view import View


@dataclass(frozen=True)
class Outcome:
    """How a run ended: steps finished of `total`, of which `taken` now; seconds to the end and to the first step."""

    finished: int
    total: int
    taken: int
    seconds: float
    first_step_seconds: float | None

    @property
    def complete(self) -> bool:
        return self.finished >= self.total


def train(recipe: Recipe, view: View) -> Outcome:
    """Train the recipe, or continue it where it stands.

    Raises:
        RayFtError: of the kind that says what is wrong: storage, resources, data, model, checkpoint or training.
    """
    began = time.monotonic()
    if recipe.train.workers == 0:
        job = prepare_job(recipe, view, stream.in_process)
        return _Monitor(job, view, began).watch(_in_process)
    with session.connected(recipe.train.workers, recipe.train.cpus_per_worker):
        if _on_gpus(recipe):
            session.check(recipe.train.workers, recipe.train.cpus_per_worker, 1)
        job = prepare_job(recipe, view, stream.spread)
        return _Monitor(job, view, began).watch(_on_ray)


def prepare_job(recipe: Recipe, view: View, spread: Any) -> worker.Job:
    """Prepare the recipe's data, write what was counted into the run directory, and refuse what is not fit to train on.

    Raises:
        DataError: see `prepare` and `check`.
        CheckpointError: the run of this name was trained on other data; nothing of it has been touched.
    """
    run = recipe.run.dir
    job = prepare_data(recipe, view, spread)
    job.start()
    paths.write_json(run.stats, {split: found.stats() for split, found in job.splits.items()})
    with paths.Appender(run.rejects) as rejects:
        for found in job.splits.values():
            rejects.write_file(found.rejects)  # as many as there are bad rows: not through memory
    for split, found in job.splits.items():
        check(found, recipe, split, run.rejects)
        view.line(f"{split} data{' (prepared before)' if found.reused else ''}: {found.summary()}")
    return job


def prepare_data(recipe: Recipe, view: View, spread: Any) -> worker.Job:
    """Prepare the recipe's data, or find it prepared; the run's directory is not touched."""
    paths.probe_writable(recipe.run.storage)
    folder = paths.model_folder(recipe.model.path, weights=False)
    prepared: dict[Split, Prepared] = {}
    splits: list[Split] = ["train", "eval"] if recipe.data.eval else ["train"]
    for split in splits:
        with view.progress(f"preparing {split} data") as progress:
            prepared[split] = prepare(recipe, split, folder, spread, progress)
    return worker.Job(recipe, prepared["train"], prepared.get("eval"))


class _Monitor:
    """Runs the workers in a thread and shows what they report; turns Ctrl-C into a checkpoint and a clean end."""

    def __init__(self, job: worker.Job, view: View, began: float) -> None:
        self.job, self._view, self._began = job, view, began
        self.stopping = threading.Event()
        self._first: float | None = None
        self._total = total_steps(job.recipe, job.order)

    def watch(self, start: Any) -> Outcome:
        recipe, run = self.job.recipe, self.job.recipe.run.dir
        for broken, why in _set_broken_aside(run.checkpoints):
            self._view.line(f"set aside {broken}: {why}")
        found = self.job.start()
        recipe.save()  # not before the run is known to go on with it: a refused one must not replace its own
        at = found.step if found else 0
        if at >= self._total:
            self._view.line(f"{recipe.run.name} is already trained: {at} of {self._total} steps")
            return Outcome(at, self._total, 0, time.monotonic() - self._began, None)
        if found:
            self._view.line(f"resuming {recipe.run.name} at step {at} of {self._total} from {found.location}")
        self._log = MetricsLog(run, at)
        done: list[int] = []
        failed: list[BaseException] = []
        over = threading.Event()

        def body() -> None:
            try:
                done.append(start(self.job, self))
            except BaseException as error:  # carried to the main thread, which raises it
                failed.append(error)
            finally:
                over.set()

        thread = threading.Thread(target=body, name="ray-ft-train", daemon=True)
        try:
            # A live panel would draw over a debugger's prompt.
            with self._view.training(self._total, at, plain=recipe.train.workers == 0) as self._panel:
                thread.start()
                self._wait(over)
        finally:
            self._log.close()
        if failed and recipe.train.workers == 0:
            raise failed[0]
        if failed:
            raise _as_ours(failed[0], run) from failed[0]
        return Outcome(done[0], self._total, done[0] - at, time.monotonic() - self._began, self._first)

    def _wait(self, over: threading.Event) -> None:
        # Not by joining the thread: Python 3.11 takes one for ended once Ctrl-C has interrupted join().
        while not over.is_set():
            try:
                over.wait(0.2)
            except KeyboardInterrupt:
                if self.stopping.is_set():
                    raise
                self._view.line("stopping after this step, with a checkpoint; Ctrl-C again to stop at once")
                self.stopping.set()

    def say(self, line: str) -> None:
        """Takes a line for people from the workers."""
        self._view.line(line)

    def log(self, row: dict[str, float]) -> None:
        """Takes a row of metrics from the workers."""
        if self._first is None:
            self._first = time.monotonic() - self._began
        self._panel.update(row)
        try:
            self._log.add(row)
            if "checkpoint_seconds" in row:
                self._log.flush()
        except OSError as error:  # the training itself may still reach its storage; losing it over a log would be worse
            self._view.line(f"metrics of step {row['step']} could not be written: {error}")

    def stop_requested(self) -> bool:
        return self.stopping.is_set()


def _set_broken_aside(folder: str) -> list[tuple[str, str]]:
    broken: list[tuple[str, str]] = []
    checkpoint.newest(folder, on_broken=lambda location, why: broken.append((location, why)))
    return broken


def _as_ours(error: BaseException, run: paths.RunDir) -> BaseException:
    """The deliberate error inside whatever Ray wrapped around it, if there is one."""
    seen: list[BaseException] = [error]
    for fault in seen:
        if isinstance(fault, RayFtError):
            return fault
        inner = [getattr(fault, "cause", None), fault.__cause__, *getattr(fault, "worker_failures", {}).values()]
        seen += [e for e in inner if isinstance(e, BaseException) and e not in seen]
    if isinstance(error, KeyboardInterrupt):
        return error
    last = str(error).strip().splitlines()[-12:]
    return TrainingError(
        "a worker failed:\n    " + "\n    ".join(last),
        [
            f"each worker's whole traceback: {run.at('logs')}",
            "train again to resume at the newest checkpoint",
            "train.workers=0 runs the same loop here, for a debugger",
        ],
    )


# ------------------------------------------------------------------------------------------------- in this process


def _in_process(job: worker.Job, monitor: _Monitor) -> int:
    recipe = job.recipe
    cuda = recipe.train.device == "cuda" or (recipe.train.device == "auto" and torch.cuda.is_available())
    if cuda and not torch.cuda.is_available():
        raise ResourceError("train.device = 'cuda', and this machine has no usable GPU", ["train.device=cpu"])
    layout = Layout(0, 1, torch.device("cuda", 0) if cuda else torch.device("cpu"), _dtype(recipe, cuda))
    alone = recipe.train.model_copy(update={"strategy": "none"})  # there is nobody to share the shards with
    job = replace(job, recipe=recipe.model_copy(update={"train": alone}))

    def batches(order: Order, start: int, total: int) -> Any:
        rows = recipe.train.global_batch
        return stream.local_batches(order, start * rows, total * rows, 0, 1, rows)

    return worker.run(job, layout, batches, monitor)


def _dtype(recipe: Recipe, cuda: bool) -> torch.dtype:
    name = recipe.model.dtype
    if name == "auto":
        name = "bfloat16" if cuda else "float32"
    return torch.bfloat16 if name == "bfloat16" else torch.float32


# ----------------------------------------------------------------------------------------------------------- on Ray


def _on_gpus(recipe: Recipe) -> bool:
    return recipe.train.device == "cuda" or (recipe.train.device == "auto" and session.gpus() > 0)


def _on_ray(job: worker.Job, monitor: _Monitor) -> int:
    import ray
    from ray.data import ExecutionOptions
    from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    recipe = job.recipe
    cuda = _on_gpus(recipe)
    board = ray.remote(num_cpus=0)(_Board).remote()
    rows, total = recipe.train.global_batch, total_steps(recipe, job.order)
    backend = "nccl" if cuda else "gloo"
    if cuda and recipe.train.fsdp.cpu_offload:
        backend = "cpu:gloo,cuda:nccl"  # the norm of gradients that lie in host memory is summed there

    def training_data() -> Any:  # called again whenever the workers are started, so it reads where the run stands now
        found = job.start()
        start = found.step if found else 0
        return stream.training_dataset(job.order, start * rows, total * rows, recipe.train.rows_per_worker)

    options = ExecutionOptions(preserve_order=True)
    trainer = TorchTrainer(
        _ray_worker,
        train_loop_config={"job": job, "board": board, "cuda": cuda},
        torch_config=TorchConfig(backend=backend),
        scaling_config=ScalingConfig(
            num_workers=recipe.train.workers,
            use_gpu=cuda,
            resources_per_worker={"CPU": recipe.train.cpus_per_worker, **({"GPU": 1} if cuda else {})},
        ),
        # Ray's own snapshots are not needed to resume and stop a run when they are damaged, so each start has new ones.
        run_config=RunConfig(
            name=f"attempt-{int(time.time())}",
            storage_path=recipe.run.dir.at("ray"),
            failure_config=FailureConfig(max_failures=0),
        ),
        datasets={"train": training_data},
        dataset_config=DataConfig(datasets_to_split=["train"], execution_options=options),
    )
    ended = threading.Event()

    def relay() -> None:
        while True:
            over = ended.wait(0.25)
            if monitor.stop_requested():
                board.stop.remote()
            lines, rows = ray.get(board.take.remote())
            for line in lines:
                monitor.say(line)
            for row in rows:
                monitor.log(row)
            if over:
                return

    relaying = threading.Thread(target=relay, name="ray-ft-metrics", daemon=True)
    relaying.start()
    try:
        trainer.fit()
        return ray.get(board.finished.remote())
    finally:
        ended.set()
        relaying.join(10)
        ray.kill(board)


class _Board:
    """An actor between the workers and whoever watches: metrics one way, the wish to stop the other."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._rows: list[dict[str, float]] = []
        self._stop = False
        self._finished = 0

    def say(self, line: str) -> None:
        self._lines.append(line)

    def push(self, row: dict[str, float]) -> None:
        self._rows.append(row)
        self._finished = int(row["step"])

    def finished(self) -> int:
        return self._finished

    def take(self) -> tuple[list[str], list[dict[str, float]]]:
        taken = self._lines, self._rows
        self._lines, self._rows = [], []
        return taken

    def stop(self) -> None:
        self._stop = True

    def stopping(self) -> bool:
        return self._stop


class _BoardLink:
    """Rank 0's end of the board; never waits for it."""

    def __init__(self, board: Any) -> None:
        self._board, self._asked = board, board.stopping.remote()
        self._pushed: Any = None

    def say(self, line: str) -> None:
        self._pushed = self._board.say.remote(line)

    def log(self, row: dict[str, float]) -> None:
        self._pushed = self._board.push.remote(row)

    def flush(self) -> None:
        """Wait until the board has the last row."""
        import ray

        if self._pushed is not None:
            ray.get(self._pushed)

    def stop_requested(self) -> bool:
        import ray

        if not ray.wait([self._asked], timeout=0)[0]:
            return False
        answer = ray.get(self._asked)
        self._asked = self._board.stopping.remote()
        return answer


def _ray_worker(config: dict[str, Any]) -> None:
    """The function that Ray Train runs on every worker."""
    import ray.train
    from ray.train.torch import get_device

    job: worker.Job = config["job"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = get_device() if config["cuda"] else torch.device("cpu")
    nodes = 1
    if job.recipe.train.fsdp.replicas == "nodes":
        if config["cuda"]:
            torch.cuda.set_device(device)  # over which NCCL talks
        ranks: list[Any] = [None] * world
        torch.distributed.all_gather_object(ranks, context.get_node_rank())
        nodes = len(set(ranks))
    layout = Layout(rank, world, device, _dtype(job.recipe, config["cuda"]), nodes)

    def batches(order: Order, start: int, total: int) -> Any:
        shard, settings = ray.train.get_dataset_shard("train"), job.recipe.train
        return stream.batches(shard, order, start * settings.global_batch, rank, world, settings.rows_per_worker)

    link = _BoardLink(config["board"])
    try:
        finished = worker.run(job, layout, batches, link)
        link.flush()
    except Exception:
        # Ray shortens tracebacks; the whole one is kept with the run.
        log = job.recipe.run.dir.at("logs", f"worker-{rank}.txt")
        paths.write_text(log, traceback.format_exc())
        raise
    ray.train.report({"step": finished})
