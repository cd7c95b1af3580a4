"""What the doctor makes of GPUs: a planted nvidia-smi on PATH is asked, and each planted fault is found by name."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ray_ft.doctor import gpus, smi
from ray_ft.doctor.finding import Finding, Severity, worst

GIB = 1 << 30

HEALTHY = {
    "name": "NVIDIA H100 80GB HBM3",
    "total": "81559 MiB",
    "used": "4 MiB",
    "free": "81004 MiB",
    "persistence": "Enabled",
    "mig": "Disabled",
    "ecc": "Enabled",
    "recovery": "None",
    "sram": "0",
    "dram": "0",
    "pending": "No",
    "failure": "No",
    "celsius": "34 C",
    "margin": "51 C",
    "slowdown": "Not Active",
    "hot": "Not Active",
    "brake": "Not Active",
    "driver_hot": "Not Active",
    "capped": "Not Active",
    "watts": "700.00 W",
    "usual_watts": "700.00 W",
    "lanes": "16x",
    "fabric": "Completed",
    "processes": "",
}


def gpu_xml(index: int = 0, **changes: str) -> str:
    values = HEALTHY | changes
    return f"""
	<gpu id="00000000:{index + 0x1B:02X}:00.0">
		<product_name>{values["name"]}</product_name>
		<persistence_mode>{values["persistence"]}</persistence_mode>
		<mig_mode><current_mig>{values["mig"]}</current_mig><pending_mig>{values["mig"]}</pending_mig></mig_mode>
		<uuid>GPU-5a1b{index:04d}-0000-4000-8000-00000000000{index}</uuid>
		<gpu_reset_status><reset_required>N/A</reset_required></gpu_reset_status>
		<gpu_recovery_action>{values["recovery"]}</gpu_recovery_action>
		<pci><pci_gpu_link_info>
			<pcie_gen><max_link_gen>5</max_link_gen><current_link_gen>1</current_link_gen></pcie_gen>
			<link_widths><max_link_width>16x</max_link_width><current_link_width>{values["lanes"]}</current_link_width></link_widths>
		</pci_gpu_link_info></pci>
		<clocks_event_reasons>
			<clocks_event_reason_gpu_idle>Active</clocks_event_reason_gpu_idle>
			<clocks_event_reason_sw_power_cap>{values["capped"]}</clocks_event_reason_sw_power_cap>
			<clocks_event_reason_hw_slowdown>{values["slowdown"]}</clocks_event_reason_hw_slowdown>
			<clocks_event_reason_hw_thermal_slowdown>{values["hot"]}</clocks_event_reason_hw_thermal_slowdown>
			<clocks_event_reason_hw_power_brake_slowdown>{values["brake"]}</clocks_event_reason_hw_power_brake_slowdown>
			<clocks_event_reason_sw_thermal_slowdown>{values["driver_hot"]}</clocks_event_reason_sw_thermal_slowdown>
		</clocks_event_reasons>
		<fb_memory_usage><total>{values["total"]}</total><used>{values["used"]}</used>
			<reserved>551 MiB</reserved><free>{values["free"]}</free></fb_memory_usage>
		<ecc_mode><current_ecc>{values["ecc"]}</current_ecc><pending_ecc>{values["ecc"]}</pending_ecc></ecc_mode>
		<ecc_errors>
			<volatile>
				<sram_correctable>3</sram_correctable>
				<sram_uncorrectable_parity>{values["sram"]}</sram_uncorrectable_parity>
				<sram_uncorrectable_secded>0</sram_uncorrectable_secded>
				<dram_correctable>12</dram_correctable>
				<dram_uncorrectable>{values["dram"]}</dram_uncorrectable>
			</volatile>
			<aggregate><dram_uncorrectable>7</dram_uncorrectable></aggregate>
		</ecc_errors>
		<retired_pages><pending_retirement>N/A</pending_retirement></retired_pages>
		<remapped_rows>
			<remapped_row_pending>{values["pending"]}</remapped_row_pending>
			<remapped_row_failure>{values["failure"]}</remapped_row_failure>
		</remapped_rows>
		<temperature><gpu_temp>{values["celsius"]}</gpu_temp><gpu_temp_tlimit>{values["margin"]}</gpu_temp_tlimit></temperature>
		<gpu_power_readings>
			<current_power_limit>{values["watts"]}</current_power_limit>
			<default_power_limit>{values["usual_watts"]}</default_power_limit>
		</gpu_power_readings>
		<fabric><state>{values["fabric"]}</state><status>Success</status></fabric>
		<processes>{values["processes"]}</processes>
	</gpu>"""


def log_xml(*gpu: str, driver: str = "580.95.05", cuda: str = "13.0") -> str:
    return (
        '<?xml version="1.0" ?>\n<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">\n<nvidia_smi_log>'
        f"<driver_version>{driver}</driver_version><cuda_version>{cuda}</cuda_version>"
        f"<attached_gpus>{len(gpu)}</attached_gpus>{''.join(gpu)}</nvidia_smi_log>"
    )


TOPOLOGY = (
    "\t\x1b[4mGPU0\tGPU1\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m\n"
    "GPU0\t X \tNV18\tPIX\t0-47\t0\t\tN/A\n"
    "GPU1\tNV18\t X \tSYS\t48-95\t1\t\tN/A\n"
    "NIC0\tPIX\tSYS\t X \t\t\t\t\n\nLegend:\n\n  X    = Self\n  NV#  = NVLinks\n"
)
PEERS = " \tGPU0\tGPU1\t\n GPU0\tX\tOK\t\n GPU1\tOK\tX\t\n\nLegend:\n\n  X    = Self\n  OK   = Status Ok\n"


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts an nvidia-smi on PATH that prints what it is given; `status` other than 0: it fails with what it prints."""

    def planted(state: str, topology: str = TOPOLOGY, peers: str = PEERS, status: int = 0) -> None:
        for name, text in (("state", state), ("topology", topology), ("peers", peers)):
            (tmp_path / name).write_text(text)
        tool = tmp_path / "nvidia-smi"
        tool.write_text(
            f"#!{sys.executable} -S\nimport sys\n"
            'wanted = {("-q", "-x"): "state", ("topo", "-m"): "topology", ("topo", "-p2p", "r"): "peers"}\n'
            f'print(open("{tmp_path}/" + wanted[tuple(sys.argv[1:])]).read(), end="")\nsys.exit({status})\n'
        )
        tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    return planted


def facts(*gpu: str, declared: int | None = None, torch_cuda: str | None = "13.0", **more: Any) -> dict[str, Any]:
    """Of a node with these GPUs, as `look` gives them."""
    said = {name: more.pop(name) for name in ("driver", "cuda") if name in more}
    versions, found = smi.states(log_xml(*gpu, **said))
    node = {"declared": len(found) if declared is None else declared, "group": "", "torch_cuda": torch_cuda}
    node |= {"failed": "", "installed": True, **versions, "gpus": found}
    pair = len(found) == 2
    return node | {"links": smi.matrix(TOPOLOGY) if pair else [], "peers": smi.matrix(PEERS) if pair else []} | more


def one(findings: list[Finding], name: str) -> Finding:
    (found,) = [finding for finding in findings if finding.name == name]
    return found


# ---------------------------------------------------------------------------------------------------------------- look


def test_looks_at_gpus(plant: Callable[..., None]) -> None:
    plant(log_xml(gpu_xml(0), gpu_xml(1, used="41210 MiB", processes=_process(4711, "python", "41200 MiB"))))
    found = gpus.look()
    assert (found["driver"], found["cuda"], found["failed"], found["declared"]) == ("580.95.05", "13.0", "", None)
    first, second = found["gpus"]
    assert first["name"] == "NVIDIA H100 80GB HBM3"
    assert first["total"] == 81559 << 20
    assert (first["celsius"], first["margin"], first["watts"], first["width"]) == (34, 51, 700, 16)
    assert (first["uncorrected"], first["slowed"], first["remap_pending"], first["recovery"]) == (0, [], False, "")
    assert (first["ecc"], first["persistence"], first["mig"], first["processes"]) == (True, True, False, [])
    assert second["processes"] == [{"pid": 4711, "name": "python", "bytes": 41200 << 20}]
    assert found["links"] == [["X", "NV18"], ["NV18", "X"]]
    assert found["peers"] == [["X", "OK"], ["OK", "X"]]


def _process(pid: int, name: str, used: str) -> str:
    return (
        f"<process_info><pid>{pid}</pid><process_name>{name}</process_name>"
        f"<used_memory>{used}</used_memory></process_info>"
    )


def test_a_machine_without_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = gpus.look()
    assert (found["installed"], found["gpus"]) == (False, [])
    assert [(finding.name, finding.severity) for finding in gpus.check({"here": found})] == [
        ("gpus.count", Severity.NOTE)
    ]


def test_a_driver_that_does_not_answer(plant: Callable[..., None]) -> None:
    plant("Failed to initialize NVML: Driver/library version mismatch\n", status=18)
    found = gpus.look()
    assert "Driver/library version mismatch" in found["failed"]
    said = one(gpus.check({"n1": found | {"declared": 8}}), "gpus.state")
    assert (said.severity, said.where) == (Severity.ERROR, "n1")
    assert "version mismatch" in said.what
    assert one(gpus.check({"n1": found | {"declared": 0}}), "gpus.state").severity == Severity.WARNING


def test_an_answer_that_is_cut_off(plant: Callable[..., None]) -> None:
    plant(log_xml(gpu_xml())[:900])
    assert "cannot be read" in gpus.look()["failed"]


def test_an_old_drivers_words() -> None:
    text = log_xml(
        "<gpu><product_name>Tesla V100</product_name>"
        "<clocks_throttle_reasons><clocks_throttle_reason_sw_thermal_slowdown>Active"
        "</clocks_throttle_reason_sw_thermal_slowdown></clocks_throttle_reasons>"
        "<ecc_errors><volatile><double_bit><total>2</total></double_bit></volatile></ecc_errors>"
        "<retired_pages><pending_retirement>Yes</pending_retirement></retired_pages>"
        "<temperature><gpu_temp>80 C</gpu_temp><gpu_temp_slow_threshold>87 C</gpu_temp_slow_threshold></temperature>"
        "<power_readings><power_limit>250.00 W</power_limit><default_power_limit>300.00 W</default_power_limit>"
        "</power_readings></gpu>"
    )
    (gpu,) = smi.states(text)[1]
    assert (gpu["slowed"], gpu["uncorrected"], gpu["remap_pending"]) == (["sw_thermal_slowdown"], 2, True)
    assert (gpu["margin"], gpu["watts"], gpu["usual_watts"], gpu["total"]) == (7, 250, 300, None)
    assert gpu["ecc"] is gpu["mig"] is None


def test_a_matrix_of_something_else() -> None:
    assert smi.matrix("No devices were found") == []
    assert smi.matrix("\tGPU0\tGPU1\nGPU0\t X \tNV4\n") == []  # a row lacks
    assert smi.matrix("\tGPU0\tCPU Affinity\nGPU0\t X \t0-3\n") == [["X"]]


def test_torchs_cuda_is_read_without_importing_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise RuntimeError('imported')")
    version = tmp_path / "torch/version.py"
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    version.write_text("from typing import Optional\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n")
    assert gpus._torch_cuda() == "13.0"
    version.write_text("from typing import Optional\ncuda: Optional[str] = None\nhip: Optional[str] = '6.4'\n")
    assert gpus._torch_cuda() == ""


# --------------------------------------------------------------------------------------------------------------- check


def test_healthy_nodes_have_nothing_to_say() -> None:
    found = gpus.check({name: facts(gpu_xml(0), gpu_xml(1, capped="Active", used="600 MiB")) for name in ("n1", "n2")})
    assert [(finding.name, finding.severity) for finding in found] == [("gpus.healthy", Severity.OK)]
    assert "4 × NVIDIA H100" in found[0].what


@pytest.mark.parametrize(
    ("changes", "name", "severity", "says"),
    [
        ({"dram": "1"}, "gpus.errors", Severity.ERROR, "1 uncorrectable"),
        ({"sram": "2"}, "gpus.errors", Severity.ERROR, "2 uncorrectable"),
        ({"failure": "Yes"}, "gpus.errors", Severity.ERROR, "could not be replaced"),
        ({"pending": "Yes"}, "gpus.errors", Severity.WARNING, "next reset"),
        ({"ecc": "Disabled"}, "gpus.errors", Severity.NOTE, "ECC is off"),
        ({"recovery": "Drain and Reset"}, "gpus.state", Severity.ERROR, "drain and reset"),
        ({"fabric": "In Progress"}, "gpus.state", Severity.ERROR, "NVLink switches"),
        ({"used": "60000 MiB"}, "gpus.memory", Severity.WARNING, "58.6 of 79.6 GiB"),
        ({"hot": "Active", "slowdown": "Active"}, "gpus.heat", Severity.WARNING, "too hot (34 °C)"),
        ({"driver_hot": "Active"}, "gpus.heat", Severity.WARNING, "clocks are held down"),
        ({"brake": "Active", "slowdown": "Active"}, "gpus.heat", Severity.WARNING, "power supply"),
        ({"slowdown": "Active"}, "gpus.heat", Severity.WARNING, "slows itself down"),
        ({"margin": "3 C", "celsius": "82 C"}, "gpus.heat", Severity.WARNING, "3 degrees from slowing down (82 °C)"),
        ({"watts": "400.00 W"}, "gpus.power", Severity.WARNING, "400 W of the usual 700"),
        ({"lanes": "8x"}, "gpus.pcie", Severity.WARNING, "8 of its 16"),
        ({"mig": "Enabled"}, "gpus.mig", Severity.WARNING, "MIG"),
    ],
)
def test_a_fault_of_one_gpu(changes: dict[str, str], name: str, severity: Severity, says: str) -> None:
    found = gpus.check({"n1": facts(gpu_xml(0), gpu_xml(1)), "n2": facts(gpu_xml(0), gpu_xml(1, **changes))})
    said = one(found, name)
    assert (said.severity, said.where) == (severity, "n2 GPU 1")
    assert says in said.what
    assert worst(found) == severity


def test_who_holds_the_memory() -> None:
    held = gpu_xml(used="41210 MiB", processes=_process(4711, "/usr/bin/python3", "41200 MiB"))
    said = one(gpus.check({"n1": facts(held)}), "gpus.memory")
    assert "/usr/bin/python3 (4711)" in said.what
    assert "kill 4711" in said.ways_out[0]


def test_more_gpus_counted_than_there_are() -> None:
    said = one(gpus.check({"n1": facts(gpu_xml(), declared=8)}), "gpus.count")
    assert said.severity == Severity.ERROR
    assert "counts 8 GPUs and 1 are there" in said.what
    said = one(gpus.check({"n1": facts(gpu_xml(0), gpu_xml(1), declared=1)}), "gpus.count")
    assert said.severity == Severity.NOTE


@pytest.mark.parametrize(
    ("torch_cuda", "cuda", "severity"),
    [
        ("13.0", "12.8", Severity.ERROR),
        ("13.2", "13.0", Severity.NOTE),
        ("12.8", "13.0", None),
        ("13.0", "13.0", None),
        ("", "13.0", Severity.ERROR),
        (None, "13.0", None),
    ],
)
def test_torch_and_the_driver(torch_cuda: str | None, cuda: str, severity: Severity | None) -> None:
    found = gpus.check({"n1": facts(gpu_xml(), torch_cuda=torch_cuda, cuda=cuda)})
    assert [finding.severity for finding in found if finding.name == "gpus.torch"] == ([severity] if severity else [])


def test_gpus_that_differ() -> None:
    h100, a100 = gpu_xml(), gpu_xml(name="NVIDIA A100-SXM4-80GB", total="81920 MiB")
    said = one(gpus.check({"n1": facts(h100), "n2": facts(h100), "n3": facts(a100)}), "gpus.alike")
    assert (said.severity, said.where) == (Severity.WARNING, "n3")
    assert "A100" in said.what
    assert "H100" in said.what
    said = one(gpus.check({"n1": facts(h100, a100)}), "gpus.alike")
    assert (said.where, said.severity) == ("n1", Severity.WARNING)
    # Two groups may differ from one another.
    groups = {"n1": facts(h100, group="train"), "n2": facts(a100, group="serve")}
    assert worst(gpus.check(groups)) == Severity.OK


def test_memory_that_differs_by_what_the_driver_keeps_is_alike() -> None:
    assert worst(gpus.check({"n1": facts(gpu_xml()), "n2": facts(gpu_xml(total="81500 MiB"))})) == Severity.OK


def test_another_driver_on_one_node() -> None:
    usual = facts(gpu_xml())
    said = one(gpus.check({"n1": usual, "n2": usual, "n3": facts(gpu_xml(), driver="575.57.08")}), "gpus.driver")
    assert (said.where, said.severity) == ("n3", Severity.WARNING)
    assert "575.57.08" in said.what


def test_a_lost_nvlink() -> None:
    well, ill = (facts(gpu_xml(0), gpu_xml(1)) for _ in range(2))
    ill["links"] = [["X", "SYS"], ["SYS", "X"]]
    said = one(gpus.check({"n1": well, "n2": well, "n3": ill}), "gpus.links")
    assert (said.where, said.severity) == ("n3", Severity.WARNING)
    assert "SYS" in said.what


def test_no_peer_access() -> None:
    node = facts(gpu_xml(0), gpu_xml(1), peers=[["X", "GNS"], ["GNS", "X"]])
    said = one(gpus.check({"n1": node}), "gpus.peers")
    assert (said.severity, said.where) == (Severity.WARNING, "n1")  # in spite of NVLink
    said = one(gpus.check({"n1": node | {"links": [["X", "PHB"], ["PHB", "X"]]}}), "gpus.peers")
    assert said.severity == Severity.NOTE
    assert "0-1: the GPU cannot" in said.what
