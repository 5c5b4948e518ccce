"""The trial of a wiring: what its points do to gradients of a tiny model is compared with what they are to do.

At everything above the place where branch and skip part, the true gradient is the sum of the one with the skip stopped
and the one with the branch stopped, and with both stopped there is none: no scale has to be known. Read `tried` first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from frostline.anatomy import Anatomy, find_blocks, part_modules
from frostline.engine.route_points import RoutePoint
from frostline.engine.routes import Points, Signature, Wiring, placed, set_routes, signature_of
from frostline.errors import first_line
from frostline.schedule import Route

TOLERANCE = 1e-3
"""Relative; fp32 rounding gives 1e-6, wrong wirings gave 0.6 and more."""
N_TOKENS = 8


def tried(model: nn.Module, anatomy: Anatomy, wirings: Mapping[Signature, Wiring]) -> dict[Signature, Wiring]:
    """The wirings without the points that a tiny model contradicts. `model` is changed: its parts become points."""
    layer_of: dict[Signature, int] = {}
    for layer in range(anatomy.n_layers):  # the last of each kind: something lies before it
        layer_of[signature_of(part_modules(model, anatomy, layer))] = layer
    points = placed(model, anatomy, wirings)
    out = dict(wirings)
    for kind, layer in layer_of.items():
        trial = _Trial(model=model, anatomy=anatomy, points=points, layer=layer)
        for point in wirings[kind].points:
            try:
                why = trial.fault(point)
            except RuntimeError as error:  # cutting what something else needs
                why = f"a trial of it fails: {first_line(error)}"
            if why is not None:
                out[kind] = out[kind].without(point, why)
    return out


@dataclass(frozen=True, kw_only=True)
class _Gradients:
    """Of one pass through a block with a fixed cotangent at its output."""

    at_input: torch.Tensor | None
    of: dict[nn.Parameter, torch.Tensor | None]
    output: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class _Trial:
    model: nn.Module
    anatomy: Anatomy
    points: Points
    layer: int

    def fault(self, point: str) -> str | None:
        """What is wrong with a point; None when it does what it is to do."""
        if point == "block.in":
            return self.input_fault()
        return self.branch_fault(point) if point.endswith(".out") else self.skip_fault(point)

    def input_fault(self) -> str | None:
        """Nothing before the block may have a gradient, by any way."""
        self.route("block.in")
        before = [block for _, block in find_blocks(self.model)[: self.layer]]
        self.model.zero_grad(set_to_none=True)
        self.forward().sum().backward()
        found = [p for block in before for p in block.parameters() if p.grad is not None and bool(p.grad.any())]
        return "a gradient reaches the blocks before it by another way" if found else None

    def branch_fault(self, point: str) -> str | None:
        """The branch gets none; the highway past it stays open; the output keeps its bits."""
        true, cut = self.gradients(), self.gradients(point)
        branch = self.points.blocks[self.layer].parts[point.removesuffix(".out")]
        if not torch.equal(true.output, cut.output):
            return "a stop there changes the block's output"
        if any(cut.of[p] is not None and bool(cut.of[p].any()) for p in branch.parameters() if p in cut.of):  # type: ignore[union-attr]
            return "a gradient reaches the branch by another way"
        return "a stop there cuts the residual stream" if cut.at_input is None else None

    def skip_fault(self, skip: str) -> str | None:
        """True gradient = skip stopped + branch stopped, above the place where they part; none with both stopped."""
        wiring = self.points.blocks[self.layer].wiring
        outs = [f"{b}.out" for b in wiring.branches] if skip == "block.skip" else [skip.replace(".skip", ".out")]
        if any(o not in wiring.points for o in outs):
            return "the branch beside it cannot be stopped, so this skip cannot be tried"
        true, past, through, neither = (self.gradients(*p) for p in ((), (skip,), outs, (skip, *outs)))
        if not torch.equal(true.output, past.output):
            return "a stop there changes the block's output"
        above = self.above(skip)
        pairs = [(past.at_input, through.at_input, true.at_input, neither.at_input)]
        pairs += [(past.of[p], through.of[p], true.of[p], neither.of[p]) for p in above if p in true.of]
        largest = max((whole.norm().item() for _, _, whole, _ in pairs if whole is not None), default=0.0)
        error = max(_difference(a, b, c, least=1e-2 * largest) for a, b, c, _ in pairs)
        if not error <= TOLERANCE:
            return f"the probes contradict it: the gradients past it and beside it differ from the whole by {error:.1g}"
        return "a gradient passes it and its branch by another way" if any(map(_some, (n for *_, n in pairs))) else None

    def above(self, skip: str) -> list[nn.Parameter]:
        """Parameters of the block before the place where branch and skip part: those of the branches before it."""
        wiring = self.points.blocks[self.layer].wiring
        branch = skip.removesuffix(".skip")
        at = wiring.branches.index(branch) if branch in wiring.branches else 0
        parts = self.points.blocks[self.layer].parts
        return [p for b in wiring.branches[:at] for p in parts[b].parameters()]

    def route(self, *points: str) -> None:
        set_routes(self.points, [Route(point=p, mode="stop", layers=(self.layer,)) for p in points])

    def gradients(self, *points: str) -> _Gradients:
        self.route(*points)
        block: RoutePoint = self.points.blocks[self.layer].block
        given: list[torch.Tensor] = []
        returned: list[torch.Tensor] = []

        def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            stream = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            given.append(stream.view_as(stream))  # a node of its own
            if "hidden_states" in kwargs:
                return args, {**kwargs, "hidden_states": given[-1]}
            return (given[-1], *args[1:]), kwargs

        def leave(_module: nn.Module, _args: object, out: object) -> None:
            first = out[0] if isinstance(out, (tuple, list)) else out
            assert isinstance(first, torch.Tensor)
            returned.append(first)

        hooks = [block.register_forward_pre_hook(enter, with_kwargs=True), block.register_forward_hook(leave)]
        try:
            self.forward()
        finally:
            for hook in hooks:
                hook.remove()
            self.route()
        output, parameters = returned[-1], [p for p in block.parameters() if p.requires_grad]
        if not output.requires_grad:
            return _Gradients(at_input=None, of=dict.fromkeys(parameters), output=output)
        cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
        first, *others = torch.autograd.grad(
            output, [given[-1], *parameters], cotangent, allow_unused=True, materialize_grads=False
        )
        return _Gradients(at_input=first, of=dict(zip(parameters, others, strict=True)), output=output.detach())

    def forward(self) -> torch.Tensor:
        vocabulary = self.model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
        ids = torch.randint(3, vocabulary, (1, N_TOKENS), generator=torch.Generator().manual_seed(0))
        logits = self.model(input_ids=ids, use_cache=False).logits
        assert isinstance(logits, torch.Tensor)
        return logits


def _difference(a: torch.Tensor | None, b: torch.Tensor | None, whole: torch.Tensor | None, *, least: float) -> float:
    """‖a + b − whole‖ over ‖whole‖ or `least`, what is larger; None is zero."""
    parts = [t for t in (a, b) if t is not None]
    if whole is None:
        return 0.0 if not parts else float("inf")
    size = max(whole.norm().item(), least)
    return (sum(parts, torch.zeros_like(whole)) - whole).norm().item() / size if size else 0.0


def _some(gradient: torch.Tensor | None) -> bool:
    return gradient is not None and bool(gradient.any())
