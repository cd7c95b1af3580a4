"""The working directory as a job takes it along: what goes in, what stays out and why, and the archive.

Ray unpacks the archive on every node and starts the job in it. In it belong recipes and code; rows, weights and runs
lie on storage that all nodes reach. Limits: a link to a folder is not followed; the archive is built in memory.
"""

from __future__ import annotations

import fnmatch
import hashlib
import io
import os
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ray_ft.errors import RecipeError

MOST = 100 << 20  # bytes of one request that Ray's dashboard takes (DASHBOARD_CLIENT_MAX_SIZE)
HOPELESS = 20 * MOST  # bytes before compression: what is larger is not even tried
NAMED = 5  # of the largest files, in an error

#: Left out whatever anybody includes: of use to nobody there, or not to be sent.
NEVER = {
    "tools' own": (
        *(".git", ".hg", ".svn", ".venv", "venv", "__pycache__", "*.pyc", "*.egg-info", "node_modules", ".tox", ".nox"),
        *(".mypy_cache", ".ruff_cache", ".pytest_cache", ".import_linter_cache", ".hypothesis", ".ipynb_checkpoints"),
        *(".cache", ".idea", ".vscode", ".DS_Store"),
    ),
    "credentials": (
        *(".env", ".env.*", ".netrc", ".git-credentials", "auth_token", "id_rsa*", "id_ed25519*", "id_ecdsa*"),
        *("*.pem", "*.key", "*.p12", "*.pfx", "credentials.json", "service-account*.json", ".pypirc"),
        *(".aws", ".ssh", ".ray-ft", ".kube", ".gnupg"),
    ),
}
#: Left out unless included.
USUALLY = {
    "weights": ("*.safetensors", "*.bin", "*.gguf", "*.pt", "*.pth", "*.ckpt", "*.onnx", "*.h5"),
    "data": (
        *("*.jsonl", "*.ndjson", "*.parquet", "*.arrow", "*.feather", "*.csv", "*.tsv"),
        *("*.gz", "*.zst", "*.xz", "*.bz2", "*.tar", "*.tgz", "*.zip"),
    ),
}
IGNORE_FILES = (".gitignore", ".rayignore")


@dataclass
class Package:
    """What of `root` a job takes along: relative names (with /) and their bytes; and how many files of each kind stay.

    A folder that stays counts as one.
    """

    root: Path
    files: dict[str, int] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def size(self) -> int:
        return sum(self.files.values())

    @property
    def largest(self) -> list[str]:
        return sorted(self.files, key=lambda name: -self.files[name])[:NAMED]

    def holds(self, path: str | Path) -> bool:
        """Whether a file, or anything of a folder, of the working directory goes along."""
        name = os.path.relpath(path, self.root).replace(os.sep, "/")
        return name in self.files or any(one.startswith(f"{name}/") for one in self.files)

    def describe(self) -> str:
        stays = ", ".join(f"{count} {kind}" for kind, count in sorted(self.left_out.items()))
        return f"{len(self.files)} files, {self.size / 2**20:.1f} MiB" + (f"; left out: {stays}" if stays else "")

    def build(self) -> tuple[str, bytes]:
        """The archive and its name, which depends on names, rights and content alone: Ray keeps what it has by name.

        Raises:
            RecipeError: it is larger than what Ray takes; names the largest files.
        """
        if self.size > HOPELESS:
            raise self._too_large(f"{self.size / 2**20:.0f} MiB")
        identity, buffer = hashlib.sha256(), io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in sorted(self.files):
                file = self.root / name
                content, runs = file.read_bytes(), bool(file.stat().st_mode & 0o100)
                entry = zipfile.ZipInfo(name)  # of 1980, so that equal content is an equal archive
                entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, (0o755 if runs else 0o644) << 16
                archive.writestr(entry, content)
                identity.update(f"{name}\0{runs}\0{hashlib.sha256(content).hexdigest()}\n".encode())
                if buffer.tell() > MOST:
                    raise self._too_large(f"more than {MOST >> 20} MiB, compressed,")
        if buffer.tell() > MOST:
            raise self._too_large(f"more than {MOST >> 20} MiB, compressed,")
        return f"_ray_pkg_{identity.hexdigest()[:32]}.zip", buffer.getvalue()

    def _too_large(self, size: str) -> RecipeError:
        largest = ", ".join(f"{name} ({self.files[name] / 2**20:.1f} MiB)" for name in self.largest)
        return RecipeError(
            f"the working directory {self.root} has {size} to send, and Ray takes {MOST >> 20} MiB; largest: {largest}",
            [
                "leave out what the job does not need: --exclude 'PATTERN', .gitignore or .rayignore",
                "put rows and models on storage that every node reaches, and name them by its URI or path",
                "submit from a folder with recipes and code alone: --working-dir",
            ],
        )


def collect(
    working_dir: str | Path,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Package:
    """Look at a working directory.

    Ignore files count as Ray reads them: in each folder, for what is below it.

    Args:
        include: patterns as in .gitignore of what goes along although it is ignored, or of data and weights.
        exclude: of what stays although none of these rules says so; counts for more than `include`.

    Raises:
        RecipeError: there is no such folder, or it is the root or a person's home.
    """
    root = Path(working_dir).expanduser().resolve()
    if not root.is_dir():
        raise RecipeError(f"--working-dir {working_dir}: there is no such folder", ["name one, such as ."])
    if root in (Path("/"), Path.home().resolve()):
        raise RecipeError(
            f"--working-dir {root} would send everything that is in it", ["name the folder of your recipes and code"]
        )
    package = Package(root)
    _Walk(package, _matcher(root, include), _matcher(root, exclude), bool(include)).folder(root, [])
    if not package.files:
        raise RecipeError(f"nothing in the working directory {root} would go along", ["--include 'PATTERN'"])
    return package


Match = Callable[[Path, bool], bool]


class _Walk:
    def __init__(self, package: Package, include: Match, exclude: Match, includes: bool) -> None:
        self._package, self._include, self._exclude, self._includes = package, include, exclude, includes

    def folder(self, folder: Path, ignores: list[Match]) -> None:
        ignores = [*ignores, *_ignore_files(folder)]
        for path in sorted(folder.iterdir()):
            is_folder = path.is_dir()
            if kind := self._why_not(path, is_folder, ignores):
                # What lies in a folder that usually stays may have been included by name.
                if is_folder and self._includes and kind not in (*NEVER, "links", "excluded"):
                    self.folder(path, ignores)
                else:
                    self._package.left_out[kind] += 1
            elif is_folder:
                self.folder(path, ignores)
            elif path.is_file():  # neither a socket nor a link to nothing
                self._package.files[path.relative_to(self._package.root).as_posix()] = path.stat().st_size

    def _why_not(self, path: Path, is_folder: bool, ignores: list[Match]) -> str | None:
        """The kind of what stays, or None."""
        for kind, patterns in NEVER.items():
            if _named(path.name, patterns) or (is_folder and (path / "pyvenv.cfg").exists() and kind == "tools' own"):
                return kind
        if is_folder and path.is_symlink():
            return "links"
        if self._exclude(path, is_folder):
            return "excluded"
        if not is_folder and self._include(path, False):
            return None
        if is_folder and _holds_run(path):
            return "runs"
        if any(match(path, is_folder) for match in ignores):
            return "ignored"
        if not is_folder:
            for kind, patterns in USUALLY.items():
                if _named(path.name, patterns):
                    return kind
        return None


def _named(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _holds_run(folder: Path) -> bool:
    """A run's directory, a sweep's, or the prepared rows beside them (see `artifacts.RunDir`)."""
    has = (folder / "recipe.yaml").exists() and any(
        (folder / name).exists() for name in ("checkpoints", "metrics.jsonl", "data/stats.json")
    )
    return has or (folder / "sweep.json").exists() or folder.name == "_prepared"


def _ignore_files(folder: Path) -> list[Match]:
    found = []
    for name in IGNORE_FILES:
        if (folder / name).is_file():
            lines = (folder / name).read_text(encoding="utf-8", errors="replace").splitlines()
            found.append(_matcher(folder, lines))
    return found


def _matcher(folder: Path, patterns: Sequence[str]) -> Match:
    """Of patterns as in a .gitignore in `folder`, by the very matcher that Ray uses for its own packages."""
    if not patterns:
        return lambda path, is_folder: False
    from ray._private.thirdparty.pathspec import PathSpec

    spec = PathSpec.from_lines("gitwildmatch", patterns)
    return lambda path, is_folder: spec.match_file(path.relative_to(folder).as_posix() + "/" * is_folder)
