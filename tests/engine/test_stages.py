"""Stages end to end: what moves when, how a stage ends, and the faults at a switch that an audit must find."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import save_file
from torch import nn

import frostline
from frostline import ready as ready_module
from frostline import run as running
from frostline.anatomy import Anatomy, Slice, anatomy_of_parts, intersect
from frostline.audit import Audit
from frostline.data import Batch
from frostline.engine import LoopSettings, StageEnded, StepDone, next_token_loss, step, train, train_loop
from frostline.engine.stage_switch import Active, set_modes, switch
from frostline.environment import hash_file
from frostline.errors import NonFiniteError, RecipeError
from frostline.recipe import StageSpec
from frostline.run_folder import RunFolder
from frostline.schedule import Schedule, Stage
from frostline.selection import select

CPU = torch.device("cpu")
OPTIMIZERS = ("sgd", "adam", "adamw", "adafactor", "muon", "adamw8bit", "lion")


def failed(audit: Audit) -> str:
    """What an audit says is wrong, as one text."""
    return "\n".join(f"{e.claim}: {e.measured}" for e in audit.evidence if not e.passed)


# --- what moves when ------------------------------------------------------------------------------------------------

TEN = {
    "llama": [
        "layers[1].attn", "layers[1].ffn", "layers[1].attn.heads[2]", "embed.rows[300:316]", "layers[1].attn",
        "layers[1].attn.heads[2] | layers[1].ffn", "embed.rows[300:316] | head", "layers[1].ffn",
        "layers[1].attn.heads[2]", "embed.rows[300:316] | layers[1].attn",
    ],
    "mixtral": [
        "attn", "experts[1]", "layers[0].attn.heads[1]", "embed.rows[300:316]", "experts[1] | layers[0].attn.heads[1]",
        "attn | experts[1]", "layers[2].ffn", "experts[1]", "layers[0].attn.heads[1] | embed.rows[300:316]", "ffn",
    ],
}  # fmt: skip
"""Attention, FFN, one head, one expert and sixteen rows of the embedding: trained, frozen, trained again."""


def moved_pieces(run: RunFolder, stage: int) -> set[str]:
    before, after = (run.read_boundaries()[stage + k].hashes for k in (0, 1))
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]}


def pieces_in(anatomy: Anatomy, names: set[str], learn: str) -> set[str]:
    """The recorded pieces inside a selection. They are cut by all stages, so a piece is inside or outside."""
    selected = select(anatomy, learn).slices
    pieces = {str(s): s for s in every_piece(anatomy)}
    assert names == set(pieces), "the evidence is kept for other pieces"
    return {n for n, p in pieces.items() if any(intersect(p, s) is not None for s in selected)}


def every_piece(anatomy: Anatomy) -> list[Slice]:
    from frostline.engine.record import cut_pieces

    architecture = anatomy.model_type
    return list(cut_pieces(anatomy, [select(anatomy, e) for e in TEN[architecture]]))


@pytest.mark.parametrize("architecture", TEN)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_over_ten_stages_every_part_moves_exactly_in_those_that_name_it(
    name: str, architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ready_module, "plan_of", lambda *_, **__: None)  # ten stages planned cost more than trained
    if name in ("adamw8bit", "lion"):
        pytest.importorskip("bitsandbytes")
    optimizer = {"name": name, "weight_decay": 0.1} | ({"momentum": 0.9} if name == "sgd" else {})
    policies = ("keep", "offload", "reset")
    stages = [
        {"learn": e, "steps": 1, "lr": 1e-2, "optimizer": optimizer, "state": policies[i % 3]}
        for i, e in enumerate(TEN[architecture])
    ]
    recipe = tiny.recipe(tmp_path, architecture, stages=stages, eval={"batches": 1})
    result = frostline.train(recipe, out=tmp_path / "run")
    assert result.audit.passed, failed(result.audit)
    run = RunFolder.open(tmp_path / "run")
    anatomy = tiny.anatomy(architecture)
    names = set(run.read_boundaries()[0].hashes)
    for i, learn in enumerate(TEN[architecture]):
        assert moved_pieces(run, i) == pieces_in(anatomy, names, learn), learn
        # "zero gradient": moved by weight decay alone, as an expert that no token went to
        rows = {r for r in result.audit.rows if r.stage == f"stage-{i + 1}"}
        moved = {r.component for r in rows if r.verdict in ("moved", "zero gradient")}
        assert moved == {c.name for c, _ in select(anatomy, learn).by_component()}


# --- faults at a switch ---------------------------------------------------------------------------------------------

Fault = Callable[[Active, "Active | None", dict[str, nn.Parameter]], None]


def plant(monkeypatch: pytest.MonkeyPatch, fault: Fault, *, at: int) -> None:
    """After the switch into stage `at` (0-based), do something that a faulty switch would have done."""
    original = train.switch

    def faulty(
        parameters: Any, anatomy: Any, stage: Stage, *, memory: Any, leaving: Active | None, **more: Any
    ) -> Active:
        active = original(parameters, anatomy, stage, memory=memory, leaving=leaving, **more)
        if stage.index == at:
            fault(active, leaving, parameters)
        return active

    monkeypatch.setattr(train, "switch", faulty)


def plant_and_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault, *learn: str, at: int = 1) -> Audit:
    plant(monkeypatch, fault, at=at)
    monkeypatch.setattr(ready_module, "plan_of", lambda *_, **__: None)
    optimizer = {"name": "sgd", "momentum": 0.9}
    stages = [
        {"name": f"stage-{i + 1}", "learn": e, "steps": 2, "lr": 1e-2, "optimizer": optimizer}
        for i, e in enumerate(learn)
    ]
    recipe = tiny.recipe(tmp_path, "gpt2", stages=stages)
    return frostline.train(recipe, out=tmp_path / "run").audit


def frozen_but_moved(audit: Audit) -> set[tuple[str, str]]:
    return {(r.component, r.stage) for r in audit.failures if r.verdict == "FROZEN BUT MOVED"}


def test_a_stale_gradient_of_a_frozen_part_in_an_optimizer_over_everything_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(active: Active, _: Active | None, parameters: dict[str, nn.Parameter]) -> None:
        stale = parameters["transformer.h.2.mlp.c_fc.weight"]
        stale.grad = torch.ones_like(stale)
        owned = {o.value for o in active.ownership.owned}
        active.optimizer.parts[0].add_param_group({"params": list({*parameters.values()} - owned)})
        active.optimizer.param_groups[-1]["peak_lr"] = 1e-2

    audit = plant_and_train(tmp_path, monkeypatch, fault, "ffn", "layers[0].attn")
    assert not audit.passed
    assert frozen_but_moved(audit) == {("layers[2].ffn.up", "stage-2")}
    assert "frozen parts that moved: layers[2].ffn.up (stage stage-2)" in failed(audit)


def test_an_optimizer_of_the_stage_before_that_goes_on_with_its_momentum_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(active: Active, leaving: Active | None, _: dict[str, nn.Parameter]) -> None:
        assert leaving is not None

        def step_both(*_: Any) -> None:
            for group in leaving.optimizer.param_groups:
                for p in group["params"]:
                    p.grad = torch.zeros_like(p)
            leaving.optimizer.step()
            leaving.optimizer.zero_grad()

        active.optimizer.parts[0].register_step_post_hook(step_both)

    audit = plant_and_train(tmp_path, monkeypatch, fault, "layers[1].ffn", "layers[0].attn")
    assert frozen_but_moved(audit) == {("layers[1].ffn.up", "stage-2"), ("layers[1].ffn.down", "stage-2")}


def test_a_leaf_of_the_stage_before_that_is_still_written_back_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(active: Active, leaving: Active | None, _: dict[str, nn.Parameter]) -> None:
        assert leaving is not None
        with torch.no_grad():
            for o in leaving.ownership.owned:
                o.value.mul_(1.01)
        active.optimizer.parts[0].register_step_post_hook(lambda *_: leaving.ownership.write_back())

    audit = plant_and_train(tmp_path, monkeypatch, fault, "layers[1].attn.q", "layers[1].attn.v")
    assert frozen_but_moved(audit) == {("layers[1].attn.q", "stage-2")}


def test_a_forgotten_hook_is_found_although_no_byte_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slice's leaf gets no gradient: the packed parameter keeps it."""

    def fault(active: Active, *_: Any) -> None:
        active.ownership.release()

    audit = plant_and_train(tmp_path, monkeypatch, fault, "ffn", "layers[1].attn.q")
    assert not audit.passed
    said = failed(audit)
    assert "layers[1].attn.q" in said or "transformer.h.1.attn.c_attn.weight" in said
    assert "stage-2" in said


def test_a_thawed_part_that_cannot_have_a_gradient_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`requires_grad` was not set back: nothing moves, and it was not unreachable from the loss either."""

    def fault(_: Active, __: Active | None, parameters: dict[str, nn.Parameter]) -> None:
        parameters["transformer.h.1.mlp.c_fc.weight"].requires_grad_(False)

    audit = plant_and_train(tmp_path, monkeypatch, fault, "ffn", "attn", "ffn", at=2)
    assert not audit.passed
    said = failed(audit)
    assert "layers[1].ffn.up" in said or "transformer.h.1.mlp.c_fc.weight" in said
    assert "stage-3" in said
    assert "layers[0].ffn.up" not in said


def test_a_frozen_part_that_still_collects_gradients_moves_no_byte_and_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Costs time and memory, and one more fault would move it."""

    def fault(_: Active, __: Active | None, parameters: dict[str, nn.Parameter]) -> None:
        parameters["transformer.h.1.mlp.c_fc.weight"].requires_grad_(True)

    audit = plant_and_train(tmp_path, monkeypatch, fault, "ffn", "attn")
    assert not frozen_but_moved(audit)
    assert not audit.passed
    assert "layers[1].ffn.up" in failed(audit) or "transformer.h.1.mlp.c_fc.weight" in failed(audit)


# --- head first, then everything ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Points:
    x: torch.Tensor
    y: torch.Tensor

    @property
    def n_targets(self) -> int:
        return len(self.y)


class TwoLayers(nn.Module):
    """y = v · (B x), linear (Kumar et al. 2022, arXiv 2202.10054)."""

    def __init__(self, body: torch.Tensor, head: torch.Tensor) -> None:
        super().__init__()
        self.body = nn.Parameter(body.clone())
        self.head = nn.Parameter(head.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.body.t() @ self.head


def squared_error(model: nn.Module, data: Points) -> torch.Tensor:
    return (model(data.x) - data.y).square().sum()


class Transfer:
    """d = 20, k = 5, ten noiseless examples from a 10-dimensional subspace; a body that is almost the true one."""

    d, k, n = 20, 5, 10

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.true_body = torch.linalg.qr(normal(self.d, self.k)).Q.t()
        self.true_head = normal(self.k)
        rotation = torch.linalg.qr(normal(self.k, self.k)).Q
        self.body = rotation @ self.true_body + 1e-6 * normal(self.k, self.d)
        self.head = normal(self.k)
        x = normal(self.n, self.d // 2) @ torch.linalg.qr(normal(self.d, self.d // 2)).Q.t()
        x *= (self.d / 2) ** 0.5 / x.norm(dim=1, keepdim=True)
        self.examples = Points(x, self.answer(x))

    def answer(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.true_body.t() @ self.true_head

    def out_of_distribution_error(self, model: TwoLayers) -> float:
        """E over x ~ N(0, I) of the squared error: the squared norm of the difference of the two linear maps."""
        map_ = model.head.detach() @ model.body.detach()
        return float((map_ - self.true_head @ self.true_body).square().sum())

    def train(self, folder: Path, *stages: tuple[str, int]) -> tuple[TwoLayers, RunFolder]:
        model = TwoLayers(self.body, self.head)
        anatomy = anatomy_of_parts(model, {"body": ["body"], "head": ["head"]})
        settings = {"lr": 0.05, "clip": None, "optimizer": {"name": "sgd", "momentum": 0.9, "weight_decay": 0.0}}
        specs = [
            (f"stage-{i + 1}", StageSpec.model_validate({"learn": e, "steps": n, **settings}), select(anatomy, e))
            for i, (e, n) in enumerate(stages)
        ]
        run = RunFolder.create(folder)
        done = train_loop(
            model, anatomy, Schedule.of(specs), lambda *_: [self.examples], squared_error,
            folder=run, settings=LoopSettings(gradients_every=1000),
        )  # fmt: skip
        run.write_status("finished", step=done.steps)
        run.model.mkdir()
        save_file(dict(model.state_dict()), run.model / "model.safetensors")
        run.write_model_files({"model.safetensors": hash_file(run.model / "model.safetensors")})
        return model, run


def test_head_first_then_everything_keeps_the_pretrained_features_that_joint_training_distorts(tmp_path: Path) -> None:
    task = Transfer()
    joint, joint_run = task.train(tmp_path / "joint", ("all", 400))
    staged, staged_run = task.train(tmp_path / "staged", ("head", 300), ("all", 100))
    for model in (joint, staged):
        assert float(squared_error(model, task.examples).detach()) < 1e-3  # both fit the examples: 16 at the start
    errors = [task.out_of_distribution_error(m) for m in (joint, staged)]
    moved = [float((m.body.detach() - task.body).norm()) for m in (joint, staged)]
    assert errors[0] / errors[1] > 1e6
    assert moved[0] / moved[1] > 1e4
    audits = [frostline.audit(run.path) for run in (joint_run, staged_run)]
    assert [failed(a) for a in audits] == ["", ""]
    rows = {(r.component, r.stage): r for r in audits[1].rows}
    assert rows["body", "stage-1"].verdict == "unchanged"
    assert rows["body", "stage-1"].bytes_changed == 0
    assert rows["head", "stage-1"].verdict == "moved"
    body = rows["body", "stage-2"]
    assert body.declared == "learns"
    assert body.relative_change is not None
    assert body.relative_change == pytest.approx(moved[1] / float(task.body.norm()), rel=1e-6)


# --- accumulation ---------------------------------------------------------------------------------------------------


def unequal_rows() -> Batch:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(tiny.VOCABULARY, (8, 13), generator=generator)
    labels = ids[:, 1:].clone()
    for row, n_ignored in enumerate((0, 11, 5, 12, 1, 0, 9, 2)):  # one row without any target
        labels[row, :n_ignored] = -100
    return Batch(input_ids=ids[:, :-1], labels=labels)


@pytest.mark.parametrize("learn", ["all", "attn.q | embed | head"])
def test_four_micro_batches_give_the_gradient_and_the_update_of_one_batch(learn: str) -> None:
    found: list[dict[str, torch.Tensor]] = []
    updated: list[dict[str, torch.Tensor]] = []
    data = unequal_rows()
    assert len({m.n_targets for m in data.split(4)}) > 1
    for n in (1, 4):
        model = tiny.model("gpt2").eval()
        anatomy = tiny.anatomy("gpt2")
        spec = StageSpec.model_validate({"learn": learn, "steps": 1, "lr": 0.1, "optimizer": "sgd"})
        stage = Schedule.of([("s", spec, select(anatomy, learn, ties="together"))]).stages[0]
        parameters = dict(model.named_parameters(remove_duplicate=False))
        active = switch(parameters, anatomy, stage, memory={}, leaving=None)
        before = {str(o.piece): o.value.detach().clone() for o in active.ownership.owned}
        step(model, data.split(n), next_token_loss, seed=0, device=CPU)
        found.append({str(o.piece): o.value.grad.clone() for o in active.ownership.owned if o.value.grad is not None})
        active.optimizer.step()
        updated.append({str(o.piece): o.value.detach() - before[str(o.piece)] for o in active.ownership.owned})
    assert found[0].keys() == found[1].keys() == updated[0].keys()
    largest = max(float(g.norm()) for g in found[0].values())
    for name, g in found[0].items():
        if float(g.norm()) > 1e-6 * largest:  # the key bias of softmax attention has none but rounding
            assert float((g - found[1][name]).norm() / g.norm()) < 1e-6, name
            assert float((updated[0][name] - updated[1][name]).norm() / updated[0][name].norm()) < 1e-5, name


# --- how a stage ends -----------------------------------------------------------------------------------------------


def small(folder: Path, stages: Sequence[dict[str, Any]], **fields: Any) -> Any:
    return tiny.recipe(folder, "gpt2", stages=list(stages), **fields)


def test_tokens_and_epochs_become_the_steps_that_the_closed_form_gives(tmp_path: Path) -> None:
    stages = [
        {"learn": "ffn", "tokens": 1, "lr": 1e-3},
        {"learn": "ffn", "tokens": 256, "lr": 1e-3},
        {"learn": "ffn", "tokens": 257, "lr": 1e-3},
        {"learn": "ffn", "epochs": 0.1, "lr": 1e-3},
        {"learn": "ffn", "epochs": 1, "lr": 1e-3},
    ]
    result = frostline.train(small(tmp_path, stages), out=tmp_path / "run")
    assert result.audit.passed, failed(result.audit)
    run = RunFolder.open(tmp_path / "run")
    size = run.read_step_size()
    assert size is not None
    assert (size["tokens"], size["rows"]) == (4 * 32, 4)
    expected = [1, 2, 3, math.ceil(0.1 * size["n_rows"] / 4), math.ceil(size["n_rows"] / 4)]
    assert [s.end - s.start for s in run.read_schedule()] == expected
    assert result.steps == sum(expected)
    steps = [row for row in run.read_lines(run.metrics) if "loss" in row]
    assert len(steps) == sum(expected)
    one_epoch = [row for row in steps if row["stage"] == "stage-5"]
    assert abs(sum(row["n_targets"] for row in one_epoch) - size["n_rows"] * 32) < 4 * 32


NEVER = {"every": 1, "patience": 2, "min_delta": 100.0}
"""No measurement after the first is a new best, so the stage ends after its third step."""


@pytest.fixture(scope="module")
def ended_early(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three stages, of which the second ends at a plateau after 3 of 8 steps."""
    folder = tmp_path_factory.mktemp("plateau")
    stages = [
        {"name": "first", "learn": "attn", "steps": 2, "lr": 1e-3},
        {"name": "until-flat", "learn": "ffn", "steps": 8, "lr": 1e-3, "plateau": NEVER},
        {"name": "last", "learn": "attn.q", "steps": 3, "lr": 1e-3, "decay": "linear"},
    ]
    frostline.train(small(folder, stages), out=folder / "run")
    return folder / "run"


def test_a_plateau_ends_a_stage_early_and_what_follows_is_laid_anew(ended_early: Path) -> None:
    run = RunFolder.open(ended_early)
    assert [(s.start, s.end) for s in run.read_schedule()] == [(0, 2), (2, 5), (5, 8)]
    endings = run.read_lines(run.endings)
    assert [(e["stage"], e["step"], e["why"]) for e in endings] == [
        (0, 2, "its time"),
        (1, 5, "plateau"),
        (2, 8, "its time"),
    ]
    assert [b.step for b in run.read_boundaries()] == [0, 2, 5, 8]
    rows = [row for row in run.read_lines(run.metrics) if "loss" in row]
    assert [row["stage"] for row in rows] == ["first"] * 2 + ["until-flat"] * 3 + ["last"] * 3
    assert [row["lr"] for row in rows[5:]] == pytest.approx([1e-3, 1e-3 * 2 / 3, 1e-3 / 3])
    audit = frostline.audit(ended_early)
    assert audit.passed, failed(audit)


def test_the_observers_hear_how_many_steps_a_plateau_left_out(tmp_path: Path) -> None:
    heard: list[StageEnded] = []
    stages = [{"learn": "ffn", "steps": 9, "lr": 1e-3, "plateau": NEVER}]
    frostline.train(
        small(tmp_path, stages), out=tmp_path / "run",
        observers=[lambda e: heard.append(e) if isinstance(e, StageEnded) else None],
    )  # fmt: skip
    assert [(e.step, e.n_skipped, e.stage.n_steps) for e in heard] == [(3, 6, 3)]


def test_a_stage_whose_loss_keeps_falling_runs_to_its_end(tmp_path: Path) -> None:
    stages = [{"learn": "all", "steps": 6, "lr": 1e-3, "plateau": {"every": 2, "patience": 1}}]
    result = frostline.train(small(tmp_path, stages), out=tmp_path / "run")
    run = RunFolder.open(tmp_path / "run")
    losses = [r["held_out_loss"] for r in run.read_lines(run.metrics) if "held_out_loss" in r]
    assert losses == sorted(losses, reverse=True)
    assert result.steps == 6
    assert [e["why"] for e in run.read_lines(run.endings)] == ["its time"]
    assert result.audit.passed


def test_each_stage_has_a_plateau_of_its_own_and_no_memory_of_the_one_before(tmp_path: Path) -> None:
    stages = [{"name": n, "learn": n, "steps": 8, "lr": 1e-3, "plateau": NEVER} for n in ("ffn", "attn")]
    result = frostline.train(small(tmp_path, stages), out=tmp_path / "run")
    assert result.steps == 6
    assert [(s.start, s.end) for s in RunFolder.open(tmp_path / "run").read_schedule()] == [(0, 3), (3, 6)]
    assert result.audit.passed, failed(result.audit)


def test_every_boundary_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from frostline.engine.record import Recorder

    seen: list[int] = []
    original = Recorder.boundary

    def boundary(self: Recorder, index: int, **fields: Any) -> None:
        seen.append(index)
        original(self, index, **fields)

    monkeypatch.setattr(Recorder, "boundary", boundary)
    stages = [{"learn": "ffn", "steps": 8, "lr": 1e-3, "plateau": NEVER}]
    frostline.train(small(tmp_path, stages), out=tmp_path / "run")
    assert seen == [0, 1]


def test_a_plateau_without_held_out_data_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    task = Transfer()
    model = TwoLayers(task.body, task.head)
    anatomy = anatomy_of_parts(model, {"body": ["body"], "head": ["head"]})
    spec = StageSpec.model_validate({"learn": "all", "steps": 9, "lr": 1e-3, "plateau": NEVER})
    with pytest.raises(RecipeError, match="ends at a plateau of the held-out loss, but there is no held-out data"):
        train_loop(
            model, anatomy, Schedule.of([("s", spec, select(anatomy, "all"))]), lambda *_: [task.examples],
            squared_error, folder=RunFolder.create(tmp_path / "run"), settings=LoopSettings(),
        )  # fmt: skip
    assert torch.equal(model.body.detach(), task.body)


def copy_of(run: Path, to: Path) -> Path:
    return Path(shutil.copytree(run, to / "run"))


def edit_metrics(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = run / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        change(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows if row))


def a_loss_that_fell(row: dict[str, Any]) -> None:
    if row.get("held_out_loss") and row["step"] == 5:
        row["held_out_loss"] -= 1000


def a_measurement_less(row: dict[str, Any]) -> None:
    if "held_out_loss" in row and row["step"] == 4:
        row.clear()


def a_loss_that_is_no_number(row: dict[str, Any]) -> None:
    if "held_out_loss" in row and row["step"] == 4:
        row["held_out_loss"] = math.nan


@pytest.mark.parametrize("change", [a_loss_that_fell, a_measurement_less, a_loss_that_is_no_number])
def test_a_plateau_that_the_recorded_losses_do_not_show_fails_the_audit(
    ended_early: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    run = copy_of(ended_early, tmp_path)
    edit_metrics(run, change)
    said = failed(frostline.audit(run))
    assert "stages that the recipe asks for otherwise than they were scheduled: until-flat" in said


@pytest.mark.parametrize(("first", "second"), [(4, 7), (6, 9)])
def test_a_plateau_that_came_earlier_or_later_than_the_schedule_says_fails_the_audit(
    ended_early: Path, tmp_path: Path, first: int, second: int
) -> None:
    run = copy_of(ended_early, tmp_path)
    path = run / "schedule.json"
    data = json.loads(path.read_text())
    data["stages"][1]["end"] = data["stages"][2]["start"] = first
    data["stages"][2]["end"] = second
    path.write_text(json.dumps(data))
    assert "otherwise than they were scheduled: until-flat" in failed(frostline.audit(run))


def test_a_stage_that_ended_early_without_a_plateau_fails_the_audit(tmp_path: Path) -> None:
    stages = [{"name": "short", "learn": "ffn", "steps": 3, "lr": 1e-3}]
    frostline.train(small(tmp_path, stages), out=tmp_path / "run")
    recipe = tmp_path / "run" / "recipe.yaml"
    text = recipe.read_text()
    assert text.count("steps: 3") == 1
    recipe.write_text(text.replace("steps: 3", "steps: 4"))
    assert "otherwise than they were scheduled: short: learn ffn, 4 steps" in failed(frostline.audit(tmp_path / "run"))


def test_a_stage_that_went_on_after_its_plateau_fails_the_audit(tmp_path: Path) -> None:
    """The recorded losses stood still after three steps, and the stage trained for five."""
    stages = [{"name": "long", "learn": "ffn", "steps": 5, "lr": 1e-3, "plateau": {**NEVER, "min_delta": 0.0}}]
    frostline.train(small(tmp_path, stages), out=tmp_path / "run")
    run = tmp_path / "run"
    assert frostline.audit(run).passed

    def stand_still(row: dict[str, Any]) -> None:
        if "held_out_loss" in row:
            row["held_out_loss"] = 1.0

    edit_metrics(run, stand_still)
    assert "otherwise than they were scheduled: long" in failed(frostline.audit(run))


def test_a_run_stopped_inside_a_stage_with_a_plateau_has_whole_evidence(tmp_path: Path) -> None:
    """Also right after a plateau: the evidence of the stage that ended is not written again as another's."""
    for stop_at in (3, 4, 5):
        task = Transfer()
        model = TwoLayers(task.body, task.head)
        anatomy = anatomy_of_parts(model, {"body": ["body"], "head": ["head"]})
        specs = [
            (e, StageSpec.model_validate({"learn": e, "steps": 8, "lr": 1e-3, "plateau": NEVER}), select(anatomy, e))
            for e in ("body", "head")
        ]
        run = RunFolder.create(tmp_path / str(stop_at))
        calls = [0]

        def stop(calls: list[int] = calls, stop_at: int = stop_at) -> bool:
            calls[0] += 1
            return calls[0] > stop_at

        done = train_loop(
            model, anatomy, Schedule.of(specs), lambda *_, task=task: [task.examples], squared_error, folder=run,
            settings=LoopSettings(), held_out=[task.examples], stop=stop,
        )  # fmt: skip
        run.write_status("interrupted", step=done.steps)
        assert (done.steps, done.finished) == (stop_at, False)
        assert [b.step for b in run.read_boundaries()] == [0, 3, stop_at][: 2 if stop_at == 3 else 3]
        audit = frostline.audit(run.path)
        assert [e.claim for e in audit.evidence if not e.passed] == ["every stage ran to its end"]


@pytest.mark.parametrize("at", [1, 3, 4])
def test_an_interrupted_run_with_plateaus_is_unfinished_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """What a run has not come to cannot contradict its recipe: no loss was due there yet."""

    @contextmanager
    def stop_after(n_steps: int) -> Iterator[Callable[[], bool]]:
        yield lambda: len(seen) >= n_steps

    seen: list[StepDone] = []
    monkeypatch.setattr(running, "stop_on_signal", lambda: stop_after(at))
    monkeypatch.setattr(ready_module, "plan_of", lambda *_, **__: None)
    plateau = {"every": 2, "patience": 1}
    stages = [{"learn": n, "steps": 6, "lr": 1e-3, "plateau": plateau} for n in ("ffn", "attn")]
    result = frostline.train(
        small(tmp_path, stages),
        out=tmp_path / "run",
        observers=[lambda e: seen.append(e) if isinstance(e, StepDone) else None],
    )
    assert (result.state, result.steps) == ("interrupted", at)
    assert failed(result.audit) == f"every stage ran to its end: {at} steps"


def test_numbers_that_are_not_finite_at_the_first_step_of_a_stage_leave_whole_evidence(tmp_path: Path) -> None:
    task = Transfer()
    model = TwoLayers(task.body, task.head)
    anatomy = anatomy_of_parts(model, {"body": ["body"], "head": ["head"]})
    specs = [(e, StageSpec(learn=e, steps=2, lr=1e-3), select(anatomy, e)) for e in ("body", "head")]
    bad = Points(task.examples.x, task.examples.y * math.nan)
    run = RunFolder.create(tmp_path / "run")
    with pytest.raises(NonFiniteError, match=r"step 3 \(stage head, batch 2\)"):
        train_loop(
            model, anatomy, Schedule.of(specs), lambda i, _: [bad if i == 2 else task.examples], squared_error,
            folder=run, settings=LoopSettings(),
        )  # fmt: skip
    assert [b.step for b in run.read_boundaries()] == [0, 2, 2]
    assert moved_pieces(run, 1) == set()


# --- dropout --------------------------------------------------------------------------------------------------------


def frozen_branch_twice(policy: str, learn: str, watched: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What a submodule gives for one input under two seeds, in training, with dropout everywhere."""
    model = tiny.model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.0)
    anatomy = tiny.anatomy("gpt2")
    spec = StageSpec.model_validate({"learn": learn, "steps": 1, "lr": 1e-3, "frozen_dropout": policy})
    stage = Schedule.of([("s", spec, select(anatomy, learn))]).stages[0]
    switch(dict(model.named_parameters(remove_duplicate=False)), anatomy, stage, memory={}, leaving=None)
    set_modes(model, stage)
    seen: list[torch.Tensor] = []
    module = model.get_submodule(watched)
    module.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
    for seed in (0, 1):
        step(model, [unequal_rows()], next_token_loss, seed=seed, device=CPU)
    return seen[0].detach(), seen[1].detach()


@pytest.mark.parametrize(
    ("learn", "watched", "frozen"),
    [
        ("layers[1:]", "transformer.h.0", True),
        ("layers[:2]", "transformer.h.0", False),
        ("ffn", "transformer.h.0.attn", True),
        ("attn", "transformer.h.0.attn", False),
        ("attn.q", "transformer.h.0.attn", False),
        ("layers[0].attn.heads[1]", "transformer.h.0.attn", False),
    ],
)
def test_dropout_is_off_in_what_is_frozen_and_on_in_what_learns(learn: str, watched: str, frozen: bool) -> None:
    first, second = frozen_branch_twice("off", learn, watched)
    assert torch.equal(first, second) == frozen
    first, second = frozen_branch_twice("on", learn, watched)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("learn", "policy", "on"),
    [("layers[1:]", "off", False), ("ffn", "off", False), ("layers[1:]", "on", True), ("embed", "off", True)],
)
def test_the_embeddings_dropout_is_off_where_nothing_of_the_embedding_learns(learn: str, policy: str, on: bool) -> None:
    model, anatomy = tiny.model("gpt2", embd_pdrop=0.5), tiny.anatomy("gpt2")
    spec = StageSpec.model_validate({"learn": learn, "steps": 1, "lr": 1e-3, "frozen_dropout": policy})
    stage = Schedule.of([("s", spec, select(anatomy, learn, ties="together"))]).stages[0]
    switch(dict(model.named_parameters(remove_duplicate=False)), anatomy, stage, memory={}, leaving=None)
    set_modes(model, stage)
    assert model.transformer.drop.training == on


def test_dropout_comes_back_in_what_thaws_and_after_a_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = [
        {"learn": "layers[1:]", "steps": 2, "lr": 1e-3},
        {"learn": "layers[0]", "steps": 2, "lr": 1e-3},
        {"learn": "layers[0]", "steps": 1, "lr": 1e-3, "frozen_dropout": "on"},
    ]
    model = tiny.config("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.0)
    recipe = small(tmp_path, stages, model=model, eval={"every": 1, "batches": 1})
    loaded: list[nn.Module] = []
    original = ready_module.load_weights

    def load(*args: Any, **fields: Any) -> nn.Module:
        loaded.append(original(*args, **fields))
        for block in loaded[0].transformer.h:  # type: ignore[union-attr]
            block.register_forward_pre_hook(lambda m, _: now.append(m.training))
        return loaded[0]

    now: list[bool] = []
    monkeypatch.setattr(ready_module, "load_weights", load)
    monkeypatch.setattr(ready_module, "plan_of", lambda *_, **__: None)
    frostline.train(recipe, out=tmp_path / "run")
    passes = [tuple(now[i : i + 3]) for i in range(0, len(now), 3)]
    modes = [p for p in passes if any(p)]
    assert modes == [(False, True, True)] * 2 + [(True, False, False)] * 2 + [(True, True, True)]
