"""Chat templates, rendered in a process of its own with limits of time and size.

`Template` is a template with what it is given; `render` gives the texts of some conversations. Read `render` first.
A template is somebody else's program: see `template_worker.py` for what holds it.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import select
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from frostline.data.files import RowError
from frostline.errors import DataError

SECONDS = 20.0
"""How long the renderings of one conversation may take."""
START_SECONDS = 120.0
"""How long the process may take to start, its imports included."""
KEPT = (
    "PATH",
    "PYTHONPATH",
    "LD_LIBRARY_PATH",
    "HOME",
    "TMPDIR",
    "SYSTEMROOT",
    "OPENBLAS_CORETYPE",
    "OPENBLAS_L2_SIZE",
)
"""Of the environment, what the process gets; no keys and tokens."""
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Template:
    """A chat template and what it is given beside the messages."""

    text: str
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Special tokens by name, and what the recipe gives."""
    seconds: float = SECONDS

    @property
    def has_marks(self) -> bool:
        """Whether it says itself where the assistant speaks."""
        return bool(_MARKS.search(self.text))


@dataclass(frozen=True, slots=True)
class Job:
    """One rendering."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    prompt: bool = False
    """With what the template writes before the assistant's next turn."""


@dataclass(frozen=True, slots=True)
class Rendering:
    """What came of a job."""

    text: str | None
    """None where the template refused."""
    spans: tuple[tuple[int, int], ...] = ()
    """Where the template's own marks say that the assistant speaks, in characters."""
    error: str = ""


def template_of(tokenizer: Any, *, file: str | None, variables: Mapping[str, Any], tools: bool = False) -> Template:
    """The template of a file, or the tokenizer's own. Raises `DataError` when there is none."""
    if file is not None:
        text = read_template(file)
    elif not tokenizer.chat_template:
        raise DataError(
            "the data are conversations, but the tokenizer has no chat template; give one as a Jinja file: "
            "`data.chat_template: FILE`"
        )
    else:
        try:
            text = tokenizer.get_chat_template(tools=[{}] if tools else None)
        except ValueError as error:
            raise DataError(f"the tokenizer's chat template cannot be used: {error}") from None
    return Template(text=text, variables={**tokenizer.special_tokens_map, **variables})


def read_template(file: str) -> str:
    """The text of a template's file. Raises `DataError`."""
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise DataError(f"data.chat_template: {file} cannot be read: {reason}") from None


def render(template: Template, jobs: Sequence[Job], *, where: str) -> list[Rendering]:
    """Every job's text. Raises `RowError` with `where` when a rendering does not end in time."""
    request = {
        "template": template.text,
        "variables": dict(template.variables),
        "marks": template.has_marks,
        "jobs": [{"messages": list(j.messages), "tools": list(j.tools), "prompt": j.prompt} for j in jobs],
    }
    answers = _worker().ask(request, seconds=template.seconds, where=where)
    return [Rendering(a.get("text"), tuple(tuple(s) for s in a.get("spans", ())), a.get("error", "")) for a in answers]


class _Worker:
    """The process, and the pipe to it."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        script = Path(__file__).with_name("template_worker.py")
        kept = {name: os.environ[name] for name in KEPT if name in os.environ}
        environment = {**kept, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONUTF8": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        self.rest = b""
        self.started = False

    def ask(self, request: Mapping[str, Any], *, seconds: float, where: str) -> list[dict[str, Any]]:
        """The answer to one request. Raises `RowError` when it does not come in time; the process is then gone."""
        if not self.started:
            self._start(request)
        try:
            answer = self._ask(request, seconds)
        except (TimeoutError, BrokenPipeError, EOFError) as error:
            self.close()
            why = (
                f"did not end within {seconds:g} s"
                if isinstance(error, TimeoutError)
                else "took too much and was ended"
            )
            raise RowError(f"{where}: rendering its chat template {why}") from None
        return answer

    def _start(self, request: Mapping[str, Any]) -> None:
        """Wait until the process has its imports: the time they take is not the template's."""
        try:
            self._ask({**request, "jobs": []}, START_SECONDS)
        except (TimeoutError, BrokenPipeError, EOFError):
            self.close()
            raise DataError("the process that renders chat templates does not start") from None
        self.started = True

    def _ask(self, request: Mapping[str, Any], seconds: float) -> list[dict[str, Any]]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request, default=str).encode() + b"\n")
        self.process.stdin.flush()
        while b"\n" not in self.rest:
            if not select.select([self.process.stdout], [], [], seconds)[0]:
                raise TimeoutError
            more = os.read(self.process.stdout.fileno(), 1 << 20)
            if not more:
                raise EOFError
            self.rest += more
        line, _, self.rest = self.rest.partition(b"\n")
        answer: list[dict[str, Any]] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process and wait until it is gone."""
        global _running
        self.process.kill()
        self.process.communicate()
        if _running is self:
            _running = None


_running: _Worker | None = None
_of_parents: list[_Worker] = []
"""Workers of processes that this one was forked from: their pipes are not ours to read, write or close."""


def _worker() -> _Worker:
    global _running
    if _running is not None and _running.owner != os.getpid():
        _of_parents.append(_running)
        _running = None
    if _running is None:
        _running = _Worker()
    return _running


@atexit.register
def _end() -> None:
    if _running is not None and _running.owner == os.getpid():
        _running.close()
