"""Checks of one attention or FFN part: whether its slices are the query's, a head's, a neuron's, an expert's.

The rows of q are those that the query depends on; head 3 is what the output depends on when only its columns of o are
left; neuron 7 is what loses its gradient with its column of down; an expert is what the outputs of the tokens sent to
it depend on and others do not. A difference is noted with both sides in `Findings`. Read `CHECKS` (at the end) first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from frostline.anatomy.access import put, take
from frostline.anatomy.component import Component, Cut
from frostline.anatomy.slice_capture import (
    Branch,
    NotMeasuredError,
    Watch,
    attentions,
    choices,
    linear_norms,
    run,
    scaled,
    touched,
)
from frostline.anatomy.slices import Slice, intersect, subtract_all

EXACT = 1e-4
"""Relative error (fp32) below which an output is an affine function of a part."""
N_HEADS = 4
"""Heads of a branch that are looked at where it has more."""

Roles = frozenset[str]
"""Of `query`, `key`, `value`: those that an element influences."""

ROLES: dict[str, Roles] = {
    "q": frozenset({"query"}), "q_norm": frozenset({"query"}), "k": frozenset({"key"}), "k_norm": frozenset({"key"}),
    "v": frozenset({"value"}), "kv": frozenset({"key", "value"}), "o": frozenset(),
}  # fmt: skip
"""First step of a part's name below `attn` → what it says it influences."""

NOTHING: Roles = frozenset()
NAMED: tuple[Roles, ...] = tuple({*ROLES.values()} - {NOTHING})
"""What has a name of its own, so that no part of another name influences it."""

OTHER_ROLES: dict[tuple[str, str], tuple[tuple[Roles, ...], str]] = {
    ("zaya", "attn.q"): ((ROLES["q"] | ROLES["k"],), "the mean of its query heads is added to a key head"),
    ("zaya", "attn.k"): ((ROLES["q"] | ROLES["k"],), "a key head is added to its query heads"),
    **{
        ("deepseek_v4", f"attn.compressor.{name}"): (
            (ROLES["kv"], NOTHING),
            "it condenses a number of earlier tokens into one, of which this text may have too few",
        )
        for name in ("position_bias", "kv_proj", "gate_proj")
    },
}
"""(model type, part) → what it may influence in this architecture instead, and how."""

TRUE_EXCEPTIONS: dict[tuple[str, str], str] = {
    ("gemma3n_text", "ffn.neurons"): "the threshold of its sparse activation depends on all gates",
    ("inkling2_text", "ffn.gate"): "both gate and up go through a soft cap",
    (
        "zamba2",
        "ffn.gate_up_proj_adapter_list",
    ): "the shared block has an adapter for each use of it",
    ("stablelm", "attn.q_norm"): "every head has a norm that is a tensor of its own, which no cut can divide",
    ("stablelm", "attn.k_norm"): "every head has a norm that is a tensor of its own, which no cut can divide",
}
"""(model type, part) → why what is measured there differs from what the name says, and the name is right."""


@dataclass(frozen=True, slots=True)
class Findings:
    """What the checks of one model found; sentences are keys, so that each stands once and in order."""

    model_type: str
    measured: list[str] = field(default_factory=list)
    disagreements: dict[str, None] = field(default_factory=dict)
    exceptions: dict[str, None] = field(default_factory=dict)

    def disagree(self, part: str, sentence: str) -> None:
        """Note a difference in a part such as `layers[3].attn.heads`, under the exceptions where it is one."""
        reason = TRUE_EXCEPTIONS.get((self.model_type, part.partition(".")[2]))
        if reason is None:
            self.disagreements[sentence] = None
        else:
            self.exceptions[f"{sentence} — {reason}"] = None


@dataclass(frozen=True, kw_only=True)
class Part:
    """An attention or FFN part of one layer, to be measured."""

    name: str
    """Such as `layers[3].attn`, `layers[3].attn[1]`, `layers[3].ffn`."""
    kind: str
    """A key of `CHECKS`."""
    components: tuple[Component, ...]
    cuts: tuple[Cut, ...]
    branch: Branch
    norms: tuple[nn.Module, ...]
    """Norms inside the branch."""

    def tensors(self, components: Sequence[Component]) -> tuple[str, ...]:
        """Names of the parameters of some components."""
        return tuple(dict.fromkeys(s.tensor for c in components for s in self.slices(c)))

    def slices(self, component: Component) -> list[Slice]:
        """The slices of a component that lie in parameters that have gradients."""
        parameters = self.branch.parameters
        return [s for s in component.slices if s.tensor in parameters and parameters[s.tensor].requires_grad]

    def steps(self, piece: Slice) -> tuple[str, str]:
        """First and last step, below the branch, of the part that a slice lies in."""
        holders = (c for c in self.components for s in c.slices if intersect(s, piece) is not None)
        path = next(holders).path
        return path[2][0], path[-1][0]


def check_roles(part: Part, found: Findings) -> None:
    """q, k and v: what the query, the key and the value depend on."""
    watch = Watch()
    run(part.branch, watch)
    measured = attentions(watch)
    if not measured:
        raise NotMeasuredError("no softmax of a product of query and key in its forward pass")
    names = part.tensors(part.components)
    codes = {n: torch.zeros(part.branch.parameters[n].shape, dtype=torch.uint8) for n in names}
    for attention in measured:
        for bit, tensor in enumerate((attention.query, attention.key, attention.value)):
            for name, elements in touched(tensor, names, part.branch).items():
                codes[name] |= elements.to(torch.uint8) << bit
    for c in part.components:
        for s in part.slices(c):
            _compare_roles(c, s, take(codes[s.tensor], s), found)
    found.measured.append(part.name)


def _compare_roles(c: Component, piece: Slice, codes: torch.Tensor, found: Findings) -> None:
    """A part's name against what its elements influence."""
    step = c.path[2][0]
    counts = {_roles(code): n for code, n in enumerate(torch.bincount(codes.reshape(-1)).tolist()) if n}
    if step == "qkv":
        found.disagree(c.name, f"{c.name}: {piece}: query, key and value are packed and not told apart")
        return
    other, reason = OTHER_ROLES.get((found.model_type, c.name.partition(".")[2]), (None, ""))
    said = other or ((ROLES[step],) if step in ROLES else None)
    if said is None and c.is_norm:
        return
    odd = {r: n for r, n in counts.items() if (r in NAMED if said is None else r not in said)}
    if odd:
        is_said = "is no part of q, k, v or kv" if said is None else f"influences {_listed(said[0])}"
        was = ", ".join(f"{n} of {piece.n_elements} elements influence {_listed(r)}" for r, n in odd.items())
        found.disagree(c.name, f"{c.name}: {piece}: its name says it {is_said}, measured: {was}")
    elif reason:
        was = " or ".join(map(_listed, counts))
        found.exceptions[f"{c.name}: {piece} influences {was} — {reason}"] = None


def _roles(code: int) -> Roles:
    return frozenset(role for bit, role in enumerate(("query", "key", "value")) if code >> bit & 1)


def _listed(roles: Roles) -> str:
    return " and ".join(role for role in ("query", "key", "value") if role in roles) or "none of query, key and value"


def check_linear(part: Part, found: Findings) -> None:
    """Linear attention: no softmax joins a query and a key."""
    watch = Watch()
    run(part.branch, watch)
    if attentions(watch):
        found.disagree(part.name, f"{part.name}: its name says linear attention, measured: a softmax joins its tokens")
    found.measured.append(part.name)


def check_heads(part: Part, found: Findings) -> None:
    """Heads: what the output depends on when only one head's columns of o are left."""
    cuts = {c.path[-1][0]: c for c in part.cuts if c.path[-1][0] in ("heads", "kv_heads")}
    if "heads" not in cuts:
        return
    heads, inner = cuts["heads"], [c for c in part.components if c.path[2][0] != "o"]
    with linear_norms(part.norms):
        watch = Watch()
        run(part.branch, watch)
        n_found = {a.n_heads for a in attentions(watch)}
        if n_found and n_found != {heads.n}:
            found.disagree(heads.name, f"{heads.name}: its name says {heads.n} heads, measured: {sorted(n_found)}")
            return
        looked_at = sorted({round(i * (heads.n - 1) / (N_HEADS - 1)) for i in range(N_HEADS)})
        touched_by = {h: _touched_by_head(part, heads, h, inner) for h in looked_at}
    for cut in cuts.values():
        for h, elements in touched_by.items():
            for sentence in _compare_member(part, cut, h * cut.n // heads.n, elements):
                found.disagree(cut.name, sentence)
        found.measured.append(cut.name)
    pieces = [piece for cut in cuts.values() for piece, _ in cut.pieces]
    for c in inner:
        for s in subtract_all(part.slices(c), pieces):
            used = [take(elements[s.tensor], s) for elements in touched_by.values()]
            if any(not torch.equal(u, used[0]) for u in used):
                found.disagree(c.name, f"{c.name}: {s}: heads use different elements of it, and no member holds them")


def _touched_by_head(part: Part, heads: Cut, h: int, inner: Sequence[Component]) -> dict[str, torch.Tensor]:
    others = [i for i in range(heads.n) if i != h]
    columns = [s for s in heads.members(others) if part.steps(s)[0] == "o"] if others else []
    with scaled(columns, 0.0, part.branch):
        return touched(run(part.branch), part.tensors(inner), part.branch)


def _compare_member(part: Part, cut: Cut, i: int, elements: dict[str, torch.Tensor]) -> Iterator[str]:
    """The slices of one member against the elements that were measured to be its own."""
    for (piece, _), member in zip(cut.pieces, cut.members([i]), strict=True):
        step = part.steps(piece)[0]
        if step == "o" or piece.tensor not in elements:
            continue
        said = torch.zeros_like(elements[piece.tensor])
        put(said, member, torch.ones((), dtype=torch.bool))
        said, was = take(said, piece), take(elements[piece.tensor], piece)
        if torch.equal(said, was):
            continue
        missing, foreign = int((said & ~was).sum()), int((was & ~said).sum())
        if foreign or (missing and not (step == "k" and len(piece.index) == 1)):  # softmax ignores a key's bias
            yield (
                f"{cut.name}[{i}]: {piece}: its name says {int(said.sum())} elements act through its columns of o, "
                f"measured: {missing} of them do not and {foreign} others do"
            )


def check_experts(part: Part, found: Findings) -> None:
    """Experts: what the outputs of the tokens depend on that were sent to them, and the others' do not."""
    members: dict[int | None, list[Component]] = defaultdict(list)
    for c in part.components:
        if c.path[2][0] == "experts":
            members[c.path[2][1]].append(c)
    for c in members.pop(None, ()):
        found.disagree(c.name, f"{c.name}: the experts are packed and not told apart")
    if not members:
        return
    watch = Watch()
    output = run(part.branch, watch)
    rows: dict[frozenset[int], list[int]] = defaultdict(list)
    for row, chosen in enumerate(choices(watch, part.branch.n_rows)):
        rows[chosen].append(row)
    sent = {j: tuple(j in chosen for chosen in rows) for j in members}
    if len(set(sent.values())) < len(members) or not all(map(any, sent.values())):
        raise NotMeasuredError(f"the choices of {part.branch.n_rows} tokens do not tell the experts apart")
    names = part.tensors([c for c in part.components if c.path[2][0] != "router"])
    elements = {chosen: touched(output[at], names, part.branch) for chosen, at in rows.items()}
    for c in part.components:
        for s in part.slices(c):
            for sentence in _compare_expert(c, s, elements):
                found.disagree(c.name, sentence)
    found.measured.append(f"{part.name}.experts")


def _compare_expert(
    c: Component, piece: Slice, elements: dict[frozenset[int], dict[str, torch.Tensor]]
) -> Iterator[str]:
    """A slice of an expert against the elements touched per set of chosen experts."""
    step, j = c.path[2]
    by_choice = {
        chosen: take(found[piece.tensor], piece) for chosen, found in elements.items() if piece.tensor in found
    }
    if step == "shared_expert" and not all(bool(e.any()) for e in by_choice.values()):
        yield f"{c.name}: {piece}: its name says every token visits it, measured: some do not"
    if step not in ("experts", "unused"):
        return
    mine = [e for chosen, e in by_choice.items() if j in chosen]
    others = [e for chosen, e in by_choice.items() if j not in chosen]
    missing = int((~torch.stack(mine).any(0)).sum()) if mine else 0
    foreign = int(torch.stack(others).any(0).sum()) if others else 0
    if missing or foreign:
        yield (
            f"{c.name}: {piece}: of {piece.n_elements} elements, {missing} do not matter to any token sent to it "
            f"and {foreign} matter to tokens that were not"
        )


def check_neurons(part: Part, found: Findings) -> None:
    """Neurons: which rows lose their gradient with which columns of down, by as many runs as an index has bits."""
    cuts = [c for c in part.cuts if c.path[-1][0] == "neurons"]
    if not cuts:
        return
    inner = [c for c in part.components if c.path[-1][0] != "down"]
    names = part.tensors(inner)
    codes = {n: torch.zeros(part.branch.parameters[n].shape, dtype=torch.int32) for n in names}
    n_bits = (max(cut.n for cut in cuts) + 1).bit_length()  # no code has all bits: that is what dead elements have
    with linear_norms(part.norms):
        for bit in range(n_bits):
            columns = [s for c in cuts for s in _columns_of_down(part, c, bit)]
            with scaled(columns, 0.0, part.branch):
                for name, elements in touched(run(part.branch), names, part.branch).items():
                    codes[name] |= (~elements).to(torch.int32) << bit
    rows = [(cut, piece, dim) for cut in cuts for piece, dim in cut.pieces if part.steps(piece)[1] != "down"]
    dead = [cut.name for cut, s, _ in rows if bool((take(codes[s.tensor], s) == 2**n_bits - 1).all())]
    if dead:
        raise NotMeasuredError(f"no token reaches {dead[0]}")
    for cut, piece, dim in rows:
        for sentence in _compare_neurons(cut, piece, dim, take(codes[piece.tensor], piece)):
            found.disagree(cut.name, sentence)
    for c in inner:
        for s in subtract_all(part.slices(c), [piece for _, piece, _ in rows]):
            rest = take(codes[s.tensor], s)
            if bool(((rest > 0) & (rest < 2**n_bits - 1)).any()):
                found.disagree(c.name, f"{c.name}: {s}: single neurons use elements of it, and no member holds them")
    found.measured.extend(cut.name for cut in cuts)


def _columns_of_down(part: Part, cut: Cut, bit: int) -> list[Slice]:
    """Those of the neurons whose number, counted from 1, has a bit."""
    chosen = [j for j in range(cut.n) if (j + 1) >> bit & 1]
    return [s for s in cut.members(chosen) if part.steps(s)[1] == "down"] if chosen else []


def _compare_neurons(cut: Cut, piece: Slice, dim: int, codes: torch.Tensor) -> Iterator[str]:
    """The rows of every member against the neurons, counted from 1, whose columns they act through."""
    said = (torch.arange(piece.shape[dim]) // (piece.shape[dim] // cut.n) + 1).to(codes.dtype)
    wrong = (codes.movedim(dim, -1) != said).movedim(-1, dim)
    if bool(wrong.any()):
        first = int(wrong.movedim(dim, 0).reshape(piece.shape[dim], -1).any(1).nonzero()[0])
        yield (
            f"{cut.name}: {piece}: its name says index {first} of dimension {dim} acts through the columns of down of "
            f"neuron {int(said[first]) - 1}, measured: it does not; {int(wrong.sum())} elements in all"
        )


def check_gates(part: Part, found: Findings) -> None:
    """Gate and up: the output is an affine function of up, and of gate it is none."""
    gates = [c for c in part.components if c.path[-1][0] == "gate"]
    parents = {c.path[:-1] for c in gates}
    ups = [c for c in part.components if c.path[-1][0] == "up" and c.path[:-1] in parents]
    if not ups:
        return
    with linear_norms(part.norms):
        for name, components, should in (("up", ups, True), ("gate", gates, False)):
            if (_bend(part, components) <= EXACT) != should:
                said, was = ("an affine", "no affine") if should else ("no affine", "an affine")
                sentence = f"its names say the output is {said} function of {name}, measured: it is {was} one"
                found.disagree(f"{part.name}.gate", f"{part.name}: {sentence}")
    found.measured.append(f"{part.name}.gate")


def _bend(part: Part, components: Sequence[Component]) -> float:
    """How far the output is from an affine function of some components, relative to what they do."""
    slices = [s for c in components for s in part.slices(c)]
    outputs = []
    for factor in (0.25, -0.5, 0.0):  # small, so that clamps do not bind
        with scaled(slices, factor, part.branch):
            outputs.append(run(part.branch).detach())
    one, minus_two, zero = outputs  # in quarters
    if torch.equal(one, zero):
        raise NotMeasuredError("the output does not depend on gate or up")
    return float((2 * one + minus_two - 3 * zero).norm() / (one - zero).norm())


CHECKS: dict[str, tuple[Callable[[Part, Findings], None], ...]] = {
    "attn": (check_roles, check_heads),
    "linear_attn": (check_linear,),
    "ffn": (check_experts, check_neurons, check_gates),
}
"""Kind of part → what is measured of it."""
