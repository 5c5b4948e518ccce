"""What is freed stays with the process while it trains, is given back afterwards, and changes no number."""

from __future__ import annotations

import resource
from pathlib import Path
from unittest.mock import Mock

import pytest
import tiny
import torch

from frostline import levers, train
from frostline.engine import Chose, freed_memory
from frostline.engine.freed_memory import can_be_kept, kept
from frostline.levers import freed_memory_for

LARGE, ROUNDS = 128 << 20, 8
glibc = pytest.mark.skipif(not can_be_kept(), reason="the allocator is not glibc's")


def faults_of_a_tensor() -> int:
    """New pages that the system gave for one large tensor, filled."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(LARGE, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@glibc
def test_tensors_get_the_pages_of_those_before() -> None:
    """Most of them: where something small lies behind a freed block, the next one of its size may not fit into it."""
    anew = sum(faults_of_a_tensor() for _ in range(ROUNDS))
    with kept():
        again = sum(faults_of_a_tensor() for _ in range(ROUNDS))
    assert again < anew / 2


@glibc
def test_what_was_kept_is_given_back_at_the_end() -> None:
    before = resident()
    with kept():
        faults_of_a_tensor()
        assert resident() > before + LARGE / 2
    assert resident() < before + LARGE / 2


def test_nothing_is_told_to_the_allocator_where_it_is_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Mock()
    monkeypatch.setattr(freed_memory, "_glibc", lambda: library)
    with kept(wanted=False):
        pass
    library.mallopt.assert_not_called()
    with kept():
        library.mallopt.assert_called()


def test_another_allocator_is_left_alone_and_the_run_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freed_memory, "_glibc", lambda: None)
    with kept():
        pass
    chosen = freed_memory_for(tiny.recipe(tmp_path, freed_memory="keep"), torch.device("cpu"))
    assert (chosen.value, "glibc" in chosen.why) == ("return", True)
    assert freed_memory_for(tiny.recipe(tmp_path), torch.device("cpu")).value == "return"


def test_by_itself_it_is_kept_on_a_cpu_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levers, "can_be_kept", lambda: True)
    recipe = tiny.recipe(tmp_path)
    assert freed_memory_for(recipe, torch.device("cpu")).value == "keep"
    assert freed_memory_for(recipe, torch.device("cuda")).value == "return"
    assert freed_memory_for(tiny.recipe(tmp_path, freed_memory="return"), torch.device("cpu")).value == "return"


def test_a_run_gives_the_same_bytes_either_way_and_says_what_it_chose(tmp_path: Path) -> None:
    files = []
    for how in ("auto", "return"):
        said: list[object] = []
        recipe = tiny.recipe(tmp_path, freed_memory=how)
        train(recipe, out=tmp_path / how, observers=[said.append])
        files.append((tmp_path / how / "model" / "model.safetensors").read_bytes())
        chosen = [e.value for e in said if isinstance(e, Chose) and e.setting == "freed_memory"]
        assert chosen == (["keep" if can_be_kept() else "return"] if how == "auto" else [])
    assert files[0] == files[1]
