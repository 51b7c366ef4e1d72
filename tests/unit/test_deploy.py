"""deploy/ keeps the promises that can be read off it without a container engine."""

import configparser
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tollbook.inference.settings import load_settings

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
NODES = tuple(f"node{number}" for number in range(1, 7))
OURS = ("projector", "standby", "worker", "gateway1", "gateway2", "cli")
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))["services"]


def test_services_are_a_cluster_a_store_and_every_kind_of_process(services: dict[str, Any]) -> None:
    assert set(services) == {*NODES, "form", "store", "bucket", *OURS}
    # Each follows while the other works: one that does not stand by would be refused after the other has taken over.
    for name in ("projector", "standby"):
        assert services[name]["command"] == ["projector", "--standby"]
        assert "/health/live" in services[name]["healthcheck"]["test"][-1]


def test_every_node_has_its_writes_on_disk_evicts_nothing_and_has_a_volume_of_its_own(services: dict[str, Any]) -> None:
    for name in NODES:
        program, *arguments = services[name]["command"]
        options = dict(zip(arguments[::2], arguments[1::2], strict=True))
        assert program == "valkey-server"
        assert options["--appendonly"] == "yes"
        assert options["--appendfsync"] == "always"
        assert options["--maxmemory-policy"] == "noeviction"
        assert services[name]["volumes"] == [f"{name}:/data"]


def test_the_cluster_is_formed_of_all_nodes_with_a_replica_for_each_primary(services: dict[str, Any]) -> None:
    command = services["form"]["command"][-1]
    addresses = [services[name]["networks"]["inside"]["ipv4_address"] for name in NODES]
    assert all(f"{address}:6379" in command for address in addresses)
    assert "--cluster-replicas 1" in command
    assert set(services["form"]["depends_on"]) == set(NODES)
    first = services["worker"]["environment"]["REDIS_URL"]
    assert all(f"{address}:6379" in first for address in addresses[:3])


def test_published_ports_are_on_the_loopback_interface_and_of_gateways_alone(services: dict[str, Any]) -> None:
    ports = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert set(ports) == {"gateway1", "gateway2"}
    assert all(port.startswith("127.0.0.1:") for each in ports.values() for port in each)


def test_no_two_services_share_a_volume_or_a_network_namespace(services: dict[str, Any]) -> None:
    volumes = [volume for service in services.values() for volume in service.get("volumes", [])]
    assert len(volumes) == len(set(volumes))
    assert not any("network_mode" in service for service in services.values())


@pytest.mark.parametrize("path", [DEPLOY / "compose.yaml", DEPLOY.parent / "compose.yaml"], ids=["deploy", "small"])
def test_what_a_shell_exports_for_compose_is_refused_by_no_command(path: Path) -> None:
    """Commands refuse unknown names that begin with TOLLBOOK_."""
    names = re.findall(r"\$\{(\w+)", path.read_text(encoding="utf-8"))
    assert names
    assert [name for name in names if name.startswith("TOLLBOOK_")] == []


def test_only_services_that_use_the_archive_have_the_stores_secret(
    services: dict[str, Any],
) -> None:
    names = {name for name in OURS if "AWS_SECRET_ACCESS_KEY" in services[name]["environment"]}
    assert names == {"projector", "standby", "cli"}
    assert all(services[name]["environment"]["TOLLBOOK_ARCHIVE_URL"].startswith("s3://tollbook/") for name in names)


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_a_unit_runs_as_a_user_of_its_own_with_time_to_stop(unit: Path) -> None:
    parsed = configparser.RawConfigParser(strict=False)
    parsed.read(unit)
    service = parsed["Service"]
    assert service["User"] == "tollbook"
    assert service["ExecStart"].startswith("/opt/tollbook/bin/tollbook ")
    assert int(service["TimeoutStopSec"]) >= 60
    assert service["ProtectSystem"] == "strict"


@pytest.mark.parametrize("path", [DEPLOY / "compose.yaml", DEPLOY.parent / "compose.yaml"], ids=["deploy", "small"])
def test_workers_and_gateways_have_time_to_settle_and_a_volume_for_unbooked_charges(path: Path) -> None:
    """Without the setting a process ends within 15 s, however long its container may take."""
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    callers = [each for each in document["services"].values() if each.get("command") in (["worker"], ["gateway"])]
    assert len(callers) >= 2
    for service in callers:
        grace_s = int(service["environment"]["TOLLBOOK_STOP_GRACE_S"])
        assert load_settings(env_file=None).attempt_timeout_s <= grace_s < int(service["stop_grace_period"][:-1])
        (volume,) = service["volumes"]
        name, place = volume.split(":")
        assert name in document["volumes"]
        assert place == "/data"
