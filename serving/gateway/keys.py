"""Who may ask: API keys by name, from the environment and from a file that may change while serving.

Of a key only its SHA-256 is kept. A plain hash is enough here, unlike for passwords: a slow, salted hash protects
secrets that can be guessed, and keys of `new_key` have 256 random bits, which nobody finds by trying, from the hash or
otherwise. A slow hash would only cost every request its time. Keys under 16 characters are refused for this reason.

The file has a line for each key, ``NAME KEY`` or ``NAME sha256:HEX``; empty lines and lines that start with # are
left out. A name may have several keys: to rotate one, add the new line, move the clients, remove the old line. The
file is read again when it changed, which is looked for at most once a second; one that cannot be used is logged and
the keys before stay, also where it is gone or has no byte (an editor may be writing it). To revoke all, leave a
comment.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ray_ft.errors import ServeError
from serving.gateway.refusal import Refusal

log = logging.getLogger("ray_ft.gateway")

SHORTEST = 16
#: Names go into logs and metrics.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HEX = re.compile(r"[0-9a-f]{64}")

#: How often the file is looked at, in seconds.
LOOK_EVERY = 1.0

FORM = "a line is NAME KEY or NAME sha256:HEX, with a name of letters, digits, '.', '_' and '-'"


def new_key() -> str:
    """A random key of 256 bits."""
    return f"rft-{secrets.token_urlsafe(32)}"


def key_line(name: str, key: str) -> str:
    """The line for the keys file, with the hash in place of the key.

    Raises:
        ServeError: the name or the key cannot be used.
    """
    _check_name(name, "the name")
    return f"{name} sha256:{_digest_of(key, 'the key')}"


def add_key(name: str, file: Path | None) -> tuple[str, str]:
    """Make a key; returns it, and its line, which is added to `file`, where one is given, readable by its owner alone.

    Raises:
        ServeError: the name cannot be used, or the file cannot be written.
    """
    key = new_key()
    line = key_line(name, key)
    if file is not None:
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            with open(descriptor, "r+b") as stream:
                stream.seek(0)
                before = stream.read()
                stream.write((b"" if before.endswith(b"\n") or not before else b"\n") + line.encode() + b"\n")
        except OSError as error:
            raise ServeError(
                f"the keys file {str(file)!r} cannot be written: {error.strerror}", ["name another: --file FILE"]
            ) from error
    return key, line


@dataclass(frozen=True)
class Client:
    """Who asks: the name of the key, and whether it may read /metrics."""

    name: str
    admin: bool


class Keys:
    """All keys of an endpoint.

    Args:
        from_env: SHA-256 of the key in hex by name, as of `parse_env`.
        file: path of the keys file, or None.
        admins: names of keys that may read /metrics.

    Raises:
        ServeError: the file cannot be read or has a line that is no key, or one key has two names.
    """

    def __init__(
        self,
        from_env: Mapping[str, str],
        file: str | None = None,
        admins: Iterable[str] = ("admin",),
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._from_env = [(name, bytes.fromhex(digest)) for name, digest in from_env.items()]
        self._file = file
        self._admins = frozenset(admins)
        self._clock = clock
        self._looked = clock()
        self._seen: tuple[int, int, int] | None = None
        self._fault: str | None = None
        self._keys = self._merged([])
        if file is not None:
            self._seen, lines = _read(file)
            self._keys = self._merged(lines)

    def __repr__(self) -> str:
        return f"Keys({len(self._keys)} of {', '.join(self.names())})"

    def __len__(self) -> int:
        return len(self._keys)

    def names(self) -> list[str]:
        return sorted({client.name for client, _ in self._keys})

    @staticmethod
    def parse_env(text: str) -> Mapping[str, str]:
        """SHA-256 in hex by name, from ``NAME:KEY,NAME:KEY`` (or ``NAME:sha256:HEX``).

        Raises:
            ServeError: an entry is no key, or a name comes twice.
        """
        parsed: dict[str, str] = {}
        for number, entry in enumerate((part.strip() for part in text.split(",")), 1):
            if not entry:
                continue
            name, colon, key = entry.partition(":")
            where = f"entry {number} of the environment variable with keys"
            if not colon:  # the whole entry may be a key: say nothing of it
                raise ServeError(f"{where} has no colon", ["write NAME:KEY,NAME:KEY"])
            _check_name(name, where)
            if name in parsed:
                raise ServeError(f"{where} has the name {name!r} of an earlier one", ["give each key its own name"])
            parsed[name] = _digest_of(key, where)
        return parsed

    def client(self, authorization: str | None) -> Client:
        """Who asks, by the ``Authorization`` header.

        Raises:
            Refusal: 401: there is no bearer key; 403: it is none of ours. Neither says more.
        """
        self._look()
        scheme, _, key = (authorization or "").partition(" ")
        key = key.strip()
        if scheme.lower() != "bearer" or not key:
            raise Refusal(
                401,
                "an API key is needed: Authorization: Bearer KEY",
                "missing_api_key",
                headers=[(b"www-authenticate", b"Bearer")],
            )
        digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
        found = None
        for client, known in self._keys:  # all of them, so that the time says nothing about which
            if hmac.compare_digest(digest, known):
                found = client
        if found is None:
            raise Refusal(403, "this API key is not valid here", "invalid_api_key")
        return found

    def _merged(self, lines: list[tuple[str, bytes]]) -> list[tuple[Client, bytes]]:
        names: dict[bytes, str] = {}
        for name, digest in [*self._from_env, *lines]:
            if names.setdefault(digest, name) != name:
                raise ServeError(
                    f"the keys named {names[digest]!r} and {name!r} are the same key",
                    ["give each name a key of its own, as the log tells who asked by name"],
                )
        return [(Client(name, name in self._admins), digest) for digest, name in names.items()]

    def _look(self) -> None:
        """Read the file again where it changed; on any fault the keys stay as they are."""
        now = self._clock()
        if self._file is None or now - self._looked < LOOK_EVERY:
            return
        self._looked = now
        try:
            seen = _identity(os.stat(self._file))
            if seen == self._seen:
                return
            if seen[1] == 0:
                raise ServeError(f"the keys file {self._file!r} has no byte", ["to revoke all keys, write a # comment"])
            read, lines = _read(self._file)
            keys = self._merged(lines)
        except (OSError, ServeError) as error:
            fault = str(error).splitlines()[0]
            if fault != self._fault:  # once, not with every request
                self._fault = fault
                log.error("the keys stay as they were: %s", fault)
            return
        self._fault = None
        self._seen, self._keys = read, keys
        log.warning("keys file read again: %d keys of %s", len(self), ", ".join(self.names()) or "nobody")


def _identity(info: os.stat_result) -> tuple[int, int, int]:
    return info.st_mtime_ns, info.st_size, info.st_ino


def _read(file: str) -> tuple[tuple[int, int, int], list[tuple[str, bytes]]]:
    """The file's identity and its keys. Errors name the line, never what is in it."""
    try:
        with open(file, encoding="utf-8") as lines:
            info = os.fstat(lines.fileno())
            text = lines.read(1 << 20)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ServeError(
            f"the keys file {file!r} (gateway.api_keys_file) cannot be read: {reason}",
            ["write it, a line for each key: ray-ft key NAME", "or set api_keys_file: null and use the environment"],
        ) from None
    if info.st_mode & (stat.S_IRGRP | stat.S_IROTH):
        log.warning("the keys file %r can be read by other users of this machine: chmod 600 it", file)
    keys = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        where = f"line {number} of the keys file {file!r}"
        if len(words) != 2:
            raise ServeError(f"{where} has {len(words)} words", [FORM])
        _check_name(words[0], where)
        keys.append((words[0], bytes.fromhex(_digest_of(words[1], where))))
    return _identity(info), keys


def _check_name(name: str, where: str) -> None:
    if not NAME.fullmatch(name):
        raise ServeError(f"{where} does not begin with a name for a key", [FORM])  # it may be a key: not shown


def _digest_of(key: str, where: str) -> str:
    if key.startswith("sha256:"):
        digest = key.removeprefix("sha256:").lower()
        if not _HEX.fullmatch(digest):
            raise ServeError(f"{where}: after sha256: there are not 64 hexadecimal digits", [FORM])
        return digest
    if len(key) < SHORTEST:
        raise ServeError(
            f"{where}: a key of {len(key)} characters can be guessed; the shortest allowed has {SHORTEST}",
            ["make a random one: ray-ft key NAME"],
        )
    if any(character.isspace() or not character.isprintable() for character in key):
        raise ServeError(f"{where}: the key has spaces or control characters, which no header can carry")
    return hashlib.sha256(key.encode()).hexdigest()
