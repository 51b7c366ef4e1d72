"""Endpoints that make no call: the models, a token count, and what is left of a key's budgets."""

import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tollbook.gateway.app import refusal
from tollbook.gateway.bodies import Bodies
from tollbook.gateway.callers import Callers, check_model
from tollbook.gateway.endpoints import address_of
from tollbook.gateway.messages.token_count import count_tokens
from tollbook.gateway.problems import Problem, problem_of_error
from tollbook.gateway.requests import model_in
from tollbook.inference.api_keys import ApiKey
from tollbook.inference.budgets_now import read_budgets
from tollbook.inference.runtime import InferenceRuntime

COUNT_HEADER: Final = "x-tollbook-token-count"


class Information:
    """Answers `/v1/models`, `/v1/models/{id}`, `/v1/messages/count_tokens` and `/v1/key`."""

    def __init__(self, runtime: InferenceRuntime, callers: Callers, bodies: Bodies) -> None:
        self._bodies = bodies
        self._runtime = runtime
        self._callers = callers

    async def models(self, request: Request) -> Response:
        """List the policy's task types and the providers' models that the key allows."""
        return await self._answer(request, self._list_models)

    async def model(self, request: Request) -> Response:
        """Show one model or task type."""

        async def find(key: ApiKey, runtime: InferenceRuntime) -> dict[str, Any]:
            wanted = request.path_params["model"]
            for listed in (await self._list_models(key, runtime))["data"]:
                if listed["id"] == wanted:
                    return listed
            raise Problem(404, "model_not_found", f"no model or task type {wanted!r} is known", should_retry=False)

        return await self._answer(request, find)

    async def count_tokens(self, request: Request) -> Response:
        """Count the tokens of a prompt in Anthropic's format, or estimate them; a header says which."""
        try:
            key = await self._callers.admit(request.headers, address_of(request))
            request.scope["tollbook"]["key_id"] = key.key_id
            body = await self._bodies.read(request)
            model = model_in(body)
            check_model(key, model)
            route = self._runtime.rules.tasks.get(model)
            counter = self._runtime.prices.models.counter(route.model if route else model)
            tokens, is_estimate = count_tokens(body, counter)
        except Exception as exc:  # noqa: BLE001 - the edge of the server.
            return refusal(request, problem_of_error(exc))
        counted = "estimate" if is_estimate else "exact"
        return JSONResponse({"input_tokens": tokens}, headers={COUNT_HEADER: counted})

    async def key(self, request: Request) -> Response:
        """Show the key's attributes, and its budgets as the gate sees them now."""
        return await self._answer(request, self._show_key)

    async def _answer(
        self, request: Request, work: Callable[[ApiKey, InferenceRuntime], Awaitable[dict[str, Any]]]
    ) -> Response:
        try:
            key = await self._callers.admit(request.headers, address_of(request))
            request.scope["tollbook"]["key_id"] = key.key_id
            return JSONResponse(await work(key, self._runtime))
        except Exception as exc:  # noqa: BLE001 - the edge of the server.
            return refusal(request, problem_of_error(exc))

    async def _list_models(self, key: ApiKey, runtime: InferenceRuntime) -> dict[str, Any]:
        policy = runtime.policies.newest.policy
        owners = dict.fromkeys(policy.tasks, "tollbook")
        owners |= {model: model.partition("/")[0] for model in runtime.prices.models.ids}
        for name, rule in policy.providers.items():
            owners |= {f"{model}@{name}": name for model in runtime.prices.models.at(name, rule).ids}
        data = [_model(model, owner) for model, owner in owners.items() if key.may_call(model)]
        ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
        return {"object": "list", "data": data, "has_more": False, **ends}

    async def _show_key(self, key: ApiKey, runtime: InferenceRuntime) -> dict[str, Any]:
        return {
            "key_id": key.key_id,
            "name": key.name,
            "user_id": key.user_id,
            "plan": key.plan,
            "campaign_id": key.campaign_id,
            "tags": dict(key.tags),
            "models": list(key.models),
            "streams": list(key.streams),
            "allows": sorted(key.allows),
            "is_admin": key.is_admin,
            "expires_at": _moment(key.expires_ms),
            "budgets": await self._budgets(key, runtime) if key.user_id else [],
        }

    async def _budgets(self, key: ApiKey, runtime: InferenceRuntime) -> list[dict[str, Any]]:
        assert key.user_id is not None, "only a user has budgets"
        attributes = {**key.tags, "plan": key.plan, "campaign": key.campaign_id}
        budgets = await read_budgets(runtime, key.user_id, attributes, now_ms=round(1000 * time.time()))
        return [
            {
                "budget": each.budget,
                "limit_usd": f"{each.limit_usd:f}",
                "spent_usd": f"{each.spent_usd:f}",
                "held_usd": f"{each.held_usd:f}",
                "remaining_usd": f"{each.remaining_usd:f}",
                "resets_at": _moment(each.resets_ms),
            }
            for each in budgets
        ]


def _model(model: str, owner: str) -> dict[str, Any]:
    """Return a model in OpenAI's and Anthropic's format at once: their fields do not clash. Its age is unknown."""
    openai = {"object": "model", "created": 0, "owned_by": owner}
    anthropic = {"type": "model", "display_name": model, "created_at": "1970-01-01T00:00:00Z"}
    return {"id": model, **openai, **anthropic}


def _moment(at_ms: int | None) -> str | None:
    return None if at_ms is None else datetime.fromtimestamp(at_ms / 1000, UTC).isoformat()
