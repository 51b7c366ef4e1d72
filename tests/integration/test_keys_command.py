"""`tollbook keys` on a running system: what is printed, asked and refused."""

import asyncio
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import pytest
from redis.asyncio import Redis

from tests.quick import first_quick
from tests.system import Finished, RunningSystem, run_cli, running_system
from tollbook.inference.api_keys import ApiKeys, hash_of, secret_of

SECRET: Final = re.compile(r"tb-[A-Za-z0-9_-]{43}")
DAY_S: Final = 86_400


@pytest.fixture
async def running(redis_client: Redis, server_url: str, tmp_path: Path) -> AsyncIterator[RunningSystem]:
    async with running_system(tmp_path / "data", server_url, workers=0) as running:
        yield running


class Keys:
    """The command in a directory of its own, against the running system."""

    def __init__(self, server_url: str, directory: Path) -> None:
        self._directory = directory
        self._env = {"REDIS_URL": server_url, "TOLLBOOK_DATA_DIR": str(directory / "data")}

    async def run(self, *arguments: str) -> Finished:
        return await run_cli("keys", *arguments, cwd=self._directory, env=self._env)

    async def create(self, *arguments: str) -> dict[str, Any]:
        done = await self.run("create", *arguments, "--json")
        assert done.code == 0, done.stderr
        return done.json()

    async def list(self) -> list[dict[str, Any]]:
        return (await self.run("list", "--json")).json()


@pytest.fixture
def keys(running: RunningSystem, server_url: str, tmp_path: Path) -> Keys:
    return Keys(server_url, tmp_path)


async def test_a_key_is_printed_once_and_opens_the_gateway_until_it_is_revoked(
    running: RunningSystem, keys: Keys
) -> None:
    assert (await keys.run("list")).stdout.startswith("there are no keys")
    done = await keys.create(
        "--user", "u42", "--plan", "growth", "--campaign", "spring", "--tag", "team=red", "--tag", "note=a=b",
        "--model", "generate_draft", "--model", "gpt-4o-mini", "--stream", "generation", "--allow", "tags",
        "--name", "shop", "--expires", "90d", "--reason", "the shop", "--author", "ann",
    )  # fmt: skip
    assert SECRET.fullmatch(done["key"])
    assert done["is_new"] is True
    handle = running.system.handle
    found = await ApiKeys(handle.pipeline, handle.keys[0], monotonic=time.monotonic).find(done["key"])
    assert found is not None
    assert (found.key_id, found.user_id, found.plan, found.campaign_id) == (done["key_id"], "u42", "growth", "spring")
    assert (found.tags, found.models) == (
        {"team": "red", "note": "a=b"},
        ("generate_draft", "openai/gpt-4o-mini"),
    )
    assert (found.streams, found.allows, found.is_admin) == (("generation",), frozenset({"tags"}), False)
    assert found.expires_ms is not None
    assert found.expires_ms / 1000 - time.time() == pytest.approx(90 * DAY_S, abs=600)

    listed = await keys.run("list")
    assert done["key_id"] in listed.stdout
    assert "active, expires" in listed.stdout
    assert not SECRET.search(listed.stdout)
    revoked = await keys.run("revoke", done["key_id"], "--reason", "lost", "--author", "bob")
    assert re.fullmatch(rf"{done['key_id']} is revoked from \S+Z on\n", revoked.stdout)
    assert await ApiKeys(handle.pipeline, handle.keys[0], monotonic=time.monotonic).find(done["key"]) is None
    again = await keys.run("revoke", done["key_id"])
    assert (again.code, again.stdout) == (0, f"nothing to do: {revoked.stdout}")
    (row,) = await keys.list()
    assert (row["state"], row["created_by"], row["reason"], row["revoked_by"]) == ("revoked", "ann", "the shop", "bob")


@pytest.mark.slow
async def test_a_key_is_rotated_and_the_old_one_is_accepted_for_a_time(keys: Keys) -> None:
    old = await keys.create("--user", "u42", "--name", "shop")
    done = (await keys.run("rotate", old["key_id"], "--after", "24h", "--json")).json()
    assert done["replaces"] == old["key_id"]
    first, second = await keys.list()
    assert (first["state"], first["replaced_by"], second["name"]) == ("active", done["key_id"], "shop")
    refused = await keys.run("rotate", old["key_id"])
    assert refused.code != 0
    assert f"{old['key_id']} is revoked already" in refused.stderr
    # Only the key was found; its id is found by it.
    found = await keys.run("revoke", old["key"], "--reason", "on a web page")
    assert f"{old['key_id']} is revoked from" in found.stdout
    plain = await keys.run("rotate", done["key_id"])
    (secret,) = SECRET.findall(plain.stdout)
    assert "The key is shown only now" in plain.stdout
    assert secret not in (old["key"], done["key"])
    assert [row["state"] for row in await keys.list()] == ["revoked", "revoked", "active"]


@pytest.mark.slow
async def test_a_repeated_command_says_that_the_key_was_shown_before(keys: Keys) -> None:
    arguments = ("--user", "u42", "--key", "shop-1", "--reason", "the shop")
    await keys.create(*arguments)
    again = await keys.run("create", *arguments, "--json")
    assert (again.code, again.stdout) == (1, "")
    assert "a key was already created with --key shop-1" in again.stderr
    assert len(await keys.list()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "problem"),
    first_quick(
        5,
        [
            (("create",), "a key needs a user"),
            (("create", "--user", "u1", "--plan", "growht"), "unknown plan 'growht'; did you mean 'growth'"),
            (
                ("create", "--user", "u1", "--stream", "generaton"),
                "unknown stream 'generaton'; did you mean 'generation'",
            ),
            (("create", "--user", "u1", "--model", "score_pots"), "'score_pots'; did you mean 'score_post'"),
            (("create", "--user", "u1", "--tag", "red"), "--tag: 'red' is not written NAME=VALUE"),
            (("create", "--user", "u1", "--tag", "a=1", "--tag", "a=2"), "--tag: a is given twice"),
            (("create", "--user", "u1", "--tag", "user=x"), "tags must not be named 'user'"),
            (("create", "--user", "u1", "--expires", "2020-01-01"), "must expire in the future"),
            (("create", "--user", "u1", "--expires", "soon"), "--expires: 'soon' is not a time"),
            (("create", "--user", "u1", "--expires", "9999999d"), "--expires: 9999999d is longer than ten years"),
            (("create", "--user", "u1", "--reason", " "), "--reason: give a reason"),
            (("revoke", "key-1"), "this is not the id of a key; ids look like key-0123456789ab"),
            (("revoke", "key-000000000000"), "there is no key key-000000000000"),
            (("revoke", "key-000000000000", "--after", "1 week"), "--after: '1 week' is not a time span"),
            (("rotate", "key-000000000000"), "there is no key key-000000000000"),
        ],
    ),
)
async def test_an_impossible_change_of_a_key_is_refused_with_the_reason(
    keys: Keys, arguments: tuple[str, ...], problem: str
) -> None:
    refused = await keys.run(*arguments)
    assert refused.code != 0
    assert refused.stdout == ""
    assert problem in refused.stderr


@pytest.mark.slow
async def test_an_unknown_key_is_not_shown(keys: Keys) -> None:
    """G10."""
    secret = secret_of(b"x" * 32)
    for text in (secret, secret[:-1]):
        refused = await asyncio.gather(keys.run("revoke", text), keys.run("rotate", text, "--json"))
        for each in refused:
            assert each.code != 0
            assert text not in each.stdout + each.stderr
            assert hash_of(text) not in each.stdout + each.stderr
