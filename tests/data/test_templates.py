"""Templates are somebody else's program: whatever they do, it ends in time, stays small, and touches nothing (X9)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from versions import older_than

from frostline.data import templates
from frostline.data.templates import Job, Template, render
from frostline.errors import DataError

HELLO = [Job([{"role": "user", "content": "é"}])]


def rendered(text, *, seconds=20.0, jobs=HELLO):
    (first, *_) = render(Template(text=text, seconds=seconds), jobs, where="here:1")
    return first


@pytest.mark.parametrize(
    "endless",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 7 ** (7 ** 9) % 3 }}",  # one operation in C, which no signal interrupts
    ],
)
def test_a_template_that_does_not_end_is_ended_and_the_next_one_works(endless):
    with pytest.raises(DataError, match="here:1: rendering its chat template"):
        rendered(endless, seconds=0.2)
    assert rendered("{{ messages[0].content }}").text == "é"


@pytest.mark.parametrize(
    "huge",
    [
        "{{ 'a' * 10 ** 12 }}",
        "{{ ('a' * 2 ** 31) | length }}",
        "{% set n = namespace(s='ab') %}{% for i in range(40) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}",
    ],
)
def test_a_template_that_grows_without_bound_is_an_error_and_takes_no_memory_of_ours(huge):
    assert rendered(huge).text is None
    assert rendered(huge).error == "it takes too much memory"


def test_a_template_that_writes_too_much_is_an_error():
    found = rendered("{{ 'a' * 17000000 }}")
    assert found.text is None
    assert "17000000 characters" in found.error


@pytest.mark.parametrize(
    "escape",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'content': 'x'}) }}",
        "{{ messages[0].__init__ }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        pytest.param(
            "{{ namespace(__class__=1) }}",
            marks=older_than("5.22", "a namespace takes such a name, and shows the value it was given"),
        ),
        "{% set n = namespace(__class__=1) %}{{ n.__class__.__mro__ }}",
        "{% set n = namespace() %}{% set n.__class__ = 1 %}{{ n.__class__.__base__ }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 1 // 0 }}",
        "{{ nothing.at.all }}",
        "{% if %}",
    ],
)
def test_a_template_that_reaches_out_or_is_broken_gets_nothing(escape):
    found = rendered(escape)
    assert not found.text, "something was reached"
    assert found.error or found.text == ""  # the sandbox gives nothing, or refuses


def test_a_template_sees_only_what_it_is_given():
    found = rendered("{{ config }}{{ self.__dict__ }}{{ request }}{{ lipsum.__globals__ }}")
    assert found.text is None or found.text == ""


def test_today_is_always_the_same_day_so_that_a_resumed_run_has_the_same_tokens():
    assert rendered("{{ strftime_now('%d %b %Y') }}").text == "26 Jul 2024"


def test_a_process_that_was_killed_is_started_again():
    rendered("a")
    worker = templates._worker()
    os.kill(worker.process.pid, 9)
    worker.process.wait()
    with pytest.raises(DataError, match="here:1"):
        rendered("a")
    assert rendered("b").text == "b"


def test_one_process_serves_many_conversations():
    first = templates._worker()
    rendered("a")
    rendered("b")
    assert templates._worker() is first


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads a process's environment from /proc")
def test_the_process_gets_no_secrets_of_the_environment(monkeypatch):
    templates._end()
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    rendered("a")
    environment = Path(f"/proc/{templates._worker().process.pid}/environ").read_bytes()
    assert b"hf_secret" not in environment


@pytest.mark.slow
def test_a_process_whose_parent_is_gone_ends_by_its_own_limit_of_processor_time():
    script = Path(templates.__file__).with_name("template_worker.py")
    code = f"import runpy; serve = runpy.run_path({str(script)!r})['serve']"
    code += "; serve.__globals__['PROCESSOR_SECONDS'] = 1; serve()"
    job = {"messages": [], "tools": [], "prompt": False}
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    request = json.dumps({"template": endless, "variables": {}, "marks": False, "jobs": [job]})
    done = subprocess.run([sys.executable, "-P", "-c", code], input=request.encode(), capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGXCPU
