"""compose.yaml and the image keep the promises that can be read off them without a container engine."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {"demo", "up", "worker", "projector", "gateway", "publish", "result", "spend", "ping", "doctor"}
OURS = ("projector", "worker", "gateway", "cli")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def dockerfile() -> list[str]:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def test_services_are_redis_projector_worker_gateway_and_cli(compose: dict[str, Any]) -> None:
    assert set(compose["services"]) == {"redis", *OURS}


def test_every_published_port_is_on_the_loopback_interface(compose: dict[str, Any]) -> None:
    ports = [port for service in compose["services"].values() for port in service.get("ports", [])]

    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports), ports


def test_redis_has_every_write_on_disk_and_evicts_nothing(compose: dict[str, Any]) -> None:
    redis = compose["services"]["redis"]
    program, *arguments = redis["command"]
    options = dict(zip(arguments[::2], arguments[1::2], strict=True))

    assert program == "redis-server"
    assert options == {
        "--appendonly": "yes",
        "--appendfsync": "always",
        "--auto-aof-rewrite-min-size": "256mb",
        "--maxmemory-policy": "noeviction",
    }
    assert redis["volumes"] == ["redis:/data"]


def test_workers_start_after_a_healthy_redis_and_projector(compose: dict[str, Any]) -> None:
    services = compose["services"]

    for name, needed in {
        "projector": {"redis"},
        "worker": {"redis", "projector"},
        "gateway": {"redis", "projector"},
    }.items():
        dependencies = services[name]["depends_on"]
        assert set(dependencies) == needed
        assert all(dependency["condition"] == "service_healthy" for dependency in dependencies.values())
        assert all(services[dependency]["healthcheck"]["test"][0] == "CMD" for dependency in needed)


def test_the_projector_is_healthy_when_it_is_ready(compose: dict[str, Any]) -> None:
    projector, worker = compose["services"]["projector"], compose["services"]["worker"]
    program, option, code = projector["healthcheck"]["test"][1:]
    port = projector["environment"]["TOLLBOOK_METRICS_PORT"]

    assert (program, option) == ("python", "-c")
    assert f"http://127.0.0.1:{port}/health/ready" in code
    assert "TOLLBOOK_METRICS_HOST" not in projector["environment"] | worker["environment"]


def test_our_services_run_known_commands_of_one_image(compose: dict[str, Any]) -> None:
    services = compose["services"]

    assert services["projector"]["command"] == ["projector"]
    assert services["worker"]["command"] == ["worker"]
    assert services["gateway"]["command"] == ["gateway"]
    assert {"projector", "worker", "gateway"} <= COMMANDS
    assert {services[name]["image"] for name in OURS} == {f"tollbook:{project()['version']}"}


def test_services_share_only_redis(compose: dict[str, Any]) -> None:
    services = compose["services"]

    for name in OURS:
        assert "network_mode" not in services[name]
        assert services[name]["volumes"] == ["data:/data"]
        assert services[name]["environment"]["TOLLBOOK_DATA_DIR"] == "/data"
        assert services[name]["environment"]["REDIS_URL"] == "redis://redis:6379/0"


def test_the_gateway_is_published(compose: dict[str, Any]) -> None:
    gateway = compose["services"]["gateway"]
    port = gateway["environment"]["TOLLBOOK_GATEWAY_PORT"]

    assert gateway["ports"] == [f"127.0.0.1:${{GATEWAY_PORT:-{port}}}:{port}"]
    assert f"127.0.0.1:{port}/" in gateway["healthcheck"]["test"][-1]


def test_the_provider_is_taken_from_the_environment(compose: dict[str, Any]) -> None:
    environment = compose["services"]["worker"]["environment"]

    assert environment["OPENROUTER_API_KEY"] == "${OPENROUTER_API_KEY:-}"
    assert environment["OPENROUTER_BASE_URL"].startswith("${OPENROUTER_BASE_URL:-https://")


def test_volumes_are_declared(compose: dict[str, Any]) -> None:
    used = {volume.split(":")[0] for service in compose["services"].values() for volume in service["volumes"]}

    assert used == set(compose["volumes"])


def test_the_image_runs_tollbook_as_a_plain_user_from_the_lock(dockerfile: list[str]) -> None:
    entrypoint = next(line for line in dockerfile if line.startswith("ENTRYPOINT "))
    (program,) = json.loads(entrypoint.removeprefix("ENTRYPOINT "))

    assert program in project()["scripts"]
    assert dockerfile.index("USER tollbook") < dockerfile.index(entrypoint)
    installed = [line for line in dockerfile if " uv sync " in line.replace("/", " ")]
    assert len(installed) == 2
    assert all("--frozen --no-dev" in line for line in installed)
    assert not any("pip install" in line for line in dockerfile)


def test_the_image_context_lets_in_what_the_build_needs_and_nothing_else() -> None:
    rules = (ROOT / ".dockerignore").read_text(encoding="utf-8").split("\n")
    packages = {
        "tollbook",
        "notebooks",
        "schemas",
        "ledger",
        "inference",
        "consumers",
        "audit",
        "standin",
        "observability",
        "gateway",
        "app",
        "views",
        "demo",
        "cli",
    }

    assert "*" in rules
    assert {rule[1:] for rule in rules if rule.startswith("!")} == packages | {
        "pyproject.toml",
        "uv.lock",
        "dev.py",
        "LICENSE",
        "README.md",
    }


def project() -> dict[str, Any]:
    """Return the project's metadata."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
