"""The peer of `launcher.py` and `recovery.py`: the same training as a plain torchrun script, nothing of ray_ft in it.

Reads the packed rows from a .npz file, in the order in which ray-ft trains them, and keeps them in memory. Where the
settings name a folder and a number of steps as "checkpoint", it saves after every so many, by PyTorch's distributed
checkpoints, and begins at the newest; where they name a "progress" file, each finished step is written into it.
    torchrun --nproc-per-node 2 benchmarks/peers/torchrun_loop.py SETTINGS.json
"""

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    train(settings, rank, world, in_order(settings, rank, world))
    dist.destroy_process_group()


def in_order(settings: dict[str, Any], rank: int, world: int) -> Iterator[slice]:
    """This worker's rows of each step."""
    share = settings["global_batch"] // world
    for step in range(settings["steps"]):
        first = step * settings["global_batch"] + rank * share
        yield slice(first, first + share)


def train(settings: dict[str, Any], rank: int, world: int, batches: Iterable[Any]) -> None:
    """The loop; `batches` gives what takes this worker's rows of a step, from the first step on."""
    torch.set_num_threads(settings["threads"])
    arrays = np.load(settings["rows"])
    ids, positions, labels = (torch.from_numpy(arrays[name]) for name in ("input_ids", "position_ids", "labels"))

    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32, attn_implementation="sdpa")
    mesh = init_device_mesh("cpu", (world,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings["lr"], betas=(0.9, 0.95), weight_decay=0.0)

    saving = settings.get("checkpoint")
    start = restore(saving["folder"], model, optimizer) if saving else 0

    step_seconds, losses, first = [], [], 0.0
    began = time.perf_counter()
    for step, rows in enumerate(batches):
        if step < start:
            continue
        targets = labels[rows][:, 1:]
        tokens = torch.tensor([(targets != -100).sum().item()], dtype=torch.float64)
        dist.all_reduce(tokens)
        # The usual way: all logits of the row, on every position.
        logits = model(input_ids=ids[rows], position_ids=positions[rows], use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten(), reduction="sum")
        (loss * world / tokens.item()).backward()  # FSDP2 averages over workers
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total = loss.detach().double()
        dist.all_reduce(total)
        losses.append(total.item() / tokens.item())
        step_seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
        first = first or time.time()
        if "progress" in settings and rank == 0:
            with open(settings["progress"], "a") as stream:
                stream.write(f"{step + 1}\n")
        if saving and (step + 1) % saving["every"] == 0:
            save(saving["folder"], step + 1, model, optimizer)
    if rank == 0:
        with open(settings["result"], "w") as stream:
            json.dump({"step_seconds": step_seconds, "losses": losses, "first_step_at": first}, stream)


def save(folder: str, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=os.path.join(folder, str(step)))
    if dist.get_rank() == 0:  # the name of the newest changes once all of it is there
        newest = Path(folder, "newest")
        newest.with_suffix(".new").write_text(str(step))
        newest.with_suffix(".new").replace(newest)


def restore(folder: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Fill both from the newest checkpoint, if there is one. Returns the steps finished."""
    newest = Path(folder, "newest")
    if not newest.exists():
        return 0
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    dcp.load(state, checkpoint_id=os.path.join(folder, newest.read_text()))
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return int(newest.read_text())


if __name__ == "__main__":
    main()
