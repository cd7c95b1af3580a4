"""What the doctor makes of the network: planted facts and NCCL logs, and a real measurement between two processes."""

from __future__ import annotations

import copy
import resource
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from distributed import run

from ray_ft import hosts
from ray_ft.doctor import collective, fabric, nccl_log, network, rdma
from ray_ft.doctor.finding import Finding, Severity, worst

GB = 1e9


def one(findings: list[Finding], name: str) -> Finding:
    (found,) = [finding for finding in findings if finding.name == name]
    return found


# -------------------------------------------------------------------------------------------------------------- hosts


def test_the_interface_of_an_address() -> None:
    loopback = hosts.interface_of("127.0.0.1")
    assert loopback in {name for _, name in socket.if_nameindex()}
    assert hosts.interface_of("203.0.113.9") == ""  # nobody's


@pytest.mark.parametrize(
    ("setting", "takes"),
    [
        ("eth", ["eth0", "eth1"]),
        ("=eth", []),
        ("=eth0", ["eth0"]),
        ("eth0,ib", ["eth0", "ib0"]),
        ("^lo,docker", ["eth0", "eth1", "ib0"]),
        ("^=eth0", ["eth1", "ib0", "lo", "docker0"]),
    ],
)
def test_what_nccl_takes(setting: str, takes: list[str]) -> None:
    assert hosts.nccl_takes(setting, ["eth0", "eth1", "ib0", "lo", "docker0"]) == takes


# ------------------------------------------------------------------------------------------------------------ nccl_log

HEAD = "w1:912:912 [0] NCCL INFO Bootstrap: Using eth0:10.0.0.4<0>\n"
HEAD += "w1:912:912 [0] NCCL INFO NCCL version 2.28.9+cuda13.0\n"
IB = (
    HEAD + "w1:912:980 [0] NCCL INFO NET/IB : Using [0]mlx5_0:1/IB [1]mlx5_1:1/IB [RO]; OOB eth0:10.0.0.4<0>\n"
    "w1:912:980 [0] NCCL INFO Initialized NET plugin IB\nw1:912:980 [0] NCCL INFO Using network IB\n"
    "w1:912:991 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[0] [send] via NET/IB/0/GDRDMA\n"
    "w1:912:991 [0] NCCL INFO Channel 01/0 : 1[0] -> 0[0] [receive] via NET/IB/1/GDRDMA\n"
    "w1:912:991 [0] NCCL INFO Channel 02/0 : 0[0] -> 2[1] via P2P/CUMEM\n"
)
EFA = (
    HEAD + "w1:912:980 [0] NCCL INFO NET/OFI Selected provider is efa, fabric is efa (found 32 nics)\n"
    "w1:912:980 [0] NCCL INFO Using network AWS Libfabric\n"
    "w1:912:991 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[0] [send] via NET/AWS Libfabric/0/GDRDMA\n"
)
SOCKETS = (
    HEAD + "w1:912:980 [0] NCCL INFO NET/Plugin: Could not find: libnccl-net.so\n"
    "w1:912:980 [0] misc/ibvwrap.cc:94 NCCL WARN Call to ibv_open_device failed\n"
    "w1:912:980 [0] NCCL INFO NET/IB : No device found.\n"
    "w1:912:980 [0] NCCL INFO NET/Socket : Using [0]eth0:10.0.0.4<0>\nw1:912:980 [0] NCCL INFO Using network Socket\n"
    "w1:912:991 [0] NCCL INFO Channel 00 : 0[0] -> 1[0] [send] via NET/Socket/0\n"
)


@pytest.mark.parametrize(
    ("text", "networks", "channels", "direct"),
    [
        (IB, ["NET/IB"], {"NET/IB": 2, "P2P": 1}, 2),
        (EFA, ["NET/OFI"], {"NET/OFI": 1}, 1),
        (SOCKETS, ["NET/Socket"], {"NET/Socket": 1}, 0),
        (IB.replace("/GDRDMA", ""), ["NET/IB"], {"NET/IB": 2, "P2P": 1}, 0),
        (IB.replace("NET/IB/", "NET/IBext_v8/"), ["NET/IB"], {"NET/IB": 2, "P2P": 1}, 2),
        (HEAD + "a:1:2 [0] NCCL INFO Using network FasTrak\n", ["NET/FasTrak"], {}, 0),
        (HEAD + "a:1:2 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via SHM/direct/direct\n", [], {"SHM": 1}, 0),
        (HEAD + "a:1:2 [0] NCCL INFO Using network Sandpiper\n", ["NET/Sandpiper"], {}, 0),
        ("", [], {}, 0),
    ],
)
def test_reads_nccls_log(text: str, networks: list[str], channels: dict[str, int], direct: int) -> None:
    found = nccl_log.read(text)
    assert (found["networks"], found["channels"], found["direct"]) == (networks, channels, direct)
    assert found["version"] == ("2.28.9" if text else "")


def test_nccls_cards_and_warnings() -> None:
    assert nccl_log.read(IB)["cards"].startswith("NET/IB: [0]mlx5_0:1/IB [1]mlx5_1:1/IB")
    assert nccl_log.read(SOCKETS * 2)["warnings"] == ["Call to ibv_open_device failed"]


# ---------------------------------------------------------------------------------------------------------------- rdma


def machine(
    root: Path, *ports: tuple[str, str, str, str], verbs: bool = True, cards: tuple[tuple[str, str], ...] = ()
) -> Path:
    """A machine's /sys and /dev: ports of (device, link layer, state, rate), cards of (vendor, device)."""
    for device, layer, state, rate in ports:
        folder = root / "sys/class/infiniband" / device / "ports/1"
        folder.mkdir(parents=True)
        for name, text in (("link_layer", layer), ("state", state), ("rate", rate)):
            (folder / name).write_text(f"{text}\n")
    if verbs:
        (root / "dev/infiniband").mkdir(parents=True)
        (root / "dev/infiniband/uverbs0").touch()
    for place, (vendor, device) in enumerate(cards):
        folder = root / f"sys/bus/pci/devices/0000:{place:02x}:00.0"
        folder.mkdir(parents=True)
        for name, text in (("class", "0x020000"), ("vendor", vendor), ("device", device)):
            (folder / name).write_text(f"{text}\n")
    return root


NDR = ("mlx5_0", "InfiniBand", "4: ACTIVE", "400 Gb/sec (4X NDR)")


def test_looks_at_the_machines_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in rdma.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NCCL_IB_DISABLE", "1")
    down = ("mlx5_1", "Ethernet", "1: DOWN", "40 Gb/sec (4X QDR)")
    efa = ("rdmap0s6", "Unspecified", "4: ACTIVE", "100 Gb/sec (4X EDR)")
    found = rdma.look(machine(tmp_path, NDR, down, efa, cards=(("0x15b3", "0x1021"), ("0x1d0f", "0xefa2"))))
    assert found["devices"] == [
        {"name": "mlx5_0:1", "kind": "InfiniBand", "gbps": 400.0, "active": True},
        {"name": "mlx5_1:1", "kind": "RoCE", "gbps": 40.0, "active": False},
        {"name": "rdmap0s6:1", "kind": "EFA", "gbps": 100.0, "active": True},
    ]
    assert found["verbs"] is True
    assert found["cards"] == {"EFA": 1, "Mellanox": 1}
    assert found["environment"] == {"NCCL_IB_DISABLE": "1"}
    assert set(found["libraries"]) == {"libibverbs.so.1", "libnccl-net.so"}
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    assert found["lockable"] == (None if limit == resource.RLIM_INFINITY else limit)
    assert rdma.fabric_of(found) == "1 × EFA 100 Gb/s, 1 × InfiniBand 400 Gb/s"


def test_a_machine_without_such_cards(tmp_path: Path) -> None:
    found = rdma.look(tmp_path)
    assert (found["devices"], found["verbs"], found["cards"], found["libraries"]) == ([], False, {}, {})
    assert rdma.fabric_of(found) == ""


def test_a_library_is_really_loaded() -> None:
    assert rdma._loads("libc.so.6")
    assert not rdma._loads("libsurely-not-there.so.1")


def port(kind: str = "InfiniBand", gbps: float = 400.0, active: bool = True) -> dict[str, Any]:
    return {"name": "mlx5_0:1", "kind": kind, "gbps": gbps, "active": active}


def cards(*devices: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Facts of a node on which such devices work."""
    efa = any(device["kind"] == "EFA" for device in devices)
    libraries = {"libibverbs.so.1": True, **({"libnccl-net.so": True} if efa else {})} if devices else {}
    facts = {"devices": list(devices), "verbs": bool(devices), "cards": {}, "google": 0, "lockable": None}
    return facts | {"libraries": libraries, "environment": {}} | changes


def test_cards_that_work() -> None:
    found = rdma.check({"n1": cards(port(), port()), "n2": cards(port(), port())})
    assert [(finding.name, finding.severity) for finding in found] == [("fabric.devices", Severity.OK)]
    assert "2 × InfiniBand 400 Gb/s" in found[0].what
    found = rdma.check({"n1": cards(), "n2": cards()})
    assert [(finding.name, finding.severity) for finding in found] == [("fabric.devices", Severity.NOTE)]


@pytest.mark.parametrize(
    ("facts", "name", "severity", "says"),
    [
        (cards(port(), verbs=False), "fabric.access", Severity.ERROR, "/dev/infiniband"),
        (cards(port(), libraries={"libibverbs.so.1": False}), "fabric.library", Severity.ERROR, "libibverbs"),
        (
            cards(port("EFA"), libraries={"libibverbs.so.1": True, "libnccl-net.so": False}),
            "fabric.library",
            Severity.ERROR,
            "aws-ofi-nccl",
        ),
        (cards(port(), lockable=8 << 20), "fabric.memlock", Severity.WARNING, "8,192 KiB"),
        (cards(port(), environment={"NCCL_IB_DISABLE": "1"}), "fabric.disabled", Severity.ERROR, "NCCL_IB_DISABLE=1"),
        (cards(port("EFA"), environment={"NCCL_NET": "Socket"}), "fabric.disabled", Severity.ERROR, "NCCL_NET"),
        (cards(port(), environment={"NCCL_P2P_DISABLE": "1"}), "fabric.disabled", Severity.WARNING, "P2P"),
        (cards(cards={"EFA": 4, "Mellanox": 0}), "fabric.driver", Severity.WARNING, "4 of EFA"),
        (cards(cards={"EFA": 0, "Mellanox": 1}), "fabric.driver", Severity.NOTE, "1 of Mellanox"),
    ],
)
def test_cards_that_cannot_be_used(facts: dict[str, Any], name: str, severity: Severity, says: str) -> None:
    said = one(rdma.check({"n1": facts, "n2": copy.deepcopy(facts) | {"environment": {}, "verbs": True}})[:1], name)
    assert (said.severity, said.where) == (severity, "n1")
    assert says in said.what


def test_efa_does_not_mind_nccl_ib_disable() -> None:
    found = rdma.check({name: cards(port("EFA"), environment={"NCCL_IB_DISABLE": "1"}) for name in ("n1", "n2")})
    assert worst(found) == Severity.OK


def test_cards_that_differ() -> None:
    found = rdma.check({"n1": cards(port(), port()), "n2": cards(port(), port(active=False))})
    assert "2 × InfiniBand" in one(found, "fabric.alike").what


# ------------------------------------------------------------------------------------------------------------- network


def node(number: int, of: int = 3, **changes: Any) -> dict[str, Any]:
    """A healthy node 10.0.0.<number> of so many."""
    everybody = {f"10.0.0.{other}": f"w{other}" for other in range(1, of + 1)}
    address = f"10.0.0.{number}"
    real = {"mtu": 1500, "up": True, "mbps": 10_000, "virtual": False}
    interfaces = {
        "lo": {"addresses": ["127.0.0.1", "::1"], "mtu": 65536, "up": True, "mbps": 0, "virtual": True},
        "eth0": {"addresses": [address, "fe80::1%eth0"], **real},
    }
    facts: dict[str, Any] = {"id": f"id{number}", "address": address, "host_name": f"w{number}", "gpus": 0}
    facts |= {"interfaces": interfaces, "chosen": "eth0", "environment": {}, "own": [address], "rdma": cards()}
    facts["peers"] = {
        one: {"name": name, "leads_to": [one], "refused": ""} for one, name in everybody.items() if one != address
    }
    return facts | changes


def cluster(of: int = 3) -> dict[str, dict[str, Any]]:
    return {f"10.0.0.{number}": node(number, of) for number in range(1, of + 1)}


def test_looks_at_this_machine() -> None:
    found = network.look()
    assert (found["address"], found["peers"], found["id"]) == ("127.0.0.1", {}, "")
    assert found["host_name"] == socket.gethostname()
    assert found["chosen"] in found["interfaces"]
    assert "127.0.0.1" in found["interfaces"][found["chosen"]]["addresses"]
    assert found["interfaces"][found["chosen"]]["virtual"] is True
    assert network._leads_to("localhost") in (["127.0.0.1"], ["127.0.0.1", "::1"], ["::1"])
    assert str(network._leads_to("no-such-host.invalid")).startswith("!")


def test_a_port_that_refuses() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        assert network._refused(listening.getsockname()) == ""
    with socket.socket() as silent:  # its port is nobody else's meanwhile
        silent.bind(("127.0.0.1", 0))
        assert "refused" in network._refused(silent.getsockname()).lower()


def test_what_is_asked_late_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    never = threading.Event()
    monkeypatch.setattr(network, "SECONDS", 2.0)
    asked = {"quick": 0.0, "slow": 60.0}
    assert network._each(set(asked), lambda name: not never.wait(asked[name]), "late") == {
        "quick": True,
        "slow": "late",
    }
    never.set()


def test_a_healthy_network() -> None:
    found = network.check(cluster())
    assert {finding.name: finding.severity for finding in found} == {
        "network.reach": Severity.OK,
        "network.interface": Severity.OK,
        "network.names": Severity.OK,
    }
    assert "eth0" in one(found, "network.interface").what
    assert worst(network.check({"here": node(1, 1)})) == Severity.OK


def test_a_node_that_is_not_reached() -> None:
    nodes = cluster()
    nodes["10.0.0.1"]["peers"]["10.0.0.3"]["refused"] = "timed out"
    said = one(network.check(nodes), "network.reach")
    assert (said.severity, said.where) == (Severity.ERROR, "10.0.0.1")
    assert "10.0.0.3: timed out" in said.what


@pytest.mark.parametrize(
    ("changes", "severity", "says"),
    [
        ({"address": "127.0.0.1", "chosen": "lo"}, Severity.ERROR, "loopback"),
        ({"address": "169.254.9.2"}, Severity.ERROR, "link-local"),
        ({"address": "fd00::2"}, Severity.ERROR, "IPv6"),
        ({"chosen": ""}, Severity.WARNING, "no interface here has the address"),
        ({"address": "worker-2"}, Severity.WARNING, "no address"),
    ],
)
def test_addresses_that_do_not_do(changes: dict[str, Any], severity: Severity, says: str) -> None:
    nodes = cluster()
    nodes["10.0.0.2"] |= changes
    said = one(network.check(nodes), "network.address")
    assert (said.severity, said.where) == (severity, "10.0.0.2")
    assert says in said.what


@pytest.mark.parametrize(
    ("environment", "severity", "says"),
    [
        ({"GLOO_SOCKET_IFNAME": "eth9"}, Severity.ERROR, "no such interface"),
        ({"NCCL_SOCKET_IFNAME": "=ens"}, Severity.ERROR, "no such interface"),
        ({"NCCL_SOCKET_IFNAME": "lo"}, Severity.ERROR, "loopback"),
        ({"NCCL_SOCKET_IFNAME": "^lo"}, Severity.NOTE, "takes eth0"),
    ],
)
def test_an_interface_by_hand(environment: dict[str, str], severity: Severity, says: str) -> None:
    nodes = cluster()
    nodes["10.0.0.2"]["environment"] = environment
    (said,) = [one for one in network.check(nodes) if one.name == "network.interface" and one.severity]
    assert (said.severity, said.where) == (severity, "10.0.0.2")
    assert says in said.what


def test_interfaces_with_other_names_are_worth_a_note() -> None:
    nodes = cluster()
    nodes["10.0.0.3"]["interfaces"]["ens5"] = nodes["10.0.0.3"]["interfaces"].pop("eth0")
    nodes["10.0.0.3"]["chosen"] = "ens5"
    said = [one for one in network.check(nodes) if one.name == "network.interface"]
    assert {(one.severity, one.where) for one in said} == {
        (Severity.NOTE, "10.0.0.1, 10.0.0.2"),
        (Severity.NOTE, "10.0.0.3"),
    }


def test_names_that_lead_elsewhere() -> None:
    nodes = cluster()
    nodes["10.0.0.2"]["own"] = ["127.0.1.1"]  # as Debian has it
    assert one(network.check(nodes), "network.names").severity == Severity.NOTE
    nodes = cluster()
    nodes["10.0.0.2"]["own"] = ["10.9.9.9"]
    said = one(network.check(nodes), "network.names")
    assert (said.severity, said.where) == (Severity.WARNING, "10.0.0.2")
    nodes = cluster()
    nodes["10.0.0.2"]["own"] = "!Name or service not known"
    said = one(network.check(nodes), "network.names")
    assert (said.severity, said.where) == (Severity.WARNING, "10.0.0.2")
    assert "w2, does not resolve" in said.what
    nodes = cluster()
    nodes["10.0.0.1"]["peers"]["10.0.0.3"]["leads_to"] = ["10.0.0.77"]
    said = one(network.check(nodes), "network.names")
    assert (said.severity, said.where) == (Severity.WARNING, "10.0.0.1")
    assert "w3 leads to 10.0.0.77" in said.what
    nodes = cluster()
    nodes["10.0.0.1"]["peers"]["10.0.0.3"]["leads_to"] = "!Name or service not known"
    said = one(network.check(nodes), "network.names")
    assert (said.severity, said.where) == (Severity.WARNING, "10.0.0.1")


def test_pods_names_lead_nowhere() -> None:
    nodes = cluster()
    for facts in nodes.values():
        for peer in facts["peers"].values():
            peer["leads_to"] = "!Name or service not known"
    said = one(network.check(nodes), "network.names")
    assert said.severity == Severity.NOTE


def test_another_mtu_on_one_node() -> None:
    nodes = cluster()
    nodes["10.0.0.3"]["interfaces"]["eth0"]["mtu"] = 9001
    said = one(network.check(nodes), "network.mtu")
    assert (said.severity, said.where) == (Severity.WARNING, "10.0.0.3")
    assert "eth0 9001 bytes there and 1500 elsewhere" in said.what


def test_a_faster_card_stands_idle() -> None:
    nodes = cluster()
    fast = {"addresses": ["192.168.5.2"], "mtu": 9000, "up": True, "mbps": 100_000, "virtual": False}
    nodes["10.0.0.2"]["interfaces"]["ens1"] = fast
    said = one(network.check(nodes), "network.faster")
    assert (said.severity, said.where) == (Severity.WARNING, "10.0.0.2")
    assert "--node-ip-address=192.168.5.2" in said.ways_out[0]
    for change in ({"virtual": True}, {"up": False}, {"addresses": []}, {"mbps": 25_000}):
        nodes["10.0.0.2"]["interfaces"]["ens1"] = fast | change
        assert worst(network.check(nodes)) == Severity.OK


def test_cards_are_looked_at_where_several_nodes_have_gpus() -> None:
    nodes = cluster()
    for name in ("10.0.0.2", "10.0.0.3"):
        nodes[name] |= {"gpus": 8, "rdma": cards(port(), verbs=False)}
    found = [finding for finding in network.check(nodes) if finding.name == "fabric.access"]
    assert [finding.where for finding in found] == ["10.0.0.2", "10.0.0.3"]
    nodes["10.0.0.3"]["gpus"] = 0
    assert not [finding for finding in network.check(nodes) if finding.name.startswith("fabric")]


# -------------------------------------------------------------------------------------------------- collective, fabric


def _both(rank: int, world: int) -> dict[str, Any]:
    began = time.monotonic()
    reduced = collective.all_reduce((64 << 10, 1 << 20))
    took = time.monotonic() - began
    alone = collective.all_reduce((64 << 10,), [0])
    began = time.monotonic()
    exchanged = collective.exchange(fabric.rounds(range(world)), 1 << 20)
    exchanging = time.monotonic() - began
    return {"reduced": reduced, "alone": alone, "exchanged": exchanged, "took": took, "exchanging": exchanging}


def test_measures_between_two_processes() -> None:
    first, second = run(2, _both)
    assert first["reduced"] == second["reduced"]  # the slowest rank's time, on both
    assert [row["bytes"] for row in first["reduced"]] == [64 << 10, 1 << 20]
    for row in first["reduced"]:
        assert row["algbw"] == pytest.approx(row["bytes"] / row["seconds"])
        assert row["busbw"] == pytest.approx(row["algbw"])  # 2 (n - 1) / n of two ranks is 1
    assert 0 < sum(row["seconds"] for row in first["reduced"]) < max(first["took"], second["took"])
    assert [row["busbw"] for row in first["alone"]] == [0.0]
    assert second["alone"] == []
    assert set(first["exchanged"]) == set(second["exchanged"]) == {(0, 1)}
    assert first["exchanged"][0, 1] > (1 << 20) / first["exchanging"]


def _meet(rank: int, world: int, folder: str) -> float:
    import torch.distributed as dist

    dist.destroy_process_group()  # the helper's own
    port = Path(folder, "port")
    if rank == 0:
        store = collective.host("127.0.0.1", world)  # kept to the end of this function
        port.with_suffix(".partial").write_text(str(store.port))
        port.with_suffix(".partial").rename(port)
    while not port.exists():
        time.sleep(0.01)
    collective.join("127.0.0.1", int(port.read_text()), rank, world, "gloo", 60)
    return collective.all_reduce((64 << 10,))[0]["busbw"]


def test_meets_at_a_store(tmp_path: Path) -> None:
    first, second = run(2, _meet, str(tmp_path))
    assert first == second > 0


def _wrong(rank: int, world: int) -> str:
    import torch.distributed as dist

    right = dist.all_reduce

    def all_reduce(data: Any, *rest: Any, **more: Any) -> Any:
        done = right(data, *rest, **more)
        if data.numel() > 1:
            data[-1] += 1.0  # as a network does that alters what it carries
        return done

    dist.all_reduce = all_reduce
    try:
        collective.all_reduce((64 << 10,))
    except RuntimeError as error:
        return str(error)
    finally:
        dist.all_reduce = right
    return ""


def test_a_wrong_sum_is_noticed() -> None:
    assert all("gave a wrong sum" in said for said in run(2, _wrong))


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8])
def test_everybody_has_two_partners_but_one_at_a_time(count: int) -> None:
    ranks = [10 * place for place in range(count)]
    found = fabric.rounds(ranks)
    pairs = [pair for pairs in found for pair in pairs]
    for pairs_at_once in found:
        together = [rank for pair in pairs_at_once for rank in pair]
        assert len(together) == len(set(together))
    met = [rank for pair in pairs for rank in pair]
    assert {met.count(rank) for rank in ranks} == {2 if count > 2 else 1}
    assert len({frozenset(pair) for pair in pairs}) == len(pairs)


def measured(of: int = 3, speed: float = 5 * GB, log: str = "", **changes: Any) -> dict[str, Any]:
    """A measurement on healthy nodes 10.0.0.1 …, each pair at this speed."""
    addresses = [f"10.0.0.{number}" for number in range(1, of + 1)]
    pairs = [[addresses[one], addresses[two], speed] for pairs in fabric.rounds(range(of)) for one, two in pairs]
    row = {"bytes": 8 << 20, "seconds": 0.01, "algbw": speed, "busbw": speed}
    facts: dict[str, Any] = {"backend": "nccl" if log else "gloo", "skipped": {}, "nothing": "", "blocked": {}}
    facts |= {"failed": None, "nodes": [{"id": "", "address": address, "ranks": 1} for address in addresses]}
    facts |= {"all_reduce": [row], "pairs": pairs, "within": {}}
    return facts | {"logs": {address: nccl_log.read(log) for address in addresses} if log else {}} | changes


def with_gpus(*devices: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: facts | {"gpus": 8, "rdma": cards(*devices)} for name, facts in cluster().items()}


def test_a_measurement_that_is_well() -> None:
    found = fabric.check(measured(), cluster())
    assert [(finding.name, finding.severity) for finding in found] == [("fabric.bandwidth", Severity.OK)]
    assert "bus bandwidth 5.0 GB/s" in found[0].what
    found = fabric.check(measured(speed=40 * GB, log=IB, within=dict.fromkeys(cluster(), 400 * GB)), with_gpus(port()))
    assert {finding.name: finding.severity for finding in found} == {
        "fabric.transport": Severity.OK,
        "fabric.bandwidth": Severity.OK,
    }
    assert "NET/IB" in one(found, "fabric.transport").what
    assert "within a node 400.0 GB/s" in one(found, "fabric.bandwidth").what
    assert worst(fabric.check(measured(speed=10 * GB, log=EFA), with_gpus(port("EFA", 100.0)))) == Severity.OK


@pytest.mark.parametrize("kind", ["InfiniBand", "RoCE", "EFA"])
def test_sockets_where_there_is_a_fabric(kind: str) -> None:
    said = one(fabric.check(measured(log=SOCKETS), with_gpus(port(kind))), "fabric.transport")
    assert said.severity == Severity.ERROR
    assert said.where == "10.0.0.1, 10.0.0.2, 10.0.0.3"
    assert kind in said.what
    assert "ibv_open_device failed" in said.what


def test_sockets_where_there_are_cards_without_a_driver_or_googles() -> None:
    for changes in ({"cards": {"EFA": 4, "Mellanox": 0}}, {"google": 5}):
        nodes = {name: facts | {"rdma": cards(**changes)} for name, facts in with_gpus().items()}
        assert one(fabric.check(measured(log=SOCKETS), nodes), "fabric.transport").severity == Severity.ERROR


def test_sockets_where_there_is_nothing_else() -> None:
    assert one(fabric.check(measured(log=SOCKETS), with_gpus()), "fabric.transport").severity == Severity.NOTE


def test_one_node_alone_on_sockets() -> None:
    facts = measured(speed=40 * GB, log=IB)
    facts["logs"]["10.0.0.2"] = nccl_log.read(SOCKETS)
    (said,) = [finding for finding in fabric.check(facts, with_gpus(port())) if finding.severity == Severity.ERROR]
    assert (said.name, said.where) == ("fabric.transport", "10.0.0.2")


def test_rdma_by_way_of_the_hosts_memory() -> None:
    found = fabric.check(measured(speed=40 * GB, log=IB.replace("/GDRDMA", "")), with_gpus(port()))
    assert one(found, "fabric.gpudirect").severity == Severity.WARNING


def test_gpus_joined_through_the_hosts_memory() -> None:
    found = fabric.check(measured(speed=40 * GB, log=IB.replace("P2P/CUMEM", "SHM/direct/direct")), with_gpus(port()))
    assert one(found, "fabric.peers").severity == Severity.WARNING


def test_a_slow_node() -> None:
    facts = measured(of=4)
    for pair in facts["pairs"]:
        if "10.0.0.3" in pair:
            pair[2] = 0.5 * GB
    said = one(fabric.check(facts, cluster(4)), "fabric.node")
    assert (said.severity, said.where) == (Severity.WARNING, "10.0.0.3")
    assert "500.0 MB/s" in said.what


def test_a_node_whose_gpus_are_slow_among_themselves() -> None:
    within = {"10.0.0.1": 400 * GB, "10.0.0.2": 400 * GB, "10.0.0.3": 40 * GB}
    said = one(fabric.check(measured(speed=40 * GB, log=IB, within=within), with_gpus(port())), "fabric.node")
    assert said.where == "10.0.0.3"


@pytest.mark.parametrize(
    ("speed", "log", "devices", "says"),
    [
        (0.2 * GB, "", (), "less than a quarter of what eth0 can, 10 Gb/s"),
        (20 * GB, IB, (port(),), "less than half of one port's 400 Gb/s"),
    ],
)
def test_far_below_what_the_link_can(speed: float, log: str, devices: tuple[dict[str, Any], ...], says: str) -> None:
    said = one(fabric.check(measured(speed=speed, log=log), with_gpus(*devices)), "fabric.bandwidth")
    assert said.severity == Severity.WARNING
    assert says in said.what


def test_what_a_virtual_interface_says_of_its_speed_is_not_believed() -> None:
    nodes = cluster()
    for facts in nodes.values():
        facts["interfaces"]["eth0"]["virtual"] = True
    assert worst(fabric.check(measured(speed=0.2 * GB), nodes)) == Severity.OK
    assert "one gigabit" in one(fabric.check(measured(speed=0.05 * GB), nodes), "fabric.bandwidth").what


def test_a_firewall_and_a_group_that_does_not_meet() -> None:
    blocked = measured(all_reduce=[], pairs=[], blocked={"10.0.0.1": {"10.0.0.2": "timed out"}})
    said = one(fabric.check(blocked, cluster()), "fabric.reach")
    assert (said.severity, said.where) == (Severity.ERROR, "10.0.0.1")
    assert "10.0.0.2 at a free port: timed out" in said.what
    failed = {"step": "join", "why": {"10.0.0.3": "RuntimeError: connectFullMesh failed"}}
    said = one(fabric.check(measured(all_reduce=[], pairs=[], failed=failed), cluster()), "fabric.connect")
    assert (said.severity, said.where) == (Severity.ERROR, "10.0.0.3")
    assert "connectFullMesh" in said.what


def test_nothing_to_measure() -> None:
    nothing = measured(nothing="it takes two nodes", skipped={"10.0.0.2": "all its GPUs are in use"}, all_reduce=[])
    found = fabric.check(nothing, cluster())
    assert [(finding.name, finding.severity) for finding in found] == [("fabric.measured", Severity.NOTE)] * 2
