"""Switches, ownership, clipping and write-back under FSDP2, against the same schedule in one process.

Two gloo ranks run every case of `sharded_ranks.py` once for the whole file; the tests judge what they found.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sharded_ranks
from sharded_ranks import CASES, CLIP, FAULTS, N_RANKS

LIMIT_S = 120
Finding = dict[str, Any]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",  # no look-up of this machine's name
    }
    command = [sys.executable, sharded_ranks.__file__]
    processes = []
    for rank in range(N_RANKS):
        with (folder / f"log-{rank}.txt").open("w") as log:
            processes.append(
                subprocess.Popen([*command, str(rank), str(folder)], stdout=log, stderr=log, env=environment)
            )
    wait_for(processes, folder)
    return [json.loads((folder / f"rank-{rank}.json").read_text(encoding="utf-8")) for rank in range(N_RANKS)]


def wait_for(processes: list[subprocess.Popen[bytes]], folder: Path) -> None:
    """Wait until all have ended well; when one has not, or time is up, end them and show their last words."""
    deadline = time.monotonic() + LIMIT_S
    try:
        while any(p.poll() is None for p in processes):
            if any(p.poll() for p in processes) or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        codes = [p.poll() for p in processes]
    finally:
        for p in processes:
            p.kill()
            p.wait()
    if any(codes) or None in codes:
        logs = "\n".join(f"rank {r}: …{(folder / f'log-{r}.txt').read_text()[-3000:]}" for r in range(N_RANKS))
        pytest.fail(f"exit codes {codes} (None: still running after {LIMIT_S} s, or ended with the other)\n{logs}")


def frozen_keeps_its_bytes(found: Finding, _: float) -> bool:
    return bool(found["frozen_moved"] == 0)


def learning_goes_the_same_way(found: Finding, tolerance: float) -> bool:
    return bool(found["learning_moved"] > 0.9 and found["movement_error"] < tolerance)


def norms_agree(found: Finding, tolerance: float) -> bool:
    return bool(found["norm_error"] < tolerance)


def state_is_the_same(found: Finding, _: float) -> bool:
    same = all(here == alone for here, alone in (*found["restored"], *found["n_steps"]))
    return same and found["misshapen"] == 0


Check = Callable[[Finding, float], bool]


def failing(check: Check, ranks: list[dict[str, Any]], name: str, kind: str = "cases") -> list[tuple[int, Finding]]:
    """The ranks for which a check does not hold, with what they found."""
    case = CASES[name] if kind == "cases" else FAULTS[name][0]
    tolerance = 1e-5 if case.single_precision else 1e-9
    return [(i, rank[kind][name]) for i, rank in enumerate(ranks) if not check(rank[kind][name], tolerance)]


@pytest.mark.parametrize("name", CASES)
def test_frozen_elements_keep_their_bytes_on_every_rank(ranks: list[dict[str, Any]], name: str) -> None:
    assert not failing(frozen_keeps_its_bytes, ranks, name)


@pytest.mark.parametrize("name", CASES)
def test_learning_elements_go_the_way_they_go_in_one_process(ranks: list[dict[str, Any]], name: str) -> None:
    assert not failing(learning_goes_the_same_way, ranks, name)


@pytest.mark.parametrize("name", CASES)
def test_the_norm_before_clipping_is_that_of_one_process(ranks: list[dict[str, Any]], name: str) -> None:
    assert not failing(norms_agree, ranks, name)
    assert ranks[0]["cases"][name]["smallest_norm"] > CLIP, "every step is to be clipped"


@pytest.mark.parametrize("name", CASES)
def test_optimizer_state_survives_switches_as_in_one_process(ranks: list[dict[str, Any]], name: str) -> None:
    assert not failing(state_is_the_same, ranks, name)


@pytest.mark.parametrize(
    ("schedule", "stage", "n_here"),
    [
        ("rows of the first shard", 0, [512, 0]),
        ("rows of the last shard", 0, [0, 512]),
        ("rows across both shards", 0, [288, 224]),
        ("single experts", 0, [4608, 0]),
        ("single experts", 2, [0, 4608]),
        ("neurons of an expert", 0, [0, 576]),
        ("every seventh neuron", 0, [288, 288]),
        ("packed q", 0, [1088, 1024]),
    ],
)
def test_a_slice_may_lie_in_one_shard_or_across_both(
    ranks: list[dict[str, Any]], schedule: str, stage: int, n_here: list[int]
) -> None:
    assert [rank["cases"][f"{schedule} (adamw)"]["n_here"][stage] for rank in ranks] == n_here


def test_a_rank_that_holds_nothing_steps_with_the_other(ranks: list[dict[str, Any]]) -> None:
    found = ranks[1]["cases"]["rows of the first shard (adamw)"]
    assert found["n_here"] == [0, 0, 0]
    assert [here for here, _ in found["n_steps"]] == [[2], [2, 4], [4, 6]]


def test_parts_with_different_histories_have_step_counts_of_their_own(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        found = rank["cases"]["a head, then all of q (adamw)"]
        assert [here for here, _ in found["n_steps"]][:3] == [[2], [2, 4], [2, 4, 6]]


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ("write-back by indexing the DTensor", learning_goes_the_same_way),
        ("a forgotten hook", learning_goes_the_same_way),
        ("a forgotten hook", norms_agree),
        ("the whole shard owned", frozen_keeps_its_bytes),
        ("a norm of one rank alone", norms_agree),
        ("a norm that counts copies", norms_agree),
        ("a root left gathered", learning_goes_the_same_way),
    ],
)
def test_a_planted_fault_fails_the_check_it_is_for(ranks: list[dict[str, Any]], fault: str, check: Check) -> None:
    assert failing(check, ranks, fault, "faults")


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_an_optimizer_that_treats_a_matrix_as_one_thing_is_refused(ranks: list[dict[str, Any]], name: str) -> None:
    for rank in ranks:
        assert rank["refusals"][name].startswith(f"{name} treats a matrix as one thing")
