"""LISA and BAdam trained: memory as the papers say, by the bytes of the tensors that are alive, and every chosen layer
moves."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from frostline import RunResult, train
from frostline.engine import RunStarted, StageStarted, StepDone
from frostline.engine import train as loop
from frostline.recipe import Recipe, recipe_from_dict
from frostline.run_folder import RunFolder
from frostline.schedule.named import draw

N_LAYERS = 4
ADAM = 8
"""Bytes of two fp32 moments per parameter."""


def recipe_of(folder: Path, schedule: dict[str, Any], **changes: Any) -> Recipe:
    values = tiny.recipe_dict(folder, eval={"batches": 1})
    del values["stages"]
    values["model"] |= {"num_hidden_layers": N_LAYERS, "tie_word_embeddings": False}
    return recipe_from_dict({**values, "schedule": {"lr": 1e-3, **schedule}, **changes})


LISA: dict[str, Any] = {"name": "lisa", "layers": 2, "every": 1, "steps": 5, "always": "embed | head | final_norm"}
BADAM: dict[str, Any] = {"name": "badam", "every": 1, "steps": 5}


def live_bytes() -> int:
    """Bytes of the storages of all tensors that are alive in this process."""
    storages = {}
    for found in gc.get_objects():
        if type(found) in (torch.Tensor, torch.nn.Parameter):
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class StateMeter:
    """An observer: what is alive after every step beyond what was alive when the run began."""

    def __init__(self) -> None:
        self.start = 0
        self.found: list[tuple[int, int, int]] = []
        """(parameters that learn, leaves, bytes) after every step."""
        self.n_owned = 0

    def __call__(self, event: object) -> None:
        match event:
            case RunStarted():
                gc.collect()
                self.start = live_bytes()
            case StageStarted():
                self.n_owned = event.n_owned
            case StepDone():
                n = event.stage.selection.n_elements
                self.found.append((n, self.n_owned, live_bytes() - self.start))


@dataclass(frozen=True, kw_only=True)
class Done:
    """A finished run of a schedule, its state metered."""

    schedule: dict[str, Any]
    folder: Path
    result: RunResult
    meter: StateMeter


@pytest.fixture(scope="module", params=[LISA, BADAM], ids=["lisa", "badam"])
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder, meter = tmp_path_factory.mktemp("run"), StateMeter()
    result = train(recipe_of(folder, request.param), out=folder / "run", observers=[meter])
    return Done(schedule=request.param, folder=folder / "run", result=result, meter=meter)


def test_only_what_learns_now_has_optimizer_state_however_many_layers_have_learned(done: Done) -> None:
    meter = done.meter
    assert done.result.audit.passed
    assert len(meter.found) == done.schedule["steps"]
    for n_learning, n_owned, found in meter.found:
        counters = 4 * n_owned  # every leaf counts its steps
        assert 0 <= found - (ADAM * n_learning + counters) <= 2048, "moments of what learns, and nothing of the rest"


def test_offloading_holds_the_state_of_every_layer_that_has_learned(tmp_path: Path) -> None:
    """What the test above would see if frozen layers kept their moments."""
    meter = StateMeter()
    schedule = BADAM | {"state": "offload"}
    train(recipe_of(tmp_path, schedule), out=tmp_path / "run", observers=[meter])
    per_layer = ADAM * meter.found[0][0]
    held = [round(found / per_layer) for _, _, found in meter.found]
    assert held == [1, 2, 3, 4, 4]


def test_a_layer_that_is_chosen_later_moves_then_and_not_before(done: Done) -> None:
    stages, result = RunFolder.open(done.folder).read_schedule(), done.result
    chosen_later = set()
    for stage in stages:
        for i in range(N_LAYERS):
            learns = any(f"layers.{i}." in s.tensor for s in stage.learning)
            rows = [r for r in result.audit.rows if r.stage == stage.name and r.component.startswith(f"layers[{i}].")]
            assert len(rows) == 9
            assert all((r.bytes_changed > 0) == learns for r in rows)
            if learns and stage.index:
                chosen_later.add(i)
    assert len(chosen_later) > 2


def test_an_optimizer_made_once_for_the_first_draw_fails_the_audit(tmp_path: Path, monkeypatch) -> None:
    """What other trainers have done: later layers got gradients and were in no optimizer."""
    real, made = loop.switch, []

    def switch(*args: Any, **kwargs: Any) -> Any:
        active = real(*args, **kwargs)
        made.append(active)
        active.optimizer.step = made[0].optimizer.step
        return active

    monkeypatch.setattr(loop, "switch", switch)
    result = train(recipe_of(tmp_path, BADAM | {"steps": 2}), out=tmp_path / "run")
    assert not result.audit.passed
    assert {r.verdict for r in result.audit.rows if r.stage == "block-2" and r.declared == "learns"} == {
        "LEARNING BUT UNMOVED"
    }


SEED = next(s for s in range(99) if draw(s, 0, N_LAYERS, 1) == draw(s, 1, N_LAYERS, 1) != draw(s, 2, N_LAYERS, 1))
"""Draws one layer twice in a row, then another."""


def test_what_is_always_on_keeps_its_moments_while_drawn_layers_lose_theirs(tmp_path: Path) -> None:
    restored: list[int] = []

    def note(event: object) -> None:
        if isinstance(event, StageStarted):
            restored.append(event.n_restored)

    train(recipe_of(tmp_path, LISA | {"layers": 1, "steps": 4, "seed": SEED}), out=tmp_path / "run", observers=[note])
    drawn = [s.learn for s in RunFolder.open(tmp_path / "run").read_schedule()]
    assert restored[0] == 0
    assert restored[1] == 3 + 9
    for before, after, n in zip(drawn, drawn[1:], restored[1:], strict=False):
        assert n == (3 if before != after else 3 + 9), "embedding, head and norm; and a layer drawn twice in a row"
