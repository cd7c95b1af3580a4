"""The layouts in which pairs come become the same pair; whatever is none is rejected with its reason."""

from __future__ import annotations

import re
from typing import Any

import pytest

from ray_ft.data.formats import columns_used
from ray_ft.data.rows import to_sample
from ray_ft.data.samples import Conversation, Joined, Pair, preferred
from ray_ft.data.sources import Reject
from ray_ft.recipe import PreferenceSource

PAIRS = PreferenceSource(format="preference", path="x")
WHOLE = PreferenceSource(format="preference", path="x", prompt_field=None)
PLAIN = PreferenceSource(format="preference", path="x", chat=False)


def say(*contents: str, first: str = "user") -> list[dict[str, str]]:
    """Turns of two who speak in turn."""
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[at % 2], "content": content} for at, content in enumerate(contents)]


def system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}


PICTURED = [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "q"}]}]


def pair(asked: list[dict[str, str]], chosen: str, rejected: str) -> Pair:
    answers = ([*asked, *say(text, first="assistant")] for text in (chosen, rejected))
    return Pair(*(Conversation(tuple(turns), len(asked)) for turns in answers))


LAYOUTS: list[tuple[PreferenceSource, dict[str, Any], Any]] = [
    (PAIRS, {"prompt": "q", "chosen": "good", "rejected": "bad"}, pair(say("q"), "good", "bad")),
    (PAIRS, {"prompt": say("q"), "chosen": "good", "rejected": "bad"}, pair(say("q"), "good", "bad")),
    (
        PAIRS,
        {"prompt": say("q"), **{n: say(t, first="assistant") for n, t in (("chosen", "good"), ("rejected", "bad"))}},
        pair(say("q"), "good", "bad"),
    ),
    (PAIRS, {"prompt": "q", "chosen": say("q", "good"), "rejected": say("q", "bad")}, pair(say("q"), "good", "bad")),
    (
        PAIRS,
        {"prompt": "q", "chosen": [system("s"), *say("q", "good")], "rejected": [system("s"), *say("q", "bad")]},
        pair([system("s"), *say("q")], "good", "bad"),
    ),
    (WHOLE, {"chosen": say("q", "good"), "rejected": say("q", "bad")}, pair(say("q"), "good", "bad")),
    (
        WHOLE,  # an answer that both hold is part of the prompt
        {"chosen": say("q", "a", "r", "good"), "rejected": say("q", "a", "r", "bad"), "prompt": "another"},
        pair(say("q", "a", "r"), "good", "bad"),
    ),
    (
        WHOLE,
        {"chosen": say("q", "good", "r", "a"), "rejected": say("q", "bad")},
        Pair(Conversation(tuple(say("q", "good", "r", "a")), 1), Conversation(tuple(say("q", "bad")), 1)),
    ),
    (
        PLAIN,
        {"prompt": "q ", "chosen": "good", "rejected": "bad"},
        Pair(Joined("q ", "good"), Joined("q ", "bad")),
    ),
    (
        PAIRS.model_copy(update={"prompt_field": "question", "chosen_field": "yes", "rejected_field": "no"}),
        {"question": "q", "yes": "good", "no": "bad"},
        pair(say("q"), "good", "bad"),
    ),
]


@pytest.mark.parametrize(("source", "row", "expected"), LAYOUTS)
def test_every_layout_is_read(source: PreferenceSource, row: dict[str, Any], expected: Pair) -> None:
    found = to_sample(source, row)
    assert found == expected
    assert preferred(found) == expected.chosen
    assert columns_used(source) <= row.keys()
    for column in columns_used(source):
        assert isinstance(to_sample(source, {key: value for key, value in row.items() if key != column}), Reject)


@pytest.mark.parametrize(
    ("source", "row", "reason"),
    [
        (PAIRS, {"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
        (PLAIN, {"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
        (WHOLE, {"chosen": say("q", "a"), "rejected": say("q", "a")}, "chosen and rejected are the same"),
        (
            WHOLE,
            {"chosen": say("q", "a"), "rejected": say("q", "a", "r", "b")},
            "one answer is the beginning of the other",
        ),
        (WHOLE, {"chosen": say("q", "a"), "rejected": say("p", "b")}, "the prompts of chosen and rejected differ"),
        (WHOLE, {"chosen": say("q", "a"), "rejected": say("q", "b", "r")}, "the last message is not the assistant's"),
        (WHOLE, {"chosen": "a", "rejected": "b"}, "field 'chosen' is not a list of messages"),
        (WHOLE, {"chosen": say("q", "a"), "rejected": []}, "field 'rejected' is not a list of messages"),
        (
            WHOLE,
            {"chosen": say("a", first="assistant"), "rejected": say("b", first="assistant")},
            "the first message is the assistant's",
        ),
        (PAIRS, {"prompt": "q", "chosen": say("p", "a"), "rejected": "b"}, "field 'chosen' holds another prompt"),
        (
            PAIRS,
            {"prompt": say("q", "a"), "chosen": "b", "rejected": "c"},
            "the prompt's last message is not the user's",
        ),
        (PAIRS, {"prompt": "q", "chosen": None, "rejected": "b"}, "field 'chosen' is null, not a string"),
        (PAIRS, {"prompt": "q", "chosen": "a", "rejected": "\n"}, "field 'rejected' is empty"),
        (PAIRS, {"prompt": "q", "chosen": "a", "rejected": "\ud800"}, "field 'rejected' holds a lone surrogate"),
        (PAIRS, {"prompt": "q", "chosen": "a<s>", "rejected": "b"}, "holds the special token '<s>'"),
        (PAIRS, {"prompt": "q", "chosen": "a", "rejected": "b<s>"}, "holds the special token '<s>'"),
        (PAIRS, {"prompt": PICTURED, "chosen": "a", "rejected": "b"}, "pair with an image"),
        (
            WHOLE,
            {
                "chosen": [*PICTURED, *say("a", first="assistant")],
                "rejected": [*PICTURED, *say("b", first="assistant")],
            },
            "pair with an image",
        ),
    ],
)
def test_what_is_no_pair_is_rejected(source: PreferenceSource, row: dict[str, Any], reason: str) -> None:
    found = to_sample(source, row, re.compile("<s>"))
    assert isinstance(found, Reject) and found.reason == reason
