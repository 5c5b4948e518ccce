"""Every optimizer on whole tensors and on slices: what it may change, what it remembers over switches, what it costs.

The references share no code with the engine: a slice is compared with a parameter of its own, put together with the
rest into the packed tensor outside the model.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from torch.func import functional_call

from frostline.anatomy import Slice, anatomy_of_parts, part, put, read_anatomy, take
from frostline.data import Batch
from frostline.engine import check_installed, next_token_loss, optimizers, step
from frostline.engine.owned import own
from frostline.engine.stage_bytes import state_bytes
from frostline.engine.stage_switch import Active, Memory, switch
from frostline.errors import RecipeError
from frostline.prepared import make_selections
from frostline.recipe import StageSpec
from frostline.schedule import Schedule, Stage
from frostline.selection import select

CPU = torch.device("cpu")
TORCH = ("sgd", "adam", "adamw", "adafactor", "muon")
BITSANDBYTES = ("adamw8bit", "lion")
RATE = 1e-2


def need(name: str) -> None:
    if name in BITSANDBYTES:
        pytest.importorskip("bitsandbytes")


def optimizer_settings(name: str) -> dict[str, Any]:
    return {"name": name, "weight_decay": 0.1} | ({"momentum": 0.9} if name == "sgd" else {})


def batch(seed: int) -> Batch:
    ids = torch.randint(tiny.VOCABULARY, (2, 13), generator=torch.Generator().manual_seed(seed))
    return Batch(input_ids=ids[:, :-1], labels=ids[:, 1:].clone())


def make_stage(model: nn.Module, learn: str, name: str, state: str = "keep") -> Stage:
    settings = {"learn": learn, "steps": 9, "lr": RATE, "optimizer": optimizer_settings(name), "state": state}
    return Schedule.of([("s", StageSpec.model_validate(settings), select(read_anatomy(model), learn))]).stages[0]


class Training:
    """A model that goes through switches and steps as the loop does it, without clipping and evidence."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model, self.name = model, name
        self.parameters = dict(model.named_parameters())
        self.memory: Memory = {}
        self.active: Active | None = None
        self.steps = 0

    def enter(self, learn: str, state: str = "keep") -> Active:
        stage = make_stage(self.model, learn, self.name, state)
        anatomy = stage.selection.anatomy
        self.active = switch(self.parameters, anatomy, stage, memory=self.memory, leaving=self.active)
        return self.active

    def step(self, n: int = 1, *, clear: bool = True) -> None:
        assert self.active is not None
        for _ in range(n):
            step(self.model, [batch(self.steps)], next_token_loss, seed=0, device=CPU)
            self.active.optimizer.step()
            self.active.ownership.write_back()
            if clear:
                self.active.optimizer.zero_grad()
            self.steps += 1


# --- switches -------------------------------------------------------------------------------------------------------

KINDS = {
    "whole tensors": ("llama", "layers[0].ffn", "layers[1].ffn", "attn"),
    "slices": ("gpt2", "attn.q", "attn.k", "attn.v"),
    "experts": ("mixtral", "experts[0]", "experts[1]", "experts[2]"),
}
"""What a stage trains beside what both train, and what the stage between trains instead of it."""


def small_model(architecture: str) -> nn.Module:
    """Wide enough that 8-bit AdamW quantises the state of a square matrix: from 4096 elements on."""
    size = {"n_embd": 64, "n_layer": 2} if architecture == "gpt2" else {"hidden_size": 64, "num_hidden_layers": 2}
    return tiny.model(architecture, **size).eval()  # no dropout: the references below have no seeds


def state_at(active: Active, piece: Slice) -> dict[str, torch.Tensor]:
    """The optimizer's state for one piece of a leaf: tensors in the piece's shape, counters as they are."""
    for o in active.ownership.owned:
        if o.piece.tensor != piece.tensor:
            continue
        marked = torch.zeros(o.parameter.shape, dtype=torch.bool)
        put(marked, o.piece, torch.ones(o.piece.shape, dtype=torch.bool))
        if not take(marked, piece).all():
            continue
        out = {}
        for key, value in active.optimizer.state_of(o.value).items():
            out[key] = torch.as_tensor(value).detach().clone()
            if out[key].dim() and value.numel() == o.piece.n_elements:
                whole = torch.full(o.parameter.shape, torch.nan)
                put(whole, o.piece, value.float().reshape(o.piece.shape))
                out[key] = take(whole, piece).clone()
        return out
    raise AssertionError(f"nothing owns {piece}")


def pieces_of(model: nn.Module, learn: str) -> list[Slice]:
    return [s for _, found in select(read_anatomy(model), learn).by_component() for s in found]


def states(active: Active, pieces: Sequence[Slice]) -> dict[str, dict[str, torch.Tensor]]:
    return {str(p): state_at(active, p) for p in pieces}


def assert_same(mine: dict[str, dict[str, torch.Tensor]], expected: dict[str, dict[str, torch.Tensor]]) -> None:
    assert mine.keys() == expected.keys()
    for piece, state in expected.items():
        assert state, f"{piece} has no state"
        assert mine[piece].keys() == state.keys()
        for key, value in state.items():
            assert torch.equal(mine[piece][key], value), f"{piece}: {key}"


def assert_afresh(mine: dict[str, dict[str, torch.Tensor]]) -> None:
    for piece, state in mine.items():
        assert not any(bool(v.any()) for v in state.values()), piece


def step_counts(found: dict[str, dict[str, torch.Tensor]]) -> set[float]:
    return {float(s["step"]) for s in found.values() if "step" in s}


def assert_only_these_moved(before: dict[str, torch.Tensor], model: nn.Module, learn: str) -> None:
    """Every byte outside `learn` is what it was; every piece of `learn` moved."""
    allowed = {n: torch.zeros_like(t, dtype=torch.bool) for n, t in before.items()}
    pieces = pieces_of(model, learn)
    for p in pieces:
        put(allowed[p.tensor], p, torch.ones(p.shape, dtype=torch.bool))
    moved = {n: p.detach().view(torch.int32) != before[n].view(torch.int32) for n, p in model.named_parameters()}
    assert [n for n in moved if bool((moved[n] & ~allowed[n]).any())] == []
    assert [str(p) for p in pieces if not take(moved[p.tensor], p).any()] == []


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("policy", ["keep", "reset", "offload"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TORCH + BITSANDBYTES)
def test_what_is_frozen_keeps_its_bytes_and_what_thaws_has_the_state_that_was_asked_for(
    name: str, kind: str, policy: str
) -> None:
    need(name)
    architecture, thawed, shared, between = KINDS[kind]
    training = Training(small_model(architecture), name)
    model = training.model

    def enter_and_step(learn: str, n: int) -> dict[str, torch.Tensor]:
        before = snapshot(model)
        training.step(n)
        assert_only_these_moved(before, model, learn)
        return before

    first, second = f"{thawed} | {shared}", f"{between} | {shared}"
    active = training.enter(first, policy)
    enter_and_step(first, 3)
    left = states(active, pieces_of(model, thawed))
    going_on = states(active, pieces_of(model, shared))

    active = training.enter(second, policy)
    found = states(active, pieces_of(model, shared))
    assert_same(found, going_on) if policy != "reset" else assert_afresh(found)
    assert_afresh(states(active, pieces_of(model, between)))
    enter_and_step(second, 2)
    going_on = states(active, pieces_of(model, shared))

    active = training.enter(first, policy)
    n_leaves = len(active.ownership.owned)
    found = states(active, pieces_of(model, thawed))
    assert_same(found, left) if policy == "offload" else assert_afresh(found)
    found = states(active, pieces_of(model, shared))
    assert_same(found, going_on) if policy != "reset" else assert_afresh(found)
    assert (active.n_restored == n_leaves) == (policy == "offload")
    assert (active.n_restored == 0) == (policy == "reset")
    enter_and_step(first, 1)
    counted = (
        step_counts(states(active, pieces_of(model, thawed))),
        step_counts(states(active, pieces_of(model, shared))),
    )
    if counted[0]:
        expected = {"keep": ({1.0}, {6.0}), "reset": ({1.0}, {1.0}), "offload": ({4.0}, {6.0})}
        assert counted == expected[policy]


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_state_of_another_optimizer_is_never_given_to_a_leaf(name: str) -> None:
    training = Training(small_model("gpt2"), "sgd")
    training.enter("attn", "offload")
    training.step(2)
    training.name = name
    active = training.enter("attn.q", "offload")
    assert active.n_restored == 0
    training.step(1)
    training.name = "sgd"
    active = training.enter("attn", "offload")
    assert 0 < active.n_restored < len(active.ownership.owned)
    # q went on with another optimizer: what SGD knew of it is out of date
    assert_afresh(states(active, pieces_of(training.model, "attn.q")))
    for piece, state in states(active, pieces_of(training.model, "attn.{k,v}")).items():
        assert bool(state["momentum_buffer"].any()), piece
    training.step(1)


@pytest.mark.parametrize("name", TORCH + BITSANDBYTES)
def test_a_leaf_whose_first_gradient_comes_after_the_others_trains_like_them(name: str) -> None:
    """A part may be out of the loss's reach at first: its leaf then has no state when the others have one."""
    need(name)
    model = nn.ModuleDict({n: nn.Linear(4, 4, bias=False) for n in ("early", "late")})
    anatomy = anatomy_of_parts(model, {"layers[0].early": ["early"], "layers[0].late": ["late"]})
    spec = StageSpec.model_validate({"learn": "all", "steps": 3, "lr": RATE, "optimizer": optimizer_settings(name)})
    stage = Schedule.of([("s", spec, select(anatomy, "all"))]).stages[0]
    active = switch(dict(model.named_parameters()), anatomy, stage, memory={}, leaving=None)
    moved = []
    for branches in (["early"], ["early", "late"], ["late"]):
        before = snapshot(model)
        sum(model[b](torch.ones(4)).square().sum() for b in branches).backward()  # type: ignore[union-attr]
        active.optimizer.step()
        active.optimizer.zero_grad()
        moved.append([b for b in ("early", "late") if not torch.equal(model[b].weight, before[f"{b}.weight"])])
    assert moved == [["early"], ["early", "late"], ["late"]]


# --- a slice against a parameter of its own -------------------------------------------------------------------------


class Reference(nn.Module):
    """A model whose packed tensors are put together from parameters of their own, outside the model.

    `layouts`: name of a packed tensor → (its parts, from it; the packed tensor, from its parts).
    """

    def __init__(
        self,
        model: nn.Module,
        layouts: dict[str, tuple[Callable[[torch.Tensor], Sequence[torch.Tensor]], Callable[..., torch.Tensor]]],
    ) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.join = {name: join for name, (_, join) in layouts.items()}
        self.pieces: dict[str, list[nn.Parameter]] = {}
        for name, (split, _) in layouts.items():
            parts = [nn.Parameter(p.clone().contiguous()) for p in split(model.get_parameter(name).detach())]
            self.pieces[name] = parts

    def forward(self, **inputs: Any) -> Any:
        packed = {name: self.join[name](parts) for name, parts in self.pieces.items()}
        return functional_call(self.model, packed, (), inputs)

    def train_alone(self, learning: Sequence[nn.Parameter], optimizers: Sequence[Any], n_steps: int) -> None:
        for p in (p for parts in self.pieces.values() for p in parts):
            p.requires_grad_(any(p is q for q in learning))
        for i in range(n_steps):
            data = batch(i)
            (next_token_loss(self, data) / data.n_targets).backward()
            for o in optimizers:
                o.step()
                o.zero_grad()


def by_hand(name: str, matrices: Sequence[nn.Parameter], vectors: Sequence[nn.Parameter] = ()) -> list[Any]:
    """The library's optimizer over parameters of their own: matrices decayed, vectors not."""
    groups = [{"params": list(matrices), "weight_decay": 0.1}]
    groups += [{"params": list(vectors), "weight_decay": 0.0}] if vectors else []
    match name:
        case "sgd":
            return [torch.optim.SGD(groups, lr=RATE, momentum=0.9, foreach=False)]
        case "adam":
            return [torch.optim.Adam(groups, lr=RATE, foreach=False)]
        case "adamw":
            return [torch.optim.AdamW(groups, lr=RATE, foreach=False)]
        case "adafactor":
            return [torch.optim.Adafactor(groups, lr=RATE, foreach=False)]
        case "muon":
            muon = torch.optim.Muon(matrices, lr=RATE, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
            return [muon, *([torch.optim.AdamW(vectors, lr=RATE, weight_decay=0.0)] if vectors else [])]
    library = pytest.importorskip("bitsandbytes").optim
    if name == "lion":
        return [library.Lion(groups, lr=RATE, betas=(0.9, 0.99))]
    return [library.AdamW8bit(groups, lr=RATE, betas=(0.9, 0.999), eps=1e-8)]


def thirds(dim: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    return (lambda packed: packed.chunk(3, dim), lambda parts: torch.cat(list(parts), dim))


def gate_and_up_per_expert() -> tuple[Callable[..., Any], Callable[..., Any]]:
    def split(packed: torch.Tensor) -> list[torch.Tensor]:
        return [half for expert in packed.unbind(0) for half in expert.chunk(2, 0)]

    def join(parts: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.stack([torch.cat(list(parts[i : i + 2]), 0) for i in range(0, len(parts), 2)])

    return split, join


def per_expert() -> tuple[Callable[..., Any], Callable[..., Any]]:
    return (lambda packed: packed.unbind(0), lambda parts: torch.stack(list(parts)))


def train_query(name: str, dtype: torch.dtype, n_steps: int) -> tuple[nn.Module, Reference, dict[str, torch.Tensor]]:
    """GPT-2's q: as a slice, and as tensors of its own; with the reference's packed tensors."""
    sliced = small_model("gpt2").to(dtype)
    names = [f"transformer.h.{i}.attn.c_attn.{kind}" for kind in ("weight", "bias") for i in range(2)]
    reference = Reference(small_model("gpt2").to(dtype), {n: thirds(-1) for n in names})
    queries = [reference.pieces[n][0] for n in names]
    reference.train_alone(queries, by_hand(name, queries[:2], queries[2:]), n_steps)
    training = Training(sliced, name)
    training.enter("attn.q")
    training.step(n_steps)
    return sliced, reference, {n: reference.join[n](reference.pieces[n]) for n in names}


def train_expert(name: str, dtype: torch.dtype, n_steps: int) -> tuple[nn.Module, Reference, dict[str, torch.Tensor]]:
    """Expert 1 of every layer of Mixtral: as slices, and as tensors of its own."""
    models = [tiny.model("mixtral", num_hidden_layers=2).to(dtype) for _ in range(2)]
    for m in models:
        m.set_experts_implementation("eager")  # grouped products have no fp64
    packed = {f"model.layers.{i}.mlp.experts.{n}": n for i in range(2) for n in ("gate_up_proj", "down_proj")}
    layouts = {n: gate_and_up_per_expert() if kind == "gate_up_proj" else per_expert() for n, kind in packed.items()}
    reference = Reference(models[1], layouts)
    own_of = {"gate_up_proj": slice(2, 4), "down_proj": slice(1, 2)}
    experts = [p for n, kind in packed.items() for p in reference.pieces[n][own_of[kind]]]
    reference.train_alone(experts, by_hand(name, experts), n_steps)
    training = Training(models[0], name)
    training.enter("experts[1]")
    training.step(n_steps)
    return models[0], reference, {n: reference.join[n](reference.pieces[n]) for n in packed}


SLICED = {"the query of a packed projection": train_query, "an expert of a packed tensor": train_expert}


def relative_distance(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((mine - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("what", SLICED)
@pytest.mark.parametrize("name", TORCH)
def test_a_slice_trains_as_a_tensor_of_its_own_would_for_fifty_steps(name: str, what: str) -> None:
    sliced, reference, packed = SLICED[what](name, torch.float64, 50)
    moved = 0.0
    for n, theirs in packed.items():
        assert relative_distance(sliced.get_parameter(n).detach(), theirs.detach()) < 1e-9, n
        moved = max(moved, relative_distance(theirs.detach(), reference.model.get_parameter(n).detach()))
    assert moved > 0.01  # the reference's own model still holds the initial weights


@pytest.mark.parametrize("what", SLICED)
@pytest.mark.parametrize("name", TORCH)
def test_the_loss_of_a_slices_training_in_fp32_is_that_of_a_tensor_of_its_own(name: str, what: str) -> None:
    sliced, reference, _ = SLICED[what](name, torch.float32, 20)
    data = batch(1000)
    with torch.no_grad():
        mine, theirs = (float(next_token_loss(m, data)) / data.n_targets for m in (sliced, reference))
    assert mine == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize("what", SLICED)
@pytest.mark.parametrize("name", BITSANDBYTES)
def test_a_slice_trains_as_bitsandbytes_trains_a_tensor_of_its_own(name: str, what: str) -> None:
    need(name)
    sliced, _, packed = SLICED[what](name, torch.float32, 20)
    for n, theirs in packed.items():
        assert relative_distance(sliced.get_parameter(n).detach(), theirs.detach()) < 1e-6, n


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def older_objects_set_aside() -> Iterator[None]:
    """What is alive already is not looked at: with transformers loaded that is a million objects."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def live_bytes() -> int:
    """Bytes of all storages that any live tensor, or its gradient, keeps."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    return storage_bytes(tensors)


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


def stored_bytes(memory: Memory) -> int:
    return storage_bytes(t for s in memory.values() for t in s.state.values() if isinstance(t, torch.Tensor))


def live_after(name: str, stages: Sequence[tuple[str, str]]) -> int:
    """Bytes that a run keeps alive in its last stage, gradients included, what was offloaded not."""
    before = live_bytes()
    training = Training(small_model("gpt2"), name)
    for learn, policy in stages:
        training.enter(learn, policy)
        training.step(1, clear=False)
    return live_bytes() - before - stored_bytes(training.memory)


@pytest.mark.usefixtures("older_objects_set_aside")
@pytest.mark.parametrize("name", TORCH + BITSANDBYTES)
def test_after_a_switch_no_more_memory_is_alive_than_in_a_run_that_starts_there(name: str) -> None:
    need(name)
    first, between, last = "attn.{q,k} | layers[1].ffn", "attn.v", "attn.k | layers[0].ffn"
    fresh = live_after(name, [(last, "keep")])
    assert fresh > 0
    for policy in ("keep", "reset", "offload"):
        # 8-bit AdamW: what kept its state kept the table of its code too, two of 256 numbers
        tables = 2048 if name == "adamw8bit" and policy == "keep" else 0
        assert live_after(name, [(first, policy), (between, policy), (last, policy)]) == fresh
        assert fresh <= live_after(name, [(first, policy), (last, policy)]) <= fresh + tables


@pytest.mark.parametrize("name", TORCH + BITSANDBYTES)
def test_the_predicted_bytes_of_optimizer_state_are_the_measured_ones(name: str) -> None:
    need(name)
    training = Training(small_model("mixtral"), name)
    active = training.enter("attn.q | experts[1] | norm | layers[0].ffn.router")
    training.step(1)
    tensors = [t for o in active.ownership.owned for t in active.optimizer.state_of(o.value).items()]
    measured = sum(
        t.numel() * t.element_size()
        for key, t in tensors
        if isinstance(t, torch.Tensor) and t.dim() and not key.startswith(("qmap", "absmax"))
    )
    assert state_bytes(active.stage, lambda _: 4) == measured


# --- which optimizer for which leaf ---------------------------------------------------------------------------------


def test_muon_takes_the_matrices_inside_layers_and_adamw_everything_else() -> None:
    for architecture in ("mixtral", "gpt2"):
        training = Training(tiny.model(architecture), "muon")
        active = training.enter("all")
        training.step(1)
        by_kind: dict[bool, set[str]] = {True: set(), False: set()}
        for o in active.ownership.owned:
            by_kind["momentum_buffer" in active.optimizer.state_of(o.value)].add(o.piece.tensor)
        every = dict(training.model.named_parameters())
        inside = {n for n, p in every.items() if ".layers." in n or ".h." in n if p.dim() > 1}
        assert by_kind == {True: inside, False: set(every) - inside}
        assert all(len(o.value.shape) == 2 for o in active.ownership.owned if o.piece.tensor in inside)


def test_muon_without_any_matrix_and_with_nothing_but_matrices_both_work() -> None:
    for learn, kinds in (("norm", {"AdamW"}), ("attn", {"Muon"}), ("all", {"Muon", "AdamW"})):
        training = Training(tiny.model("llama"), "muon")
        active = training.enter(learn)
        assert {type(p).__name__ for p in active.optimizer.parts} == kinds
        training.step(1)


@pytest.mark.parametrize("name", BITSANDBYTES)
def test_an_optimizer_that_is_not_installed_is_refused_with_what_to_install(
    name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizers, "find_spec", lambda library: None if library == "bitsandbytes" else library)
    line = rf"the optimizer {name} needs bitsandbytes: pip install 'frostline\[bitsandbytes\]'"
    with pytest.raises(RecipeError, match=line):
        check_installed(name)
    recipe = tiny.recipe(tmp_path, stages=[{"learn": "ffn", "steps": 1, "lr": 1e-3, "optimizer": name}])
    with pytest.raises(RecipeError, match=line):
        make_selections(recipe, tiny.anatomy("llama"))
    for known in TORCH:
        check_installed(known)


def test_betas_by_part_reach_their_leaves_and_the_optimizers_own_are_the_default() -> None:
    need("lion")
    model = tiny.model("llama")
    anatomy = read_anatomy(model)
    for name, default in (
        ("adamw", (0.9, 0.999)),
        ("adam", (0.9, 0.999)),
        ("muon", (0.9, 0.999)),
        ("lion", (0.9, 0.99)),
    ):
        for given, embed in (({"embed": [0.5, 0.6], "rest": [0.7, 0.8]}, (0.5, 0.6)), (None, default)):
            optimizer = {"name": name} | ({"betas": given} if given else {})
            spec = StageSpec.model_validate({"learn": "embed | norm", "steps": 2, "lr": 1e-3, "optimizer": optimizer})
            stage = Schedule.of([("s", spec, select(anatomy, spec.learn))]).stages[0]
            active = switch(dict(model.named_parameters()), anatomy, stage, memory={}, leaving=None)
            betas = {p: tuple(g["betas"]) for g in active.optimizer.param_groups for p in g["params"]}
            for p, found in betas.items():
                rest = (0.7, 0.8) if given else default
                assert found == (embed if p is model.get_parameter("model.embed_tokens.weight") else rest)


# --- leaves in another dtype or place -------------------------------------------------------------------------------


def test_steps_below_the_resolution_of_bf16_add_up_in_an_fp32_master() -> None:
    weights = {kind: nn.Parameter(torch.ones(4, 6, dtype=torch.bfloat16)) for kind in ("master", "plain")}
    owned = {
        "master": own(weights, [part("master", (4, 6), 1, range(2, 5))], master_dtype=torch.float32),
        "plain": own(weights, [part("plain", (4, 6), 1, range(2, 5))]),
    }
    for kind, ownership in owned.items():
        (o,) = ownership.owned
        assert o.is_copy
        assert o.value.dtype == (torch.float32 if kind == "master" else torch.bfloat16)
        sgd = torch.optim.SGD([o.value], lr=1.0)
        for _ in range(64):  # 2^-10 each: a quarter of bf16's spacing below 1
            (weights[kind].float().sum() * 2**-10).backward()
            assert weights[kind].grad is None
            assert o.value.grad is not None
            assert o.value.grad.dtype == o.value.dtype
            sgd.step()
            ownership.write_back()
            sgd.zero_grad()
    expected = torch.ones(4, 6)
    expected[:, 2:5] = 1 - 64 * 2**-10
    assert torch.equal(weights["master"].detach().float(), expected)
    assert torch.equal(weights["plain"].detach().float(), torch.ones(4, 6))
    assert torch.equal(owned["master"].owned[0].value.detach(), expected[:, 2:5])


def test_a_whole_tensor_with_a_master_in_another_dtype_is_owned_as_a_copy_and_written_back_rounded() -> None:
    weight = nn.Parameter(torch.randn(5, 3).bfloat16())
    (o,) = (ownership := own({"w": weight}, [part("w", (5, 3), 0, range(5))], master_dtype=torch.float32)).owned
    assert o.is_copy
    values = torch.randn(5, 3)
    with torch.no_grad():
        o.value.copy_(values)
    ownership.write_back()
    assert torch.equal(weight.detach(), values.bfloat16())
    assert weight.dtype == torch.bfloat16
    assert torch.equal(o.value.detach(), values)  # the master keeps what bf16 cannot hold


def test_a_leaf_in_the_parameters_own_dtype_and_place_is_the_parameter_itself() -> None:
    weight = nn.Parameter(torch.randn(5, 3))
    piece = part("w", (5, 3), 0, range(5))
    (o,) = own({"w": weight}, [piece], master_dtype=torch.float32, device=CPU).owned
    assert o.value is weight
    assert not o.is_copy


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_a_leaf_on_another_device_gets_gradients_there_and_is_written_back() -> None:
    weight = nn.Parameter(torch.ones(5, 3, device="cuda"))
    ownership = own({"w": weight}, [part("w", (5, 3), 0, range(1, 3))], device=CPU)
    (o,) = ownership.owned
    weight.sum().backward()
    assert o.value.device == CPU
    assert weight.grad is None
    torch.optim.SGD([o.value], lr=0.5).step()
    ownership.write_back()
    assert weight.detach().cpu().sum(1).tolist() == [3.0, 1.5, 1.5, 3.0, 3.0]
