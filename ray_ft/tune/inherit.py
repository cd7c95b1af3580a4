"""Going on from another trial's checkpoint (PBT): the run directory takes a copy of it, and gives up its own.

On a local filesystem the copy is made of hard links and costs nothing; committed files are never changed. On an object
store its server copies. A copy that was cut short, or not begun, is made later: the intention is written first.
"""

from __future__ import annotations

import os
import posixpath
import uuid
from collections.abc import Mapping
from typing import Any

import pyarrow.fs as pafs

from ray_ft import artifacts, paths
from ray_ft.retry import patiently
from ray_ft.train import checkpoint

INTENTION = "inherits.json"


def intend(run: artifacts.RunDir, taken: Mapping[str, Any]) -> None:
    """Write down what a run will take over: `checkpoint`, its location, and what else is to be known then."""
    patiently(lambda: paths.write_json(run.at(INTENTION), taken))


def pending(run: artifacts.RunDir) -> dict[str, Any] | None:
    """What `intend` wrote, where it is not done yet."""
    location = run.at(INTENTION)
    if not patiently(lambda: paths.exists(location)):
        return None
    return dict(patiently(lambda: paths.read_json(location)))


def inherit(run: artifacts.RunDir, location: str) -> checkpoint.Found:
    """Let a run stand where another run's checkpoint stands, as was intended. Returns its own copy.

    Args:
        location: a committed checkpoint of a run with the same data, batch and model.

    Raises:
        CheckpointError: it is not whole.
        StorageError: storage does not answer.
    """
    step = int(checkpoint.verify(location)["step"])
    own = paths.join(run.checkpoints, checkpoint.name(step, uuid.uuid4().hex[:8]))
    before = [other for _, other in checkpoint.folders(run.checkpoints)]
    patiently(lambda: _copy(location, own))
    for other in before:
        checkpoint.delete(other, _must)
    patiently(lambda: paths.delete_file(run.at(INTENTION)))
    return checkpoint.Found(own, step, checkpoint.verify(own))


def _must(line: str) -> None:
    raise OSError(line)  # a checkpoint of its own that stays would be taken for where the run stands


def _copy(source: str, target: str) -> None:
    """A checkpoint's files, its marker last."""
    fs, old = paths.filesystem(source)
    _, new = paths.filesystem(target)
    fs.create_dir(new, recursive=True)
    names = [info.base_name for info in fs.get_file_info(pafs.FileSelector(old)) if info.type == pafs.FileType.File]
    for name in sorted(names, key=lambda name: name == checkpoint.COMMITTED):
        one, other = posixpath.join(old, name), posixpath.join(new, name)
        if isinstance(fs, pafs.LocalFileSystem):
            _link(one, other)
        else:
            fs.copy_file(one, other)


def _link(one: str, other: str) -> None:
    import shutil

    if os.path.exists(other):  # of an attempt that was cut short
        os.unlink(other)
    try:
        os.link(one, other)
    except OSError:  # a filesystem without links
        shutil.copyfile(one, other)
