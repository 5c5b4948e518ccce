"""No gradient of a frozen weight is computed: looked for among everything that a backward pass makes."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from frostline.anatomy import find_blocks, read_anatomy
from frostline.data import Batch
from frostline.engine.loss import next_token_loss
from frostline.engine.stage_switch import set_modes, switch
from frostline.model import load_model
from frostline.plan import KINDS, trace_stage
from frostline.recipe import ScratchModel, StageSpec
from frostline.schedule import Schedule, Stage
from frostline.selection import select

Made = list[tuple[str, tuple[int, ...]]]
MOVES = ("aten.t", "view", "transpose", "expand", "permute", "alias", "slice", "unsqueeze", "detach", "getitem")
"""Operations that compute nothing."""


class Shapes(TorchDispatchMode):
    """Notes every operation with the shapes it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.made: Made = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        note(self.made, str(func), out)
        return out


def trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without leading dimensions of 1, which sums keep."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape


def note(made: Made, name: str, value: Any) -> None:
    values = value if isinstance(value, (tuple, list)) else [value]
    if not name.removesuffix(".default").removesuffix(".int").removesuffix(".Tensor").endswith(MOVES):
        made.extend((name, trimmed(tuple(v.shape))) for v in values if isinstance(v, torch.Tensor))


def entered(architecture: str, learn: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Stage]:
    model = load_model(ScratchModel(**tiny.config(architecture)), dtype=dtype)
    anatomy = read_anatomy(model)
    spec = StageSpec(learn=learn, steps=1, lr=1e-3)
    stage = Schedule.of([("only", spec, select(anatomy, learn, ties="together"))]).stages[0]
    switch(dict(model.named_parameters(remove_duplicate=False)), anatomy, stage, memory={}, leaving=None)
    set_modes(model, stage)
    return model, stage


def batch() -> Batch:
    """75 tokens: no dimension of a weight."""
    ids = torch.randint(tiny.VOCABULARY, (3, 26), generator=torch.Generator().manual_seed(0))
    return Batch(input_ids=ids[:, :-1], labels=ids[:, 1:])


def eagerly(model: nn.Module) -> Made:
    loss = next_token_loss(model, batch())
    with Shapes() as shapes:
        loss.backward()
    return shapes.made


def compiled(model: nn.Module) -> Made:
    """What the backward graphs of the blocks hold."""
    made: Made = []

    def backward(graph: Any, _inputs: Any) -> Any:
        for node in graph.graph.nodes:
            if node.op == "call_function":
                note(made, str(node.target), node.meta.get("val"))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=lambda g, _: make_boxed_func(g.forward), bw_compiler=backward)
    torch._dynamo.reset()
    for _, block in find_blocks(model):
        block.forward = torch.compile(block.forward, backend=backend, fullgraph=True, dynamic=False)
    next_token_loss(model, batch()).backward()
    assert made
    return made


def of_frozen(model: nn.Module, made: Made) -> set[str]:
    """Frozen weights of whose shape, turned or not, something was made."""
    shapes = {s for _, s in made} | {(*s[:-2], s[-1], s[-2]) for _, s in made if len(s) > 1}
    inside = {id(p) for _, b in find_blocks(model) for p in b.parameters()}
    frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad and id(p) in inside}
    learning = {tuple(p.shape) for p in model.parameters() if p.requires_grad}
    return {n for n, p in frozen.items() if tuple(p.shape) in shapes and tuple(p.shape) not in learning}


ARCHITECTURES = ["llama", "gpt2", "olmo2", "mixtral"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_below_everything_only_the_embedding_learns_and_no_norm_ffn_or_expert_has_a_gradient(architecture: str) -> None:
    """The embedding's gradient passes through every block; norms (RMS and layer), matrices and experts are frozen."""
    model, stage = entered(architecture, "embed")
    assert of_frozen(model, eagerly(model)) == set()
    model, stage = entered(architecture, "embed")
    cost = trace_stage(model, stage.selection.anatomy, stage, rows=2, length=16, n_vocabulary=tiny.VOCABULARY)
    products = {part for part, kinds in cost.flops.items() if kinds[KINDS[3]]}
    assert products == ({"head"} if architecture == "gpt2" else set())  # GPT-2's head is the embedding's own tensor


def test_what_learns_is_seen_by_the_same_look() -> None:
    model, _ = entered("llama", "norm")
    assert (32,) in {s for _, s in eagerly(model)}
    model, _ = entered("mixtral", "experts")
    assert {(4, 96, 32), (4, 32, 96)} & {s for _, s in eagerly(model)}


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf", "ignore:Dynamo detected a call"
)
@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [("llama", torch.float32), ("gpt2", torch.float32), ("mixtral", torch.bfloat16)],
)
def test_compiled_graphs_have_no_gradient_of_a_frozen_weight(architecture: str, dtype: torch.dtype) -> None:
    model, _ = entered(architecture, "embed", dtype)
    assert of_frozen(model, compiled(model)) == set()


def test_below_the_first_part_that_learns_nothing_is_recorded_without_any_no_grad() -> None:
    """What autograd keeps for backward after the forward pass: nothing that the first two of three blocks made."""
    model, _ = entered("llama", "layers[2]")
    kept: list[torch.Tensor] = []
    made: list[int] = []
    for _, block in find_blocks(model)[:2]:
        block.register_forward_hook(lambda *_: made.append(len(kept)))

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        next_token_loss(model, batch())
    assert made == [0, 0]
    assert kept
