"""Translates tools of Responses into functions of a chat completion, and their names back.

Custom tools become functions with one text argument, because most providers have only functions; a grammar is put in
the description. The function of a namespace's tool has the namespace in its name. `ToolNames` translates names back.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

from tollbook.gateway.request_fields import Table, kind_of, list_at, refusal, table_at, text_at
from tollbook.schemas.problems import shown

ADDITIONAL_TOOLS: Final = "additional_tools"
"""The type of an input item that contains tools."""
INPUT: Final = "input"
"""The one argument of a custom tool."""
_INPUT_SCHEMA: Final[Table] = {"type": "object", "properties": {INPUT: {"type": "string"}}, "required": [INPUT]}
_SEPARATOR: Final = "__"
_SERVER_TOOL: Final = (
    "the provider may run it any number of times, so its cost has no upper bound; send functions, and run them yourself"
)

_WITHOUT_SEARCH: Final = ' (in Codex, `web_search = "disabled"` turns it off)'


@dataclass(frozen=True, slots=True)
class ToolName:
    """The name of a tool in Responses."""

    name: str
    namespace: str | None = None
    is_custom: bool = False


class ToolNames:
    """The tools of a request, by their functions' names."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        """Read the names from the body of a request that was already translated."""
        self._by_function: dict[str, ToolName] = {}
        for tool, namespace in _flat(body):
            name = ToolName(str(tool["name"]), namespace, tool.get("type") == "custom")
            self._by_function[function_name(name.name, namespace)] = name

    def of(self, function: str) -> ToolName:
        """Return the name of the tool behind a function that a model called."""
        return self._by_function.get(function) or ToolName(function)


def function_name(name: str, namespace: str | None) -> str:
    """Return the name of a tool's function."""
    return f"{namespace}{_SEPARATOR}{name}" if namespace else name


def functions_of(body: Mapping[str, Any]) -> list[Table]:
    """Translate the tools of a request into functions of a chat completion. Errors: InvalidTask.

    Tools are in `tools`, or in items of the input, where Codex puts them for OpenAI's newest models.
    """
    made: list[Table] = []
    for path, value in _listed(body):
        tool = table_at(value, path)
        match kind_of(tool, path):
            case "function" | "custom":
                made.append(_function(tool, path))
            case "namespace":
                made += _functions_of_namespace(tool, path)
            case "web_search" if tool.get("external_web_access") is False:
                # Codex offers a search of OpenAI's cached pages by default. It is left out; the model works without it.
                continue
            case "tool_search" if tool.get("execution", "server") == "server":
                continue  # All tools that the search would find are sent anyway.
            case "tool_search":
                raise refusal(path, "searches for tools that are not in the request: send all tools")
            case "local_shell" | "shell" | "apply_patch" | "computer" | "computer_use_preview" as kind:
                raise refusal(
                    path, f"is OpenAI's tool {kind!r}, which chat completions do not have: send it as a function"
                )
            case kind:
                hint = _WITHOUT_SEARCH if kind == "web_search" else ""
                raise refusal(path, f"is the server tool {shown(kind)}: {_SERVER_TOOL}{hint}")
    return list({function["function"]["name"]: function for function in made}.values())


def choice_of(choice: object, functions: list[Table]) -> tuple[object, list[Table]]:
    """Return a chat completion's `tool_choice`, and the functions that it allows. Errors: InvalidTask."""
    if isinstance(choice, str):
        return choice, functions
    table = table_at(choice, "tool_choice")
    kind = kind_of(table, "tool_choice")
    if kind == "allowed_tools":
        names = {
            _chosen(table_at(each, "tool_choice.tools")) for each in list_at(table.get("tools"), "tool_choice.tools")
        }
        mode = text_at(table.get("mode"), "tool_choice.mode")
        return mode, [function for function in functions if function["function"]["name"] in names]
    if kind not in ("function", "custom"):
        raise refusal("tool_choice", f"names the server tool {shown(kind)}: {_SERVER_TOOL}")
    return {"type": "function", "function": {"name": _chosen(table)}}, functions


def _chosen(choice: Table) -> str:
    return function_name(text_at(choice.get("name"), "tool_choice.name"), choice.get("namespace"))


def _function(tool: Table, path: str, namespace: str | None = None) -> Table:
    name = text_at(tool.get("name"), f"{path}.name")
    function: Table = {"name": function_name(name, namespace)}
    if tool.get("type") == "custom":
        function |= {"description": _custom_description(tool, path), "parameters": _INPUT_SCHEMA}
    else:
        function |= {each: tool[each] for each in ("description", "parameters", "strict") if each in tool}
    return {"type": "function", "function": function}


def _custom_description(tool: Table, path: str) -> str:
    described = text_at(tool.get("description", ""), f"{path}.description")
    form = table_at(tool.get("format", {}), f"{path}.format")
    if form.get("type", "text") == "text":
        return described
    # Chat completions put the grammar in an object of its own.
    form = table_at(form.get("grammar", form), f"{path}.format.grammar")
    grammar = text_at(form.get("definition"), f"{path}.format.definition")
    return f"{described}\n\n`{INPUT}` must follow this grammar ({form.get('syntax', 'lark')}):\n{grammar}".strip()


def _functions_of_namespace(namespace: Table, path: str) -> list[Table]:
    name = text_at(namespace.get("name"), f"{path}.name")
    made: list[Table] = []
    for number, value in enumerate(list_at(namespace.get("tools"), f"{path}.tools")):
        inner = f"{path}.tools[{number}]"
        tool = table_at(value, inner)
        if kind_of(tool, inner) not in ("function", "custom"):
            raise refusal(inner, "must be a function or a custom tool")
        made.append(_function(tool, inner, name))
    described = text_at(namespace.get("description", ""), f"{path}.description")
    if made and described:
        # Only with the first tool, because every token of the prompt is paid for.
        first = made[0]["function"]
        first["description"] = f"{name}: {described}\n\n{first.get('description', '')}".rstrip()
    return made


def _listed(body: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """Yield the tools of a request, each with its path."""
    items = body.get("input")
    lists: list[tuple[str, object]] = [("tools", body.get("tools"))]
    for number, item in enumerate(cast("list[object]", items) if isinstance(items, list) else []):
        table = cast("Table", item) if isinstance(item, dict) else {}
        if table.get("type") == ADDITIONAL_TOOLS:
            lists.append((f"input[{number}].tools", table.get("tools")))
    for path, tools in lists:
        for number, tool in enumerate(list_at(tools or [], path)):
            yield f"{path}[{number}]", tool


def _flat(body: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], str | None]]:
    """Yield functions and custom tools, each with its namespace."""
    for path, value in _listed(body):
        tool = table_at(value, path)
        if tool.get("type") == "namespace":
            for each in list_at(tool.get("tools"), f"{path}.tools"):
                yield table_at(each, path), tool.get("name")
        elif tool.get("type") in ("function", "custom"):
            yield tool, None
