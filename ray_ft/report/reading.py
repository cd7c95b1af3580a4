"""What a run directory says, read once, with nothing assumed to be there but the recipe.

The recipe is read as plain YAML, not checked against this version's settings, so that old runs can be looked at. A file
that is damaged is left out and named. No string that leaves this module holds credentials of a URI of the recipe.
"""

from __future__ import annotations

import io
import json
import math
import re
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import pyarrow.fs as pafs
import yaml

from ray_ft import artifacts, paths
from ray_ft.data.files import public_name, without_secrets
from ray_ft.data.order import as_fraction
from ray_ft.errors import StorageError, first_line
from ray_ft.report.starts import first_step

EXAMPLES = 5  # rejected rows shown of each reason
MOST_REJECTS = 100_000  # lines of rejects.jsonl that are looked through for them
SHORT = 80  # characters of strings that may come again
QUIET = 3  # a run that wrote nothing for so many times its usual pause, and for
LEAST_QUIET = 120  # so many seconds beside, has stopped
TRACEBACK = 40  # last lines of a worker's traceback that are shown,
TRACEBACK_BYTES = 20_000  # at most so many bytes
_COMMITTED = re.compile(r"step_(\d{8,})(-[0-9a-f]+)?")
_ASIDE = re.compile(r"(step_\d{8,}\S*)\.broken\S*")
_EVENTS = re.compile(r"events\.out\.tfevents\.(\d+)\..*")
_SHA = re.compile(r"sha256 ([0-9a-f]{64})")


@dataclass(frozen=True)
class State:
    """Where a run stands.

    Attributes:
        kind: "complete", "training", "stopped", or "new" where nothing was trained yet.
        step: steps of the newest row of metrics or checkpoint.
        total: of the whole run; None where the data is not prepared yet.
        saved: step of the newest committed checkpoint, or None.
        written: seconds since the epoch at which metrics were last written, or None.
    """

    kind: str
    step: int
    total: int | None
    saved: int | None
    written: float | None

    @property
    def words(self) -> str:
        of = f" of {self.total:,}" if self.total else ""
        return {
            "complete": f"complete after {self.step:,} steps",
            "training": f"training, at step {self.step:,}{of}",
            "stopped": f"stopped at step {self.step:,}{of}",
            "new": "nothing trained yet",
        }[self.kind]


@dataclass
class Record:
    """A run's files as Python objects; what is None or empty is not there.

    Attributes:
        uris: of the run and in its recipe, which may hold credentials: never to be shown.
        recipe: the resolved recipe as a dictionary; `recipe_text` the same as YAML.
        rows: of metrics.jsonl, with None for numbers that are not finite.
        stats: data/stats.json: a dictionary per split.
        rejects: reason → its first `EXAMPLES` rows of rejects.jsonl.
        evaluation: eval/report.json. validations: (step, report) of eval/steps, oldest first.
        manifests: of the export and of the adapter's export, by folder name.
        starts: (seconds since the epoch, step) at which the run was started, or went on after that step.
        tracebacks: file name → last lines, of workers that failed.
        aside: (checkpoint, why) of those found broken.
        faults: files that could not be read, and why.
    """

    run: artifacts.RunDir
    uris: list[str]
    recipe: dict[str, Any]
    recipe_text: str
    recipe_sha256: str | None
    rows: list[dict[str, Any]] = field(default_factory=list)
    stats: dict[str, Any] = field(default_factory=dict)
    rejects: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    evaluation: dict[str, Any] | None = None
    validations: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    manifests: dict[str, dict[str, Any]] = field(default_factory=dict)
    starts: list[tuple[float, int]] = field(default_factory=list)
    tracebacks: dict[str, str] = field(default_factory=dict)
    aside: list[tuple[str, str]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    state: State = State("new", 0, None, None, None)
    _cleaned: dict[str, str] = field(default_factory=dict, repr=False)
    """Short strings without credentials: names of columns come again in each of 100,000 rows."""

    @classmethod
    def read(cls, run: str) -> Record:
        """Read a run directory.

        Raises:
            StorageError: there is no such run, or storage does not answer.
        """
        where = artifacts.RunDir(paths.absolute(run))
        try:
            if not paths.exists(where.recipe):
                raise StorageError(
                    f"{public_name(run)!r} is no run directory: it has no recipe.yaml",
                    ["name <run.storage>/<run.name>, as `ray-ft train` printed it", "train first: ray-ft train RECIPE"],
                )
            text = paths.read_text(where.recipe)
            content = yaml.safe_load(text)
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise StorageError(
                f"{public_name(where.recipe)} cannot be read: {without_secrets(first_line(error), where.root)}",
                ["check the path, that storage answers, and its credentials in the environment"],
            ) from None  # the cause may hold credentials
        if not isinstance(content, dict):
            raise StorageError(f"{public_name(where.recipe)} holds no recipe", ["name a run directory"])
        sha = _SHA.search(text.split("\n", 1)[0])
        record = cls(where, _uris([where.root, content]), {}, "", sha[1] if sha else None)
        record.recipe = record.clean(content)
        # After the comment, which names no setting.
        record.recipe_text = yaml.safe_dump(record.recipe, sort_keys=False, allow_unicode=True, width=110)
        record._read_rest(content)
        return record

    @property
    def name(self) -> str:
        return str(self.setting("run.name") or paths.base_name(self.run.root))

    @property
    def location(self) -> str:
        """For people, and for commands on the page."""
        return public_name(self.run.root)

    def setting(self, key: str) -> Any:
        """A setting of the recipe by its path, or None."""
        return _setting(self.recipe, key)

    def sources(self, split: str) -> list[str]:
        """What people call each source of a split: its files' names, and where two have the same, its number."""
        paths_of = [source.get("path") for source in self.setting(f"data.{split}") or []]
        each = [[found] if isinstance(found, str) else list(found or []) for found in paths_of]
        names = [", ".join(paths.base_name(str(one).rstrip("/")) for one in found) for found in each]
        return [f"{name} ({at})" if names.count(name) > 1 or not name else name for at, name in enumerate(names)]

    def clean(self, content: Any) -> Any:
        """The same without credentials, in whatever string they stand: of the run's URI and of those in the recipe."""
        if isinstance(content, dict):
            return {self.clean(key): self.clean(value) for key, value in content.items()}
        if isinstance(content, list | tuple):
            return [self.clean(value) for value in content]
        if isinstance(content, float) and not math.isfinite(content):
            return None
        if isinstance(content, str) and self.uris:
            if content not in self._cleaned:
                cleaned = content
                for uri in self.uris:
                    cleaned = without_secrets(cleaned, uri)
                if len(content) > SHORT:
                    return cleaned
                self._cleaned[content] = cleaned
            return self._cleaned[content]
        return content

    # ------------------------------------------------------------------------------------------------------- reading

    def _read_rest(self, raw: dict[str, Any]) -> None:
        run = self.run
        self.rows = sorted(
            (row for row in self._lines(run.metrics) if isinstance(row.get("step"), int)), key=lambda row: row["step"]
        )
        self.stats = self._json(run.stats) or {}
        self._read_rejects()
        self.evaluation = self._json(run.evaluation)
        for name in self._listed(run.validations):
            if name.endswith(".json") and (content := self._json(paths.join(run.validations, name))):
                self.validations.append((int(content.get("step", 0)), content))
        self.validations.sort(key=lambda pair: pair[0])
        for folder in (run.export, run.adapter):
            if manifest := self._json(paths.join(folder, artifacts.MANIFEST)):
                self.manifests[paths.base_name(folder)] = manifest
        self.starts = sorted(
            (float(match[1]), first_step(self._head(paths.join(run.tensorboard, name))))
            for name in self._listed(run.tensorboard)
            if (match := _EVENTS.fullmatch(name))
        )
        for name in self._listed(run.logs):
            text = self._tail(paths.join(run.logs, name))
            last = text.decode("utf-8", "replace").rstrip().splitlines()[-TRACEBACK:]
            self.tracebacks[name] = self.clean("\n".join(last))
        committed = []
        for name in self._listed(run.checkpoints):
            location = paths.join(run.checkpoints, name)
            if match := _ASIDE.fullmatch(name):
                why = self._bytes(paths.join(location, "WHY")) or b"no reason is kept"
                self.aside.append((match[1], self.clean(why.decode("utf-8", "replace").strip())))
            elif (match := _COMMITTED.fullmatch(name)) and paths.exists(paths.join(location, "COMMITTED")):
                committed.append(int(match[1]))
        self.state = self._state(max(committed, default=None), _total(raw, self.stats))

    def _read_rejects(self) -> None:
        """Line by line: there are as many as there are bad rows."""
        if not paths.exists(self.run.rejects):
            return
        fs, path = paths.filesystem(self.run.rejects)
        with fs.open_input_stream(path, compression=None) as stream, io.BufferedReader(stream) as lines:
            for number, line in enumerate(lines):
                if number == MOST_REJECTS:
                    return
                try:
                    reject = json.loads(line)
                    found = self.rejects.setdefault(str(reject["reason"]), [])
                except (ValueError, TypeError, KeyError):
                    self._note(self.run.rejects, f"line {number + 1}: no reject")
                    return
                if len(found) < EXAMPLES:
                    found.append(self.clean(reject))

    def _state(self, saved: int | None, total: int | None) -> State:
        step = max(self.rows[-1]["step"] if self.rows else 0, saved or 0)
        info = self._info(self.run.metrics)
        written = info.mtime_ns / 1e9 if info and info.mtime_ns else None
        if saved is not None and total is not None and saved >= total:
            return State("complete", saved, total, saved, written)
        if written is None:
            return State("stopped" if saved else "new", step, total, saved, written)
        return State(
            "training" if time.time() - written < self._usual_pause() else "stopped", step, total, saved, written
        )

    def _usual_pause(self) -> float:
        """Seconds of silence after which a run has stopped. Object stores hear of it only with each checkpoint."""
        seconds = [row["step_seconds"] for row in self.rows if row.get("step_seconds")]
        every = self.setting("train.checkpoint.every" if paths.is_uri(self.run.root) else "train.log_every") or 1
        return LEAST_QUIET + QUIET * every * (statistics.median(seconds) if seconds else 0)

    def _bytes(self, location: str) -> bytes | None:
        """A file's content; None where there is none, or it cannot be read, which is noted."""
        try:
            return paths.read_bytes(location) if paths.exists(location) else None
        except OSError as error:
            self._note(location, first_line(error))
            return None

    def _head(self, location: str) -> bytes:
        try:
            fs, path = paths.filesystem(location)
            with fs.open_input_stream(path, compression=None) as stream:
                return stream.read(1024)
        except OSError as error:
            self._note(location, first_line(error))
            return b""

    def _tail(self, location: str) -> bytes:
        try:
            fs, path = paths.filesystem(location)
            with fs.open_input_file(path) as stream:
                stream.seek(max(stream.size() - TRACEBACK_BYTES, 0))
                return stream.read()
        except OSError as error:
            self._note(location, first_line(error))
            return b""

    def _json(self, location: str) -> dict[str, Any] | None:
        content = self._bytes(location)
        if content is None:
            return None
        try:
            found = json.loads(content)
        except ValueError as error:
            self._note(location, f"no valid JSON ({first_line(error)})")
            return None
        if not isinstance(found, dict):
            self._note(location, "no JSON object")
            return None
        return self.clean(found)

    def _lines(self, location: str) -> list[dict[str, Any]]:
        """Objects of a JSON-lines file. A last line without its end is being written; any other bad one is noted."""
        content = self._bytes(location)
        found, bad = [], []
        for number, line in enumerate((content or b"").split(b"\n")[:-1], start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict):
                found.append(self.clean(row))
            else:
                bad.append(number)
        if bad:
            more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
            self._note(location, f"line{'s' * (len(bad) > 1)} {', '.join(map(str, bad[:3]))}{more}: no JSON object")
        return found

    def _listed(self, folder: str) -> list[str]:
        try:
            return paths.list_dir(folder)
        except OSError as error:
            self._note(folder, first_line(error))
            return []

    def _info(self, location: str) -> pafs.FileInfo | None:
        fs, path = paths.filesystem(location)
        info = fs.get_file_info(path)
        return info if info.type == pafs.FileType.File else None

    def _note(self, location: str, why: str) -> None:
        self.faults.append(f"{public_name(location)}: {self.clean(why)}")


def _setting(recipe: dict[str, Any], key: str) -> Any:
    node: Any = recipe
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def _uris(content: Any) -> list[str]:
    if isinstance(content, dict):
        return [uri for value in content.values() for uri in _uris(value)]
    if isinstance(content, list):
        return [uri for value in content for uri in _uris(value)]
    return [content] if isinstance(content, str) and paths.is_uri(content) else []


def _total(recipe: dict[str, Any], stats: dict[str, Any]) -> int | None:
    """Steps of the whole run, as `ray_ft.train.schedule.total_steps` counts them, without opening the prepared rows."""
    if fixed := _setting(recipe, "train.max_steps"):
        return int(fixed)
    packed = stats.get("train", {}).get("packed_by_source")
    batch, epochs = _setting(recipe, "train.global_batch"), _setting(recipe, "train.epochs")
    if not packed or not batch or not epochs:
        return None
    rows = 0
    for number, source in enumerate(_setting(recipe, "data.train") or []):
        weight = as_fraction(source.get("weight", 1.0))
        rows += epochs * weight.numerator * packed.get(str(number), 0) // weight.denominator
    return math.ceil(rows / batch)
