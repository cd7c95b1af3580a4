"""Data as it grows: in files for the same rows, in rows, and the order over rows that are only named.

Preparing runs in a process of its own (`driver`), whose memory is that of a driver.
"""

from __future__ import annotations

import os
import pickle
import shutil
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.scale.driver import Driver
from benchmarks.scale.files import SEQ_LEN, settings, write_rows
from benchmarks.scale.growth import Series, measured, timed
from ray_ft import demo
from ray_ft.data import checks, identity, parquet, sources, work
from ray_ft.data.counts import Counts
from ray_ft.data.order import Order
from ray_ft.data.prepared import Origin, Prepared, Unit

FILES = (1, 10, 100, 1_000, 10_000)
ROWS_IN_FILES = 100_000
ROWS = (1_000, 10_000, 100_000, 1_000_000)
MANY_ROWS = 10_000_000
PACKED = (100_000, 1_000_000, 10_000_000, 100_000_000, 1_000_000_000)
HELD_OUT = (10_000, 100_000, 1_000_000)
UNIT = work.SEGMENT_TOKENS // SEQ_LEN  # packed rows of one unit


# ------------------------------------------------------------------------------------------------------------- files


def by_files(
    driver: Driver, scratch: Path, base: str, repeat: int, sizes: Sequence[int] = FILES, rows: int = ROWS_IN_FILES
) -> list[Series]:
    """The same rows in more and more files: each step before and around the rows, and preparing as a whole, once."""
    found: dict[str, dict[int, list[float]]] = {}
    for size in sizes:
        write_rows(scratch / "files", size, rows)
        calls = {**_around_rows(scratch, base, size), "looking at Parquet files": _of_parquet(scratch, base, size)}
        for turn in range(-1, repeat):  # one more before, as a warm-up
            for name, call in calls.items():
                seconds = timed(call)
                if turn >= 0:
                    found.setdefault(name, {}).setdefault(size, []).append(seconds)
        for name, values in _prepared(driver, scratch, base, rows, repeat).items():
            found.setdefault(name, {})[size] = values
    return [
        Series(f"files, {name.removesuffix(', MiB')}", "files", "MiB" if name.endswith("MiB") else "s", 1, values)
        for name, values in found.items()
    ]


def _around_rows(scratch: Path, base: str, size: int) -> dict[str, Callable[[], object]]:
    """What is done with `size` files without reading their rows."""
    folder = scratch / "files"
    wanted = settings(scratch, base, str(folder)).data.train
    objects = settings(scratch, base, _in_memory(size)).data.train
    found = list(checks.all_files(wanted))
    assert len(found) == size, "the listing lost files"
    named = {"sources": [], "files": identity.of_files(found)}
    changed = [[number, f"{name}.new", *rest] for number, name, *rest in named["files"]]
    return {
        "listing": lambda: checks.all_files(wanted),
        "listing, os.scandir and stat": lambda: [entry.stat() for entry in os.scandir(folder)],
        "listing objects (fsspec, in memory)": lambda: checks.all_files(objects),
        "cutting into chunks": lambda: [one for number, file in found for one in sources.chunks_of(file, number)],
        "checking that files are unchanged": lambda: checks.check_unchanged("", wanted, named),
        "naming what they are (identity)": lambda: identity.key_of({"files": identity.of_files(found)}),
        "saying that all files have other names": lambda: identity._of_files(named["files"], changed),
    }


def _in_memory(count: int) -> str:
    """As many objects in a store that answers at once: what listing costs here, without its network."""
    import fsspec

    fs = fsspec.filesystem("memory")
    fs.store.clear()
    for number in range(count):
        fs.pipe_file(f"/rows/part-{number:05d}.jsonl", b"{}\n")
    return "memory://rows"


def _of_parquet(scratch: Path, base: str, files: int) -> Callable[[], object]:
    """What has to be known of Parquet files before any row is read: their columns and row groups."""
    folder = scratch / "parquet"
    write_rows(folder, files, max(files, 1000), ".parquet")
    wanted = settings(folder, base, str(folder)).data.train
    found = checks.all_files(wanted)

    def look() -> None:
        parquet._footer.cache_clear()  # what is measured is the first look of a command
        checks.check_before(wanted, found, has_template=True)
        for number, file in found:
            sources.chunks_of(file, number)

    return look


# -------------------------------------------------------------------------------------------------------------- rows


def by_rows(driver: Driver, scratch: Path, base: str, repeat: int, sizes: Sequence[int] = ROWS) -> list[Series]:
    """More and more rows in one file; prepared once."""
    found: dict[str, dict[int, list[float]]] = {}
    for size in sizes:
        write_rows(scratch / "files", 1, size)
        for name, values in _prepared(driver, scratch, base, size, repeat).items():
            found.setdefault(name, {})[size] = values
    return [
        Series("rows, preparing", "rows", "s", 1, found["preparing"]),
        Series("rows, finding them prepared", "rows", "s", 1, found["finding them prepared"]),
        Series("rows, memory of the driver", "rows", "MiB", 1, found["memory of the driver, MiB"]),
    ]


def _prepared(driver: Driver, scratch: Path, base: str, rows: int, repeat: int) -> dict[str, list[float]]:
    """Of preparing the files, once; and of finding them prepared, `repeat` times."""
    shutil.rmtree(scratch / "runs", ignore_errors=True)
    found = driver.prepare(scratch, base, repeat)
    assert found["rows"] == rows, f"{found['rows']} of {rows} rows were prepared"
    return {
        "preparing": [found["seconds"]],
        "finding them prepared": found["again"],
        "memory of the driver, MiB": [found["mib"]],
    }


# ------------------------------------------------------------------------------------------------------------- order


def named_only(rows: int, sources_: int = 1) -> Prepared:
    """An index of `rows` packed rows in units as they are made, without any row."""
    starts = enumerate(range(0, rows, UNIT))
    units = [Unit(chunk, 0, min(UNIT, rows - start), chunk % sources_) for chunk, start in starts]
    counts = Counts(rows=rows, used=rows, packed=rows, tokens=rows * SEQ_LEN)
    return Prepared("", SEQ_LEN, counts, tuple(units), tuple(Origin("rows.jsonl", 0) for _ in units))


def order_of(prepared: Prepared, *, shuffle: bool = True) -> Order:
    return Order(prepared, 0, shuffle, 8_000_000 // SEQ_LEN, 1)


def by_order(repeat: int, sizes: Sequence[int] = PACKED) -> list[Series]:
    """The order over packed rows: to lay out a whole run, and to stand at a position in its middle."""

    def run(size: int) -> dict[str, float]:
        prepared = named_only(size)
        middle = size // 2
        order = order_of(prepared)
        tracemalloc.start()
        items = [pickle.dumps(part) for part in order.slices(0, size)]  # what `stream.training_dataset` holds
        held = tracemalloc.get_traced_memory()[0] / 2**20
        tracemalloc.stop()
        plain = order_of(prepared, shuffle=False)
        return {
            "laying out": timed(lambda: [pickle.dumps(part) for part in order_of(prepared).slices(0, size)]),
            "memory, MiB": held,
            "a position in the middle": timed(lambda: next(order.slices(middle, middle + 1))),
            "a position in the middle, unshuffled": min(
                timed(lambda: next(plain.slices(middle, middle + 1))) for _ in range(2)
            ),
            "slices": float(len(items)),
        }

    found = measured(sizes, run, repeat)
    found.pop("slices")
    dues = {"laying out": 1.0, "memory, MiB": 1.0}
    return [
        Series(
            f"order, {name.removesuffix(', MiB')}", "packed rows", "MiB" if name.endswith("MiB") else "s",
            dues.get(name, 0.0), values,
        )
        for name, values in found.items()
    ]  # fmt: skip


def by_held_out(repeat: int, sizes: Sequence[int] = HELD_OUT) -> list[Series]:
    """Which source each held-out row is of, batch by batch, as an evaluation of a mixture asks."""

    def run(size: int) -> dict[str, float]:
        order = Order.once(named_only(size, sources_=3))
        step = 64 * max(size // 100_000, 1)  # a hundredth of the batches of the largest, spread evenly
        batches = range(0, size - 8, step)
        asked = timed(lambda: [order.sources(first, first + 8) for first in batches])
        return {"each": asked / len(batches)}

    values = measured(sizes, run, repeat)["each"]
    return [Series("order, the sources of a batch of held-out rows", "packed rows", "s", 0, values)]


def series(scratch: str, repeat: int, many: bool) -> list[Series]:
    folder = Path(scratch, "data")
    base = demo.write_demo(os.path.join(scratch, "demo"), rows=300, layers=2).base
    rows = (*ROWS, MANY_ROWS) if many else ROWS
    found = [*by_order(repeat), *by_held_out(repeat)]
    with Driver() as driver:
        return [*found, *by_files(driver, folder, base, repeat), *by_rows(driver, folder, base, repeat, rows)]
