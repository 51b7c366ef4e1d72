"""The link that `tollbook up` prints, as a user opens it; with one process, and with several."""

import re
from pathlib import Path

import httpx
import pytest

from tests.servers import wait_until
from tests.system import BackgroundCommand

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("workers", ["0", "1"])
async def test_the_link_of_up_opens_the_web_view_once(tmp_path: Path, workers: str) -> None:
    here = tmp_path / "here"
    here.mkdir()
    command = await BackgroundCommand.start("up", "--stand-in", "--workers", workers, cwd=here, is_installed=True)
    try:
        link = re.compile(r"^Web view: (http://\S+/ui\?once=\S+)$", re.MULTILINE)
        [found] = await wait_until(lambda: link.findall(command.stdout), what="the link")
        view = found.partition("?")[0]
        async with httpx.AsyncClient(follow_redirects=True, timeout=30, trust_env=False) as client:

            async def is_served() -> bool:
                try:
                    return (await client.get(view)).status_code == 401
                except httpx.TransportError:
                    return False

            await wait_until(is_served, what="the gateway")
            opened = await client.get(found)
            health = await client.get(f"{view}/health")
        async with httpx.AsyncClient(timeout=30, trust_env=False) as other:
            again = await other.get(found)
    finally:
        await command.end()

    assert opened.status_code == 200
    assert ">Keys</a>" in opened.text
    assert health.status_code == 200
    assert ">failed</span>" not in health.text
    assert again.status_code == 401


async def test_a_log_of_lines_of_json_has_no_link(tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    command = await BackgroundCommand.start("up", "--stand-in", cwd=here, env={"TOLLBOOK_LOG_FORMAT": "json"})
    try:
        await wait_until(lambda: "system.started" in command.stderr, what="`tollbook up`")
        assert "once=" not in command.stdout + command.stderr
    finally:
        await command.end()
