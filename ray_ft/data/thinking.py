"""An answer that thinks first: which of it is the thinking, which is said, and what cannot be told apart.

One rule for training rows, for the loss and for scores: a text holds at most one thinking part, from its open tag
through its close tag, and what it says is what follows. Limits: tags are compared as they are written, letter case
included; a tag that is quoted in the thinking is taken for a tag.
"""

from __future__ import annotations

import re

from ray_ft.recipe import Thinking


def fault(answer: str, tags: Thinking) -> tuple[str, str] | None:
    """Why an answer cannot be told apart, as a reason and a detail; None where it can, or thinks nothing."""
    began: int | None = None
    last = 0  # where what was closed ends
    for match in re.finditer(f"{re.escape(tags.open)}|{re.escape(tags.close)}", answer):
        around = repr(answer[max(match.start() - 20, 0) : match.end() + 20])
        if match[0] == tags.open:
            if began is not None:
                return "thinking within thinking", f"a second {tags.open} before {tags.close}: {around}"
            if last:
                return "thinks twice in one answer", f"{tags.open} again after {tags.close}: {around}"
            began = match.start()
        elif began is None:
            return "thinking is closed but not opened", f"{tags.close} without {tags.open}: {around}"
        else:
            began, last = None, match.end()
    if began is not None:
        return "thinking is not closed", f"{tags.open} without {tags.close}: {answer[began : began + 40]!r}"
    if last and not answer[last:].strip():
        return "nothing after the thinking", f"the answer ends with {tags.close}"
    return None


def split(text: str, tags: Thinking | None) -> tuple[str | None, str]:
    """(thinking, what is said), without white space around; the thinking is None where there is none.

    Of any text, as a model may write anything: what is said follows the last close tag. Thinking that was never
    closed, as in an answer that was cut off, says nothing. An open tag may be missing: some chat templates write it.
    """
    if tags is None:
        return None, text.strip()
    before, close, after = text.rpartition(tags.close)
    if close:
        return before.replace(tags.open, "", 1).strip(), after.strip()
    before, opened, after = text.partition(tags.open)
    return (after.strip(), before.strip()) if opened else (None, text.strip())


def said(text: str, start: int, end: int, tags: Thinking) -> list[tuple[int, int]]:
    """The characters of text[start:end], an answer without a fault, that are outside its thinking.

    Both tags belong to the thinking. The open one may stand before `start`: some chat templates write it. White space
    in front of the thinking is layout.
    """
    close = text.find(tags.close, start, end)
    if close < 0:
        return [(start, end)]
    begin = text.find(tags.open, start, close)
    begin = start if begin < 0 else begin
    spans = [(start, begin), (close + len(tags.close), end)]
    return [(low, high) for low, high in spans if text[low:high].strip()]
