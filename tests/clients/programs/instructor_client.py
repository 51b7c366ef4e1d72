"""instructor over OpenAI's SDK: structured output by a tool and by a schema, whole and in parts."""

from typing import Any

import instructor
from harness import MODEL, PROMPTS, City, key, play, url
from openai import OpenAI


def client(name: str, mode: instructor.Mode = instructor.Mode.TOOLS) -> Any:
    return instructor.from_openai(OpenAI(base_url=url(name), api_key=key(name)), mode=mode)


def said(name: str) -> Any:
    return [{"role": "user", "content": PROMPTS[name]}]


def structured(name: str) -> dict[str, Any]:
    by_tool, by_schema = (ask(name, mode) for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA))
    return by_tool if by_tool == by_schema else {"tool": by_tool, "schema": by_schema}


def ask(name: str, mode: instructor.Mode = instructor.Mode.TOOLS) -> dict[str, Any]:
    made = client(name, mode).chat.completions.create(model=MODEL, messages=said(name), response_model=City)
    return {"parsed": made.model_dump()}


def streaming(name: str) -> dict[str, Any]:
    parts = list(client(name).chat.completions.create_partial(model=MODEL, messages=said(name), response_model=City))
    return {"parsed": parts[-1].model_dump(), "parts": len(parts)}


play(
    structured=structured,
    structured_streamed=streaming,
    cap=ask,
    cap_streamed=streaming,
    cut_off=streaming,
    retry=ask,
)
