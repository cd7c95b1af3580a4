"""The stand-in for an image processor that vLLM imports: in a process of its own, as imports cannot be undone."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest

SCRIPT = """
import importlib.util, sys
found, there = importlib.util.find_spec, {there}
importlib.util.find_spec = lambda name, *more: object() if name == "torchvision" and there else (
    None if name == "torchvision" else found(name, *more))
from ray_ft.vllm_plugin import MODULE, images_by_pil
for _ in range(2):  # vLLM says that a plugin may be loaded again
    images_by_pil()
print(MODULE in sys.modules and sys.modules[MODULE].Gemma3ImageProcessor.__name__)
"""


@pytest.mark.parametrize(("there", "expected"), [(False, "Gemma3ImageProcessorPil"), (True, "False")])
def test_pil_stands_in_where_there_is_no_torchvision_and_nothing_is_touched_where_there_is(
    there: bool, expected: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(there=there)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [expected]


def test_vllm_finds_it() -> None:
    (entry,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="ray_ft_images")
    assert entry.load().__name__ == "images_by_pil"
