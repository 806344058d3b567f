"""What can be checked of deploy/ without starting it: it parses, and means what it should."""

import configparser
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from orchestrator.cli import app
from orchestrator.settings import Settings

DEPLOY = Path(__file__).parents[1] / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
GRACE_SECONDS = Settings().grace_seconds


def parses(words: list[str]) -> bool:
    """Whether penstock's own command line takes these words; refusals raise."""
    command: Any = typer.main.get_command(app)
    inner = command.commands[words[0]]
    inner.make_context(words[0], words[1:]).close()
    return True


def interpolated(value: Any) -> Any:
    """The value as compose sees it with the defaults of its variables, and a password."""
    if isinstance(value, dict):
        return {key: interpolated(each) for key, each in value.items()}
    if isinstance(value, list):
        return [interpolated(each) for each in value]
    if not isinstance(value, str):
        return value
    value = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value)
    return re.sub(r"\$\{\w+:\?[^}]*\}", "secret", value)


@pytest.fixture(scope="module")
def compose() -> Any:
    text = (DEPLOY / "compose.yaml").read_text(encoding="utf-8")
    return interpolated(yaml.safe_load(text))


def ours(compose: Any) -> dict[str, Any]:
    return {k: v for k, v in compose["services"].items() if v["image"].startswith("penstock")}


def seconds(text: str) -> float:
    return float(text.removesuffix("s"))


def test_compose_has_the_parts_of_a_fleet_and_refers_to_nothing_else(compose: Any) -> None:
    services = compose["services"]
    assert set(services) == {"redis", "postgres", "worker", "worker-gpu", "scheduler", "api"}
    for name, service in services.items():
        assert service["restart"] == "unless-stopped", name
        for other, how in service.get("depends_on", {}).items():
            assert how == {"condition": "service_healthy"} and services[other]["healthcheck"]
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert source.startswith((".", "/")) or source in compose["volumes"], volume
    built = ours(compose)["worker"]["build"]
    assert (DEPLOY / built["context"] / built["dockerfile"]).is_file()


def test_redis_keeps_what_it_was_given(compose: Any) -> None:
    words = compose["services"]["redis"]["command"]
    told = dict(zip(words[1::2], words[2::2], strict=True))
    assert told["--appendonly"] == "yes"
    assert told["--maxmemory-policy"] == "noeviction"


def test_the_gpu_worker_asks_for_a_gpu_when_it_is_asked_for(compose: Any) -> None:
    worker = compose["services"]["worker-gpu"]
    assert worker["profiles"] == ["gpu"]
    usual = [each for each in ours(compose).values() if "profiles" not in each]
    devices = [each["command"][-1] for each in usual if "--device" in each["command"]]
    assert devices == ["cpu"]
    (device,) = worker["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia" and device["capabilities"] == ["gpu"]
    assert worker["command"][-2:] == ["--device", "cuda:0"]


def test_composes_commands_and_settings_are_real(compose: Any) -> None:
    for name, service in ours(compose).items():
        assert parses(service["command"]), name
        settings = Settings.from_env({k: str(v) for k, v in service["environment"].items()})
        assert settings.broker_url == "redis://redis:6379/0"
        assert settings.database_url.endswith("@postgres/penstock")
        assert seconds(service["stop_grace_period"]) > GRACE_SECONDS


def test_composes_variables_stand_in_the_example() -> None:
    used = re.findall(r"\$\{(\w+):", (DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    given = re.findall(r"^(\w+)=", (DEPLOY / "env.example").read_text(encoding="utf-8"), re.M)
    assert set(used) == set(given)
    assert not any(name.startswith("PENSTOCK_") for name in used), "the shell's own settings"


def unit(file: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=True, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(file.read_text(encoding="utf-8"))
    return parser


@pytest.mark.parametrize("file", UNITS, ids=lambda file: file.name)
def test_a_units_command_and_times_are_real(file: Path) -> None:
    service = unit(file)["Service"]
    program, *words = service["ExecStart"].replace("%i", "tiny").split()
    assert program == "/opt/penstock/bin/penstock"
    assert parses(words)
    assert float(service["TimeoutStopSec"]) > GRACE_SECONDS
    assert service["KillSignal"] == "SIGTERM" and service["Restart"] == "on-failure"
    assert service["EnvironmentFile"] == "/etc/penstock/penstock.env"


def test_the_units_settings_are_real() -> None:
    text = (DEPLOY / "systemd" / "penstock.env").read_text(encoding="utf-8")
    for lines in (text, re.sub(r"^#(?=PENSTOCK_)", "", text, flags=re.M)):
        found = dict(re.findall(r"^(\w+)=(.*)$", lines, re.M))
        assert Settings.from_env(found).database_url == found["PENSTOCK_DATABASE_URL"]


def test_systemd_has_nothing_to_say_of_the_units(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed")
    for file in UNITS:
        # Its program and its settings are not installed here.
        text = file.read_text(encoding="utf-8")
        text = text.replace("/opt/penstock/bin/penstock", sys.executable)
        text = text.replace("EnvironmentFile=", "EnvironmentFile=-")
        (tmp_path / file.name.replace("@", "@tiny")).write_text(text, encoding="utf-8")
    found = subprocess.run(
        [analyze, "verify", "--man=no", *sorted(map(str, tmp_path.iterdir()))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (found.returncode, found.stdout + found.stderr) == (0, "")


def test_the_readme_names_every_file_and_says_what_was_not_run() -> None:
    text = (DEPLOY / "README.md").read_text(encoding="utf-8")
    for file in DEPLOY.rglob("*"):
        if file.is_file() and file.name not in ("README.md", ".env"):
            assert f"`{file.relative_to(DEPLOY)}`" in text, file
    assert "**Not run here.**" in text
