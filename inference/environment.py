"""Variables of the environment and of `.env`: reading them, and finding misspelt names of settings.

It never shows a value, which may be a secret (G10).
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from dotenv import dotenv_values

from tollbook.inference.errors import SettingsError
from tollbook.schemas.problems import closest_name

_PREFIX: Final = "TOLLBOOK_"


def read_variable(name: str, *, env_file: Path | None = Path(".env")) -> str | None:
    """Return a variable that the policy names, from the environment or else from `env_file`; None if empty.

    Errors: SettingsError if the file cannot be read.
    """
    value = os.environ.get(name) or variables_of(env_file).get(name)
    return value.strip() or None if isinstance(value, str) else None


def variables_of(env_file: Path | None) -> Mapping[str, object]:
    """Return the variables in a file; none if there is no file. Errors: SettingsError if it cannot be read."""
    try:
        return dotenv_values(env_file) if env_file else {}
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is not UTF-8"
        raise SettingsError([f"{env_file} cannot be read: {reason}"]) from exc


def unknown_variables(variables: Iterable[str], known: Sequence[str]) -> list[str]:
    """Return one problem for each `TOLLBOOK_*` variable that is not in `known`, the names of all settings."""
    # Compared without the prefix, which would make any two names look similar.
    endings = [name.removeprefix(_PREFIX) for name in known if name.startswith(_PREFIX)]
    problems: list[str] = []
    for name in variables:
        if name.upper().startswith(_PREFIX) and name.upper() not in known:
            closest = closest_name(name[len(_PREFIX) :], endings)
            hint = f"did you mean {_PREFIX}{closest}?" if closest else "the documentation lists all settings"
            problems.append(f"{name}: unknown setting; {hint}")
    return problems
