"""The cluster files: Ray takes them, they ask for machines as they are, pin what they install and open nothing."""

from __future__ import annotations

import copy
import gzip
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
FILES = sorted(CLUSTER.glob("*.yaml"))
CLOUDS = ("aws", "gcp")
#: vCPUs and GPUs of Google's machine types, from cloud.google.com/compute/docs/{gpus,general-purpose-machines}.
GOOGLE = {
    "n2-standard-8": (8, 0),
    "n2-standard-32": (32, 0),
    "a2-highgpu-8g": (96, 8),
    "a3-highgpu-8g": (208, 8),
    "a3-ultragpu-8g": (224, 8),
}


def config(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())


def types(name: str, *, workers: bool = True) -> dict[str, dict[str, Any]]:
    return {key: one for key, one in config(name)["available_node_types"].items() if not workers or key != "head"}


def machine(one: dict[str, Any]) -> str:
    node = one["node_config"]
    return node.get("InstanceType") or node["machineType"]


@pytest.fixture(scope="module")
def amazon() -> dict[str, Any]:
    """AWS's own description of its machines, as moto has it."""
    import moto

    with gzip.open(Path(moto.__file__).parent / "ec2/resources/instance_types.json.gz") as file:
        return json.load(file)


def as_ray_takes_it(content: dict[str, Any]) -> dict[str, Any]:
    """Filled with the provider's defaults and checked as `ray up` does, before it calls any cloud."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    filled = prepare_config(copy.deepcopy(content))
    validate_config(filled)
    return filled


def test_there_are_the_three_files() -> None:
    assert [file.stem for file in FILES] == ["aws", "gcp", "on_prem"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_ray_takes_the_file(file: Path) -> None:
    filled = as_ray_takes_it(config(file.stem))
    assert all(one["min_workers"] == 0 for one in filled["available_node_types"].values()) or file.stem == "on_prem"


@pytest.mark.parametrize("name", CLOUDS)
def test_ray_refuses_a_misspelt_setting_and_a_wrong_type(name: str) -> None:
    for broken in ({"idle_timeout_minute": 10}, {"max_workers": "six"}, {"upscaling_speed": -1}):
        with pytest.raises(jsonschema.ValidationError):
            as_ray_takes_it({**config(name), **broken})
    content = config(name)
    content["available_node_types"]["cpu"]["max_worker"] = 2
    with pytest.raises(jsonschema.ValidationError):
        as_ray_takes_it(content)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_nothing_of_rays_defaults_is_installed_or_opened(file: Path) -> None:
    filled = as_ray_takes_it(config(file.stem))
    commands = [line for key in filled if key.endswith("_commands") for line in filled[key]]
    assert any("start.sh head" in line for line in commands)
    for line in commands:
        assert not re.search(r"nightly|latest|wheels|conda|0\.0\.0\.0|--dashboard-host|auth_token", line), line
        for package in re.findall(r"pip install (.*)", line):
            assert all("==" in one for one in package.split() if not one.startswith("-")), line
    for who, role in (("head", "head"), ("worker", "worker")):
        stop, *_, start = filled[f"{who}_start_ray_commands"]
        assert stop == "ray stop" and f"cluster/start.sh {role}" in start


def test_ray_starts_with_a_token_and_a_dashboard_on_loopback() -> None:
    start = (CLUSTER / "start.sh").read_text()
    assert "--dashboard-host=127.0.0.1" in start and "0.0.0.0" not in start
    assert "RAY_AUTH_MODE=token" in start and "RAY_JOB_STOP_WAIT_TIME_S" in start
    for file in FILES:
        assert config(file.stem)["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token", file.stem


def test_what_all_three_share_is_the_same() -> None:
    first, *others = (config(file.stem) for file in FILES)
    for other in others:
        for key in ("cluster_name", "file_mounts", "rsync_exclude", "setup_commands"):
            assert other[key] == first[key], key


def test_what_is_mounted_is_here_and_is_all_of_the_project() -> None:
    mounts = {remote: local for remote, local in config("aws")["file_mounts"].items() if not local.startswith("~")}
    assert all((ROOT / local).exists() and remote == f"~/ray-ft/{local}" for remote, local in mounts.items())
    project = (ROOT / "pyproject.toml").read_text()
    (packages,) = re.findall(r"include = \[(.*)\]", project)
    needed = {name.strip(' "*') for name in packages.split(",")} | set(re.findall(r'"(LICENSE|README\.md)"', project))
    assert needed <= set(mounts.values())


@pytest.mark.parametrize("name", CLOUDS)
def test_the_head_has_no_gpu_and_takes_no_work(name: str) -> None:
    head = types(name, workers=False)["head"]
    assert head["resources"] == {"CPU": 0} and head["max_workers"] == 0
    assert "--num-cpus=0 --num-gpus=0" in config(name)["head_start_ray_commands"][-1]


def test_aws_types_have_what_their_machines_have(amazon: dict[str, Any]) -> None:
    for key, one in types("aws").items():
        has = amazon[machine(one)]
        gpus = sum(gpu["Count"] for gpu in has.get("GpuInfo", {}).get("Gpus", []))
        resources = {"CPU": has["VCpuInfo"]["DefaultVCpus"], **({"GPU": gpus} if gpus else {})}
        assert one["resources"] == resources, key
    assert "GpuInfo" not in amazon[machine(types("aws", workers=False)["head"])]


def test_gcp_types_have_what_their_machines_have() -> None:
    for key, one in types("gcp").items():
        cpus, gpus = GOOGLE[machine(one)]
        assert one["resources"] == {"CPU": cpus, **({"GPU": gpus} if gpus else {})}, key
    assert GOOGLE[machine(types("gcp", workers=False)["head"])][1] == 0


@pytest.mark.parametrize("name", CLOUDS)
def test_each_gpu_type_is_there_on_demand_and_spot(name: str) -> None:
    every = types(name)
    assert set(every) == {"cpu", *(f"{gpu}{kind}" for gpu in ("h100", "h200", "a100") for kind in ("", "_spot"))}
    for gpu in ("h100", "h200", "a100"):
        demand, spot = copy.deepcopy(every[gpu]), copy.deepcopy(every[f"{gpu}_spot"])
        assert spot.pop("priority") > demand.get("priority", 0)  # comes first
        if name == "aws":
            assert spot["node_config"].pop("InstanceMarketOptions") == {"MarketType": "spot"}
        else:
            how = spot["node_config"].pop("scheduling")
            assert how.pop("provisioningModel") == "SPOT" and how.pop("instanceTerminationAction") == "DELETE"
            assert how == demand["node_config"].pop("scheduling") and how["onHostMaintenance"] == "TERMINATE"
        assert spot == demand, gpu


@pytest.mark.parametrize("name", CLOUDS)
def test_it_grows_from_none_to_what_it_says_that_costs(name: str) -> None:
    content, every = config(name), types(name)
    assert not any(one.get("min_workers") for one in every.values())
    assert 0 < content["idle_timeout_minutes"] <= 15 and content["provider"]["cache_stopped_nodes"] is False
    enabled = {
        key.removesuffix("_spot") for key, one in every.items() if one["max_workers"] and "GPU" in one["resources"]
    }
    assert len(enabled) == 1  # one run's GPUs are alike
    prices = content["metadata"]["usd_per_hour"]
    assert set(prices) == {machine(one) for one in types(name, workers=False).values()}
    costs = [prices[machine(one)] for one in every.values() for _ in range(one["max_workers"])]
    head = prices[machine(types(name, workers=False)["head"])]
    most = head + sum(sorted(costs, reverse=True)[: content["max_workers"]])
    text = (CLUSTER / f"{name}.yaml").read_text()
    assert f"about ${most:.0f} an hour" in text
    assert f"about ${head * 24:.0f} a day" in text
    assert f"${most:.0f}" in (CLUSTER / "README.md").read_text()


def test_aws_images_are_pinned_and_identities_need_session_tokens() -> None:
    for key, one in types("aws", workers=False).items():
        node = one["node_config"]
        assert re.fullmatch(r"ami-[0-9a-f]{17}", node["ImageId"]), key
        assert node["MetadataOptions"]["HttpTokens"] == "required", key
        assert node["IamInstanceProfile"]["Name"] == ("ray-ft-head" if key == "head" else "ray-ft-worker")
        assert all(
            disk["Ebs"]["Encrypted"] and disk["Ebs"]["DeleteOnTermination"] for disk in node["BlockDeviceMappings"]
        )


def test_gcp_images_are_pinned_and_machines_have_an_identity() -> None:
    for key, one in types("gcp", workers=False).items():
        (disk,) = one["node_config"]["disks"]
        assert re.search(r"/images/[\w-]+-v\d{8}$", disk["initializeParams"]["sourceImage"]), key
        assert disk["autoDelete"] and one["node_config"]["serviceAccounts"], key
        items = {item["key"]: item["value"] for item in one["node_config"]["metadata"]["items"]}
        assert items["block-project-ssh-keys"] == "TRUE", key


def test_aws_machines_with_gpus_have_an_efa_on_every_card(amazon: dict[str, Any]) -> None:
    for key, one in types("aws").items():
        if "GPU" not in one["resources"]:
            continue
        node, network = one["node_config"], amazon[machine(one)]["NetworkInfo"]
        first, *others = node["NetworkInterfaces"]
        assert 1 + len(others) == network["MaximumNetworkCards"] == network["EfaInfo"]["MaximumEfaInterfaces"], key
        assert (first["NetworkCardIndex"], first["DeviceIndex"], first["InterfaceType"]) == (0, 0, "efa")
        assert [other["NetworkCardIndex"] for other in others] == list(range(1, 1 + len(others)))
        assert {(other["DeviceIndex"], other["InterfaceType"]) for other in others} == {(1, "efa-only")}
        assert node["Placement"] and not {"SubnetIds", "SecurityGroupIds"} & set(node)  # Ray wants them in one place


def test_gcp_machines_with_gpus_have_their_fabrics_networks() -> None:
    for key, one in types("gcp").items():
        nics = [nic["nicType"] for nic in one["node_config"]["networkInterfaces"]]
        wanted = {"h100": ["GVNIC"] * 5, "h200": ["GVNIC"] * 2 + ["MRDMA"] * 8}
        assert nics == wanted.get(key.removesuffix("_spot"), ["GVNIC"]), key
        names = [nic["subnetwork"] for nic in one["node_config"]["networkInterfaces"]]
        assert len(set(names)) == len(names), key  # a network takes one card of a machine
        made = (CLUSTER / "account/gcp.sh").read_text()
        for network in {re.sub(r"-\d$", "", name.split("/")[-1]) for name in names}:
            assert (
                re.search(rf'compute networks subnets "?{network}(-\$|")? ', made + " ") or f'"{network}-$' in made
            ), network


@pytest.mark.parametrize("name", CLOUDS)
def test_the_head_alone_has_a_public_address(name: str) -> None:
    provider = config(name)["provider"]
    assert provider["use_internal_ips"] and provider["use_external_head_ip"]
    private = config("aws")["metadata"]["private"] if name == "aws" else None
    for key, one in types(name).items():
        node = one["node_config"]
        if name == "aws":
            places = [*node.get("SubnetIds", []), *(nic["SubnetId"] for nic in node.get("NetworkInterfaces", []))]
            assert set(places) == {private}, key
        else:
            assert not any("accessConfigs" in nic for nic in node["networkInterfaces"]), key


def test_the_account_lets_in_ssh_alone_and_gives_no_more_rights_than_needed() -> None:
    text = (CLUSTER / "account/aws.yaml").read_text()
    assert not re.search(r"[:\[-] [&*]\w", text)  # CloudFormation reads no anchors
    made = yaml.safe_load(text)["Resources"]
    group = made["Group"]["Properties"]
    assert [(rule["FromPort"], rule["ToPort"], rule["CidrIp"]) for rule in group["SecurityGroupIngress"]] == [
        (22, 22, {"Ref": "SshFrom"})
    ]
    for rule, peer in (("GroupIn", "SourceSecurityGroupId"), ("GroupOut", "DestinationSecurityGroupId")):
        assert made[rule]["Properties"][peer] == made[rule]["Properties"]["GroupId"] == {"Ref": "Group"}
    assert all(made["Runs"]["Properties"]["PublicAccessBlockConfiguration"].values())
    policies = [made["UseBucket"]["Properties"]["PolicyDocument"]]
    policies += [one["PolicyDocument"] for one in made["HeadRole"]["Properties"]["Policies"]]
    for statement in (one for policy in policies for one in policy["Statement"]):
        actions = statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
        assert not any("*" in action for action in actions), statement
    profiles = {one["Properties"]["InstanceProfileName"] for one in made.values() if one["Type"].endswith("Profile")}
    used = {one["node_config"]["IamInstanceProfile"]["Name"] for one in types("aws", workers=False).values()}
    assert profiles == used
    outputs = set(yaml.safe_load(text)["Outputs"])
    assert outputs <= set(config("aws")["metadata"])


def dockerfile() -> list[str]:
    """Its instructions, without comments, each on one line."""
    text = "\n".join(line for line in (CLUSTER / "Dockerfile").read_text().splitlines() if not line.startswith("#"))
    return [re.sub(r"\s+", " ", one).strip() for one in text.replace("\\\n", " ").splitlines() if one.strip()]


def test_the_image_is_made_from_pinned_things_and_the_lock() -> None:
    lines = dockerfile()
    base = next(line.split("=", 1)[1] for line in lines if line.startswith("ARG BASE="))
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu\d\d\.\d\d(@sha256:[0-9a-f]{64})?", base)
    assert [line for line in lines if line.startswith("FROM")] == ["FROM ${BASE}"]
    cuda = re.search(r"^nvidia-cuda-runtime==(\d+)\.", (ROOT / "requirements/gpu.txt").read_text(), re.MULTILINE)
    assert cuda and base.split(":")[1].startswith(f"{cuda[1]}.")
    assert not any(line.startswith("ADD") or "curl" in line or "http" in line for line in lines)
    assert any("requirements/install.sh gpu" in line for line in lines)
    uv = next(line.split("=", 1)[1] for line in lines if line.startswith("ARG UV="))
    assert f"\nUV={uv}\n" in (CLUSTER / "setup.sh").read_text()
    for line in lines:
        for package in re.findall(r"pip install (.*?)(?: &&|$)", line):
            assert all("==" in one for one in package.split() if not one.startswith("-") and one != ":all:"), line


def test_the_image_runs_as_a_user_without_rights_and_holds_no_secrets() -> None:
    lines = dockerfile()
    assert [line for line in lines if line.startswith("USER")] == ["USER 1000:1000"]
    assert lines.index("USER 1000:1000") > max(number for number, line in enumerate(lines) if line.startswith("RUN"))
    assert any("RAY_AUTH_MODE=token" in line for line in lines)
    ignored = (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    copied = {source.split("/")[0] for line in lines if line.startswith("COPY") for source in line.split()[1:-1]}
    assert "*" in ignored and copied == allowed and all((ROOT / source).exists() for source in copied)
    assert not any(
        re.search(r"(TOKEN|SECRET|PASSWORD|KEY)\w*=\S", line.replace("RAY_AUTH_MODE=token", "")) for line in lines
    )


def test_the_readme_names_every_way() -> None:
    text = (CLUSTER / "README.md").read_text()
    for name in ("aws.yaml", "gcp.yaml", "on_prem.yaml", "kuberay", "Dockerfile", "account/aws.yaml", "account/gcp.sh"):
        assert name in text and (CLUSTER / name).exists(), name
