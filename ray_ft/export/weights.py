"""The exported weights: the base's files in their own layout, names and precision, with what was trained in place.

Memory holds one file's tensors and the adapters of its layers. An adapter is merged into the weights that it was
trained beside: where these were rounded to 4 bits, the rounded ones are written, in the base's precision.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from ray_ft import paths
from ray_ft.errors import ExportError
from ray_ft.model import adapt, adapter, load, quantize
from ray_ft.recipe import Model
from ray_ft.trained import Trained


def write(trained: Trained, folder: str) -> None:
    """Write a run's weights and, where the base has one, the index of its files.

    Raises:
        ExportError: a value is not finite, nothing differs from the base, or the base lacks what was trained.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    files = load.weight_files(trained.base)
    plan = _Plan.of(trained, set(files))
    files = {key: file for key, file in files.items() if key not in plan.copies}
    changed = learnt = 0
    for file in sorted(set(files.values())):
        with safe_open(os.path.join(trained.base, file), framework="pt") as base:
            content = {name: base.get_tensor(name) for name in sorted(n for n, f in files.items() if f == file)}
        fresh, nonzero = plan.fresh(trained, content)
        learnt += nonzero
        for key, tensor in fresh.items():
            if not torch.isfinite(tensor).all():
                raise ExportError(f"{key} holds values that are not finite", ["resume from an earlier checkpoint"])
            changed += not torch.equal(tensor, content[key])
        save_file({**content, **fresh}, os.path.join(folder, file), metadata={"format": "pt"})
    ways_out = ["check train.optimizer.lr and model.freeze", "a learning rate below the export precision rounds away"]
    if plan.adapters and not learnt:
        raise ExportError(
            f"the adapter changes nothing after {trained.found.step} steps: B is zero in all its {len(plan.adapters)} "
            "layers, so that this would publish the base model",
            ways_out,
        )
    if not changed:
        raise ExportError(
            f"no tensor differs from the base after {trained.found.step} steps: this would publish the base model",
            ways_out,
        )
    index = os.path.join(trained.base, load.INDEX)
    if os.path.exists(index):
        paths.write_json(os.path.join(folder, load.INDEX), {**paths.read_json(index), "weight_map": files})


@dataclass(frozen=True)
class _Plan:
    """What becomes of each tensor of the base's files, by the tensor's key there.

    Attributes:
        trained: name in the checkpoint of what replaces it.
        adapters: name of the adapted module whose weight it is.
        rounded: keys of weights that were held in 4 bits, which takes `dtype`.
        copies: keys of what the base stores a second time though it is tied; such a copy would stay the base's.
    """

    settings: Model
    trained: dict[str, str]
    adapters: dict[str, str]
    rounded: frozenset[str]
    copies: frozenset[str]
    dtype: torch.dtype

    @classmethod
    def of(cls, run: Trained, found: set[str]) -> _Plan:
        settings = run.recipe.model
        model = load.build(load.load_config(run.base))
        keys = load.stored_keys(model, found)
        dtype = torch.float32 if settings.dtype == "float32" else torch.bfloat16
        quantized = adapt.adapt(model, settings, dtype, dtype, packed=False).quantized if settings.quantize else ()
        names = run.trained_names()
        stored = {name: adapter.stored_name(name) for name in names}
        layers = {name.removesuffix(adapter.DOWN) for name in names if name.endswith(adapter.DOWN)}
        weights = {*filter(None, stored.values()), *(f"{layer}.weight" for layer in layers)}
        if absent := sorted(weights - keys.keys()):
            raise ExportError(
                f"the checkpoint trains {', '.join(absent[:3])}, which the base {run.base} does not hold",
                ["export with the base that the run was trained from (model.path)"],
            )
        return cls(
            settings,
            {keys[base]: name for name, base in stored.items() if base is not None},
            {keys[f"{layer}.weight"]: layer for layer in layers},
            frozenset(keys[name] for name in quantized),
            frozenset(key for name, key in keys.items() if name in model.all_tied_weights_keys),
            dtype,
        )

    def fresh(self, run: Trained, content: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], int]:
        """(The tensors of a file that are not the base's, how many adapters in it are not zero).

        Args:
            content: the base's file.
        """
        wanted = {self.trained[key]: torch.empty_like(tensor) for key, tensor in content.items() if key in self.trained}
        for key in content.keys() & self.adapters.keys():
            wanted |= self._matrices(self.adapters[key], content[key])
        if wanted:
            run.read(wanted)
        found, nonzero = {}, 0
        for key, tensor in content.items():
            if key in self.trained:
                found[key] = wanted[self.trained[key]]
            elif key in self.rounded:
                found[key] = quantize.rounded(tensor, self.dtype).to(tensor.dtype)
            if layer := self.adapters.get(key):
                assert self.settings.adapter is not None
                a, b = wanted[f"{layer}{adapter.DOWN}"], wanted[f"{layer}{adapter.UP}"]
                magnitude = wanted.get(f"{layer}{adapter.MAGNITUDE}")
                nonzero += bool(b.any())
                found[key] = adapter.merge(found.get(key, tensor), a, b, magnitude, self.settings.adapter)
        return found, nonzero

    def _matrices(self, layer: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        assert self.settings.adapter is not None
        shapes = adapter.shapes(self.settings.adapter, *weight.shape)
        return {f"{layer}{part}": torch.empty(shape, dtype=torch.float32) for part, shape in shapes.items()}
