"""Bounds of media in a prompt: the most tokens of images, sounds, files and videos, and how much these cost extra.

Invariant (G1): a part counts with the most tokens by the policy, else by the provider's publication (`images`). If
neither has a number, or its tokens may cost more than text tokens and have no known price, the call is refused (G8).
"""

import base64
import binascii
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, assert_never

from tollbook.inference.errors import PriceUnknown
from tollbook.inference.images import image_tokens_at_most
from tollbook.inference.prices.model_price import ModelPrice
from tollbook.schemas.messages import AudioPart, FilePart, ImagePart, InputAudio, MediaPart, VideoPart
from tollbook.schemas.policy import ModelRule

# The lowest bit rate of MP3 is 8,000 bits per second (ISO/IEC 13818-3, layer III).
_MP3_BYTES_PER_S: Final = 1_000
_PCM: Final = (1, 3)
_WAV_HEADER: Final = struct.Struct("<HHIIHH")
_FORMAT_AT: Final = 20
WORDS: Final = {"image": "images", "audio": "sound", "file": "files", "video": "videos"}
"""The name of each kind in messages."""
NO_LIMITS: Final = ModelRule()


@dataclass(frozen=True, slots=True)
class MediaBound:
    """The most tokens of all media in a prompt.

    `image_tokens` is the largest number of tokens of one image. `surcharges` is, by kind, how much its tokens cost
    above prompt tokens, in millionths of a nano-dollar.
    """

    tokens: int = 0
    images: int = 0
    image_tokens: int = 0
    files: int = 0
    surcharges: Mapping[str, int] = field(default_factory=dict[str, int])


NO_MEDIA: Final = MediaBound()


def kind_of(part: MediaPart) -> str:
    """Return the kind of a part by the providers' name for the modality: image, audio, file or video."""
    match part:
        case ImagePart():
            return "image"
        case AudioPart():
            return "audio"
        case FilePart():
            return "file"
        case VideoPart():
            return "video"
        case _:
            assert_never(part)


def bound_media(
    parts: Iterable[MediaPart], price: ModelPrice, limits: ModelRule = NO_LIMITS, *, cache_percent: int = 100
) -> MediaBound:
    """Bound the tokens of media, and how much they cost above text tokens.

    `cache_percent` is the price of a cached token in percent of its listed price.
    Errors: PriceUnknown if a part has no limit, or its tokens have no known price.
    """
    tokens = images = image_tokens = files = 0
    surcharges: dict[str, int] = {}
    prompt = min(tier.prompt_nanousd_per_mtok for tier in price.tiers)
    for part in parts:
        kind = kind_of(part)
        count = _tokens_at_most(part, price.model, limits)
        media_price = price.media_price(kind)
        if media_price is None and kind in ("audio", "video"):
            raise PriceUnknown.of_model(price.model, f"tokens of {WORDS[kind]} have a price that is not known")
        media_price = prompt if media_price is None else -(-media_price * cache_percent // 100)
        tokens += count
        surcharges[kind] = surcharges.get(kind, 0) + count * max(0, media_price - prompt)
        if kind == "image":
            images, image_tokens = images + 1, max(image_tokens, count)
        files += kind == "file"
    return MediaBound(tokens, images, image_tokens, files, surcharges)


def _tokens_at_most(part: MediaPart, model: str, limits: ModelRule) -> int:
    match part:
        case ImagePart():
            return image_tokens_at_most(model) if limits.image_tokens is None else limits.image_tokens
        case AudioPart():
            found = _audio_tokens_at_most(part.input_audio, limits)
        case FilePart():
            found = limits.file_tokens
        case VideoPart():
            found = limits.video_tokens
        case _:
            assert_never(part)
    if found is None:
        kind = kind_of(part)
        raise PriceUnknown(
            f"a call with {WORDS[kind]} to {model} has no upper bound: set its {kind}_tokens in the policy's [models]",
            {"model": model},
        )
    return found


def _audio_tokens_at_most(audio: InputAudio, limits: ModelRule) -> int | None:
    known = [] if limits.audio_tokens is None else [limits.audio_tokens]
    seconds = None if limits.audio_tokens_per_second is None else _seconds_at_most(audio)
    if seconds is not None:
        known.append(seconds * (limits.audio_tokens_per_second or 0))
    return min(known, default=None)


def _seconds_at_most(audio: InputAudio) -> int | None:
    """Return how many whole seconds a sound has at most; None if its format does not tell."""
    try:
        data = base64.b64decode(audio.data.rpartition(",")[2], validate=True)
    except binascii.Error:
        return None
    if audio.format == "mp3":
        return 1 + len(data) // _MP3_BYTES_PER_S if _is_mp3(data) else None
    rate = _wav_bytes_per_s(data) if audio.format == "wav" else None
    return None if rate is None else 1 + len(data) // rate


def _is_mp3(data: bytes) -> bool:
    """Whether a sound begins like MP3. Other codecs can have more seconds per byte."""
    return data.startswith(b"ID3") or (len(data) > 1 and data[0] == 0xFF and data[1] & 0xE6 == 0xE2)


def _wav_bytes_per_s(data: bytes) -> int | None:
    """Return the lowest byte rate that a WAV file's header allows; None if it is missing or the sound is compressed.

    The `fmt` chunk must come first, as recorders write it: other chunks may contain bytes that look like one.
    """
    if data[:4] != b"RIFF" or data[8:16] != b"WAVEfmt " or len(data) < _FORMAT_AT + _WAV_HEADER.size:
        return None
    kind, channels, sample_rate, byte_rate, frame_bytes, bits = _WAV_HEADER.unpack_from(data, _FORMAT_AT)
    rate = min(byte_rate, sample_rate * frame_bytes, sample_rate * channels * (bits // 8))
    return rate if kind in _PCM and rate > 0 else None
