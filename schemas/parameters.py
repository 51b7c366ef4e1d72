"""Parameters of completions and embeddings: which ones a task may set, in which form, and which are refused, and why.

Accepted parameters do not change the price of a token, and are counted in the bound (`inference/bounds`). A parameter
is refused if it would change the price, add charges of its own, or return something that a result cannot hold.
"""

import json
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final, Literal, Self, cast

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from tollbook.schemas.expectations import Expected
from tollbook.schemas.json_text import is_deeper, parse_json
from tollbook.schemas.messages import CacheControl, Content, Form
from tollbook.schemas.problems import shown

MAX_SCHEMA_DEPTH: Final = 64
MAX_TOOLS: Final = 512
MAX_STOPS: Final = 64
MAX_DIMENSIONS: Final = 8_192
_MAX_SEED: Final = 2**63
_FunctionName = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9_.:-]{1,128}$"), Expected("a name of 1 to 128 letters, digits and any of _ - . :")
]


def refuse_bool(value: object) -> object:
    """Refuse true and false as a number: to Python, and so to pydantic, true is the number 1. Errors: ValueError."""
    if isinstance(value, bool):
        raise ValueError(f"must be a number, not {shown(value)}")  # noqa: TRY004 - pydantic turns only ValueErrors into problems.
    return value


_IsNumber: Final = BeforeValidator(refuse_bool)


class FunctionDefinition(Form):
    """A function that a model may call; `parameters` is a JSON Schema."""

    name: _FunctionName
    description: str | None = Field(default=None, repr=False)
    parameters: dict[str, Any] | None = Field(default=None, repr=False)
    strict: bool | None = None


class CustomDefinition(Form):
    """A custom tool: the model calls it with text, whose form a grammar may describe."""

    name: _FunctionName
    description: str | None = Field(default=None, repr=False)
    format: dict[str, Any] | None = Field(default=None, repr=False)


class FunctionTool(Form):
    """A function among the tools."""

    type: Literal["function"]
    function: FunctionDefinition
    cache_control: CacheControl | None = None


class CustomTool(Form):
    """A custom tool among the tools."""

    type: Literal["custom"]
    custom: CustomDefinition
    cache_control: CacheControl | None = None


def _refuse_server_tool(value: object) -> object:
    """Refuse tools that the provider runs: it may run them any number of times. Errors: ValueError."""
    kind = cast("Mapping[str, object]", value).get("type") if isinstance(value, Mapping) else None
    if isinstance(kind, str) and kind not in ("function", "custom"):
        raise ValueError(
            f"is the server tool {shown(kind)}: the provider runs it as often as it likes, at a cost without an upper "
            "bound; send functions, and run them yourself"
        )
    return cast("object", value)


Tool = Annotated[
    Annotated[FunctionTool | CustomTool, Field(discriminator="type")],
    BeforeValidator(_refuse_server_tool),
    Expected("a function such as {'type': 'function', 'function': {'name': ...}}"),
]


def parse_if_json(value: object) -> object:
    """Parse text that is a JSON list or object, as in a plain stream field; other text stays as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return parse_json(value)
        except (ValueError, RecursionError):
            return value
    return value


def _choice_of(*words: str) -> Callable[[object], object]:
    """Return a validator that accepts one of these words, or an object that names a tool."""

    def check(value: object) -> object:
        value = parse_if_json(value)
        if isinstance(value, dict) or (isinstance(value, str) and value in words):
            return cast("dict[str, Any] | str", value)
        raise ValueError(f"must be one of {', '.join(map(repr, words))}, or a JSON object that names what to call")

    return check


def _check_stops(value: object) -> object:
    value = parse_if_json(value)
    stops = (value,) if isinstance(value, str) else value
    if not isinstance(stops, list | tuple) or not all(
        isinstance(stop, str) and stop for stop in cast("list[object]", stops)
    ):
        raise ValueError("must be a text or a list of texts, none of them empty")
    return value


def _logit_bias(value: dict[str, int | float]) -> dict[str, int | float]:
    for token, bias in value.items():
        if not (token.isascii() and token.isdigit() and len(token) <= 9) or not -100 <= bias <= 100:
            raise ValueError("must name tokens by number, each with a number from -100 to 100")
    return value


class Reasoning(Form):
    """How much a model may reason before it answers. Reasoning tokens count in `max_tokens`."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    max_tokens: Annotated[int, Field(ge=0, le=1_000_000), _IsNumber] | None = None
    exclude: bool | None = None
    enabled: bool | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None


class JsonSchema(Form):
    """The JSON Schema that an answer must follow."""

    model_config = ConfigDict(frozen=True, extra="forbid", serialize_by_alias=True)

    name: _FunctionName
    description: str | None = Field(default=None, repr=False)
    schema_: dict[str, Any] | None = Field(default=None, alias="schema", repr=False)
    strict: bool | None = None


class ResponseFormat(Form):
    """The form of the answer: text, JSON, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = Field(default=None, repr=False)

    @model_validator(mode="after")
    def _has_its_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("'json_schema' is for the type 'json_schema' only, which needs it")
        return self


class WebSearchOptions(Form):
    """How the web is searched: the size of the search context, and the user's location."""

    search_context_size: Literal["low", "medium", "high"] | None = None
    user_location: dict[str, Any] | None = Field(default=None, repr=False)


class Prediction(Form):
    """Text that much of the answer is expected to repeat. Its unused tokens are billed as completion tokens."""

    type: Literal["content"]
    content: Content = Field(repr=False)


_CHOICE_WORDS: Final = "one of a few words, or a JSON object that names what to call"
_ToolChoice = Annotated[
    str | dict[str, Any], BeforeValidator(_choice_of("none", "auto", "required", "any")), Expected(_CHOICE_WORDS)
]
_FunctionChoice = Annotated[str | dict[str, Any], BeforeValidator(_choice_of("none", "auto")), Expected(_CHOICE_WORDS)]
_Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False), _IsNumber]
_Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), _IsNumber]


class Parameters(BaseModel):
    """What a task or a route may set for a completion beside model, `max_tokens` and `temperature`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    top_p: _Share | None = None
    """Nucleus sampling: the share of probability to draw from, 0 to 1."""
    top_k: Annotated[int, Field(ge=-1, le=1_000_000), _IsNumber] | None = None
    """Draw from this many most likely tokens; 0 or -1: from all."""
    min_p: _Share | None = None
    """Leave out tokens below this share of the likeliest one's probability, 0 to 1."""
    top_a: _Share | None = None
    """Leave out tokens below this share of the square of the likeliest one's probability, 0 to 1."""
    frequency_penalty: _Penalty | None = None
    """Penalty for tokens by how often they occur in the text already, -2 to 2."""
    presence_penalty: _Penalty | None = None
    """Penalty for tokens that occur in the text already, -2 to 2."""
    repetition_penalty: Annotated[float, Field(gt=0, le=2, allow_inf_nan=False), _IsNumber] | None = None
    """Factor against repetition, above 0 up to 2; 1: none."""
    seed: Annotated[int, Field(ge=-_MAX_SEED, lt=_MAX_SEED), _IsNumber] | None = None
    """Seed for sampling, so that a repeat is likely to give the same answer."""
    stop: (
        Annotated[
            str | Annotated[tuple[str, ...], Field(max_length=MAX_STOPS)],
            BeforeValidator(_check_stops),
            Expected(f"a text or a list of at most {MAX_STOPS} texts"),
        ]
        | None
    ) = Field(default=None, repr=False)
    """A text, or a JSON list of texts, at which the answer ends."""
    logit_bias: Annotated[dict[str, int | float], AfterValidator(_logit_bias)] | None = None
    """A JSON object: by a token's number, what is added to its likelihood, -100 to 100."""
    logprobs: bool | None = None
    """Have the provider compute log probabilities, for the result's `logprobs`."""
    top_logprobs: Annotated[int, Field(ge=0, le=20), _IsNumber] | None = None
    """How many likely tokens `logprobs` are for, 0 to 20."""
    response_format: ResponseFormat | None = Field(default=None, repr=False)
    """The form of the answer, as JSON: `{"type": "json_object"}`, or `json_schema` with a schema."""
    structured_outputs: bool | None = None
    """OpenRouter: the model must support JSON Schemas."""
    tools: tuple[Tool, ...] | None = Field(default=None, max_length=MAX_TOOLS, repr=False)
    """Functions that the model may call, as JSON. The application runs them."""
    tool_choice: _ToolChoice | None = Field(default=None, repr=False)
    """`none`, `auto`, `required`, or a JSON object that names the function to call."""
    parallel_tool_calls: bool | None = None
    """Whether the model may call several functions at once."""
    functions: tuple[FunctionDefinition, ...] | None = Field(default=None, max_length=MAX_TOOLS, repr=False)
    """The older form of `tools`, as JSON."""
    function_call: _FunctionChoice | None = Field(default=None, repr=False)
    """The older form of `tool_choice`."""
    reasoning: Reasoning | None = None
    """How much the model may reason, as JSON: `effort` or `max_tokens`, `exclude`, `enabled`."""
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    """How much the model may reason, in OpenAI's form."""
    include_reasoning: bool | None = None
    """OpenRouter: whether the reply has the reasoning."""
    verbosity: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    """How long the answer should be."""
    prediction: Prediction | None = Field(default=None, repr=False)
    """Text that much of the answer is expected to repeat, as JSON. Its unused tokens are billed as completion."""
    cache_control: CacheControl | None = None
    """Let the provider cache the prompt, as JSON: `{"type": "ephemeral"}`."""
    prompt_cache_key: str | None = Field(default=None, min_length=1, max_length=64, repr=False)
    """Prompts with the same key share a cache."""
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
    """How long OpenAI keeps the prompt in its cache."""
    store: bool | None = None
    """Whether OpenAI keeps the completion."""
    modalities: tuple[Literal["text", "image"], ...] | None = None
    """Kinds of output, as JSON: `["text", "image"]`. Images only if the policy has a price for them."""
    image_config: Annotated[dict[str, str | int], Field(max_length=16)] | None = None
    """OpenRouter: the form of the images in the answer, as JSON: `{"aspect_ratio": "16:9"}`."""
    web_search_options: WebSearchOptions | None = Field(default=None, repr=False)
    """Search the web, as JSON: `{"search_context_size": "low"}`. Only if the policy has a price for it."""
    transforms: tuple[Literal["middle-out"], ...] | None = None
    """OpenRouter: `["middle-out"]` shortens a prompt that is too long for the model."""
    dimensions: Annotated[int, Field(ge=1, le=MAX_DIMENSIONS), _IsNumber] | None = None
    """Embeddings: how many numbers a vector has, if the model can make shorter ones."""
    encoding_format: Literal["float", "base64"] | None = None
    """Embeddings: whether a vector is a list of numbers, or base64 text of 32-bit floats, which is shorter."""

    @model_validator(mode="before")
    @classmethod
    def _without_absent_fields(cls, value: object) -> object:
        if not isinstance(value, Mapping):
            return value
        fields = cast("Mapping[str, object]", value)
        return {
            name: each
            for name, each in fields.items()
            if each is not None and not (name in _LISTS and (not each or (name == "modalities" and each == ["text"])))
        }

    @model_validator(mode="after")
    def _are_json(self) -> Self:
        if not self.model_fields_set & Parameters.model_fields.keys():
            return self  # For speed: most tasks set no parameter, and a dump takes longer than validation.
        values = self.model_dump(include=set(Parameters.model_fields), exclude_none=True)
        if is_deeper(values, MAX_SCHEMA_DEPTH):
            raise ValueError(f"the parameters must not be nested deeper than {MAX_SCHEMA_DEPTH} levels")
        try:
            json.dumps(values, allow_nan=False)
        except (TypeError, ValueError):
            raise ValueError("the parameters must contain only JSON values, without infinities") from None
        return self

    def parameters(self) -> dict[str, Any]:
        """Return the parameters that are set, as JSON values."""
        given = self.model_fields_set & Parameters.model_fields.keys()
        return self.model_dump(mode="json", include=given, exclude_none=True) if given else {}


IMAGE_PARAMETERS: Final = frozenset({"modalities", "image_config"})
"""Parameters that ask for images in the answer."""
SEARCH: Final = "web_search_options"
"""The parameter that asks for a web search."""
EMBEDDINGS_PARAMETERS: Final = ("dimensions", "encoding_format")
"""Parameters of embeddings, which have no others."""
_LISTS: Final = frozenset({"stop", "tools", "functions", "transforms", "modalities"})
"""Parameters for which an empty list counts as absent."""
JSON_PARAMETERS: Final = (
    "logit_bias", "response_format", "tools", "functions", "reasoning", "prediction", "cache_control", "transforms",
    "web_search_options", "modalities", "image_config",
)  # fmt: skip
"""Parameters that are JSON text in a plain stream field."""

_WEB_SEARCH: Final = "use `web_search_options` for web searches, if the policy has a price for them"
_ROUTING: Final = "a task names one `model`, and its route the fallback: each is priced before it is called"
REFUSED: Final[Mapping[str, str]] = {
    "n": "a result holds one answer: publish one task for each",
    "best_of": "a result holds one answer: publish one task for each",
    "stream_options": "the usage is in the result anyway",
    "service_tier": "it changes the price of a token, and the bound is computed from the standard price",
    "speed": "it changes the price of a token, and the bound is computed from the standard price",
    "web_search": _WEB_SEARCH,
    "search_parameters": _WEB_SEARCH,
    "enable_search": _WEB_SEARCH,
    "plugins": "plugins bill by the request or the page, or add to the prompt, and the cost of repeated steps has no "
    "bound; OpenRouter chooses how files are read if the policy's prices have `file`",
    "stop_server_tools_when": "tools that the provider runs have no bound",
    "max_tool_calls": "tools that the provider runs have no bound",
    "mcp_servers": "tools that the provider runs have no bound",
    "audio": "a result cannot hold sound, and its price is not known",
    "models": _ROUTING,
    "route": _ROUTING,
    "preset": _ROUTING,
    "provider": "Tollbook sets it, so that no endpoint costs more than the bound",
    "user": "Tollbook sends the provider its own name for the user: `user_id` says who is charged",
    "safety_identifier": "Tollbook sends the provider its own name for the user: `user_id` says who is charged",
    "extra_body": "put its fields beside the others",
    "extra_headers": "a task has no headers",
    "extra_query": "a task has no query",
}
"""Parameters that a task may not set, and why."""
_NEUTRAL: Final[Mapping[str, tuple[object, ...]]] = {
    "n": (1,),
    "best_of": (1,),
    "models": ([],),
    "mcp_servers": ([],),
    "provider": ({},),
    "service_tier": ("default", "standard"),
    "web_search": (False,),
    "enable_search": (False,),
    "plugins": ([],),
    "extra_body": ({},),
    "extra_headers": ({},),
    "extra_query": ({},),
}
"""Default values of refused parameters, which SDKs send without need. They are dropped."""


_STREAM_OPTIONS: Final = frozenset({"include_usage", "include_obfuscation", "continuous_usage_stats"})
"""Options of event streams that change neither the answer nor its price."""


def drop_refused(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the fields without refused parameters, and a problem for each that has more than its default value."""
    kept: dict[str, Any] = {}
    problems: list[str] = []
    for name, value in values.items():
        if name not in REFUSED:
            kept[name] = value
        elif not _is_neutral(name, value):
            problems.append(f"'{name}' cannot be set: {REFUSED[name]}")
    return kept, problems


def _is_neutral(name: str, value: object) -> bool:
    if value is None:
        return True
    try:
        read = parse_json(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        read = value
    if name == "stream_options" and isinstance(read, dict):
        return cast("dict[str, object]", read).keys() <= _STREAM_OPTIONS
    if type(read) is float and read.is_integer():
        read = int(read)
    # To Python, true is the number 1.
    return any(type(read) is type(each) and read == each for each in _NEUTRAL.get(name, ()))
