"""The two pages that people look at, in a real browser: the playground over the real gateway, and a run's report.

The engine is a fake one that speaks as vLLM does; everything between it and the screen is real.
"""

from __future__ import annotations

import base64
import json
import os
import shlex
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

from ray_ft.recipe import Recipe
from ray_ft.report import report
from ray_ft.train import launch
from ray_ft.view import View
from serving.gateway import Gateway, Route, Settings

sys.path.append(str(Path(__file__).parent.parent / "unit"))  # where the fake engine lies
import fake_engine as fake

#: Set where these tests must not be skipped, as in continuous integration.
REQUIRE = "RAY_FT_REQUIRE_CHROMIUM"
#: Milliseconds that a busy machine may take for what the browser shows.
PATIENCE = 60_000
expect.set_options(timeout=PATIENCE)
HOSTILE = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script> [a](javascript:window.hacked=1)'
EXAMPLES = (
    {
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is two and two?"}],
        "reference": "four " + HOSTILE,
        "origin": "heldout.jsonl:7",
    },
    {"prompt": "Once upon", "reference": "a time", "origin": "heldout.jsonl:8"},
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = next((path for name in ("chromium", "chromium-browser") if (path := shutil.which(name))), None)
    if chromium is None:
        reason = "there is no Chromium on this machine (as root: apt-get install chromium)"
        if os.environ.get(REQUIRE) == "1":
            pytest.fail(f"{REQUIRE}=1, and {reason}")
        pytest.skip(reason)
    with sync_playwright() as playwright:
        # Its own sandbox needs rights that a container's root lacks; nothing foreign is loaded here.
        opened = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@dataclass
class Seen:
    """What a page asked for and complained of."""

    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def watch(self, page: Page) -> None:
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", self._console)

    def _console(self, message: ConsoleMessage) -> None:
        # The browser itself writes a line for each answer of 4xx or 5xx; the page cannot keep it from that.
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            self.errors.append(message.text)

    def elsewhere(self, base: str) -> list[str]:
        return [url for url in self.requests if not url.startswith((base, "data:", "blob:"))]


@dataclass
class Bench:
    """A gateway over a fake engine, and a page that shows its playground."""

    page: Page
    base: str
    engine: fake.Engine
    app: Gateway
    routes: list[Route]
    seen: Seen

    @property
    def answers(self) -> Any:
        return self.page.locator("#talk .side:not(.reference)")

    def ask(self, text: str) -> None:
        self.page.get_by_label("Your question").fill(text)
        self.page.get_by_role("button", name="Send").click()

    def done(self, failed: int = 0) -> None:
        """Wait for the end of all answers, of which so many are to have failed."""
        expect(self.page.get_by_role("button", name="Send")).to_be_visible()
        said = self.page.locator(".failed").all_text_contents()
        assert len(said) == failed, said

    def bodies(self) -> list[dict[str, Any]]:
        """What the page asked; the gateway's own probes are not among it."""
        return [body for _, body, _ in self.engine.requests if "stream" in body or "input" in body]


OpenBench = Callable[..., Bench]


@pytest.fixture
def bench(browser: Browser) -> Iterator[OpenBench]:
    """Opens the playground; at the end, checks that the page complained of nothing and asked nobody else."""
    opened: list[Bench] = []
    with ExitStack() as stack:

        def make(
            fragment: str = f"#key={fake.KEY}",
            places: int | None = None,
            examples: tuple[dict[str, Any], ...] = EXAMPLES,
            **settings: Any,
        ) -> Bench:
            engine = fake.Engine()
            backend = fake.Backend(stack.enter_context(fake.serving(engine)), places=places)
            routes = [
                fake.route("tuned", backend, compare="tuned-base", examples=examples),
                fake.route("tuned-base", backend),
                fake.route("seeing", backend, vision=True),
                fake.route("plain", backend, chat=False, examples=EXAMPLES[1:]),
                fake.route("labels", backend, kind="classify", chat=False),
            ]
            app = Gateway(Settings(**settings), fake.keys(), routes)
            base = stack.enter_context(fake.serving(app, lifespan="on"))
            context = browser.new_context()
            stack.callback(context.close)
            page = context.new_page()
            page.set_default_timeout(PATIENCE)
            seen = Seen()
            seen.watch(page)
            page.goto(f"{base}/playground/{fragment}")
            opened.append(Bench(page, base, engine, app, routes, seen))
            if fragment:
                expect(page.get_by_label("Model", exact=True)).to_be_enabled()
            return opened[-1]

        yield make
        for one in opened:
            assert one.seen.errors == []
            assert one.seen.elsewhere(one.base) == []
            assert one.page.evaluate("window.hacked") is None


# ---------------------------------------------------------------------------------------------------------------- keys


def test_without_a_key_the_page_asks_for_one_and_takes_only_a_right_one(bench: OpenBench) -> None:
    b = bench(fragment="")
    page = b.page
    expect(page.get_by_role("alert")).to_have_text("This server wants an API key.")
    page.get_by_label("API key", exact=True).fill("wrong-key-of-sixteen-or-more")
    page.get_by_role("button", name="Use it").click()
    expect(page.get_by_role("alert")).to_have_text("This API key is not valid here.")
    page.get_by_label("API key", exact=True).fill(fake.KEY)
    page.get_by_role("button", name="Use it").click()
    expect(page.get_by_label("Model", exact=True)).to_be_enabled()
    assert page.locator("#model option").all_text_contents() == ["tuned", "tuned-base", "seeing", "plain", "labels"]
    expect(page.locator("#notice")).to_be_hidden()
    page.reload()  # the key is kept for the tab
    expect(page.get_by_label("Model", exact=True)).to_be_enabled()
    page.get_by_role("button", name="API key").click()
    page.get_by_role("button", name="Forget it").click()
    expect(page.get_by_role("alert")).to_have_text("This server wants an API key.")


def test_a_key_in_the_address_is_taken_and_removed(bench: OpenBench) -> None:
    b = bench()
    assert b.page.url == f"{b.base}/playground/"
    assert b.page.evaluate("history.length") <= 2  # about:blank and this one: no entry with the key
    assert fake.KEY not in b.page.content()
    assert b.page.evaluate("JSON.stringify(localStorage) + document.cookie") == "{}"
    assert not any(fake.KEY in url for url in b.seen.requests)


# ----------------------------------------------------------------------------------------------------------- answering


#: When the answer's text changed, and when its figures came, in milliseconds.
WATCH = """
window.seen = [];
const shown = (node) => node.parentElement?.matches(".text") || node.matches?.(".stats");
new MutationObserver((changes) => {
  if (changes.some((change) => shown(change.target))) seen.push(performance.now());
}).observe(document.getElementById("talk"), { subtree: true, childList: true, characterData: true });
"""


def test_an_answer_arrives_piece_by_piece_with_its_figures(bench: OpenBench) -> None:
    b = bench()
    b.engine.tokens, b.engine.rate = ("eins ", "zwei ", "drei "), 10
    b.page.evaluate(WATCH)
    b.page.get_by_label("Longest answer, in tokens").fill("12")
    b.ask("Count!")
    text = b.answers.locator(".text").first
    expect(text).to_have_text("eins zwei drei " * 4)
    b.done()
    stats = b.answers.locator(".stats")
    expect(stats).to_contain_text("1 → 12 tokens")
    expect(stats).to_contain_text("first after")
    expect(stats).to_contain_text("cut off at the longest answer")
    rate = float((stats.text_content() or "").split("·")[-1].split()[0])
    # As the page itself was seen to change: how fast that goes is also this machine's affair.
    first, *_, last = seen = b.page.evaluate("seen")
    assert len(seen) >= 4
    assert rate == pytest.approx(11 / (last - first) * 1000, rel=0.2)
    (body,) = b.bodies()
    assert body["messages"] == [{"role": "user", "content": "Count!"}]
    assert (body["temperature"], body["max_tokens"], body["stream"]) == (0, 12, True)


def test_tokens_that_came_at_once_have_no_rate_and_white_space_is_named(bench: OpenBench) -> None:
    b = bench()
    b.engine.tokens = ("", "", "", "\f")
    b.page.get_by_label("Longest answer, in tokens").fill("8")
    b.ask("Say nothing")
    b.done()
    expect(b.answers.locator("em")).to_have_text("(white space alone)")
    stats = b.answers.locator(".stats")
    expect(stats).to_contain_text("→ 8 tokens")
    expect(stats).not_to_contain_text("tokens/s")


def test_a_long_list_of_examples_does_not_push_the_question_out_of_view(bench: OpenBench) -> None:
    row = {"reference": "yes", "origin": "heldout.jsonl:1"}
    b = bench(examples=tuple({"prompt": f"{number} is a number that is long " * 4, **row} for number in range(20)))
    b.page.set_viewport_size({"width": 1280, "height": 720})
    b.page.get_by_role("button", name="3 is a number").first.click()
    b.done()
    expect(b.page.locator(".question")).to_be_in_viewport(ratio=1)
    expect(b.page.get_by_label("Model", exact=True)).to_be_in_viewport(ratio=1)
    b.page.locator(".example").last.scroll_into_view_if_needed()  # in a list that scrolls by itself
    expect(b.page.locator(".question")).to_be_in_viewport(ratio=1)


def test_settings_are_sent(bench: OpenBench) -> None:
    b = bench()
    b.page.get_by_label("System prompt").fill("Be brief.")
    b.page.get_by_label("Temperature").fill("0.7")
    b.page.get_by_label("Longest answer, in tokens").fill("")
    b.ask("Hello")
    b.done()
    (body,) = b.bodies()
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert body["temperature"] == 0.7
    assert "max_tokens" not in body


def test_stop_ends_the_answer_and_the_engines_work(bench: OpenBench) -> None:
    b = bench()
    b.engine.tokens, b.engine.rate = ("word ",), 5
    b.ask("Go on for ever")
    expect(b.answers.locator(".text")).to_contain_text("word word")
    b.page.get_by_role("button", name="Stop").click()
    expect(b.answers.locator(".stats")).to_have_text("stopped")
    b.done()
    assert b.answers.locator(".failed").count() == 0
    fake.wait_until(lambda: b.engine.cancelled == 1, 60)
    assert len(b.answers.locator(".text").text_content() or "") < 100 * len("word ")


def test_base_and_tuned_answer_side_by_side_and_at_once(bench: OpenBench) -> None:
    b = bench()
    b.engine.rate = 0.5  # until both are seen
    b.page.get_by_label("beside the base model").check()
    b.ask("one two three four")
    fake.wait_until(lambda: b.engine.running == 2, 60)
    b.engine.rate = 0
    b.done()
    assert b.answers.locator("h3").all_text_contents() == ["tuned-base", "tuned"]
    expect(b.answers.nth(0).locator(".text")).to_have_text("tuned-base says: one two three four ")
    expect(b.answers.nth(1).locator(".text")).to_have_text("tuned says: one two three four ")
    left, right = (b.answers.nth(at).bounding_box() for at in (0, 1))
    assert left is not None
    assert right is not None
    assert left["y"] == right["y"]
    assert left["x"] < right["x"]
    b.ask("and then?")  # each goes on with its own answer
    b.done()
    second = {body["model"]: body["messages"] for body in b.bodies()[2:]}
    for name in ("tuned", "tuned-base"):
        assert [turn["role"] for turn in second[name]] == ["user", "assistant", "user"]
        assert second[name][1]["content"].startswith(f"{name} says:")


def test_a_question_is_edited_and_answered_again(bench: OpenBench) -> None:
    b = bench()
    b.ask("first")
    b.done()
    b.ask("second")
    b.done()
    b.page.get_by_role("button", name="Answer again").first.click()  # what came after it is no longer so
    b.done()
    assert b.page.locator(".turn").count() == 1
    assert len(b.bodies()) == 3
    b.page.get_by_role("button", name="Edit").click()
    expect(b.page.get_by_label("Your question")).to_have_value("first")
    assert b.page.locator(".turn").count() == 0
    b.page.get_by_label("Your question").fill("edited")
    b.page.keyboard.press("Enter")
    b.done()
    assert b.bodies()[-1]["messages"] == [{"role": "user", "content": "edited"}]


def test_held_out_examples_are_asked_with_their_reference_beside(bench: OpenBench) -> None:
    b = bench()
    b.page.get_by_role("button", name="What is two and two?").click()
    b.done()
    assert b.bodies()[-1]["messages"] == EXAMPLES[0]["prompt"]
    expect(b.page.locator(".reference .text")).to_have_text(str(EXAMPLES[0]["reference"]))
    expect(b.page.get_by_label("System prompt")).to_have_value("Be brief.")
    b.page.get_by_label("Model", exact=True).select_option("plain")  # which goes on with texts
    b.page.get_by_role("button", name="Once upon").click()
    b.done()
    path, body, _ = b.engine.requests[-1]
    assert (path, body["prompt"]) == ("/v1/completions", "Once upon")
    expect(b.answers.locator(".text")).to_have_text("plain says: Once upon ")


def test_labels_are_shown_with_their_probabilities(bench: OpenBench) -> None:
    b = bench()
    b.page.get_by_label("Model", exact=True).select_option("labels")
    expect(b.page.get_by_label("Temperature")).to_be_hidden()
    b.ask("What a day")
    b.done()
    assert b.page.locator(".labels dt").all_text_contents() == ["good", "bad"]
    assert b.page.locator(".labels dd").all_text_contents() == ["75.0%", "25.0%"]
    widths = [bar.evaluate("bar => bar.value / bar.max") for bar in b.page.locator(".labels progress").all()]
    assert widths == [0.75, 0.25]


def test_an_image_is_sent_small_enough_and_only_to_a_model_that_sees(bench: OpenBench, tmp_path: Path) -> None:
    from PIL import Image

    b = bench()
    expect(b.page.get_by_label("Add an image")).to_be_hidden()
    b.page.get_by_label("Model", exact=True).select_option("seeing")
    small, large, none = (tmp_path / name for name in ("small.png", "large.png", "none.png"))
    Image.new("RGB", (40, 30), "red").save(small)
    Image.effect_noise((3000, 1000), 90).save(large)
    none.write_text("no image")
    b.page.locator("#file").set_input_files(none)
    expect(b.page.get_by_role("alert")).to_contain_text("none.png is no image")
    b.page.locator("#file").set_input_files(small)
    expect(b.page.get_by_alt_text("The image that goes with the question")).to_be_visible()
    b.ask("What is it?")
    b.done()
    image, text = b.bodies()[-1]["messages"][-1]["content"]
    assert image["image_url"]["url"] == f"data:image/png;base64,{base64.b64encode(small.read_bytes()).decode()}"
    assert text == {"type": "text", "text": "What is it?"}
    b.page.locator("#file").set_input_files(large)
    expect(b.page.get_by_alt_text("The image that goes with the question")).to_be_visible()
    b.ask("And this?")
    b.done()
    sent = b.bodies()[-1]["messages"][-1]["content"][0]["image_url"]["url"]
    (tmp_path / "sent").write_bytes(base64.b64decode(sent.removeprefix("data:image/jpeg;base64,")))
    assert Image.open(tmp_path / "sent").size == (1536, 512)


def test_a_request_is_copied_as_curl(bench: OpenBench) -> None:
    b = bench()
    asked = 'it\'s "$HOME"\n`id` \\ ü'
    b.page.get_by_label("Your question").fill(asked)
    b.page.get_by_role("button", name="Copy as curl").click()
    text = b.page.locator("#curl-text").input_value()
    assert fake.KEY not in text
    words = shlex.split(text)
    assert words[:2] == ["curl", f"{b.base}/v1/chat/completions"]
    assert "Authorization: Bearer $RAY_FT_API_KEY" in words
    body = json.loads(words[words.index("-d") + 1])
    assert body["messages"] == [{"role": "user", "content": asked}]
    answer = httpx.post(words[1], json=body, headers=fake.HEADERS)
    assert answer.status_code == 200


# -------------------------------------------------------------------------------------------------------------- errors


def test_markup_of_an_answer_is_text(bench: OpenBench) -> None:
    b = bench()
    b.engine.tokens = (HOSTILE,)
    b.page.get_by_label("Longest answer, in tokens").fill("1")
    b.ask(HOSTILE)
    b.done()
    expect(b.answers.locator(".text")).to_have_text(HOSTILE)
    expect(b.page.locator(".question .text")).to_have_text(HOSTILE)
    assert b.page.locator("#talk img, #talk script, #talk a").count() == 0
    policy = httpx.get(f"{b.base}/playground/").headers["content-security-policy"]
    assert "script-src 'self'" in policy
    assert "unsafe" not in policy


def test_the_policy_stops_what_the_page_would_not_do() -> None:
    """That nothing hostile runs is not the policy's doing alone: the page itself writes no markup."""
    folder = Path(__file__).parents[2] / "serving" / "playground"
    script, page = (folder / "app.js").read_text(), (folder / "index.html").read_text()
    for way in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "new Function",
        "localStorage",
    ):
        assert way not in script
    assert " style=" not in page
    assert "<style" not in page
    assert " on" not in page.replace(" one", "").replace(" only", "").split("<body>")[0]
    assert page.count("<script") == 1
    assert "http" not in page.replace("http-equiv", "")


def _said(b: Bench, text: str = "hello") -> str:
    b.ask(text)
    b.done(failed=1)
    return b.answers.last.locator(".failed").text_content() or ""


def test_too_many_requests(bench: OpenBench) -> None:
    b = bench(requests_per_minute=2)
    for text in ("first", "second"):
        b.ask(text)
        b.done()
    said = _said(b, "third")
    assert said.startswith("Too many requests with this key.")
    assert "try again in" in said


def test_too_large_a_request(bench: OpenBench) -> None:
    b = bench(max_body_bytes=2000)
    assert _said(b, "x" * 3000).startswith("The request is too large for this server.")


def test_a_setting_that_the_server_refuses(bench: OpenBench) -> None:
    b = bench(max_tokens=100)
    assert "from 1 to 100" in _said(b)


def test_a_model_that_is_gone(bench: OpenBench) -> None:
    b = bench()
    b.app.replace([route for route in b.routes if route.name != "tuned"])
    assert _said(b).startswith("The server does not know this model, or no longer.")


def test_no_room(bench: OpenBench) -> None:
    b = bench(places=1, max_waiting=1)
    b.engine.stall_after = 0

    def fill() -> None:
        asked = {"model": "tuned", "messages": [{"role": "user", "content": "hi"}], "stream": True}
        with httpx.stream(
            "POST", f"{b.base}/v1/chat/completions", json=asked, headers=fake.HEADERS, timeout=60
        ) as answer:
            over.wait(240)
            assert answer is not None

    over = threading.Event()
    fillers = [threading.Thread(target=fill, daemon=True) for _ in range(2)]
    fillers[0].start()
    fake.wait_until(lambda: b.engine.running == 1, 60)
    fillers[1].start()
    metrics = f"{b.base}/metrics"
    waiting = 'gateway_waiting{model="tuned"} 1.0'
    fake.wait_until(lambda: waiting in httpx.get(metrics, headers=fake.ADMIN, timeout=60).text, 60)
    try:
        assert _said(b).startswith("The model has no room for this request at the moment.")
    finally:
        over.set()


def test_an_answer_that_breaks_off_keeps_what_came(bench: OpenBench) -> None:
    b = bench()
    b.engine.break_after = 2
    said = _said(b, "one two three four")
    assert "broke off" in said or "connection was lost" in said
    expect(b.answers.locator(".text")).to_have_text("tuned says: ")


def test_a_server_that_is_gone(bench: OpenBench) -> None:
    b = bench()
    b.page.context.set_offline(True)
    assert _said(b) == "The connection to the server was lost."
    b.page.context.set_offline(False)
    b.page.get_by_role("button", name="Answer again").click()
    b.done()
    expect(b.answers.locator(".text")).to_have_text("tuned says: hello ")


# -------------------------------------------------------------------------------------------------------------- report


def test_a_report_opens_without_network_and_draws_its_charts(
    browser: Browser, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = make_recipe("train.max_steps=4", "train.eval_every=2", "train.log_every=1")
    launch.train(recipe, View())
    evaluation = {"step": 4, "rows": 1, "model": {"loss": 1.0, "scores": {"chrf": 10.0}}, "base": None}
    evaluation["samples"] = [{"prompt": HOSTILE, "reference": HOSTILE, "answer": HOSTILE, "origin": HOSTILE}]
    evaluation["labels"] = {"confusion": {"labels": [HOSTILE], "answers": [HOSTILE, "b"], "counts": [[1, 2]]}}
    Path(recipe.run.dir.at("eval")).mkdir()
    Path(recipe.run.dir.evaluation).write_text(json.dumps(evaluation))
    location = report(recipe.run.dir.root, View(), str(tmp_path / "out.html"))
    for script in (True, False):
        context = browser.new_context(offline=True, java_script_enabled=script)
        page, seen = context.new_page(), Seen()
        seen.watch(page)
        page.goto(f"file://{location}")
        expect(page.locator("h1")).to_contain_text("complete after 4 steps")
        tables = page.locator("table")
        if script:
            drawn = page.locator("html[data-drawn]")
            expect(drawn).to_have_count(1)
            charts = page.locator(".chart")
            assert charts.count() == int(drawn.get_attribute("data-drawn") or 0) >= 8
            assert all(chart.locator("svg.main-svg").count() for chart in charts.all())
            assert page.locator(".chart path.js-line").count() >= 8
            fit = "charts => charts.every(chart => chart.querySelector('svg').clientWidth <= chart.clientWidth)"
            for width in (1280, 400):
                page.set_viewport_size({"width": width, "height": 800})
                fake.wait_until(partial(charts.evaluate_all, fit), PATIENCE / 1000)
                assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            page.evaluate("dispatchEvent(new Event('beforeprint'))")
            page.emulate_media(media="print", color_scheme="dark")
            assert charts.evaluate_all(fit)
            assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
            assert all(table.is_visible() for table in tables.all())
            assert page.evaluate("window.hacked") is None
        else:
            expect(page.locator(".chart").first).to_be_hidden()
            assert all(table.is_visible() for table in tables.all())  # every number is there without a script
        assert tables.count() >= 4
        assert page.locator("main img, main a").count() == 0
        expect(page.locator(".answers .side p").first).to_have_text(HOSTILE)
        assert seen.errors == []
        assert seen.requests == [f"file://{location}"]
        context.close()
