"""Files of rows as many as are asked for, and a recipe over them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from ray_ft import recipe

SEQ_LEN = 256


def write_rows(folder: Path, files: int, rows: int, ending: str = ".jsonl") -> None:
    """`rows` short texts, evenly in `files` files; the same rows whatever the number of files."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for number in range(files):
        part = range(rows * number // files, rows * (number + 1) // files)
        made = [{"text": f"{at} and {at % 977}: {at % 89} et {at % 97}"} for at in part]
        target = folder / f"part-{number:05d}{ending}"
        if ending == ".parquet":
            pq.write_table(pa.Table.from_pylist(made), target)
        else:
            target.write_text("".join(json.dumps(one) + "\n" for one in made))


def settings(folder: Path, base: str, where: str) -> recipe.Recipe:
    """A recipe over the files of a folder, a glob or a URI."""
    source = {"path": [where], "format": "text"}
    content = {
        "run": {"name": "scale", "storage": str(folder / "runs")},
        "model": {"path": base},
        "data": {"train": [source], "seq_len": SEQ_LEN},
    }
    return recipe.parse(content)
