from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import nn

from frostline.anatomy import Anatomy, part, put, read_anatomy, take, whole
from frostline.engine.loss import next_token_loss
from frostline.engine.owned import own, relative
from frostline.engine.stage_switch import Active, Memory, switch
from frostline.engine.step import step
from frostline.recipe import StageSpec
from frostline.schedule import Schedule, Stage
from frostline.selection import select

CPU = torch.device("cpu")
OPTIMIZERS: list[dict[str, Any]] = [
    {"name": "adamw", "weight_decay": 0.1},
    {"name": "adam", "weight_decay": 0.1},
    {"name": "sgd", "momentum": 0.9, "weight_decay": 0.1},
]


def one_stage(anatomy: Anatomy, learn: str, **settings: Any) -> Stage:
    spec = StageSpec.model_validate({"learn": learn, "steps": 100, "lr": 1e-2, **settings})
    return Schedule.of([("only", spec, select(anatomy, learn))]).stages[0]


def batch(n_rows: int = 4, length: int = 16, seed: int = 0) -> Any:
    from frostline.data import Batch

    ids = torch.randint(tiny.VOCABULARY, (n_rows, length + 1), generator=torch.Generator().manual_seed(seed))
    return Batch(input_ids=ids[:, :-1], labels=ids[:, 1:])


def run_steps(model: nn.Module, active: Active, n_steps: int, lr: float = 1e-2) -> None:
    for i in range(n_steps):
        step(model, [batch(seed=i)], next_token_loss, seed=i, device=CPU)
        for group in active.optimizer.param_groups:
            group["lr"] = lr
        active.optimizer.step()
        active.ownership.write_back()
        active.optimizer.zero_grad()


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters(remove_duplicate=False))


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: o["name"])
@pytest.mark.parametrize(
    ("architecture", "learn"),
    [
        ("gpt2", "attn.q"),
        ("gpt2", "layers[1].attn.{k,v} | layers[0].ffn.up"),
        ("mixtral", "experts[1]"),
        ("mixtral", "experts[0,2].gate | router"),
        ("gpt2", "layers[::2].attn.heads[1,3]"),
        ("gpt_neox", "attn.heads[2] | ffn.neurons[5:40:7]"),
        ("gpt_oss", "experts[1,3].gate | kv_heads[1]"),
        ("llama", "ffn.neurons[40:] | head.rows[::2]"),
    ],
)
def test_everything_outside_the_selection_keeps_its_bytes(
    architecture: str, learn: str, optimizer: dict[str, Any]
) -> None:
    model = tiny.model(architecture)
    anatomy = read_anatomy(model)
    before = {n: p.detach().clone() for n, p in parameters(model).items()}
    active = switch(parameters(model), anatomy, one_stage(anatomy, learn, optimizer=optimizer), memory={}, leaving=None)
    run_steps(model, active, 5)
    for name, after in parameters(model).items():
        moved = after.detach() != before[name]
        allowed = torch.zeros_like(moved)
        for s in select(anatomy, learn).slices:
            if s.tensor == name:
                put(allowed, s, torch.ones(s.shape, dtype=torch.bool))
                assert take(moved, s).float().mean() > 0.5, f"{s} should have moved"
        assert not bool((moved & ~allowed).any()), name


class SplitLinear(nn.Module):
    """GPT-2's packed projection with q, k and v as parameters of their own: the reference without slices."""

    def __init__(self, packed: nn.Module) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(w.clone()) for w in packed.weight.detach().chunk(3, dim=1)])
        self.biases = nn.ParameterList([nn.Parameter(b.clone()) for b in packed.bias.detach().chunk(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ torch.cat(list(self.weights), dim=1) + torch.cat(list(self.biases))


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: o["name"])
def test_a_slice_trains_as_a_tensor_of_its_own_would(optimizer: dict[str, Any]) -> None:
    sliced, split = tiny.model("gpt2").double(), tiny.model("gpt2").double()
    anatomy = read_anatomy(sliced)
    stage = one_stage(anatomy, "attn.q", optimizer=optimizer)
    active = switch(parameters(sliced), anatomy, stage, memory={}, leaving=None)
    run_steps(sliced, active, 20)

    split.requires_grad_(False)
    projections = []
    for block in split.transformer.h:  # type: ignore[union-attr]
        block.attn.c_attn = SplitLinear(block.attn.c_attn)
        projections.append(block.attn.c_attn)
    weights = [p.weights[0].requires_grad_() for p in projections]
    biases = [p.biases[0].requires_grad_() for p in projections]
    for p in projections:
        for other in (*p.weights[1:], *p.biases[1:]):
            other.requires_grad_(False)
    groups = [{"params": weights, "weight_decay": optimizer["weight_decay"]}, {"params": biases, "weight_decay": 0.0}]
    make = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}[optimizer["name"]]
    settings = {"momentum": 0.9} if optimizer["name"] == "sgd" else {}
    reference = make(groups, lr=1e-2, foreach=False, **settings)
    for i in range(20):
        step(split, [batch(seed=i)], next_token_loss, seed=i, device=CPU)
        reference.step()
        reference.zero_grad()
    for block, projection in zip(sliced.transformer.h, projections, strict=True):  # type: ignore[union-attr]
        width = block.attn.c_attn.weight.shape[1] // 3
        mine, theirs = block.attn.c_attn.weight.detach()[:, :width], projection.weights[0].detach()
        assert float((mine - theirs).norm() / theirs.norm()) < 1e-12
        assert torch.allclose(block.attn.c_attn.bias[:width], projection.biases[0], rtol=0, atol=1e-13)


def test_optimizer_memory_exists_only_for_what_learns() -> None:
    model = tiny.model("mixtral")
    anatomy = read_anatomy(model)
    active = switch(parameters(model), anatomy, one_stage(anatomy, "experts[1]"), memory={}, leaving=None)
    run_steps(model, active, 1)
    states = [active.optimizer.state_of(o.value) for o in active.ownership.owned]
    n_state = sum(t.numel() for s in states for k, t in s.items() if k in ("exp_avg", "exp_avg_sq"))
    assert n_state == 2 * select(anatomy, "experts[1]").n_elements


def test_every_leaf_given_to_an_optimizer_is_contiguous() -> None:
    for architecture, learn in (("gpt2", "attn.q"), ("mixtral", "experts[1].up"), ("gpt2", "all")):
        model = tiny.model(architecture)
        anatomy = read_anatomy(model)
        active = switch(parameters(model), anatomy, one_stage(anatomy, learn), memory={}, leaving=None)
        leaves = [p for g in active.optimizer.param_groups for p in g["params"]]
        assert leaves
        assert all(p.is_contiguous() and p.is_leaf for p in leaves)


def test_a_whole_tensor_that_is_not_contiguous_is_owned_as_a_copy() -> None:
    parameter = nn.Parameter(torch.randn(4, 6).t())
    ownership = own({"w": parameter}, [whole("w", (6, 4))])
    assert ownership.owned[0].is_copy
    assert ownership.owned[0].value.is_contiguous()


def test_gradients_of_a_slice_accumulate_over_backward_passes_and_the_packed_one_is_cleared() -> None:
    w = nn.Parameter(torch.arange(12.0).reshape(3, 4))
    ownership = own({"w": w}, [part("w", (3, 4), 1, range(1, 3))])
    x = torch.randn(5, 3)
    for _ in range(2):
        (x @ w).sum().backward()
    assert w.grad is None
    expected = 2 * x.sum(0)[:, None].expand(3, 2)
    assert torch.allclose(ownership.owned[0].value.grad, expected)  # type: ignore[arg-type]
    ownership.release()
    (x @ w).sum().backward()
    assert w.grad is not None


def test_neighbouring_slices_share_one_leaf_where_the_optimizer_treats_elements_alone() -> None:
    model = tiny.model("mixtral")
    anatomy = read_anatomy(model)
    shapes = {}
    for name in ("adamw", "adafactor", "muon"):
        stage = one_stage(anatomy, "experts[1] & layers[0]", optimizer={"name": name})
        owned = switch(parameters(model), anatomy, stage, memory={}, leaving=None).ownership.owned
        shapes[name] = sorted(tuple(o.value.shape) for o in owned)
    assert shapes["adamw"] == [(32, 48), (96, 32)]
    assert shapes["adafactor"] == shapes["muon"] == [(32, 48), (48, 32), (48, 32)]


def test_relative_finds_a_piece_inside_its_container() -> None:
    container = part("w", (8, 6), 1, range(2, 6))
    piece = part("w", (8, 6), 1, range(3, 5))
    tensor = torch.randn(8, 6)
    inside = relative(piece, container)
    assert inside is not None
    assert torch.equal(take(take(tensor, container), inside), take(tensor, piece))
    assert relative(container, piece) is None


def test_a_switch_clears_gradients_and_sets_requires_grad_exactly() -> None:
    model = tiny.model("llama")
    anatomy = read_anatomy(model)
    memory: Memory = {}
    first = switch(parameters(model), anatomy, one_stage(anatomy, "all"), memory=memory, leaving=None)
    step(model, [batch()], next_token_loss, seed=0, device=CPU)
    switch(parameters(model), anatomy, one_stage(anatomy, "ffn"), memory=memory, leaving=first)
    learning = {s.tensor for s in select(anatomy, "ffn").slices}
    for name, p in parameters(model).items():
        assert p.grad is None
        assert p.requires_grad == (name in learning)


def test_kept_state_continues_and_reset_state_starts_afresh() -> None:
    for policy, expected_step in (("keep", 4.0), ("reset", 1.0)):
        model = tiny.model("gpt2")
        anatomy = read_anatomy(model)
        memory: Memory = {}
        first = switch(parameters(model), anatomy, one_stage(anatomy, "all"), memory=memory, leaving=None)
        run_steps(model, first, 3)
        stage = one_stage(anatomy, "attn.q", state=policy)
        old = {
            n: first.optimizer.state_of(p)["exp_avg"].clone() for n, p in parameters(model).items() if p.requires_grad
        }
        second = switch(parameters(model), anatomy, stage, memory=memory, leaving=first)
        if policy == "keep":
            assert second.n_restored == len(second.ownership.owned)
            for o in second.ownership.owned:
                expected = take(old[o.piece.tensor], o.piece)
                assert torch.equal(second.optimizer.state_of(o.value)["exp_avg"], expected)
        run_steps(model, second, 1)
        assert {float(second.optimizer.state_of(o.value)["step"]) for o in second.ownership.owned} == {expected_step}


def test_parts_of_one_tensor_with_different_histories_are_leaves_of_their_own() -> None:
    model = tiny.model("gpt2")
    anatomy = read_anatomy(model)
    memory: Memory = {}
    first = switch(parameters(model), anatomy, one_stage(anatomy, "attn.q"), memory=memory, leaving=None)
    run_steps(model, first, 2)
    second = switch(parameters(model), anatomy, one_stage(anatomy, "attn"), memory=memory, leaving=first)
    run_steps(model, second, 1)
    steps: dict[tuple[int, ...], set[float]] = {}
    for o in second.ownership.owned:
        if "c_attn.weight" in o.piece.tensor:
            steps.setdefault(tuple(o.value.shape), set()).add(float(second.optimizer.state_of(o.value)["step"]))
    assert steps == {(32, 32): {3.0}, (32, 64): {1.0}}


def test_norms_and_biases_are_not_decayed_unless_asked() -> None:
    model = tiny.model("gpt2")
    anatomy = read_anatomy(model)
    active = switch(parameters(model), anatomy, one_stage(anatomy, "all"), memory={}, leaving=None)
    names = {id(p): n for n, p in model.named_parameters()}
    for group in active.optimizer.param_groups:
        for p in group["params"]:
            is_plain = "ln_" not in names[id(p)] and not names[id(p)].endswith("bias")
            assert group["weight_decay"] == (0.01 if is_plain else 0.0)
    stage = one_stage(anatomy, "all", optimizer={"decay_norms_and_biases": True})
    everything = switch(parameters(model), anatomy, stage, memory={}, leaving=None)
    assert {g["weight_decay"] for g in everything.optimizer.param_groups} == {0.01}
