"""The dashboard asks only for metrics, and labels, that exist: the gateway's in its registry, Ray's and vLLM's in their
sources."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serving.gateway.metrics import Metrics

DASHBOARD = Path(__file__).parents[2] / "cluster" / "grafana" / "ray_ft.json"

#: Prometheus name → (package, file that defines it, how it is written there). Ray puts ray_ before every name, and
#: _total behind a counter's; vLLM's names lose their colon on the way through Ray.
_TRAIN = "train/v2/_internal/metrics"
_REPORTER = "dashboard/modules/reporter/reporter_agent.py"
_DATA = "data/_internal/stats.py"
_VLLM = "v1/metrics/loggers.py"
RAY = {
    "ray_cluster_active_nodes": ("ray", _REPORTER, "cluster_active_nodes"),
    "ray_cluster_failed_nodes": ("ray", _REPORTER, "cluster_failed_nodes"),
    "ray_cluster_pending_nodes": ("ray", _REPORTER, "cluster_pending_nodes"),
    "ray_data_current_bytes": ("ray", _DATA, "data_current_bytes"),
    "ray_data_iter_rows_total": ("ray", _DATA, "data_iter_rows_total"),
    "ray_data_iter_total_blocked_seconds": ("ray", _DATA, "data_iter_total_blocked_seconds"),
    "ray_data_output_rows": ("ray", _DATA, "data_output_rows"),
    "ray_data_spilled_bytes": ("ray", _DATA, "data_spilled_bytes"),
    "ray_node_cpu_utilization": ("ray", _REPORTER, "node_cpu_utilization"),
    "ray_node_disk_utilization_percentage": ("ray", _REPORTER, "node_disk_utilization_percentage"),
    "ray_node_gpu_power_milliwatts": ("ray", _REPORTER, "node_gpu_power_milliwatts"),
    "ray_node_gpus_utilization": ("ray", _REPORTER, "node_gpus_utilization"),
    "ray_node_gram_used": ("ray", _REPORTER, "node_gram_used"),
    "ray_node_mem_total": ("ray", _REPORTER, "node_mem_total"),
    "ray_node_mem_used": ("ray", _REPORTER, "node_mem_used"),
    "ray_node_network_receive_speed": ("ray", _REPORTER, "node_network_receive_speed"),
    "ray_node_network_send_speed": ("ray", _REPORTER, "node_network_send_speed"),
    "ray_serve_autoscaling_target_replicas": (
        "ray", "serve/_private/deployment_state.py", "serve_autoscaling_target_replicas",
    ),
    "ray_serve_deployment_queued_queries": ("ray", "serve/_private/router.py", "serve_deployment_queued_queries"),
    "ray_serve_deployment_replica_healthy": (
        "ray", "serve/_private/deployment_state.py", "serve_deployment_replica_healthy",
    ),
    "ray_train_controller_state": ("ray", f"{_TRAIN}/controller.py", "train_controller_state"),
    "ray_train_worker_group_shutdown_total_time_s": (
        "ray", f"{_TRAIN}/controller.py", "train_worker_group_shutdown_total_time_s",
    ),
    "ray_train_worker_group_start_total_time_s": (
        "ray", f"{_TRAIN}/controller.py", "train_worker_group_start_total_time_s",
    ),
    "ray_vllm_generation_tokens_total": ("vllm", _VLLM, "vllm:generation_tokens"),
    "ray_vllm_kv_cache_usage_perc": ("vllm", _VLLM, "vllm:kv_cache_usage_perc"),
    "ray_vllm_num_preemptions_total": ("vllm", _VLLM, "vllm:num_preemptions"),
    "ray_vllm_num_requests_running": ("vllm", _VLLM, "vllm:num_requests_running"),
    "ray_vllm_num_requests_waiting": ("vllm", _VLLM, "vllm:num_requests_waiting"),
    "ray_vllm_prefix_cache_hits_total": ("vllm", _VLLM, "vllm:prefix_cache_hits"),
    "ray_vllm_prefix_cache_queries_total": ("vllm", _VLLM, "vllm:prefix_cache_queries"),
    "ray_vllm_prompt_tokens_total": ("vllm", _VLLM, "vllm:prompt_tokens"),
}  # fmt: skip

#: PromQL that the dashboard uses.
WORDS = {"by", "histogram_quantile", "label_values", "max", "min", "rate", "sum"}
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}


def gateway() -> dict[str, set[str]]:
    """Names that the gateway's registry gives, with the labels of each."""
    found = {}
    for collector in set(Metrics().registry._collector_to_names):
        for family in collector.describe() if hasattr(collector, "describe") else collector.collect():
            for suffix in SUFFIXES[family.type]:
                labels = set(collector._labelnames) | ({"le"} if suffix == "_bucket" else set())  # type: ignore[attr-defined]
                found[family.name + suffix] = labels
    return found


def dashboard() -> dict[str, Any]:
    return json.loads(DASHBOARD.read_text(encoding="utf-8"))


def expressions() -> Iterator[tuple[str, str, str]]:
    """(panel, expression, legend) of the whole dashboard; of its variables too."""
    content = dashboard()
    for panel in content["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"], target["legendFormat"]
    for variable in content["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["name"], variable["query"]["query"], ""


def names(expression: str) -> set[str]:
    """Metrics that an expression asks for."""
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\bby \([^)]*\)", "", expression)
    if "label_values" in bare:
        bare = bare.split(",")[0]
    return set(re.findall(r"[a-zA-Z_:][\w:]*", bare)) - WORDS


def labels(expression: str, legend: str) -> set[str]:
    """Labels that it sums by, filters by or shows."""
    found = {label.strip() for group in re.findall(r"\bby \(([^)]*)\)", expression) for label in group.split(",")}
    found |= set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", expression))
    return found | set(re.findall(r"\{\{(\w+)\}\}", legend))


def test_every_metric_is_known() -> None:
    known = {*RAY, *gateway()}
    used = set()
    for panel, expression, _ in expressions():
        asked = names(expression)
        assert asked, panel
        assert asked <= known, f"{panel}: {sorted(asked - known)} do not exist"
        used |= asked
    assert set(RAY) <= used  # the list above holds no more than is used


def test_what_asks_for_another_metric_is_found() -> None:
    assert names('sum by (a) (rate(ray_made_up_total{b="c"}[5m])) / ray_node_mem_used') == {
        "ray_made_up_total",
        "ray_node_mem_used",
    }
    assert "ray_made_up_total" not in {*RAY, *gateway()}


def test_the_gateways_labels_exist() -> None:
    known = gateway()
    for panel, expression, legend in expressions():
        asked = names(expression)
        if asked <= set(known):
            offered = set.intersection(*(known[name] for name in asked))
            assert labels(expression, legend) <= offered, panel


@pytest.mark.parametrize("name", sorted(RAY))
def test_rays_metrics_are_in_its_source(name: str) -> None:
    package, file, written = RAY[name]
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"{package} is not installed")
    assert spec.submodule_search_locations
    text = Path(spec.submodule_search_locations[0], file).read_text(encoding="utf-8")
    assert f'"{written}"' in text
    assert name.removesuffix("_total") in (
        f"ray_{written.replace(':', '_')}",
        f"ray_{written.removesuffix('_total')}",
    )


def test_what_a_legend_shows_is_what_is_summed_by() -> None:
    for panel, expression, legend in expressions():
        grouped = {label.strip() for group in re.findall(r"\bby \(([^)]*)\)", expression) for label in group.split(",")}
        assert set(re.findall(r"\{\{(\w+)\}\}", legend)) <= grouped, panel


def test_the_dashboard_is_whole() -> None:
    content = dashboard()
    panels = content["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    titles = [panel["title"] for panel in panels]
    assert len(set(titles)) == len(titles)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
    variables = {variable["name"] for variable in content["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", " ".join(expression for _, expression, _ in expressions())))
    assert used - {"__rate_interval"} <= variables
