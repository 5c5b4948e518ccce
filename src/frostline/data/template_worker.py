"""A process of its own that renders chat templates: they come with models, so they are somebody else's program.

Run as a script with one JSON object per line in and out; `templates.py` starts it, and ends it when it takes too long.
transformers compiles a template in jinja2's immutable sandbox: no files, no imports, no attributes of Python itself.
What a sandbox cannot stop is a template that never ends or grows without bound, so this process has a limit of memory
and of processor time of its own, which hold even when its parent was killed.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from datetime import datetime
from typing import Any

MEMORY_BYTES = 1 << 30
"""What rendering may take beside what the interpreter has once its modules are loaded."""
PROCESSOR_SECONDS = 60
OUTPUT_CHARACTERS = 16_000_000
TODAY = datetime(2024, 7, 26)
"""What templates take for today. Were it the clock's, a run resumed tomorrow would train on other tokens."""


def serve() -> None:
    """Answer requests until there are no more."""
    from transformers.utils import chat_template_utils

    _limit_memory()
    for line in sys.stdin.buffer:
        _limit_time()
        request = json.loads(line)
        answer = [_render(job, request, chat_template_utils) for job in request["jobs"]]
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


def _render(job: dict[str, Any], request: dict[str, Any], utils: Any) -> dict[str, Any]:
    """One conversation as text, and where the template's own marks say that the assistant speaks."""
    try:
        compiled = utils._compile_jinja_template(request["template"])
        compiled.environment.globals["strftime_now"] = TODAY.strftime
        compiled.globals["strftime_now"] = TODAY.strftime
        (text,), spans = utils.render_jinja_template(
            conversations=[job["messages"]],
            tools=job["tools"] or None,
            chat_template=request["template"],
            add_generation_prompt=job["prompt"],
            return_assistant_tokens_mask=request["marks"],
            **request["variables"],
        )
    except MemoryError:
        return {"error": "it takes too much memory"}
    except Exception as error:  # templates raise whatever they are written to raise
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    if len(text) > OUTPUT_CHARACTERS:
        return {
            "error": f"it writes {len(text)} characters for one conversation; at most {OUTPUT_CHARACTERS} are taken"
        }
    return {"text": text, "spans": [list(s) for s in spans[0]] if request["marks"] else []}


def _limit_memory() -> None:
    with suppress(ImportError, OSError, ValueError):  # where a system has no such limits, the parent's clock remains
        import resource

        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123  a kernel's file, read once
            now = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY_BYTES, now + MEMORY_BYTES))


def _limit_time() -> None:
    with suppress(ImportError, OSError, ValueError):
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(used.ru_utime + used.ru_stime) + PROCESSOR_SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))


if __name__ == "__main__":
    serve()
