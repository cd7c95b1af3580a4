"""What is refused: settings that cannot fit the files, files that change while they are in use, and data of which too
little is left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from ray_ft import paths
from ray_ft.data import identity as identities
from ray_ft.data import sources
from ray_ft.data.files import File
from ray_ft.data.formats import columns_used
from ray_ft.data.prepared import Prepared, Split
from ray_ft.errors import DataError, ModelError, StorageError
from ray_ft.recipe import AnySource, Recipe, Source

WAYS_BACK = (
    "put the file back as it was, to continue",
    "train under another run.name, which prepares the data as it is now",
)


def all_files(wanted: Sequence[AnySource]) -> list[tuple[int, File]]:
    """(number of the source, file) of all sources, in order."""
    return [(number, file) for number, source in enumerate(wanted) for file in sources.find_files(source)]


def check_before(wanted: Sequence[Source], files: Sequence[tuple[int, sources.File]], has_template: bool) -> None:
    """Refuse what no row can change: a column that a Parquet file lacks, or a chat format without a template."""
    sources.read_footers(file for _, file in files)
    for number, file in files:
        if file.kind == "parquet":
            have = sources.parquet_columns(file)
            if missing := sorted(columns_used(wanted[number]) - set(have)):
                raise DataError(
                    f"{file.name} lacks column {', '.join(map(repr, missing))}; it has {', '.join(map(repr, have))}",
                    [
                        "name the right columns in the source's *_field settings",
                        "choose another format for this source",
                    ],
                )
    if not has_template:
        chatty = [s for s in wanted if getattr(s, "chat", s.format not in ("text", "labels"))]  # type: ignore[attr-defined]
        if chatty:
            raise ModelError(
                f"format {chatty[0].format!r} needs a chat template and the model's tokenizer has none",  # type: ignore[attr-defined]
                ["add chat_template.jinja to the model folder", "use format: text, or template with chat: false"],
            )


def check(prepared: Prepared, recipe: Recipe, split: Split, rejects: str) -> None:
    """Refuse data that is empty, or of which too little is left.

    Args:
        rejects: where the reader finds the rejects.

    Raises:
        DataError: no row, no usable row, or more rejects than `data.max_bad_rows`.
    """
    counts = prepared.counts
    ways = [f"each reject with file, line and reason: {rejects}"]
    if not counts.rows:
        raise DataError(f"data.{split} is empty: its files hold no rows", ["check that the right files are named"])
    if not counts.used:
        raise DataError(
            f"data.{split}: all {counts.rows} rows were rejected: {'; '.join(counts.common_reasons())}",
            [*ways, "check the source's format and its *_field settings"],
        )
    if counts.bad_share > recipe.data.max_bad_rows:
        raise DataError(
            f"data.{split}: {counts.bad_share:.1%} of {counts.rows} rows are bad, more than data.max_bad_rows = "
            f"{recipe.data.max_bad_rows:.1%}; commonest: {'; '.join(counts.common_reasons())}",
            [*ways, "mend the rows", f"or accept them: data.max_bad_rows={min(1.0, counts.bad_share + 0.005):.2f}"],
        )


def check_stamp(file: File) -> None:
    """Refuse a file that is not as its stamp says.

    Raises:
        DataError: it changed or is gone.
        StorageError: its storage does not answer.
    """
    fs, path = paths.filesystem(file.uri)
    try:
        info = fs.get_file_info(path)
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"cannot look at {file.name}: {type(error).__name__}", ["check the storage"]) from None
    if info.size is None:
        raise DataError(f"{file.name} is gone, and its tokens are not stored (data.cache: off)", WAYS_BACK)
    now = f"{info.size}-{info.mtime_ns}"
    if not identities.same_stamp(file.stamp, now):
        raise DataError(f"{file.name} changed since it was prepared: {identities.change(file.stamp, now)}", WAYS_BACK)


def check_unchanged(location: str, wanted: Sequence[AnySource], identity: dict[str, Any]) -> None:
    """Keep nothing of files that changed while they were prepared: some chunks would be older than others.

    Raises:
        DataError: naming them.
    """
    try:
        files = all_files(wanted)
    except DataError:  # a path matches nothing any more; which files are gone is said below
        files = []
    now = {(number, name, query): stamp for number, name, stamp, query in identities.of_files(files)}
    changed = []
    for number, name, stamp, query in identity["files"]:
        found = now.get((number, name, query))
        if found != stamp:
            changed.append(f"{name}: {identities.change(stamp, found)}" if found else f"{name} is gone")
    if not changed:
        return
    stats = paths.join(location, identities.STATS)
    if not paths.exists(stats):
        paths.delete_dir(location)
    elif not paths.read_json(stats)["cached"]:  # an index that this was to store the tokens of
        paths.delete_dir(paths.join(location, "shards"))
    raise DataError(
        f"data changed while it was prepared: {'; '.join(dict.fromkeys(changed))}",
        ["start again when nothing writes to these files any more"],
    )
