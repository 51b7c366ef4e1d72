"""Reading the policy file, `tollbook.toml`, into a policy, with the line of every mistake.

The file has the shape of `schemas.policy.Policy`. Numbers with a decimal point are read as decimals, so that no amount
is a float. A file that contains a secret is refused, and no message shows the secret (G10).
"""

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from pydantic import ValidationError

from tollbook.inference.errors import SettingsError
from tollbook.inference.policy_mistakes import mistakes_in
from tollbook.inference.toml_lines import (
    MAX_DEPTH,
    Place,
    line_of_depth,
    lines_of,
    places_in,
    read_toml,
    syntax_problem,
)
from tollbook.ledger.packaged import packaged_text
from tollbook.schemas.policy import Policy, default_policy
from tollbook.schemas.problems import as_text, located_problems

POLICY_FILE: Final = "tollbook.toml"
"""Name of the policy file in the working directory."""
MAX_FILE_BYTES: Final = 2_000_000
MAX_FILE_PROBLEMS: Final = 20
_SECRET_NAME: Final = re.compile(r"(^|_)(api_?key|key|token|secret|password|passwd|credentials?|authorization)$")
_SECRET_VALUE: Final = re.compile(
    r"^(sk|pk|rk|tb)-[A-Za-z0-9_-]{8,}|^(ghp|gho|xox[abpr]|AKIA|AIza)[A-Za-z0-9_-]{8,}|^(whsec|gsk)_|^Bearer\s"
    r"|^https?://[^/\s]*@|^https://hooks\.slack\.com/"
)
_ADVICE: Final = "put it into an environment variable, and name the variable here"


@dataclass(frozen=True, slots=True)
class PolicyFile:
    """A policy file: its own content, and the policy that it makes together with the defaults."""

    path: Path
    content: Mapping[str, Any]
    policy: Policy

    def says(self, *place: str) -> bool:
        """Whether the file itself has an entry at a place, for example `says("plans", "trial")`."""
        table: object = self.content
        for name in place:
            if not isinstance(table, Mapping) or name not in table:
                return False
            table = cast("Mapping[str, object]", table)[name]
        return True


def read_policy_file(path: Path) -> PolicyFile:
    """Read a policy file. Errors: SettingsError, one line for each problem: `tollbook.toml:12: ...`."""
    text = _read(path)
    try:
        content = read_toml(text)
    except tomllib.TOMLDecodeError as exc:
        line, problem = syntax_problem(text, exc)
        raise SettingsError([f"{path}:{line}: {problem}"]) from None
    if (line := line_of_depth(text, content)) is not None:
        raise SettingsError([f"{path}:{line}: is nested more than {MAX_DEPTH} deep"])
    lines = lines_of(text)
    secrets = [
        f"{path}:{_line(lines, place)}: '{_dotted(place)}' looks like a secret, which a policy must not hold: {advice}"
        for place, advice in _secrets_in(content)
    ]
    if secrets:
        raise SettingsError(secrets)
    try:
        policy = default_policy(content)
    except ValidationError as exc:
        raise SettingsError(_problems(path, exc, lines)) from None
    if mistakes := [f"{path}:{_line(lines, place) or 1}: {sentence}" for place, sentence in mistakes_in(policy)]:
        raise SettingsError(mistakes)
    return PolicyFile(path, content, policy)


def policy_template() -> str:
    """Return a policy file with the defaults, commented."""
    return packaged_text("tollbook.inference", "policy_template.toml")


def policy_schema() -> dict[str, Any]:
    """Return the JSON Schema of a policy file, for editors."""
    schema = Policy.model_json_schema()
    for part in (schema, *schema["$defs"].values()):
        for field in part["properties"].values():
            if "patternProperties" in field:
                field["additionalProperties"] = False  # No other names are allowed.
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "Tollbook policy file"}


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)  # A limit, since a file such as /dev/zero has no end.
        if len(content) > MAX_FILE_BYTES:
            raise SettingsError([f"{path}: must have at most {MAX_FILE_BYTES} bytes"])
        return content.decode("utf-8-sig")
    except OSError as exc:
        raise SettingsError([f"{path}: the policy file cannot be read: {exc.strerror or exc}"]) from exc
    except UnicodeDecodeError as exc:
        line = exc.object.count(b"\n", 0, exc.start) + 1
        raise SettingsError([f"{path}:{line}: is not UTF-8"]) from None


def _secrets_in(content: Mapping[str, Any]) -> Iterator[tuple[Place, str]]:
    for place in places_in(content):
        value: Any = content
        for part in place:
            value = value[part]
        if not isinstance(value, str):
            continue
        name = next(part for part in reversed(place) if isinstance(part, str)).lower().replace("-", "_")
        is_model_parameter = place[0] == "tasks" and len(place) > 2 and place[2] == "params"
        if _SECRET_VALUE.match(value) or (_SECRET_NAME.search(name) and not is_model_parameter):
            yield place, f"{_ADVICE}: {_env_field(place)}"


def _dotted(place: Place) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")


def _env_field(place: Place) -> str:
    if place[0] == "alerts":
        return 'webhook_env = "ALERT_WEBHOOK"'
    provider = re.sub(r"\W", "_", str(place[1])).upper() if place[0] == "providers" and len(place) > 1 else "PROVIDER"
    return f'key_env = "{provider}_API_KEY"'


def _problems(path: Path, error: ValidationError, lines: Mapping[Place, int]) -> list[str]:
    """Return one message for each place of the file with a problem, in the order of the lines."""
    by_place: dict[Place, list[str]] = {}
    for place, sentence in located_problems(error, Policy, limit=MAX_FILE_PROBLEMS):
        by_place.setdefault(place or _place_named_by(sentence), []).append(_in_toml(sentence))
    found = [(_line(lines, place), as_text(sentences)) for place, sentences in by_place.items()]
    found.sort(key=lambda each: each[0] or MAX_FILE_BYTES)
    return [f"{path}:{line}: {text}" if line else f"{path}: {text}" for line, text in found]


def _place_named_by(sentence: str) -> Place:
    """Return the place that a message about the whole policy names at its start, such as `'budgets[1].name': ...`."""
    found = re.match(r"'([^']+)'", sentence)
    parts = re.findall(r"[^.\[\]]+", found[1]) if found else []
    return tuple([int(part) if part.isdigit() else part for part in parts])


def _line(lines: Mapping[Place, int], place: Place) -> int | None:
    """Return the line of a place; if it is not in the file, the line of the nearest table around it."""
    while place:
        # A single table may be written instead of a list of tables; its place has no number.
        for candidate in (place, tuple(part for part in place if isinstance(part, str))):
            if candidate in lines:
                return lines[candidate]
        place = place[:-1]
    return None


def _in_toml(sentence: str) -> str:
    return sentence.replace("must be a JSON object", "must be a table").replace(", not an object", ", not a table")
