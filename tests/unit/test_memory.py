"""No rank ever holds the whole model: loading takes a rank's shard and no more than one tensor beside it."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import build, recipe_of, run
from transformers import LlamaConfig, LlamaForCausalLM

from ray_ft.demo import DemoPaths

WORLD = 4
SIZES = {"vocab_size": 16_384, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, int, int]:
    """A folder with 168M weights in bfloat16; (folder, elements, elements of the largest tensor)."""
    folder = tmp_path_factory.mktemp("large")
    config = LlamaConfig(**SIZES, num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=False)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    model.save_pretrained(folder)
    sizes = [parameter.numel() for parameter in model.parameters()]
    return str(folder), sum(sizes), max(sizes)


class Watch:
    """The most anonymous memory of this process, in bytes, looked at every few milliseconds.

    What is mapped from files does not count: the system takes it back when it needs to.
    """

    def __enter__(self) -> Watch:
        self.start = self.peak = anonymous()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._over.wait(0.003):
            self.peak = max(self.peak, anonymous())

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self.peak = max(self.peak, anonymous())  # it may have been looked at last before the end

    @property
    def grown(self) -> int:
        return self.peak - self.start


def anonymous() -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def load_watched(rank: int, world: int, demo: DemoPaths, folder: str, strategy: str) -> tuple[int, int]:
    """(bytes by which memory grew at most, bytes of this rank's weights)."""
    options = [f"train.strategy={strategy}", f"train.workers={world}", "train.micro_batch=1"]
    build(recipe_of(demo, "/none", *options), rank, world)  # imports, and what they allocate
    recipe = recipe_of(demo, "/none", f"model.path={folder}", *options)
    with Watch() as watch:
        built: Any = build(recipe, rank, world)
    return watch.grown, sum(span.data.numel() * 4 for span in built.spans().values())


def test_fsdp_loads_a_shard_with_little_beside_it(demo: DemoPaths, large: tuple[str, int, int]) -> None:
    folder, elements, largest = large
    for grown, held in run(WORLD, load_watched, demo, folder, "fsdp"):
        assert held == pytest.approx(elements * 4 / WORLD, rel=0.01)
        assert held < grown + 2**20  # the watch sees it
        assert grown < held + largest * 4 + 32 * 2**20
    [(whole, _)] = run(1, load_watched, demo, folder, "none")
    assert whole > elements * 4 - 2**20  # without sharding it is all there, so the bound above means something
