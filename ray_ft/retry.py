"""Storage that fails for a moment: which errors may pass by themselves, and calling again until they do.

Object stores answer 503 under load, connections are reset, NFS servers restart. Only what lasts, and what no waiting
mends (a full disk, missing rights), is worth an error. Not every read and write goes through here: a person who named
the wrong bucket should hear so at once; checkpoints, whose loss costs hours, wait.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential, wait_random
from tenacity.nap import sleep_using_event
from tenacity.stop import stop_never, stop_when_event_set

#: 0.5 + 1 + 2 + … + 30 s: about a minute between the first attempt and the last, however long an attempt takes (an
#: upload that breaks off after an hour gets its second one too). pyarrow's S3 client tries three times within each.
ATTEMPTS = 8
FIRST_WAIT = 0.5
LONGEST_WAIT = 30.0

#: What waiting does not mend.
LASTING = frozenset(
    (
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),  # no room
        *(errno.EACCES, errno.EPERM, errno.EROFS),  # not allowed
        *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP, errno.ENAMETOOLONG),
        *(errno.EINVAL, errno.EBADF),
    )
)
#: The same from object stores, whose errors reach Python as text: names of AWS's and of Google's errors.
LASTING_WORDS = (
    *("ACCESS_DENIED", "HTTP status 401", "HTTP status 403", "PERMISSION_DENIED", "UNAUTHENTICATED"),
    *(
        "NO_SUCH_BUCKET",
        "allow_bucket_creation",
        "INVALID_ACCESS_KEY_ID",
        "SIGNATURE_DOES_NOT_MATCH",
        "MISSING_AUTHENTICATION_TOKEN",
    ),
)

T = TypeVar("T")


def may_pass(error: BaseException) -> bool:
    """Whether the same call may succeed a little later: timeouts, 5xx, resets, a stale NFS handle."""
    if not isinstance(error, OSError) or error.errno in LASTING or isinstance(error, FileNotFoundError):
        return False
    return not any(word in str(error) for word in LASTING_WORDS)


def patiently(call: Callable[[], T], stop: threading.Event | None = None) -> T:
    """What `call` returns; it is called again, after growing waits, while it fails with an error that may pass.

    Args:
        stop: once set, it is not called again, and no longer waited for.

    Raises:
        OSError: the last error, as it came.
    """
    again = Retrying(
        retry=retry_if_exception(may_pass),
        wait=wait_exponential(FIRST_WAIT, LONGEST_WAIT) + wait_random(0, FIRST_WAIT),
        stop=stop_after_attempt(ATTEMPTS) | (stop_when_event_set(stop) if stop else stop_never),
        sleep=sleep_using_event(stop) if stop else time.sleep,
        reraise=True,
    )
    return again(call)
