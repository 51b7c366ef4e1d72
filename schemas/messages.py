"""Chat messages: what OpenAI's SDKs and applications put into a conversation, with the parts of replies in it.

Nulls count as absent. Fields that an SDK adds only for its user (`parsed`) are dropped. `inference/bounds` computes how
many tokens a message can have, and `inference/media` which images, sounds, files and videos have a bound.
"""

import json
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Final, Literal, Self, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from tollbook.schemas.expectations import Expected
from tollbook.schemas.identifiers import id_text

MAX_MEDIA_CHARACTERS: Final = 2_000_000
"""Characters of the address or the data of one image, sound, file or video."""
# Other APIs' names of parts, and what a chat completion calls them.
_OTHER_NAMES: Final[Mapping[str, str]] = {
    "audio": "input_audio",
    "input_file": "file",
    "input_video": "video_url",
    "input_image": "image_url",
    "image": "image_url",
    "input_text": "text",
    "output_text": "text",
}


class Form(BaseModel):
    """A JSON object of a request. Nulls count as absent. A pydantic model of another class is read as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    dropped: ClassVar[frozenset[str]] = frozenset()
    """Fields that an SDK adds for its user, and that mean nothing to a model."""
    absent: ClassVar[tuple[object, ...]] = (None,)
    """Values that count as absent. SDKs return `annotations: []`, and LangChain `content: []` beside tool calls."""

    @model_validator(mode="before")
    @classmethod
    def _without_absent_fields(cls, value: object) -> object:
        if isinstance(value, BaseModel) and not isinstance(value, cls):
            value = value.model_dump(mode="json")
        if not isinstance(value, Mapping):
            return value
        fields = cast("Mapping[str, object]", value)
        return {name: each for name, each in fields.items() if each not in cls.absent and name not in cls.dropped}


class CacheControl(Form):
    """Marks the end of what the provider may keep in its cache. Written tokens cost more than others."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class TextPart(Form):
    """A text of a message."""

    type: Literal["text"]
    text: str = Field(repr=False)  # G10
    cache_control: CacheControl | None = None


class ImageUrl(Form):
    """Where an image is: its address, or the image itself as a `data:` URL."""

    url: str = Field(repr=False, max_length=MAX_MEDIA_CHARACTERS, pattern=r"^([Hh][Tt][Tt][Pp][Ss]?://|data:image/)")
    detail: Literal["auto", "low", "high", "original"] | None = None


class ImagePart(Form):
    """An image of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl = Field(repr=False)
    cache_control: CacheControl | None = None
    index: int | None = None


class InputAudio(Form):
    """A sound as base64, and its format: `wav`, `mp3` and others."""

    data: str = Field(repr=False, min_length=1, max_length=MAX_MEDIA_CHARACTERS)
    format: str = Field(pattern=r"^[a-z0-9]{1,16}$")


class AudioPart(Form):
    """A sound of a message."""

    type: Literal["input_audio"]
    input_audio: InputAudio = Field(repr=False)
    cache_control: CacheControl | None = None


class FileData(Form):
    """A file: as a `data:` URL or an address, or the id of one that was uploaded to the provider."""

    file_data: str | None = Field(default=None, repr=False, min_length=1, max_length=MAX_MEDIA_CHARACTERS)
    file_id: str | None = Field(default=None, repr=False, min_length=1, max_length=200)
    filename: str | None = Field(default=None, repr=False, max_length=1_000)


class FilePart(Form):
    """A file of a message."""

    type: Literal["file"]
    file: FileData = Field(repr=False)
    cache_control: CacheControl | None = None


class VideoUrl(Form):
    """Where a video is: its address, or the video itself as a `data:` URL."""

    url: str = Field(repr=False, max_length=MAX_MEDIA_CHARACTERS, pattern=r"^([Hh][Tt][Tt][Pp][Ss]?://|data:video/)")


class VideoPart(Form):
    """A video of a message."""

    type: Literal["video_url"]
    video_url: VideoUrl = Field(repr=False)
    cache_control: CacheControl | None = None


MediaPart = ImagePart | AudioPart | FilePart | VideoPart


class RefusalPart(Form):
    """A model's refusal, in a message of its own."""

    type: Literal["refusal"]
    refusal: str = Field(repr=False)


def _part_of_chat(value: object) -> object:
    """Refuse parts of other APIs, and read an address that is given as plain text."""
    if not isinstance(value, Mapping):
        return value
    part = cast("Mapping[str, object]", value)
    kind = part.get("type")
    if isinstance(kind, str) and kind in _OTHER_NAMES:
        raise ValueError(f"has the type {kind!r} of another API: a chat completion has {_OTHER_NAMES[kind]!r}")
    if kind in ("image_url", "video_url") and isinstance(part.get(str(kind)), str):
        return {**part, str(kind): {"url": part[str(kind)]}}
    return part


Part = Annotated[
    Annotated[TextPart | ImagePart | AudioPart | FilePart | VideoPart | RefusalPart, Field(discriminator="type")],
    BeforeValidator(_part_of_chat),
    Expected("a part such as {'type': 'text', 'text': ...}"),
]


def _content_form(value: object) -> str:
    return "text" if isinstance(value, str) else "parts"


Content = Annotated[
    Annotated[tuple[Part, ...], Tag("parts")] | Annotated[str, Tag("text")],
    Discriminator(_content_form),
    Expected("text or a list of parts"),
]


def _as_json_text(value: object) -> object:
    """Return arguments as JSON text, which OpenAI's form has; some applications send the object."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else value


class FunctionCall(Form):
    """A function that a model called, with its arguments as JSON text."""

    dropped = frozenset({"parsed_arguments", "provider_specific_fields", "index"})

    name: str
    arguments: Annotated[str, BeforeValidator(_as_json_text)] = Field(default="", repr=False)


class CustomCall(Form):
    """A custom tool that a model called, with its input as text."""

    name: str
    input: str = Field(default="", repr=False)


def _with_id_as_text(value: object, name: str) -> object:
    """Return a form whose call id `name` is text: some applications send a number."""
    if not isinstance(value, Mapping) or name not in value:
        return cast("object", value)
    fields = cast("Mapping[str, object]", value)
    return {**fields, name: id_text(fields[name])}


class ToolCall(Form):
    """A tool that a model called."""

    dropped = frozenset({"index", "provider_specific_fields"})

    id: str | None = None
    type: Literal["function", "custom"] = "function"
    function: FunctionCall | None = None
    custom: CustomCall | None = None
    extra_content: dict[str, Any] | None = Field(default=None, repr=False)
    """What Gemini must get back with a call: the signature of its reasoning."""

    @model_validator(mode="before")
    @classmethod
    def _with_its_id_as_text(cls, value: object) -> object:
        return _with_id_as_text(value, "id")

    @model_validator(mode="after")
    def _names_what_is_called(self) -> Self:
        if (self.custom if self.type == "custom" else self.function) is None:
            raise ValueError(f"has no {self.type!r}")
        return self


def _refuse(reason: str) -> Callable[[object], object]:
    def refuse(_value: object) -> object:
        raise ValueError(reason)

    return refuse


_REASONING: Final = ("reasoning", "reasoning_content", "reasoning_details", "thinking_blocks")
_TEXTS_AND_MEDIA: Final = frozenset({"role", "content", "refusal", "reasoning", "reasoning_content", "images"})


class Message(Form):
    """One chat message, in OpenAI's form.

    `content` may be absent beside tool calls or a refusal. Fields that OpenAI's reference does not have come from the
    replies of OpenRouter and other providers, which applications send back with the next turn.
    """

    dropped = frozenset({"parsed", "provider_specific_fields", "extra_content", "thinking"})
    absent = (None, [], ())

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content | None = Field(default=None, repr=False)  # G10
    name: str | None = Field(default=None, min_length=1, max_length=256, repr=False)
    tool_calls: tuple[ToolCall, ...] | None = Field(default=None, repr=False)
    tool_call_id: str | None = Field(default=None, repr=False)
    function_call: FunctionCall | None = Field(default=None, repr=False)
    refusal: str | None = Field(default=None, repr=False)
    reasoning: str | None = Field(default=None, repr=False)
    reasoning_content: str | None = Field(default=None, repr=False)
    reasoning_details: tuple[dict[str, Any], ...] | None = Field(default=None, repr=False)
    thinking_blocks: tuple[dict[str, Any], ...] | None = Field(default=None, repr=False)
    annotations: tuple[dict[str, Any], ...] | None = Field(default=None, repr=False)
    images: tuple[Part, ...] | None = Field(default=None, repr=False)
    cache_control: CacheControl | None = None
    audio: Annotated[None, BeforeValidator(_refuse("is audio, whose cost has no upper bound: send its transcript"))] = (
        None
    )

    @model_validator(mode="before")
    @classmethod
    def _with_its_id_as_text(cls, value: object) -> object:
        return _with_id_as_text(value, "tool_call_id")

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        calls = self.tool_calls or self.function_call
        if self.content is None and (self.role != "assistant" or not (calls or self.refusal or self.reasoning_details)):
            raise ValueError("has no content")
        return self

    @property
    def has_reasoning(self) -> bool:
        """Whether the message sends back a model's reasoning, in any form."""
        is_signed = any(call.extra_content for call in self.tool_calls or ())
        return is_signed or any(getattr(self, name) is not None for name in _REASONING)

    @property
    def is_empty(self) -> bool:
        """Whether the message has nothing but reasoning."""
        return self.content is None and not (self.tool_calls or self.function_call or self.refusal)

    def without_reasoning(self) -> Self:
        """Return the message without reasoning; it may be empty then."""
        calls = self.tool_calls and tuple(call.model_copy(update={"extra_content": None}) for call in self.tool_calls)
        return self.model_copy(update={**dict.fromkeys(_REASONING), "tool_calls": calls})

    @property
    def text(self) -> str:
        """The text of the content, its parts joined."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content or () if isinstance(part, TextPart))

    @property
    def texts(self) -> tuple[str, ...]:
        """Every plain text of the message: of its content, of a refusal, of reasoning."""
        parts = (self.content,) if isinstance(self.content, str) else self.content or ()
        of_parts = [
            part if isinstance(part, str) else part.text if isinstance(part, TextPart) else part.refusal
            for part in parts
            if not isinstance(part, MediaPart)
        ]
        further = (self.refusal, self.reasoning, self.reasoning_content)
        return (*of_parts, *(text for text in further if text is not None))

    @property
    def structures(self) -> dict[str, Any]:
        """The fields beside texts and media, as JSON values: tool calls, names, reasoning details."""
        given = self.model_fields_set - _TEXTS_AND_MEDIA
        return self.model_dump(mode="json", exclude_none=True, include=given) if given else {}

    @property
    def text_bytes(self) -> int:
        """Bytes of the message without media, whose size does not decide their cost."""
        structures = self.structures
        texts = (*self.texts, json.dumps(structures, ensure_ascii=False) if structures else "")
        return sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)

    @property
    def media_parts(self) -> tuple[MediaPart, ...]:
        """The images, sounds, files and videos of the content, and the images that a model made."""
        if isinstance(self.content, str) and self.images is None:
            return ()
        parts = (*(() if isinstance(self.content, str) else self.content or ()), *(self.images or ()))
        return tuple(part for part in parts if isinstance(part, MediaPart))

    @property
    def cache_marks(self) -> tuple[CacheControl, ...]:
        """The marks of what the provider may cache."""
        parts = () if isinstance(self.content, str) else self.content or ()
        marks = [part.cache_control for part in parts if isinstance(part, TextPart | MediaPart)]
        return tuple(mark for mark in (self.cache_control, *marks) if mark is not None)

    def as_json(self) -> dict[str, Any]:
        """Return the message as it is sent and hashed: `content` is null where there is none."""
        return {"role": self.role, "content": None, **self.model_dump(mode="json", exclude_none=True)}
