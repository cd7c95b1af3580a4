"""Ray Train and Ray Data alone: the loop of `torchrun_loop.py` as a function of theirs, on a Ray of its own.

What it takes to its first step is what anything that is built on them takes at least. Ray Data deals out the numbers of
rows, which lie in each worker's memory.
    python benchmarks/peers/ray_train_loop.py SETTINGS.json
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

WORKERS = 2


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    here = str(Path(__file__).parent)
    ray.init(
        address="local", num_cpus=WORKERS + 1, include_dashboard=False, log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))}},
    )  # fmt: skip
    share = settings["global_batch"] // WORKERS
    rows = ray.data.range(settings["steps"] * settings["global_batch"])
    with tempfile.TemporaryDirectory(prefix="ray_train_") as storage:
        trainer = TorchTrainer(
            work,
            train_loop_config={**settings, "share": share},
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=ScalingConfig(num_workers=WORKERS),
            run_config=RunConfig(storage_path=storage),
            datasets={"train": rows.repartition(target_num_rows_per_block=share, strict=True)},
        )
        trainer.fit()


def work(settings: dict[str, Any]) -> None:
    """What each worker runs."""
    import ray.train
    from torchrun_loop import train

    context, shard = ray.train.get_context(), ray.train.get_dataset_shard("train")
    batches = (batch["id"] for batch in shard.iter_batches(batch_size=settings["share"]))
    train(settings, context.get_world_rank(), context.get_world_size(), batches)


if __name__ == "__main__":
    main()
