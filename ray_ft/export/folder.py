"""A run to a model that anything can load: one Hugging Face folder with its manifest, published only when it is proved.

Weights are written in the base's own layout, names and precision, so that every reader of the base reads the result; or
the adapter alone, in PEFT's. The folder is built beside, goes through the gate, is renamed, and then, if asked for,
pushed to a hub. A failed export leaves what was there before and nothing else.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path

from ray_ft import paths
from ray_ft.artifacts import MANIFEST, Manifest
from ray_ft.errors import ExportError, first_line
from ray_ft.export import gate, lora, pushing, weights
from ray_ft.export.case import Case, config_of
from ray_ft.export.checks import wanted
from ray_ft.export.checks.text import stop_ids_of
from ray_ft.export.describe import checksums, describe, write_card
from ray_ft.export.vllm_process import Vllm, obstacle
from ray_ft.model import load
from ray_ft.trained import Trained
from ray_ft.view import View

#: Everything of a model folder that is not weights and is copied as it is.
COPIED = ("*.json", "*.jinja", "*.model", "*.txt")
REPLACED = {load.INDEX, MANIFEST, "generation_config.json", "README.md"}


def export(
    run: str,
    view: View,
    to: str | None = None,
    *,
    adapter_only: bool = False,
    push: str | None = None,
    vllm: bool | None = None,
) -> Manifest:
    """Write a run's newest checkpoint as a Hugging Face folder.

    Args:
        to: where to; the run's ``export`` folder if None, its ``adapter`` folder for an adapter alone.
        adapter_only: the adapter in PEFT's layout, in place of the model with it merged.
        push: repository of the hub to upload it to, as ORGANISATION/NAME; made private where there is none.
        vllm: let vLLM load the folder and compare its answers. None: where vLLM is installed and the model fits into
            this machine; True: or fail; False: not at all. The manifest says so.

    Raises:
        ExportError: a check failed, which is named; what was published before stays. Or the push failed; the export
            stays.
    """
    trained = Trained.of(run)
    if push:
        pushing.refuse(push)
    if adapter_only:
        lora.refuse(trained, vllm)
    target = paths.absolute(to) if to else trained.run.adapter if adapter_only else trained.run.export
    _refuse_foreign(target)
    why_not = "not asked for (--no-vllm)" if vllm is False else _classifies(trained) or obstacle(trained)
    if vllm and why_not:
        raise ExportError(
            f"check 'logits_vllm' failed: vLLM cannot be asked: {why_not}",
            ["export on a machine that serves the model", "leave the check out: --no-vllm"],
        )
    scratch = None if paths.is_uri(target) else str(Path(target).parent)
    if scratch:
        _make_folder(scratch)
    with ExitStack() as stack:
        folder = tempfile.mkdtemp(prefix=".export-", dir=scratch)
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        # Started first: it imports vLLM while files are written and looked at.
        case = Case(trained, folder, why_not or stack.enter_context(Vllm(trained)))
        if adapter_only:
            lora.write(trained, folder)
        else:
            weights.write(trained, folder, case.plan)
            _copy_rest(trained, folder)
        checks = gate.examine(case, wanted(case))
        for line in gate.summary(checks):
            view.line(line)
        facts = describe(case)
        write_card(case, facts, checks)
        content = {**facts, "checks": checks, "proof": case.reference.proof(), "files": checksums(folder)}
        paths.write_json(os.path.join(folder, MANIFEST), content)
        _publish(folder, target)
        if push:
            local = folder if paths.is_uri(target) else target
            message = f"{facts['run']}, step {facts['step']}"
            view.line(f"pushed: {pushing.push(local, push, message, target)}")
    return Manifest(target, content)


def _classifies(trained: Trained) -> str | None:
    return "a classifier is served by transformers" if trained.labels else None


def _refuse_foreign(target: str) -> None:
    """Refuse to replace what no export has put there: also beside an earlier one, and beside another's manifest.json.

    Raises:
        ExportError: it names them.
    """
    try:
        there = set(paths.list_dir(target))
    except OSError as error:
        raise ExportError(f"{target} is no folder: {first_line(error)}", ["name a folder: --to DIR"]) from error
    ours: set[str] = set()
    if MANIFEST in there:
        with contextlib.suppress(ValueError):  # not JSON, so not ours
            content = paths.read_json(paths.join(target, MANIFEST))
            if isinstance(content, dict) and "ray_ft" in content:
                ours = {MANIFEST, *content.get("files", {})}
    if foreign := sorted(there - ours):
        raise ExportError(
            f"{target} holds {', '.join(foreign[:3])}{f' … ({len(foreign)})' if len(foreign) > 3 else ''}, which no "
            "export has put there and this one would delete",
            ["name a folder that is new, empty, or an earlier export: --to DIR", "move the files elsewhere"],
        )


def _make_folder(folder: str) -> None:
    """
    Raises:
        ExportError: nothing can be written there.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ExportError(
            f"{folder} cannot be written to: {first_line(error)}",
            ["check the path, its permissions and the free space", "name another folder: --to DIR"],
        ) from error


def _publish(folder: str, target: str) -> None:
    os.chmod(folder, 0o755)  # noqa: S103 - mkdtemp makes it private, which a serving user could not read
    if not paths.is_uri(target):
        before = f"{folder}.before"  # the earlier export, kept until the new one stands
        if os.path.isdir(target):
            os.rename(target, before)
        try:
            os.rename(folder, target)
        except OSError:
            if os.path.isdir(before):
                os.rename(before, target)
            raise
        shutil.rmtree(before, ignore_errors=True)
        return
    # An object store has no rename: the manifest, without which nothing is served, goes last.
    manifest = Path(folder, MANIFEST)
    content = manifest.read_bytes()
    manifest.unlink()
    paths.delete_dir(target)
    paths.upload_dir(folder, target)
    paths.write_bytes(paths.join(target, MANIFEST), content)
    manifest.write_bytes(content)


def _copy_rest(trained: Trained, folder: str) -> None:
    for pattern in COPIED:
        for path in Path(trained.base).glob(pattern):
            if path.name not in REPLACED:
                shutil.copy(path, folder)
    if trained.labels:
        paths.write_json(os.path.join(folder, "config.json"), config_of(trained))
        return
    generation = Path(trained.base, "generation_config.json")
    settings = paths.read_json(str(generation)) if generation.exists() else {}
    settings["eos_token_id"] = stop_ids_of(trained.base)
    paths.write_json(os.path.join(folder, "generation_config.json"), settings)
