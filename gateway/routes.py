"""The routes that make no call: models, token count, the key, the OpenAPI document, and the page at the root."""

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Route

from tollbook.gateway.information import Information
from tollbook.gateway.openapi import document
from tollbook.gateway.welcome import welcome_page


def information_routes(information: Information) -> list[BaseRoute]:
    """Return the routes."""
    return [
        Route("/v1/models", information.models, methods=["GET"]),
        Route("/v1/models/{model:path}", information.model, methods=["GET"]),
        Route("/v1/messages/count_tokens", information.count_tokens, methods=["POST"]),
        Route("/v1/key", information.key, methods=["GET"]),
        Route("/openapi.json", _openapi, methods=["GET"]),
        Route("/", _welcome, methods=["GET"]),
    ]


async def _openapi(_request: Request) -> Response:
    return JSONResponse(document())


async def _welcome(request: Request) -> Response:
    return HTMLResponse(welcome_page(str(request.base_url).rstrip("/")))
