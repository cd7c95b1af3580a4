"""What lies in the exported files: the right tensors, once each, finite, and not the base's."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ray_ft import paths
from ray_ft.errors import ExportError
from ray_ft.export import lora
from ray_ft.export.case import Case, config_of
from ray_ft.export.gate import LeftOut, check
from ray_ft.export.tensorfile import Entry, Reader
from ray_ft.export.weights import by_layer
from ray_ft.model import load

AGAIN = "export again; if that does not help, report it with the recipe"


@check("base")
def base(case: Case) -> dict[str, Any]:
    """The base's weights are those that the run was trained from.

    Other ones under the same name would be exported, and compared with themselves.
    """
    kept, folder = case.trained.found.state.get(load.FINGERPRINT), case.trained.base
    if kept is None:
        raise LeftOut("the checkpoint keeps no fingerprint of its base")
    if (found := load.fingerprint(folder)) != kept:
        raise ExportError(
            f"the weights in {folder} are not those that the run was trained from",
            ["put the base's weights back, or restore model.path's old revision", "train again from the new ones"],
        )
    return {"sha256": found}


@check("keys")
def keys(case: Case) -> dict[str, Any]:
    """Every tensor is there, in the file that the base's index names, once; and the index says so.

    Tied copies are `tied_head`'s.
    """
    expected = _places(case.expected)
    found = _places(case.found)
    faults = []
    for what, names in (
        ("missing", expected.keys() - found.keys()),
        ("more than the base has", {name for name in found.keys() - expected.keys() if name not in _copies(case)}),
        ("twice", {name for name, files in found.items() if len(files) > 1}),
        ("in another file than the base's", _moved(expected, found)),
    ):
        if names:
            faults.append(f"{what}: {_some(names)}")
    index = os.path.join(case.folder, load.INDEX)
    if os.path.exists(index):
        listed = paths.read_json(index)["weight_map"]
        wrong = {name for name in listed.keys() | found.keys() if [listed.get(name)] != found.get(name)}
        if wrong - _copies(case):
            faults.append(f"the index and the files disagree: {_some(wrong)}")
    elif case.kind == "model" and len(case.found) > 1:
        faults.append(f"several files and no {load.INDEX}")
    if faults:
        raise ExportError(f"of {len(expected)} tensors {'; '.join(faults)}", [AGAIN])
    return {"tensors": len(expected), "files": len(case.expected)}


@check("shapes")
def shapes(case: Case) -> dict[str, Any]:
    """Every tensor has the shape that it has in the base."""
    return _same(case, lambda entry: list(entry.shape), "shape")


@check("dtype")
def dtype(case: Case) -> dict[str, Any]:
    """Every tensor has the element type that it has in the base; an adapter's have that of its training."""
    _same(case, lambda entry: entry.code, "element type")
    return {"dtypes": sorted({entry.code for entries in case.found.values() for entry in entries.values()})}


def _same(case: Case, fact: Callable[[Entry], Any], what: str) -> dict[str, Any]:
    tensors = 0
    for file, entries in case.expected.items():
        for name, entry in entries.items():
            tensors += 1
            if (found := fact(case.found[file][name])) != fact(entry):
                raise ExportError(f"{name} in {file} has {what} {found}, {fact(entry)} is right", [AGAIN])
    return {"tensors": tensors}


@check("finite")
def finite(case: Case) -> dict[str, Any]:
    """No value is infinite or not a number."""
    values = 0
    for _, name, tensor in _tensors(case):
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ExportError(
                f"{name} holds values that are not finite",
                ["resume from an earlier checkpoint", "lower train.optimizer.lr, or clip gradients more tightly"],
            )
        values += tensor.numel()
    return {"values": values}


@check("tied_head")
def tied_head(case: Case) -> dict[str, Any]:
    """What the model ties is stored once, and the exported config ties it as the base's does.

    Readers that take a second copy would answer with the base's output projection.
    """
    found = load.load_config(case.folder)
    ties = [_ties(config) for config in (case.config, found)]
    if ties[0] != ties[1]:
        raise ExportError(f"config.json has tie_word_embeddings {ties[1]}, the base's has {ties[0]}", [AGAIN])
    if stored := _copies(case) & _places(case.found).keys():
        raise ExportError(
            f"{_some(stored)} is stored though it is tied to another tensor, so that readers may take the copy", [AGAIN]
        )
    return {"tied": ties[0]}


@check("config")
def config(case: Case) -> dict[str, Any]:
    """config.json says in every field what the base's says; a classifier's says its class and labels.

    Answers alone do not tell: the rows that are compared are shorter than attention windows and position scaling.
    """
    fields = [config_of(case.trained), paths.read_json(os.path.join(case.folder, "config.json"))]
    if wrong := {key for key in fields[0].keys() | fields[1].keys() if fields[0].get(key) != fields[1].get(key)}:
        labels = " with the recipe's labels" if case.trained.labels else ""
        raise ExportError(f"config.json differs from the base's{labels} in {_some(wrong)}", [AGAIN])
    return {"fields": len(fields[0])}


def _ties(config: Any) -> bool:
    return bool(config.get_text_config().tie_word_embeddings)


def _copies(case: Case) -> set[str]:
    """Keys, and names in memory, of what the model ties to another tensor."""
    return {*case.plan.copies, *case.model.all_tied_weights_keys}


@check("weights_changed")
def weights_changed(case: Case) -> dict[str, Any]:
    """Something differs from the base, and nothing that was not trained does. What is new began with zeros."""
    changed = 0
    for file, names in case.expected.items():
        with Reader(os.path.join(case.trained.base, file)) as base, Reader(os.path.join(case.folder, file)) as ours:
            for name in names:
                if not ours.read(name).any() if name in case.plan.new else _equal(base, ours, name):
                    continue
                if name not in case.plan.changed:
                    raise ExportError(f"{name} differs from the base's, and it was not trained", [AGAIN])
                changed += 1
    if not changed:
        raise ExportError(
            f"no tensor differs from the base after {case.trained.found.step} steps: this would publish the base model",
            ["check train.optimizer.lr and model.freeze", "a learning rate below the export precision rounds away"],
        )
    return {"changed": changed, "unchanged": sum(map(len, case.expected.values())) - changed}


@check("weights_trained")
def weights_trained(case: Case) -> dict[str, Any]:
    """Every tensor that was trained is the checkpoint's, to the last bit of the exported precision; an adapted one is
    what it and its adapter make together.

    Answers alone do not tell: in bfloat16 a layer that was left out, or two that were swapped, may lie within rounding.
    """
    compared = 0
    for file, name, expected in _trained(case):
        with Reader(os.path.join(case.folder, file)) as ours:
            if not torch.equal(ours.read(name), expected):
                raise ExportError(f"{name} in {file} is not what step {case.trained.found.step} has trained", [AGAIN])
        compared += 1
    return {"tensors": compared}


def _trained(case: Case) -> Iterator[tuple[str, str, torch.Tensor]]:
    """(File, key, what it is to be) of all that was trained, with the tensors of one layer in memory at once."""
    if case.kind == "adapter":
        for name, tensor in lora.matrices(case.trained, lora.entries(case.trained)):
            yield lora.WEIGHTS, name, tensor
        return
    for file, names in case.expected.items():
        with Reader(os.path.join(case.trained.base, file)) as base:
            for layer in by_layer(list(names)):
                for name, tensor in case.plan.fresh(case.trained, base, layer).items():
                    yield file, name, tensor


def _equal(one: Reader, other: Reader, name: str) -> bool:
    return all(a == b for a, b in zip(one.blocks(name), other.blocks(name), strict=True))


def _tensors(case: Case) -> Iterator[tuple[str, str, torch.Tensor]]:
    for file, entries in case.found.items():
        with Reader(os.path.join(case.folder, file)) as reader:
            for name in entries:
                yield file, name, reader.read(name)


def _places(folder: dict[str, dict[str, Entry]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for file, entries in folder.items():
        for name in entries:
            found.setdefault(name, []).append(file)
    return found


def _moved(expected: dict[str, list[str]], found: dict[str, list[str]]) -> set[str]:
    return {name for name in expected.keys() & found.keys() if expected[name] != found[name] and len(found[name]) == 1}


def _some(names: set[str]) -> str:
    return f"{', '.join(sorted(names)[:3])}{f' … ({len(names)})' if len(names) > 3 else ''}"
