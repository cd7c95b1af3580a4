"""A run, or a sweep, on one page: ``report.html``, with all that its directory holds, readable anywhere without a
server."""

from __future__ import annotations

from ray_ft import artifacts, paths
from ray_ft.data.files import public_name
from ray_ft.view import View

__all__ = ["report"]


def report(run: str, view: View, to: str | None = None) -> str:
    """Write one self-contained HTML page about a run or a sweep, finished or not.

    Args:
        run: directory of a run or a sweep, a path or URI. Nothing in a run's has to be there but its recipe; what is
            missing is named on the page with the command that makes it.
        to: file to write, a path or URI; default: ``<run>/report.html``.

    Returns:
        The location of the page.

    Raises:
        StorageError: there is no such run, or it or `to` cannot be reached.
    """
    from ray_ft.report import html, swept
    from ray_ft.report.reading import Record
    from ray_ft.report.sweep_reading import Swept

    record = Record.read(run)
    location = paths.absolute(to) if to else record.run.report
    if paths.exists(record.run.at(artifacts.SWEEP)):
        read = Swept.read(record)
        words, content = read.words, swept.page(read)
    else:
        words, content = record.state.words, html.page(record)
    try:
        paths.write_text(location, content)
    except OSError as error:
        from ray_ft.errors import StorageError, first_line

        raise StorageError(
            f"the report cannot be written to {public_name(location)!r}: {record.clean(first_line(error))}",
            ["check the path, its permissions and the free space", "write it elsewhere: --to FILE"],
        ) from error
    view.line(f"{record.name}: {words}")
    for fault in record.faults:
        view.line(f"  left out: {fault}")
    return location
