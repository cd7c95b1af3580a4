"""Answers from a server that speaks OpenAI's HTTP API: ours, vLLM's, or another.

Requests run at once, as many as asked for, and what may pass by itself (429, 5xx, a lost connection) is tried again.
The key comes from the environment and goes into the Authorization header, nowhere else. Limits: the server tokenizes
and renders; images go as data: URLs.
"""

from __future__ import annotations

import itertools
import os
import random
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ray_ft.answers.target import Answer, Prompt, Sampling, Target
from ray_ft.errors import RayFtError, ServeError, first_line
from ray_ft.hosts import is_loopback

if TYPE_CHECKING:
    from openai import OpenAI
    from tenacity import RetryCallState

#: Attempts, and waits between them: 0.5 + 1 + 2 + … + 16 s, about half a minute, or what the server asks for.
ATTEMPTS = 7
FIRST_WAIT = 0.5
LONGEST_WAIT = 60.0

#: The server's own limit is 600 s by default; one that is gone is noticed when connecting.
READ_SECONDS = 620.0
CONNECT_SECONDS = 10.0


class Endpoint:
    """The engine; use `opened`.

    Args:
        at_once: requests under way at one time.

    Raises:
        ServeError: nobody answers, the key is refused, or no model can be chosen.
    """

    name = "endpoint"
    special = None  # the server's tokenizer is not known here

    def __init__(self, target: Target, at_once: int) -> None:
        import openai

        self._target, self._at_once = target, at_once
        self._client = _client(target)
        # Never OPENAI_API_KEY and its like, which the client would send to any server that it is pointed at.
        names = ["OpenAI-Organization", "OpenAI-Project", *([] if _key(target) else ["Authorization"])]
        self._headers: dict[str, Any] = {name: openai.Omit() for name in names}
        self.model = target.model or self._only_model()
        self.identity: dict[str, Any] = {"endpoint": target.location, "model": self.model}

    def close(self) -> None:
        self._client.close()

    def answers(self, prompts: Iterable[Prompt], sampling: Sampling) -> Iterator[Answer]:
        waiting: deque[Future[Answer]] = deque()
        stream = iter(prompts)
        with ThreadPoolExecutor(self._at_once, thread_name_prefix="endpoint") as pool:
            try:
                # Twice as many as run at once, so that a long answer at the front does not leave the others idle.
                for prompt in itertools.islice(stream, 2 * self._at_once):
                    waiting.append(pool.submit(self._answer, prompt, sampling))
                while waiting:
                    yield waiting.popleft().result()
                    for prompt in itertools.islice(stream, 1):
                        waiting.append(pool.submit(self._answer, prompt, sampling))
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _answer(self, prompt: Prompt, sampling: Sampling) -> Answer:
        import openai

        given: dict[str, Any] = {
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        }
        if sampling.seed is not None:
            given["seed"] = sampling.seed
        try:
            if prompt.messages is not None:
                response = self._patiently(self._client.chat.completions.create, messages=prompt.messages, **given)
            else:
                response = self.completed(prompt=prompt.text, **given)
        except openai.APIStatusError as error:  # of this prompt alone: too long, refused by the template, too large
            return Answer.failed(f"the server refused it ({error.status_code}): {_said(error)}")
        first, usage = response.choices[0], response.usage
        text = first.message.content if prompt.messages is not None else first.text
        counted = (usage.prompt_tokens, usage.completion_tokens) if usage else (0, 0)
        return Answer(text or "", first.finish_reason or "stop", *counted)

    def completed(self, **fields: Any) -> Any:
        """What /v1/completions gives for the fields of a request, with at least one choice; see `_patiently`."""
        return self._patiently(self._client.completions.create, **fields)

    def _patiently(self, call: Any, **fields: Any) -> Any:
        """What the model says to a request, tried again while it may come to pass.

        Raises:
            ServeError: it did not, whoever asks may not, or what came is no answer.
            openai.APIStatusError: the request itself is refused.
        """
        import openai
        from tenacity import Retrying, retry_if_exception_type, stop_after_attempt

        passing = (openai.APIConnectionError, openai.RateLimitError, openai.InternalServerError)
        again = Retrying(
            retry=retry_if_exception_type(passing), wait=_wait, stop=stop_after_attempt(ATTEMPTS), reraise=True
        )
        try:
            response = again(call, model=self.model, extra_headers=self._headers, **fields)
        except passing as error:
            raise self._gave_up(error) from error
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise self._refused(error) from error
        except ValueError as error:  # pydantic's and json's are such
            raise self._foreign(first_line(error)) from error
        if not getattr(response, "choices", None):
            raise self._foreign(response)
        return response

    def _only_model(self) -> str:
        import openai

        try:
            page = self._client.models.list(extra_headers=self._headers)
            listed = [model.id for model in page.data]
        except openai.APIConnectionError as error:  # not tried again: whoever mistyped an address hears so at once
            raise self._gave_up(error) from error
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise self._refused(error) from error
        except openai.APIStatusError as error:
            raise ServeError(
                f"{self._target.location} does not list its models ({error.status_code}): {_said(error)}",
                ["name the model: --model NAME"],
            ) from error
        except (AttributeError, TypeError, ValueError) as error:  # a page for people, or other JSON
            raise self._foreign(first_line(error)) from error
        if len(listed) != 1:
            raise ServeError(
                f"{self._target.location} serves {len(listed)} models: {', '.join(listed) or 'none'}",
                ["name one of them: --model NAME"] if listed else ["start one: ray-ft serve RUN"],
            )
        return listed[0]

    def _foreign(self, said: Any) -> RayFtError:
        return ServeError(
            f"what {self._target.location} answers is not OpenAI's API: {' '.join(str(said).split())[:200]}",
            ["check the address: it is where /models and /chat/completions are", "start a server: ray-ft serve RUN"],
        )

    def _gave_up(self, error: Exception) -> RayFtError:
        import openai

        if isinstance(error, openai.APIStatusError):
            return ServeError(
                f"{self._target.location} still answers {error.status_code} after {ATTEMPTS} attempts: {_said(error)}",
                ["ask less at once: a smaller batch size", "go on when it is well: finished answers are kept"],
            )
        reason = str(error.__cause__ or error)
        return ServeError(
            f"no answer from {self._target.location}: {reason}",
            [
                f"check the address, and that the server runs: curl {self._target.location}/models",
                "start it: ray-ft serve RUN",
            ],
        )

    def _refused(self, error: Any) -> RayFtError:
        variable, location = self._target.api_key_env, self._target.location
        if error.status_code == 404:
            return ServeError(
                f"{location} has no such model or path: {_said(error)}",
                [f"see what it serves: curl {location}/models", "name the model: --model NAME"],
            )
        key = f"the key in {variable} is refused" if _key(self._target) else f"no key was sent: {variable} is empty"
        return ServeError(
            f"{location} answers {error.status_code}: {key}",
            [f"export {variable}=KEY, with a key that the server knows", "ask whoever runs the server for one"],
        )


def _client(target: Target) -> OpenAI:
    import openai

    key, host = _key(target), urlsplit(target.location).hostname or ""
    if not (key.isascii() and key.isprintable()):
        raise ServeError(
            f"the key in {target.api_key_env} holds characters that no HTTP header can carry", ["set it again"]
        )
    return openai.OpenAI(
        base_url=target.location,
        api_key=key or "none",
        max_retries=0,
        http_client=openai.DefaultHttpxClient(
            # A proxy of the environment does not reach this machine's loopback.
            trust_env=not (is_loopback(host) or host.endswith(".localhost")),
            timeout=openai.Timeout(READ_SECONDS, connect=CONNECT_SECONDS),
        ),
    )


def _key(target: Target) -> str:
    return os.environ.get(target.api_key_env, "").strip()


def _wait(state: RetryCallState) -> float:
    """Seconds before the next attempt: what the server says (Retry-After, in seconds), else longer each time."""
    error = state.outcome.exception() if state.outcome else None
    response = getattr(error, "response", None)
    asked = response.headers.get("retry-after", "") if response is not None else ""
    growing = FIRST_WAIT * 2 ** (state.attempt_number - 1)
    # Not all at once again, where many requests were refused together.
    wait = float(asked) if asked.isdigit() else growing
    return min(wait, LONGEST_WAIT) + random.uniform(0, FIRST_WAIT)


def _said(error: Any) -> str:
    """The server's own message, shortened."""
    body = error.body if isinstance(error.body, dict) else {}
    said = body.get("message") or body.get("detail") or error.message
    return str(said).strip()[:500]
