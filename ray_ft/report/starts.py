"""When a run started and started again: TensorBoard's files are the only record of it that a run keeps.

Training opens a new file each time it starts, or goes back to a checkpoint after a failure, and the file's first
records name the step from which its curves go on.
"""

from __future__ import annotations

import struct

HEADER, FOOTER = 12, 4  # of a TFRecord: length (8 bytes, little-endian) and its checksum; checksum of the content


def first_step(head: bytes) -> int:
    """The step after which the curves of an event file go on; 0: from the beginning.

    Args:
        head: the first bytes of the file. What does not parse, as in a file that is being written, counts as 0.
    """
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    at = 0
    while at + HEADER <= len(head):
        (size,) = struct.unpack_from("<Q", head, at)
        at += HEADER
        event = Event()
        try:
            event.ParseFromString(head[at : at + size])
        except DecodeError:
            return 0
        if event.HasField("session_log") and event.session_log.status == SessionLog.START:
            return max(event.step - 1, 0)  # torch's purge_step: the first step whose values are to come
        at += size + FOOTER
    return 0
