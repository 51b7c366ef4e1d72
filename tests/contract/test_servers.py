"""What Tollbook needs from every kind of server."""

from redis.asyncio import Redis


async def test_the_server_is_empty_at_the_start(every_redis_client: Redis) -> None:
    assert await every_redis_client.dbsize() == 0
    assert await every_redis_client.function_list() == []
    await every_redis_client.set("left", "over")


async def test_the_server_runs_functions(every_redis_client: Redis) -> None:
    await every_redis_client.function_load(
        "#!lua name=mine\nredis.register_function('answer', function() return 42 end)"
    )
    assert await every_redis_client.fcall("answer", 0) == 42


async def test_the_server_keeps_an_append_only_file(every_redis_client: Redis) -> None:
    assert await every_redis_client.config_get("appendonly") == {"appendonly": "yes"}
