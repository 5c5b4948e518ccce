"""Secrets stay out of what a run leaves behind: found by their form, or by standing in the environment.

`without_secrets` is for texts that only inform (the command, messages); a recipe that holds one is refused instead,
because a recipe is read again. Read `find_secret` first.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

MASK = "***"
_WORDS = r"(?:token(?!iz)|secret|password|passwd|credential|api[_-]?key|access[_-]?key|private[_-]?key)"
_NAMES = re.compile(_WORDS, re.IGNORECASE)
"""What the names of environment variables and options look like that hold a secret."""
_OPTION = re.compile(rf"--?[\w-]*{_WORDS}[\w-]*", re.IGNORECASE)
_FORMS = re.compile(
    r"""
      \bhf_[A-Za-z0-9]{20,}                          # Hugging Face
    | \bwandb_v\d_[A-Za-z0-9_]{20,}                  # Weights & Biases
    | \bsk-[A-Za-z0-9_-]{20,}                        # OpenAI and others
    | \bgh[pousr]_[A-Za-z0-9]{30,} | \bgithub_pat_\w{30,}
    | \bA[KS]IA[A-Z0-9]{16}\b                        # AWS
    | (?<=://)[^/\s@:]*:[^/\s@]+(?=@)                # user:password@ in a URL
    | (?<=:/)[^/\s@:]*:[^/\s@]+(?=@)                 # the same, once it was taken for a path
    | (?<=[?&])(?:[\w-]*(?:token|secret|password|key|signature|sig)[\w-]*)=[^&\s#]+
    | (?<=Bearer\ )[\w.~+/=-]{8,}
    """,
    re.VERBOSE | re.IGNORECASE,
)
SHORTEST = 12
"""A value of the environment that is shorter is no secret that could be told apart from other text."""


def find_secret(text: str) -> str | None:
    """The first secret in a text; None without one."""
    known = next((value for value in _of_environment() if value in text), None)
    found = _FORMS.search(text)
    return known or (found[0] if found else None)


def without_secrets(text: str) -> str:
    """The text with every secret masked."""
    for value in _of_environment():
        text = text.replace(value, MASK)
    return _FORMS.sub(MASK, text)


def command_without_secrets(arguments: list[str]) -> list[str]:
    """A command line with secrets masked, whatever follows an option such as `--api-key` among them."""
    out: list[str] = []
    for argument in arguments:
        option, equals, _ = argument.partition("=")
        if out and "=" not in out[-1] and _OPTION.fullmatch(out[-1]) and not argument.startswith("-"):
            out.append(MASK)
        elif equals and _OPTION.fullmatch(option):
            out.append(f"{option}={MASK}")
        else:
            out.append(without_secrets(argument))
    return out


def _of_environment() -> Iterator[str]:
    """The values of environment variables whose names say that they are secret, the longest first."""
    values = {v for n, v in os.environ.items() if _NAMES.search(n) and len(v) >= SHORTEST and not _is_plain(v)}
    yield from sorted(values, key=len, reverse=True)


def _is_plain(value: str) -> bool:
    """Settings and paths that stand under such a name (TOKEN_FILE=/run/x)."""
    return value.lower() in ("true", "false") or value.startswith(("/", "./", "~"))
