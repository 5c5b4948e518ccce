"""Named schedules written out: a record and an anatomy → plain stages, as a recipe would list them.

Each function is the definition of one schedule, and pure: what is drawn is a function of the seed and the number of the
draw. Read `plain_stages`, then the schedule you want. Spectrum's choice comes from `spectrum.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from frostline.anatomy import Anatomy
from frostline.errors import RecipeError, SelectionError
from frostline.randomness import derive_seed
from frostline.recipe import DurationSpec, NamedSchedule, StageSpec, plain
from frostline.recipe.schedule_spec import (
    Alternate,
    BAdam,
    GradualUnfreezing,
    Lisa,
    LpFt,
    PretrainThenFreeze,
    Spectrum,
)
from frostline.selection import select

PlainStage = dict[str, Any]
"""A stage as YAML has it: only what differs from a stage's defaults."""
MAX_STAGES = 10_000


def plain_stages(
    spec: NamedSchedule, anatomy: Anatomy, *, seed: int, chosen: str | None = None
) -> tuple[PlainStage, ...]:
    """The stages of a named schedule over one model.

    `seed`: where the schedule has none; `chosen`: what Spectrum chose. Raises `RecipeError` for what the model does
    not have.
    """
    if not anatomy.n_layers:
        raise RecipeError(f"schedule: this model has no layers ({anatomy.model_type})")
    match spec:
        case GradualUnfreezing():
            return _gradual_unfreezing(spec, anatomy)
        case LpFt():
            return _lp_ft(spec, anatomy)
        case Alternate():
            return _alternate(spec)
        case PretrainThenFreeze():
            return _pretrain_then_freeze(spec)
        case Lisa():
            return _lisa(spec, anatomy, seed if spec.seed is None else spec.seed)
        case BAdam():
            return _badam(spec, anatomy, seed if spec.seed is None else spec.seed)
        case Spectrum() if chosen is not None:
            return (_stage(spec, "spectrum", _with(chosen, spec.always), spec.train),)
    raise AssertionError(f"{type(spec).__name__} cannot be written out")


def _gradual_unfreezing(spec: GradualUnfreezing, anatomy: Anatomy) -> tuple[PlainStage, ...]:
    """What follows the layers; then also the last layer, the last two, …; then everything."""
    n = anatomy.n_layers
    first = " | ".join(around_layers(anatomy).after)
    thawed = [*([first] if first else [])]
    thawed += [_with(f"layers[{max(n - k, 0)}:]", first) for k in range(spec.layers, n + spec.layers, spec.layers)]
    names = [f"thaw-{i + 1}" for i in range(len(thawed))]
    stages = [_stage(spec, name, learn, spec.each) for name, learn in zip(names, thawed, strict=True)]
    if around_layers(anatomy).before:
        return (*stages, _stage(spec, "all", "all", spec.last or spec.each))
    return (*stages[:-1], _stage(spec, "all", "all", spec.last or spec.each))  # nothing comes before the layers


def _lp_ft(spec: LpFt, anatomy: Anatomy) -> tuple[PlainStage, ...]:
    """The head, then everything."""
    try:
        tied = select(anatomy, spec.head, ties="together").pulled_in
    except SelectionError as error:
        raise RecipeError(f"schedule.head: {error}") from None
    if tied:
        head, other = tied[0]
        raise RecipeError(
            f"schedule.head: {head} is tied to {other} in this model, so the head cannot learn alone; `ties: untie` "
            "gives it weights of its own"
        )
    probe = {**_stage(spec, "probe", spec.head, spec.probe), "lr": spec.probe_lr}
    return ({k: v for k, v in probe.items() if k != "layer_decay"}, _stage(spec, "tune", "all", spec.tune))


def _alternate(spec: Alternate) -> tuple[PlainStage, ...]:
    """Turns of equal length, one part after another."""
    n = len(spec.turns)
    return tuple(
        _stage(spec, f"turn-{k + 1}", spec.turns[k % n], DurationSpec(steps=steps))
        for k, steps in enumerate(turns(spec.steps, spec.every))
    )


def _pretrain_then_freeze(spec: PretrainThenFreeze) -> tuple[PlainStage, ...]:
    """Everything, then all but `freeze`."""
    then = _stage(spec, "rest", f"all - ({spec.freeze})", spec.then)
    if spec.then_lr is not None:
        then["lr"] = spec.then_lr
    return (_stage(spec, "joint", "all", spec.joint), then)


def _lisa(spec: Lisa, anatomy: Anatomy, seed: int) -> tuple[PlainStage, ...]:
    """`layers` layers drawn anew every `every` steps, beside what is always on."""
    n = anatomy.n_layers
    if spec.layers > n:
        raise RecipeError(f"schedule.layers: {spec.layers} layers cannot be drawn from the {n} of this model")
    return tuple(
        _stage(spec, f"lisa-{k + 1}", _with(layers(draw(seed, k, n, spec.layers)), spec.always), DurationSpec(steps=m))
        for k, m in enumerate(turns(spec.steps, spec.every))
    )


def _badam(spec: BAdam, anatomy: Anatomy, seed: int) -> tuple[PlainStage, ...]:
    """Blocks in their order, one every `every` steps, around and around."""
    beside = around_layers(anatomy)
    blocks = [f"layers[{i}]" for i in range(anatomy.n_layers)]
    for wanted, where, parts in ((spec.embed, 0, beside.before), (spec.head, len(blocks) + 1, beside.after)):
        if wanted and not parts:
            raise RecipeError(f"schedule: this model has nothing {'before' if not where else 'after'} its layers")
        if wanted:
            blocks.insert(where, " | ".join(parts))
    n_turns = turns(spec.steps, spec.every)
    order = block_order(spec.order, len(blocks), len(n_turns), seed)
    return tuple(
        _stage(spec, f"block-{k + 1}", _with(blocks[i], spec.always), DurationSpec(steps=steps))
        for k, (i, steps) in enumerate(zip(order, n_turns, strict=True))
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Around:
    """Names of the parts that learn and lie outside the layers."""

    before: tuple[str, ...]
    after: tuple[str, ...]


def around_layers(anatomy: Anatomy) -> Around:
    """What stands before the layers (the embedding, positions) and what follows them (the last norm, the head)."""
    own = [c for c in anatomy.components if not c.is_other and any(anatomy.learnable(s) for s in c.slices)]
    names = [c.path[0][0] for c in own]
    first = names.index("layers")
    return Around(
        before=tuple(dict.fromkeys(n for n in names[:first] if n != "layers")),
        after=tuple(dict.fromkeys(n for n in names[first:] if n != "layers")),
    )


def draw(seed: int, k: int, n: int, size: int) -> tuple[int, ...]:
    """Draw `k` of LISA: `size` of `n` layers, every choice as likely as any other, apart from all other draws."""
    return tuple(sorted(shuffled(n, seed, "lisa", k)[:size]))


def block_order(order: str, n: int, n_turns: int, seed: int) -> tuple[int, ...]:
    """Which of `n` blocks each turn of BAdam takes."""
    if order == "ascending":
        return tuple(k % n for k in range(n_turns))
    if order == "descending":
        return tuple(n - 1 - k % n for k in range(n_turns))
    return tuple(i for cycle in range(-(-n_turns // n)) for i in shuffled(n, seed, "badam", cycle))[:n_turns]


def shuffled(n: int, seed: int, purpose: str, k: int) -> tuple[int, ...]:
    """0 … n-1 in an order that is a function of the arguments, the same on every machine and with every library."""
    return tuple(sorted(range(n), key=lambda i: derive_seed(seed, purpose, k, i)))


def turns(steps: int, every: int) -> tuple[int, ...]:
    """Steps of each turn: `every`, the last one possibly fewer. Raises `RecipeError` for too many."""
    if -(-steps // every) > MAX_STAGES:
        raise RecipeError(f"schedule: {steps} steps in turns of {every} are more than {MAX_STAGES} stages")
    rest = steps % every
    return (*([every] * (steps // every)), *([rest] if rest else []))


def layers(indices: Iterable[int]) -> str:
    """`[3, 7]` → `layers[3,7]`."""
    return f"layers[{','.join(map(str, indices))}]"


def _with(learn: str, other: str | None) -> str:
    return f"{learn} | {other}" if other else learn


def _stage(spec: NamedSchedule, name: str, learn: str, duration: DurationSpec) -> PlainStage:
    """One stage with the settings that the schedule gives all of its stages."""
    common = plain(spec.model_dump(include=set(NamedSchedule.model_fields), exclude_unset=True)) | {"state": spec.state}
    defaults = {name: field.default for name, field in StageSpec.model_fields.items()}
    own = {key: value for key, value in common.items() if getattr(spec, key) != defaults[key]}
    return {"name": name, "learn": learn, **duration.model_dump(exclude_none=True), **own}


def chosen_expression(names: Sequence[str]) -> str:
    """Components by name as one expression: `layers[1,3].attn.q | layers[0].ffn.up`."""
    by_rest: dict[str, list[int]] = {}
    for name in names:
        layer, _, rest = name.partition(".")
        by_rest.setdefault(rest, []).append(int(layer.removeprefix("layers[").removesuffix("]")))
    return " | ".join(f"{layers(sorted(found))}.{rest}" for rest, found in by_rest.items())
