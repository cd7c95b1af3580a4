"""Secrets: where they come from, and that they stay out of what is printed and written.

They come by file, one for each variable, as Kubernetes mounts a Secret and as a person may keep them: the file
``HF_TOKEN`` in ``/etc/ray-ft/secrets`` or ``~/.ray-ft/secrets`` (or in the folder that RAY_FT_SECRETS names, alone) is
what the environment variable HF_TOKEN would be. Each process reads them on the node where it runs (`load`): a command
of ours as it begins, Ray's workers for it as they start (`session.SECRETS_HOOK`), and the replicas of Ray Serve, which
that does not reach, when they first need storage or a hub (`paths`). They are sent through no job, whose ``env_vars``
Ray shows in its API and logs.

Limits: redaction knows the values that it can find (the environment's, the files', the cluster's token) and the shapes
of common credentials. It is the second line: a secret that nobody gave to a job cannot be shown by it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from ray_ft.errors import CredentialError

FOLDER = "RAY_FT_SECRETS"
FOLDERS = ("/etc/ray-ft/secrets", "~/.ray-ft/secrets")
LARGEST = 64 << 10  # bytes; what is longer is no secret but a file that was put there by mistake
SHORTEST = 8  # characters; redacting shorter values would tear holes into ordinary text
HIDDEN = "***"
WRITTEN_SECONDS = 1.0  # for a token that another process has begun to write

#: Words of a variable's name, between underscores, by which its value is taken for a secret …
_WORDS = "TOKEN|SECRET|SECRETS|PASSPHRASE|CREDENTIAL|CREDENTIALS|APIKEY|APIKEYS|KEY|KEYS|PAT|WEBHOOK|DSN"
_SECRET_NAME = re.compile(
    rf"(?:(?:^|_)(?:{_WORDS})|PASSWORD|PASSWD|_PWD)(?:_\d+|_V\d+)?$|(?:^|_)(?:ACCESS|API|SECRET)_?KEY_ID$",
    re.IGNORECASE,
)
#: … and the ends of names of what only tells where one is, or how it is used.
_PLACE = re.compile(
    r"APPLICATION_CREDENTIALS$|(?:^|_)(?:PATH|FILE|DIR|FOLDER|HOME|URL|URI|ENDPOINT|HOST|PORT|REGION|PROFILE|MODE|USER|NAME|ENV|PROJECT|ZONE|TYPE)$",
    re.IGNORECASE,
)

#: Credentials known by their look. The group, where there is one, is what is kept. All that is printed goes through
#: them, so each takes time in proportion to the text: what may repeat before a shape is sure is bounded. And each asks
#: for more than a word: a path with sk-…, "basic understanding" and eos_token=… have to stay.
SHAPES = (
    re.compile(r"\bhf_[A-Za-z0-9]{16,}"),  # Hugging Face
    re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"),  # AWS access key id
    re.compile(  # OpenAI, our own gateway and others
        r"\b(?:sk|rft|pk|rk)-(?=[\w-]{0,64}[A-Za-z0-9]{24}|(?=[\w-]{0,64}[A-Z])[\w-]{0,64}[0-9])[A-Za-z0-9_-]{20,}"
    ),
    re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|glpat-[\w-]{16,}|xox[abprs]-[\w-]{10,})"),
    re.compile(r"\bAIza[A-Za-z0-9_-]{35}|\bya29\.[\w-]{20,}"),  # Google
    re.compile(r"\beyJ[\w-]{8,2000}\.eyJ[\w-]{8,}\.[\w-]+"),  # a signed JSON Web Token
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"),
    re.compile(r"(\bAuthorization: (?:Bearer|Basic) )[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE),
    re.compile(r"(\b(?:Bearer|Basic) )(?=[A-Za-z._~+/-]{0,64}[0-9=])[A-Za-z0-9._~+/=-]{16,}", re.IGNORECASE),
    re.compile(r"(\w://)[^/\s:@?#'\"]*:[^/\s@?#'\"]+(?=@)"),  # user:password of a URL
    re.compile(
        r"((?:X-Amz-(?:Signature|Credential|Security-Token)|X-Goog-(?:Signature|Credential)|AWSAccessKeyId|Signature|"
        r"access_key|secret_key|access_key_id|secret_access_key|password|api_key|(?<!\w)sig|"
        r"(?:(?<![\w.-])|(?:access|api|auth|github|hf|session)_)token)=)[^&\s'\"<>{}|]{8,}",
        re.IGNORECASE,
    ),
)

_loaded: dict[tuple[str, ...], frozenset[str]] = {}  # folders → names that were set from them in this process
_revealed: list[str] = []  # what `revealing` lets through at this moment, the innermost last
_from_files: set[str] = set()  # values that were read, also where the environment had the variable already


def folders() -> tuple[str, ...]:
    """Where secrets are looked for, the first that has a variable's file wins."""
    named = os.environ.get(FOLDER, "")
    return tuple(os.path.expanduser(each) for each in ((named,) if named else FOLDERS))


def load() -> frozenset[str]:
    """Put what the files hold into this process's environment, once; a variable that is set there stays as it is.

    Returns:
        The names that were set.

    Raises:
        CredentialError: a file may be read by others than its owner and group, or cannot be read, or RAY_FT_SECRETS
            names no folder.
    """
    where = folders()
    if where not in _loaded:
        _loaded[where] = frozenset(_set_all(where))
    return _loaded[where]


def _set_all(where: tuple[str, ...]) -> Iterator[str]:
    for folder in where:
        for name, value in read(folder).items():
            if not _PLACE.search(name):
                _from_files.add(value)
            if not os.environ.get(name):
                os.environ[name] = value
                yield name


def read(folder: str) -> dict[str, str]:
    """Variable → value, of the files in a folder; other names, such as Kubernetes' ``..data``, are left out.

    Raises:
        CredentialError: as of `load`.
    """
    try:
        entries = sorted(Path(folder).iterdir())
    except FileNotFoundError as error:
        if os.environ.get(FOLDER):
            raise CredentialError(
                f"{FOLDER}={folder} is no folder on this node", ["correct it, or unset it", "mount the secret there"]
            ) from error
        return {}
    except OSError as error:
        raise CredentialError(
            f"the secrets in {folder} cannot be read: {error.strerror}", ["check owner and permissions of the folder"]
        ) from error
    return {
        path.name: _content(path)
        for path in entries
        if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", path.name) and path.is_file()
    }


def _content(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            status = os.fstat(stream.fileno())
            _refuse_open(path, status)
            if status.st_size > LARGEST:
                raise CredentialError(f"{path} has {status.st_size:,} bytes, which is no secret", ["move it elsewhere"])
            return stream.read().decode("utf-8").rstrip("\r\n")
    except OSError as error:
        raise CredentialError(
            f"the secret {path} cannot be read: {error.strerror}",
            ["let the user own it that runs Ray, mode 0600", "in Kubernetes: fsGroup of the pod, defaultMode 0440"],
        ) from error
    except UnicodeDecodeError as error:
        raise CredentialError(f"the secret {path} is no text", ["write it in UTF-8"]) from error


def _refuse_open(path: Path, status: os.stat_result) -> None:
    """Others may read nothing; the group only what root owns, which is how Kubernetes mounts a secret."""
    allowed = 0o750 if status.st_uid == 0 != os.getuid() else 0o700
    if stat.S_IMODE(status.st_mode) & 0o777 & ~allowed:
        raise CredentialError(
            f"the secret {path} has mode {stat.S_IMODE(status.st_mode):04o}: others can read it",
            [f"chmod 600 {path}", "in Kubernetes: defaultMode 0440 of the secret's volume, with fsGroup of the pod"],
        )


# ------------------------------------------------------------------------------------------------------- recognising


def looks_secret(name: str, value: str = "") -> bool:
    """Whether a variable holds a secret, by its name (HF_TOKEN, AWS_SECRET_ACCESS_KEY …) or by the look of its value.

    Names that only tell where one lies (…_PATH, …_FILE) do not count. Words are whole: TOKENIZERS_PARALLELISM is none.
    """
    return bool(_SECRET_NAME.search(name) and not _PLACE.search(name)) or has_credential(value)


def has_credential(text: str) -> bool:
    """Whether a text holds something of the look of a credential."""
    return any(shape.search(text) for shape in SHAPES)


def redacted(text: str) -> str:
    """The text with *** in place of each known secret's value and of all that has the look of a credential."""
    if _revealed and _revealed[-1] in text:
        return _revealed[-1].join(map(redacted, text.split(_revealed[-1])))
    for value in sorted(_values(), key=len, reverse=True):  # one may be the beginning of another
        text = text.replace(value, HIDDEN)
    for shape in SHAPES:
        text = shape.sub(lambda found: (found.group(1) if found.re.groups else "") + HIDDEN, text)
    return text


@contextlib.contextmanager
def revealing(secret: str | None) -> Iterator[None]:
    """While the block runs, this one secret is shown: one that was made just now for the person who reads it."""
    if not secret:
        yield
        return
    _revealed.append(secret)
    try:
        yield
    finally:
        _revealed.pop()


def _values() -> set[str]:
    found = set(_from_files)
    for name, value in os.environ.items():
        if _is_secret_name(name):
            # RAY_FT_API_KEYS and its like hold several, NAME:KEY each; a name may be any word, and stays.
            found.update([value, *(one.strip().partition(":")[2] for one in value.split(","))])
    found.add(_ray_token(*_token_stamp()))
    found |= {line for value in found if "\n" in value for line in value.splitlines()}  # what is printed comes by lines
    return {value for value in found if len(value) >= SHORTEST}


@functools.lru_cache(maxsize=1024)
def _is_secret_name(name: str) -> bool:
    return looks_secret(name)


# --------------------------------------------------------------------------------------------- the cluster's token


def token_file() -> Path:
    """Where Ray looks for the cluster's token: RAY_AUTH_TOKEN_PATH, else ~/.ray/auth_token."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()


def token() -> str:
    """The token that this process shows to a cluster; "" where it has none."""
    return os.environ.get("RAY_AUTH_TOKEN") or _ray_token(*_token_stamp())


def make_token() -> bool:
    """Make the token file, 256 random bits that only this user can read, where there is none. Ray's own is made 0644.

    Returns:
        Whether it was made.

    Raises:
        CredentialError: the file cannot be written, or is there and empty.
    """
    path = token_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        until = time.monotonic() + WRITTEN_SECONDS
        while path.exists() and not path.stat().st_size and time.monotonic() < until:  # another process makes it now
            time.sleep(0.05)
        if not token():
            raise CredentialError(
                f"the cluster's token {path} is empty or cannot be read", [f"rm {path}, then ray-ft token makes one"]
            ) from None
        return False
    except OSError as error:
        raise CredentialError(
            f"the cluster's token {path} cannot be written: {error.strerror}",
            ["make the folder writable", "name another file: RAY_AUTH_TOKEN_PATH"],
        ) from error
    with open(descriptor, "w", encoding="ascii") as stream:
        stream.write(secrets.token_hex(32))
    return True


def close_token() -> str | None:
    """Make the token file 0600 where others can read it; a line that says so, None where there is no need.

    A file that is another user's, such as a mounted secret, stays as it is, and the line says that.
    """
    path = token_file()
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        if not mode & 0o077 or (path.stat().st_uid != os.getuid() and not mode & 0o007):
            return None
        path.chmod(0o600)
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"the cluster's token {path} has mode {mode:04o}: others can read it ({error.strerror}); make it 0600"
    return f"the cluster's token {path} had mode {mode:04o} and could be read by others: it is 0600 now"


def _token_stamp() -> tuple[str, int]:
    path = token_file()
    try:
        return str(path), path.stat().st_mtime_ns
    except OSError:
        return "", 0


@functools.lru_cache(maxsize=4)
def _ray_token(path: str, stamp: int) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip() if path else ""
    except (OSError, UnicodeDecodeError):  # unreadable here, so that nothing here can print it
        return ""


# ------------------------------------------------------------------------------------------------------------ output


class Redacting:
    """A text stream that redacts what is written to it; all else is the stream's behind it.

    Args:
        stream: what it writes to; a function for one that is looked up at each use, as `sys.stdout` may be replaced.
    """

    def __init__(self, stream: TextIO | Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._target.write(redacted(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    @property
    def _target(self) -> Any:
        stream = self._stream() if callable(self._stream) else self._stream
        return getattr(stream, "rich_proxied_file", stream)  # a live panel's proxy would lead back to here

    @property
    def unredacted(self) -> Any:
        """The stream behind, for a secret that a person asked to see."""
        return self._target

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)
