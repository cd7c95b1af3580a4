"""GPUs, machines and prices: the one editable file, read and checked."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ray_ft import paths
from ray_ft.errors import ResourceError

GIB = 2**30
DEFAULT_GPU = "h100-80"
GPUS_PER_NODE = 8


class Gpu(BaseModel):
    """One GPU and its share of the machine; gpus.yaml says what each figure is and where it comes from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dollars_per_gpu_hour: float = Field(ge=0)
    memory_gib: float = Field(gt=0)
    bf16_tflops: float = Field(gt=0)
    memory_gbps: float = Field(gt=0)
    link_gbps: float = Field(gt=0)
    network_gbps: float = Field(gt=0)
    pcie_gbps: float = Field(gt=0)
    host_gib: float = Field(gt=0)
    utilisation: float = Field(gt=0, le=1)


class Constants(BaseModel):
    """What is neither in the model nor in the recipe, and takes memory or time all the same."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    context_gib: float = Field(ge=0)
    workspace_gib: float = Field(ge=0)
    nccl_gib: float = Field(ge=0)
    slack: float = Field(ge=0)
    host_process_gib: float = Field(ge=0)
    host_node_gib: float = Field(ge=0)
    host_usable: float = Field(gt=0, le=1)
    host_gbps: float = Field(gt=0)
    nvme_gbps: float = Field(gt=0)


class Prices(BaseModel):
    """All of gpus.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    gpus: dict[str, Gpu]
    utilisation: dict[str, float]
    constants: Constants


@dataclass(frozen=True)
class Fleet:
    """`nodes` machines with `gpus_per_node` GPUs of one kind each."""

    name: str
    gpu: Gpu
    nodes: int
    gpus_per_node: int

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def dollars_per_hour(self) -> float:
        return self.gpus * self.gpu.dollars_per_gpu_hour

    @property
    def label(self) -> str:
        nodes = f"{self.nodes} nodes of {self.gpus_per_node}" if self.nodes > 1 else f"{self.gpus_per_node}"
        return f"{nodes} × {self.name}"


def load_prices(location: str | None = None) -> Prices:
    """What is shipped, with what the file at `location` says put in its place, key by key.

    Raises:
        ResourceError: the file cannot be read, or says something impossible.
    """
    content = yaml.safe_load(resources.files("ray_ft.plan").joinpath("gpus.yaml").read_text(encoding="utf-8"))
    where = location or "gpus.yaml"
    ways_out = ["copy ray_ft/plan/gpus.yaml and change what differs", "or leave --prices out"]
    if location:
        try:
            theirs = yaml.safe_load(paths.read_text(paths.absolute(location)))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ResourceError(f"--prices {location!r} cannot be read: {error}", ways_out) from error
        if not isinstance(theirs, dict):
            raise ResourceError(f"--prices {location!r} holds {type(theirs).__name__}, not sections", ways_out)
        content = _merged(content, theirs)
    try:
        return Prices.model_validate(content)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        raise ResourceError(f"{where}: {'; '.join(faults)}", ways_out) from error


def choose(
    prices: Prices, workers: int, gpu: str | None = None, nodes: int | None = None, gpus_per_node: int | None = None
) -> Fleet:
    """The fleet that is named, completed from the recipe's number of workers.

    Raises:
        ResourceError: no such GPU is known, a number is below one, or the workers do not lie evenly on the nodes.
    """
    name = gpu or DEFAULT_GPU
    if name not in prices.gpus:
        near = difflib.get_close_matches(name, prices.gpus, n=3, cutoff=0.4)
        ways_out = [f"did you mean {one}?" for one in near] or [f"known: {', '.join(prices.gpus)}"]
        raise ResourceError(f"--gpu {name!r} is unknown", [*ways_out, "add it to a file of yours: --prices FILE"])
    for option, number in (("--nodes", nodes), ("--gpus-per-node", gpus_per_node)):
        if number is not None and number < 1:
            raise ResourceError(f"{option} {number} is not a number of machines or GPUs", ["give 1 or more"])
    workers = max(workers, 1)
    if nodes is None:
        # Without a word about machines: the recipe's workers, on as many machines as they need.
        nodes = 1 if gpus_per_node else -(-workers // GPUS_PER_NODE)
    if gpus_per_node is None:
        gpus_per_node = max(-(-workers // nodes), 1)
        if workers % nodes and nodes > 1:
            raise ResourceError(
                f"{workers} workers do not lie evenly on {nodes} nodes",
                ["name both: --nodes and --gpus-per-node", "or change train.workers"],
            )
    return Fleet(name, prices.gpus[name], nodes, gpus_per_node)


def _merged(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(ours)
    for key, value in theirs.items():
        mine = ours.get(key)
        found[key] = _merged(mine, value) if isinstance(mine, Mapping) and isinstance(value, Mapping) else value
    return found
