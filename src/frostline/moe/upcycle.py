"""A dense model → a mixture of experts that computes the same function, as a folder that plain transformers loads.

Every expert starts as the dense FFN, the router as small random numbers (never zero: ties would send every token to
the same experts). Whatever both models have is copied part by part; a part of either that finds no partner is an
error. At the end the folder is loaded again and its function measured against the dense model's. Read `upcycle` first.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from frostline.anatomy import Anatomy, Component, Slice, put, read_anatomy, take
from frostline.errors import ModelError, StorageError
from frostline.model import load_config, load_model, load_tokenizer, quiet_transformers
from frostline.moe.pairs import TARGETS, Pair, find_pair, target_config
from frostline.moe.sites import find_sites, watch_routers
from frostline.randomness import derive_seed

Init = Literal["copy", "noise", "drop"]
Top1 = Literal["preserve", "switch"]

TOLERANCE = 1e-6
"""Largest ‖Δlogits‖₂/‖logits‖₂ of an upcycle that promises the same function."""
CHECK_ROWS, CHECK_LENGTH = 2, 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Upcycled:
    """What an upcycle made, and what it measured."""

    out: str
    dense: str
    """The model type it came from."""
    target: str
    experts: int
    top_k: int
    init: Init
    top1: Top1 | None
    """None where each token visits more than one expert."""
    layers: tuple[int, ...]
    """Layers that have experts."""
    n_dense: int
    """Parameters before."""
    n_parameters: int
    """Parameters now."""
    n_active: int
    """Parameters now that one token meets."""
    change: float
    """‖Δlogits‖₂/‖logits‖₂ in fp32 between the dense model and the written folder, on seeded random tokens."""
    promised: bool
    """Whether the function had to be preserved: copies whose weights sum to 1."""
    ffn_factor: float
    """By what the output of an FFN was multiplied, were its experts equal: mean over tokens and layers."""
    tokenizer: bool
    """Whether a tokenizer was found and copied."""
    notes: tuple[str, ...]
    """What to know before training."""


def upcycle(
    source: str,
    out: str | Path,
    *,
    experts: int = 8,
    top_k: int = 2,
    init: Init = "copy",
    noise: float = 0.01,
    drop: float = 0.5,
    router_std: float = 0.02,
    top1: Top1 = "preserve",
    layers: Sequence[int] | None = None,
    target: str | None = None,
    seed: int = 0,
) -> Upcycled:
    """Write a mixture of experts made from the dense model `source` into the folder `out`.

    `init`: experts as copies; as copies plus normal `noise` (in standard deviations of each tensor); or with the share
    `drop` of each expert's neurons drawn anew from the mean and deviation of those that they replace (drop-upcycling,
    arXiv 2502.19261). `top1`, for `top_k` 1: `preserve` normalises the one weight to 1, `switch` leaves it, and the
    function changes. `layers`: which get experts (0-based), where the target has a choice. Raises `ModelError` for an
    unknown pair, a model that does not fit, an `out` that is not empty, and a function that changed where it must not.
    """
    _check_numbers(experts, top_k, noise, drop, router_std)
    folder = _empty(out)
    config = load_config(source)
    pair = find_pair(config.model_type, target)
    normalised = top_k > 1 or top1 == "preserve"
    made = target_config(config, pair, experts=experts, top_k=top_k, normalised=normalised, layers=layers)
    dense = load_model(source).eval()
    dtype = getattr(config, "dtype", None) or torch.float32
    model = _filled(dense, made, pair, init=init, noise=noise, drop=drop, router_std=router_std, seed=seed)
    anatomy = read_anatomy(model)
    n_parameters, n_in_experts = anatomy.n_parameters, sum(map(anatomy.n_own_elements, _experts(anatomy)))
    chosen = tuple(s.layer for s in find_sites(model, anatomy))
    with _beside(folder) as temporary:
        tokenizer = _save(model.to(dtype), dense, source, temporary)
        del model
        change, factor = measure_change(dense, temporary, seed=seed)
        promised = init == "copy" and normalised
        _check_change(change, promised, pair)
        result = Upcycled(
            out=str(out),
            dense=pair.dense,
            target=pair.target,
            experts=experts,
            top_k=top_k,
            init=init,
            top1=top1 if top_k == 1 else None,
            layers=chosen,
            n_dense=sum(p.numel() for p in dense.parameters()),
            n_parameters=n_parameters,
            n_active=n_parameters - n_in_experts * (experts - top_k) // experts,
            change=change,
            promised=promised,
            ffn_factor=factor,
            tokenizer=tokenizer,
            notes=tuple(_notes(init, top_k, top1, tokenizer)),
        )
        (temporary / "upcycle.json").write_text(json.dumps(upcycled_to_json(result), indent=1, ensure_ascii=False))
    return result


def upcycled_to_json(result: Upcycled) -> dict[str, Any]:
    """The record as plain data; it stands in the folder as `upcycle.json`."""
    return {"schema": 1, **asdict(result), "layers": list(result.layers), "notes": list(result.notes)}


def _check_numbers(experts: int, top_k: int, noise: float, drop: float, router_std: float) -> None:
    if experts < 2:
        raise ModelError(f"a mixture needs at least 2 experts, not {experts}")
    if not 1 <= top_k <= experts:
        raise ModelError(f"top_k must be between 1 and the number of experts ({experts}), not {top_k}")
    if not router_std > 0:
        raise ModelError(
            f"router_std must be above 0, not {router_std}: with a zero router every logit ties, all tokens go to the "
            "same experts and the others never learn"
        )
    if not noise > 0 or not 0 < drop <= 1:
        raise ModelError(f"noise must be above 0 (found {noise}), and drop above 0 and at most 1 (found {drop})")


def _empty(out: str | Path) -> Path:
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelError(f"{out} exists and is not empty; an upcycle never overwrites: name another folder")
    return folder


class _beside:  # noqa: N801 (a context manager, used like a function)
    """A temporary folder beside the target, which becomes the target when nothing went wrong, and else vanishes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> Path:
        try:
            self.folder.absolute().parent.mkdir(parents=True, exist_ok=True)
            made = tempfile.mkdtemp(prefix=f".{self.folder.name}-", dir=self.folder.absolute().parent)
        except OSError as error:
            raise StorageError(f"cannot write beside {self.folder}: {error.strerror}") from None
        self.temporary = Path(made)
        return self.temporary

    def __exit__(self, kind: object, error: BaseException | None, _trace: object) -> None:
        if kind is not None:
            shutil.rmtree(self.temporary, ignore_errors=True)
            if isinstance(error, OSError):
                raise StorageError(f"writing {self.folder} failed: {error.strerror or error}") from error
            return
        umask = os.umask(0)
        os.umask(umask)
        self.temporary.chmod(0o777 & ~umask)  # a temporary folder is its owner's alone
        if self.folder.exists():
            self.folder.rmdir()
        self.temporary.rename(self.folder)


# --- filling the target


def _filled(
    dense: nn.Module, config: Any, pair: Pair, *, init: Init, noise: float, drop: float, router_std: float, seed: int
) -> nn.Module:
    """The target model with every tensor set. Raises `ModelError` for parts without a partner."""
    with quiet_transformers():
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    filler = _Filler(dense, model, shared=0.5 if TARGETS[pair.target].shared_width else 0.0)
    with torch.no_grad():
        for component in filler.to.components:
            filler.fill(component, init=init, noise=noise, drop=drop, router_std=router_std, seed=seed)
    filler.check_all_used(pair)
    return model


class _Filler:
    """Copies parts of a dense model into a mixture of experts; remembers which it used."""

    def __init__(self, dense: nn.Module, model: nn.Module, *, shared: float) -> None:
        self.source, self.to = read_anatomy(dense), read_anatomy(model)
        self.given, self.taken = _tensors(dense), _tensors(model)
        self.shared = shared
        """The share of the FFN that the expert which every token visits has; the rest is the others'."""
        self.used: set[str] = set()

    def fill(self, part: Component, *, init: Init, noise: float, drop: float, router_std: float, seed: int) -> None:
        """Set every tensor of one part of the target."""
        names = [name for name, _ in part.path]
        if "router" in names:
            self.draw_router(part, router_std, seed)
        elif "shared_expert_gate" in names:
            self.write(part, [torch.zeros(s.shape) for s in self.stored(part)])  # sigmoid(0) = ½: the share it gets
        elif "experts" in names or "shared_expert" in names:
            values = self.dense_values(part, re.sub(r"\.(experts\[\d+\]|shared_expert)\.", ".", part.name))
            if names[-1] == "down" and "experts" in names:
                values = [v * (1 - self.shared) for v in values]  # a power of two: no digit is lost
            if "experts" in names and init != "copy":
                values = self.changed(part, values, init=init, noise=noise, drop=drop, seed=seed)
            self.write(part, values)
        elif self.stored(part):
            self.write(part, self.dense_values(part, part.name))

    def stored(self, part: Component) -> list[Slice]:
        """The slices that a checkpoint holds, under the name that owns them; the rest the model computes itself."""
        return [s for s in part.slices if self.to.tensor[s.tensor].persistent and s.tensor not in self.to.ties]

    def dense_values(self, part: Component, name: str) -> list[torch.Tensor]:
        """What the dense model's part `name` holds, one tensor for each stored slice of the target's part."""
        wanted, found = self.stored(part), self.source.component.get(name)
        slices = [s for s in found.slices if self.source.tensor[s.tensor].persistent] if found else []
        if len(slices) != len(wanted):
            raise ModelError(
                f"the target's {part.name} holds {len(wanted)} tensors and the dense model's {name} {len(slices)}; "
                "a bias that only one of them has cannot be carried over"
            )
        self.used.add(name)
        return [take(self.given[s.tensor], s).detach().clone() for s in slices]

    def write(self, part: Component, values: Sequence[torch.Tensor]) -> None:
        """Put values into the stored slices of a part; experts' slices have one dimension of length 1 more."""
        for piece, value in zip(self.stored(part), values, strict=True):
            if tuple(n for n in piece.shape if n != 1) != tuple(n for n in value.shape if n != 1):
                raise ModelError(f"{part.name} has shape {piece.shape}, the dense model's {tuple(value.shape)}")
            put(self.taken[piece.tensor], piece, value.reshape(piece.shape))

    def draw_router(self, part: Component, std: float, seed: int) -> None:
        """Small normal numbers for the router's matrix, zeros for biases and corrections."""
        for piece in self.stored(part):
            is_matrix = len(piece.shape) == 2 and self.to.learnable(piece) and min(piece.shape) > 1
            values = torch.zeros(piece.shape)
            if is_matrix:
                values.normal_(0, std, generator=_generator(seed, "upcycle router", part.path[0][1] or 0))
            put(self.taken[piece.tensor], piece, values)

    def changed(
        self, part: Component, values: Sequence[torch.Tensor], *, init: Init, noise: float, drop: float, seed: int
    ) -> list[torch.Tensor]:
        """One expert's matrices made different from the other experts'."""
        layer = part.path[0][1] or 0
        expert = next(i for name, i in part.path if name == "experts") or 0
        kind = ("gate", "up", "down").index(part.path[-1][0])
        generator = _generator(seed, f"upcycle {init}", layer, expert, kind)
        if init == "noise":
            return [
                v + noise * v.std() * torch.randn(v.shape, generator=generator) if v.dim() > 1 else v for v in values
            ]
        neurons = _neurons(values[0].shape[1 if kind == 2 else 0], drop, seed, layer, expert)
        return [
            _redrawn(v, neurons, dim=1 if kind == 2 else 0, generator=generator) if v.dim() > 1 else v for v in values
        ]

    def check_all_used(self, pair: Pair) -> None:
        """Raise `ModelError` when the dense model has parameters that nothing took."""
        left = [
            c.name
            for c in self.source.components
            if c.name not in self.used
            and any(self.source.learnable(s) and s.tensor not in self.source.ties for s in c.slices)
        ]
        if left:
            raise ModelError(f"'{pair.target}' has no place for {len(left)} parts of this model: {', '.join(left[:4])}")


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def _experts(anatomy: Anatomy) -> Iterator[Component]:
    return (c for c in anatomy.components if any(name == "experts" for name, _ in c.path))


def _generator(seed: int, purpose: str, *numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(seed, purpose, *numbers))


def _neurons(n: int, share: float, seed: int, layer: int, expert: int) -> torch.Tensor:
    """Which neurons of one expert are drawn anew: the same ones in gate, up and down."""
    order = torch.randperm(n, generator=_generator(seed, "upcycle neurons", layer, expert))
    return order[: max(1, round(share * n))]


def _redrawn(value: torch.Tensor, neurons: torch.Tensor, *, dim: int, generator: torch.Generator) -> torch.Tensor:
    old = value.index_select(dim, neurons)
    new = old.mean() + old.std() * torch.randn(old.shape, generator=generator)
    return value.index_copy(dim, neurons, new)


# --- saving and measuring


def _save(model: nn.Module, dense: nn.Module, source: str, folder: Path) -> bool:
    """Write the model, its generation settings and its tokenizer; returns whether there was a tokenizer."""
    try:
        tokenizer = load_tokenizer(source)
    except ModelError:
        tokenizer = None
    with quiet_transformers():
        if getattr(dense, "generation_config", None) is not None:
            model.generation_config = dense.generation_config
        model.save_pretrained(folder)  # type: ignore[operator]
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return tokenizer is not None


def measure_change(dense: nn.Module, folder: str | Path, *, seed: int = 0) -> tuple[float, float]:
    """(‖Δlogits‖₂/‖logits‖₂, mean factor of an FFN's output) of a written mixture against its dense model.

    In fp32 with eager experts, on 2 rows of up to 64 seeded random tokens.
    """
    model = load_model(str(folder)).eval()
    model.set_experts_implementation("eager")  # type: ignore[operator]
    config: Any = dense.config
    length = min(CHECK_LENGTH, getattr(config, "max_position_embeddings", None) or CHECK_LENGTH)
    ids = torch.randint(config.vocab_size, (CHECK_ROWS, length), generator=_generator(seed, "upcycle check"))
    anatomy = read_anatomy(model)
    sites = find_sites(model, anatomy)
    with torch.no_grad(), watch_routers(sites) as seen:
        before = dense(input_ids=ids, use_cache=False).logits.double()
        after = model(input_ids=ids, use_cache=False).logits.double()
    weights = torch.stack([r.weight.sum(-1).mean() for r in seen.values() if r.weight is not None])
    share = 0.5 if TARGETS[anatomy.model_type].shared_width else 0.0
    change = ((after - before).norm() / before.norm()).item()
    return change, share + (1 - share) * weights.double().mean().item()


def _check_change(change: float, promised: bool, pair: Pair) -> None:
    if change != change:
        raise ModelError("the upcycled model gives NaN on random tokens; nothing was written")
    if promised and change > TOLERANCE:
        raise ModelError(
            f"the function changed: ‖Δlogits‖/‖logits‖ = {change:.2e}, more than {TOLERANCE:.0e}, so this {pair.dense} "
            f"has settings that '{pair.target}' does not compute the same; nothing was written"
        )


def _notes(init: Init, top_k: int, top1: Top1, tokenizer: bool) -> Iterator[str]:
    if top_k == 1 and top1 == "preserve":
        yield (
            "each token's one weight is always 1, so the router gets no gradient from the language-model loss: only a "
            "balancing loss moves it"
        )
    elif init == "copy" and top_k > 1:
        yield (
            "all experts are equal at first, so the router gets no gradient from the language-model loss until they "
            "differ: give it a balancing loss, and let the experts learn"
        )
    if not tokenizer:
        yield "no tokenizer was found beside the dense model, so the folder has none"
