"""What the gateway counts, for Prometheus.

    ray_ft_gateway_requests_total{model,key,status}       answered requests for a model
    ray_ft_gateway_refused_total{status}                  requests refused before a model was known
    ray_ft_gateway_prompt_tokens_total{model,key}         tokens of prompts
    ray_ft_gateway_answer_tokens_total{model,key}         tokens of answers
    ray_ft_gateway_queue_seconds{model}                   waiting for a place on an engine
    ray_ft_gateway_time_to_first_token_seconds{model}     from the request's arrival; streamed answers
    ray_ft_gateway_time_per_output_token_seconds{model}   after the first one; streamed answers
    ray_ft_gateway_request_seconds{model}                 whole latency of answered requests (status 200)
    ray_ft_gateway_waiting{model}                         requests that wait for a place now
    ray_ft_gateway_running{model}                         requests that an engine works on now
    ray_ft_gateway_healthy{backend}                       1, or 0 while /health names the backend

Labels are names of routes, keys and backends, never text of a request, so their number stays small. Each gateway
process counts for itself; a scrape has to reach all of them.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

#: From an idle small model (ms) to a queue behind a long prompt.
FIRST_TOKEN = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
#: People read at about 0.2 s a token; engines give one in 5 to 100 ms.
PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
WHOLE = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15, 20, 30, 45, 60, 120, 240, 480, 960)
QUEUE = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

PREFIX = "ray_ft_gateway"


class Metrics:
    """One gateway's counters, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        by_key = ("model", "key")
        self._requests = Counter(
            f"{PREFIX}_requests", "Answered requests for a model", (*by_key, "status"), registry=self.registry
        )
        self._refused = Counter(
            f"{PREFIX}_refused", "Requests refused before a model was known", ("status",), registry=self.registry
        )
        self._prompt = Counter(f"{PREFIX}_prompt_tokens", "Tokens of prompts", by_key, registry=self.registry)
        self._answer = Counter(f"{PREFIX}_answer_tokens", "Tokens of answers", by_key, registry=self.registry)
        self._queue = self._histogram("queue_seconds", "Waiting for a place on an engine", QUEUE)
        self._first = self._histogram("time_to_first_token_seconds", "From arrival to the first token", FIRST_TOKEN)
        self._per = self._histogram("time_per_output_token_seconds", "Between tokens after the first", PER_TOKEN)
        self._whole = self._histogram("request_seconds", "From arrival to the end of the answer", WHOLE)
        self._waiting = Gauge(f"{PREFIX}_waiting", "Requests waiting for a place", ("model",), registry=self.registry)
        self._running = Gauge(f"{PREFIX}_running", "Requests being worked on", ("model",), registry=self.registry)
        self._healthy = Gauge(
            f"{PREFIX}_healthy", "Whether a backend gives tokens", ("backend",), registry=self.registry
        )
        self._models: dict[str, ModelMetrics] = {}

    def _histogram(self, name: str, what: str, buckets: Iterable[float]) -> Histogram:
        return Histogram(f"{PREFIX}_{name}", what, ("model",), buckets=tuple(buckets), registry=self.registry)

    def model(self, name: str) -> ModelMetrics:
        """The counters of one model; looked up once, as finding a labelled counter costs 2 µs each."""
        found = self._models.get(name)
        if found is None:
            found = self._models[name] = ModelMetrics(self, name)
        return found

    def refused(self, status: int) -> None:
        self._refused.labels(str(status)).inc()

    def healthy(self, backend: str, well: bool) -> None:
        self._healthy.labels(backend).set(1 if well else 0)

    def forget(self, backend: str) -> None:
        """It is no longer used: what was last said of it would stay for ever."""
        self._healthy.remove(backend)

    def text(self) -> bytes:
        """In the Prometheus text format, version 0.0.4."""
        return generate_latest(self.registry)


class ModelMetrics:
    """The counters of one model."""

    def __init__(self, metrics: Metrics, name: str) -> None:
        self._metrics, self._name = metrics, name
        self.queue = metrics._queue.labels(name)
        self.first_token = metrics._first.labels(name)
        self.per_token = metrics._per.labels(name)
        self.whole = metrics._whole.labels(name)
        self.waiting = metrics._waiting.labels(name)
        self.running = metrics._running.labels(name)
        self._requests: dict[tuple[str, int], Counter] = {}
        self._tokens: dict[str, tuple[Counter, Counter]] = {}

    def answered(self, key: str, status: int) -> None:
        counter = self._requests.get((key, status))
        if counter is None:
            counter = self._requests[key, status] = self._metrics._requests.labels(self._name, key, str(status))
        counter.inc()

    def tokens(self, key: str, prompt: int, answer: int) -> None:
        counters = self._tokens.get(key)
        if counters is None:
            both = self._metrics._prompt.labels(self._name, key), self._metrics._answer.labels(self._name, key)
            counters = self._tokens[key] = both
        counters[0].inc(prompt)
        counters[1].inc(answer)
