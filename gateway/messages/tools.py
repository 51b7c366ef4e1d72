"""Translates Anthropic's tools into functions of a chat completion."""

from typing import Any, Final

from tollbook.gateway.messages.blocks import mark_of
from tollbook.gateway.request_fields import Table, list_at, refusal, table_at, text_at, word_at
from tollbook.schemas.problems import shown

_SERVER_TOOL: Final = (
    "the provider may run it any number of times, so its cost has no upper bound; send tools with an `input_schema`, "
    "and run them yourself"
)
# Anthropic's own tools, which the client runs.
_CLIENT_TOOLS: Final = ("bash_", "text_editor_", "memory_", "computer_", "browser_")
_TOOL_SEARCH: Final = "tool_search_tool_"
_CHOICES: Final = {"auto": "auto", "any": "required", "none": "none"}


def tool_fields(given: Table) -> Table:
    """Return the tools, the choice of a tool, and whether calls may be parallel. Errors: InvalidTask."""
    tools = _functions(given.get("tools", []))
    if not tools:
        return {}
    return {"tools": tools, **_choice(given.get("tool_choice"))}


def _functions(tools: object) -> list[Table]:
    made: list[Table] = []
    for number, value in enumerate(list_at(tools, "tools")):
        path = f"tools[{number}]"
        tool = table_at(value, path)
        kind = text_at(tool.get("type", "custom"), f"{path}.type")
        if kind.startswith(_TOOL_SEARCH):
            continue  # All tools that the search would find are sent anyway.
        if kind.startswith(_CLIENT_TOOLS):
            raise refusal(
                path, f"is Anthropic's tool {shown(kind)}, which other models do not know: send its `input_schema`"
            )
        if kind != "custom":
            raise refusal(path, f"is the server tool {shown(kind)}: {_SERVER_TOOL}")
        made.append(_function(tool, path))
    return made


def _function(tool: Table, path: str) -> Table:
    function: Table = {
        "name": text_at(tool.get("name"), f"{path}.name"),
        "parameters": table_at(tool.get("input_schema"), f"{path}.input_schema"),
        **{name: tool[name] for name in ("description", "strict") if name in tool},
    }
    return {"type": "function", "function": function, **mark_of(tool)}


def _choice(value: object) -> Table:
    if value is None:
        return {}
    choice = table_at(value, "tool_choice")
    kind = word_at(choice.get("type"), "tool_choice.type", {*_CHOICES, "tool"})
    made: Any = _CHOICES.get(kind)
    if kind == "tool":
        made = {"type": "function", "function": {"name": text_at(choice.get("name"), "tool_choice.name")}}
    single = {"parallel_tool_calls": False} if choice.get("disable_parallel_tool_use") is True else {}
    return {"tool_choice": made, **single}
