"""Errors in the forms of the two APIs: types by status, our own code and metadata beside."""

import pytest

from tollbook.gateway.messages.document import error_body as message_error
from tollbook.gateway.responses.document import error_body as response_error


@pytest.mark.parametrize(
    ("status", "of_messages", "of_responses"),
    [
        (400, "invalid_request_error", "invalid_request_error"),
        (401, "authentication_error", "authentication_error"),
        (402, "billing_error", "insufficient_quota"),
        (403, "permission_error", "permission_error"),
        (404, "not_found_error", "not_found_error"),
        (409, "invalid_request_error", "conflict_error"),
        (413, "request_too_large", "invalid_request_error"),
        (429, "rate_limit_error", "rate_limit_error"),
        (500, "api_error", "server_error"),
        (502, "api_error", "server_error"),
        (503, "overloaded_error", "server_error"),
        (504, "timeout_error", "server_error"),
    ],
)
def test_types_follow_the_status(status: int, of_messages: str, of_responses: str) -> None:
    assert message_error(status, "some_code", "It went wrong.") == {
        "type": "error",
        "error": {"type": of_messages, "message": "It went wrong.", "code": "some_code"},
    }
    assert response_error(status, "some_code", "It went wrong.") == {
        "error": {"type": of_responses, "message": "It went wrong.", "code": "some_code", "param": None}
    }


def test_metadata_is_beside_the_code() -> None:
    metadata = {"budget": "user", "limit": "5"}
    assert message_error(402, "plan_limit_reached", "No.", metadata)["error"]["metadata"] == metadata
    assert response_error(402, "plan_limit_reached", "No.", metadata)["error"]["metadata"] == metadata
