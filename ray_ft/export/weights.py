"""The exported weights: the base's files in their own layout, names and precision, with what was trained in place.

Files are written in one pass, and what is not trained is copied in blocks, so that memory holds what is trained of one
layer: its tensors, its adapters, and one product in float32. An adapter is merged into the weights that it was trained
beside: where these were rounded to 4 bits, the rounded ones are written, in the base's precision.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby

import torch

from ray_ft import paths
from ray_ft.errors import ExportError
from ray_ft.export.tensorfile import Entry, Reader, Writer
from ray_ft.model import adapt, adapter, classify, load, quantize
from ray_ft.recipe import Model
from ray_ft.trained import Trained

#: What stands before a layer's own names: ``model.layers.17.``
LAYER = re.compile(r".*?\.\d+\.")


def write(trained: Trained, folder: str, plan: Plan) -> None:
    """Write a run's weights and, where the base has one, the index of its files."""
    files = plan.files
    total = 0
    for file in sorted(set(files.values())):
        with Reader(os.path.join(trained.base, file)) as base:
            entries = plan.entries(file, base)
            total += sum(entry.size for entry in entries.values())
            with Writer(os.path.join(folder, file), entries) as out:
                for keys in by_layer(list(entries)):
                    fresh = plan.fresh(trained, base, keys)
                    for key in keys:
                        if key in fresh:
                            out.write(key, fresh.pop(key))
                        else:
                            out.copy(key, base.blocks(key))
    index = os.path.join(trained.base, load.INDEX)
    if os.path.exists(index):
        content = paths.read_json(index)
        metadata = {**content.get("metadata", {}), "total_size": total}
        paths.write_json(os.path.join(folder, load.INDEX), {**content, "metadata": metadata, "weight_map": files})


def by_layer(keys: Sequence[str]) -> Iterator[list[str]]:
    """Runs of keys that belong to one layer; what belongs to none comes one by one."""

    def layer(numbered: tuple[int, str]) -> str | int:
        number, key = numbered
        found = LAYER.match(key)
        return found[0] if found else number

    for _, group in groupby(enumerate(keys), layer):
        yield [key for _, key in group]


@dataclass(frozen=True)
class Plan:
    """What becomes of each tensor of the base's files, by the tensor's key there.

    Attributes:
        trained: name in the checkpoint of what replaces it.
        adapters: name of the adapted module whose weight it is.
        rounded: keys of weights that were held in 4 bits, which takes `dtype`.
        copies: keys of what the base stores a second time though it is tied; such a copy would stay the base's.
        new: what the base has not: a classifier's last layer, in place of a language model's.
        stored: key → file, of what the base has that the trained model has, too.
    """

    settings: Model
    trained: dict[str, str]
    adapters: dict[str, str]
    rounded: frozenset[str]
    copies: frozenset[str]
    dtype: torch.dtype
    stored: dict[str, str]
    new: dict[str, Entry] = field(default_factory=dict)

    @classmethod
    def of(cls, run: Trained) -> Plan:
        """
        Raises:
            ExportError: the base lacks what was trained.
        """
        stored = load.weight_files(run.base)
        settings = run.recipe.model
        model = load.build(config := run.config())
        keys = load.stored_keys(model, stored)
        dtype = torch.float32 if settings.dtype == "float32" else torch.bfloat16
        quantized = adapt.adapt(model, settings, dtype, dtype, packed=False).quantized if settings.quantize else ()
        names, parameters = run.trained_names(), dict(model.named_parameters())
        bases = {name: adapter.stored_name(name) for name in names}
        layers = {name.removesuffix(adapter.DOWN) for name in names if name.endswith(adapter.DOWN)}
        new = {
            name: Entry.of(load.stored_dtype(config), parameters[name].shape)
            for name in classify.new_names(model, keys)
        }
        weights = {*filter(None, bases.values()), *(f"{layer}.weight" for layer in layers)}
        if absent := sorted(weights - keys.keys() - new.keys()):
            raise ExportError(
                f"the checkpoint trains {', '.join(absent[:3])}, which the base {run.base} does not hold",
                ["export with the base that the run was trained from (model.path)"],
            )
        return cls(
            settings,
            {keys.get(base, base): name for name, base in bases.items() if base is not None},
            {keys[f"{layer}.weight"]: layer for layer in layers},
            frozenset(keys[name] for name in quantized),
            frozenset(key for name, key in keys.items() if name in model.all_tied_weights_keys),
            dtype,
            {key: file for key, file in stored.items() if not (run.labels and key == keys.get(classify.WORDS))},
            new,
        )

    @cached_property
    def files(self) -> dict[str, str]:
        """Key → file, of what is exported."""
        found = {key: file for key, file in self.stored.items() if key not in self.copies}
        return found | dict.fromkeys(self.new, max(found.values()))

    def entries(self, file: str, base: Reader) -> dict[str, Entry]:
        """Key → what is exported in a file, in the order of the base's."""
        everything = {**base.entries, **self.new}
        return {key: entry for key, entry in everything.items() if self.files.get(key) == file}

    @cached_property
    def changed(self) -> frozenset[str]:
        """Keys of all that need not be the base's."""
        return frozenset(self.trained.keys() | self.adapters.keys() | self.rounded)

    def fresh(self, run: Trained, base: Reader, keys: Sequence[str]) -> dict[str, torch.Tensor]:
        """Those tensors among `keys`, all of one of the base's files, that are not the base's, as they are exported."""
        found = {}
        for key in keys:  # read at once what is replaced, as each look at a checkpoint asks its storage several times
            if key in self.trained:
                entry = self.new.get(key) or base.entries[key]
                found[key] = torch.empty(entry.shape, dtype=entry.dtype)
        wanted = {self.trained[key]: tensor for key, tensor in found.items()}
        for key in keys:
            if layer := self.adapters.get(key):
                shapes = self.adapter_entries(layer, base.entries[key].shape)
                wanted |= {name: torch.empty(entry.shape, dtype=entry.dtype) for name, entry in shapes.items()}
        if wanted:
            run.read(wanted)
        for key in keys:
            if key in self.rounded:
                weight = base.read(key)
                found[key] = quantize.rounded(weight, self.dtype).to(weight.dtype)
            if layer := self.adapters.get(key):
                assert self.settings.adapter is not None
                weight = found[key] if key in found else base.read(key)
                a, b = wanted.pop(f"{layer}{adapter.DOWN}"), wanted.pop(f"{layer}{adapter.UP}")
                magnitude = wanted.pop(f"{layer}{adapter.MAGNITUDE}", None)
                found[key] = adapter.merge(weight, a, b, magnitude, self.settings.adapter)
        return found

    def adapter_entries(self, layer: str, weight: tuple[int, ...]) -> dict[str, Entry]:
        """Name in the checkpoint → what a layer's adapter has there, its weight being [outputs, inputs]."""
        assert self.settings.adapter is not None
        shapes = adapter.shapes(self.settings.adapter, *weight)
        return {f"{layer}{part}": Entry.of(torch.float32, shape) for part, shape in shapes.items()}
