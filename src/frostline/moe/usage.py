"""Which experts a model uses on given tokens, how alike they are, and selections made from that.

Two scores of an expert, as in ESFT (arXiv 2407.01906): `tokens`, its share of all choices of its layer, and `gate`, its
share of the weight that the layer's router gives. Both sum to 1 over a layer. `measure_usage` measures, `top` and
`cover` choose, `scores_of` is what selections such as `experts[top 4 by tokens]` are resolved with. Read
`measure_usage` first.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from frostline.anatomy import Anatomy, Component, take
from frostline.errors import ModelError, RecipeError
from frostline.moe.balance import load_of
from frostline.moe.history import entropy
from frostline.moe.sites import Site, choice_of, find_sites, watch_routers
from frostline.selection import Scores, chosen, expression_of
from frostline.selection.grammar import SCORES, Ranked, Score

Chosen = dict[str, tuple[int, ...]]
"""Site, such as `layers[3].ffn` → experts, the highest score first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteUsage:
    """What one layer's router did."""

    site: str
    """Such as `layers[3].ffn`."""
    layer: int
    """0-based."""
    load: tuple[int, ...]
    """Tokens that each expert got; a token counts once for every expert it was sent to."""
    gate: tuple[float, ...]
    """Mean over all tokens of the weight that each expert's output was given; 0 for tokens it did not get."""

    def scores(self, by: Score) -> tuple[float, ...]:
        """Each expert's share of the layer's choices or of its gate weight; they sum to 1."""
        values = self.load if by == "tokens" else self.gate
        return tuple(v / (sum(values) or 1) for v in values)

    @property
    def largest_share(self) -> float:
        """The share of the choices that the busiest expert got; 1/N is balance."""
        return max(self.scores("tokens"))

    @property
    def entropy(self) -> float:
        """Of the load, over ln N: 1 is balance, 0 is one expert."""
        return entropy(self.scores("tokens"))

    @property
    def never(self) -> tuple[int, ...]:
        """Experts that no token was sent to."""
        return tuple(e for e, n in enumerate(self.load) if n == 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Likeness:
    """How alike the experts of one layer are: cosines between all their weights, over all pairs."""

    site: str
    smallest: float
    mean: float
    largest: float
    identical: tuple[tuple[int, int], ...]
    """Pairs whose weights are equal to the bit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What all layers did."""

    n_tokens: int
    sites: tuple[SiteUsage, ...]
    likeness: tuple[Likeness, ...]


@torch.no_grad()
def measure_usage(model: nn.Module, anatomy: Anatomy, batches: Iterable[torch.Tensor]) -> Usage:
    """Pass tokens, (rows, length) each, through a model in evaluation mode and count where its routers send them.

    Raises `ModelError` for a model without routers, or one whose experts are not told who visits them.
    """
    sites = find_sites(model, anatomy)
    if not sites:
        raise ModelError("this model has no router, so it has no experts to count")
    was_training = model.training
    model.eval()
    load = {s.name: torch.zeros(s.n_experts, dtype=torch.float64) for s in sites}
    gate = {s.name: torch.zeros(s.n_experts, dtype=torch.float64) for s in sites}
    n_tokens = 0
    for ids in batches:
        with watch_routers(sites) as seen:
            model(input_ids=ids, use_cache=False)
        n_tokens += ids.numel()
        for site in sites:
            index, weight = choice_of(seen[site.name], site), seen[site.name].weight
            load[site.name] += _real(
                load_of(index, torch.ones(len(index), device=index.device), _width(site, index)), site
            )
            if weight is not None:
                flat = torch.zeros(_width(site, index), dtype=torch.float64, device=index.device)
                gate[site.name] += _real(flat.index_add(0, index.reshape(-1), weight.double().reshape(-1)), site)
    model.train(was_training)
    if not n_tokens:
        raise ModelError("no tokens to count: the text is shorter than one row")
    return Usage(
        n_tokens=n_tokens,
        sites=tuple(
            SiteUsage(
                site=s.name,
                layer=s.layer,
                load=tuple(int(n) for n in load[s.name].tolist()),
                gate=tuple((gate[s.name] / n_tokens).tolist()),
            )
            for s in sites
        ),
        likeness=tuple(likeness_of(model, anatomy, sites)),
    )


def _width(site: Site, index: torch.Tensor) -> int:
    """Bins for all indices: a router may also choose experts that compute nothing and have no weights."""
    return max(site.n_experts, int(index.max()) + 1) if index.numel() else site.n_experts


def _real(bins: torch.Tensor, site: Site) -> torch.Tensor:
    return bins[: site.n_experts].cpu()


def likeness_of(model: nn.Module, anatomy: Anatomy, sites: Sequence[Site]) -> Iterator[Likeness]:
    """Cosines between the experts of each layer."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    for site in sites:
        vectors = torch.stack([_weights(parts, tensors) for parts in _experts_of(anatomy, site.name).values()])
        n = len(vectors)
        if n < 2:
            continue
        unit = vectors / vectors.norm(dim=1, keepdim=True).clamp(min=1e-30)
        pairs = [(i, j) for i in range(n) for j in range(i + 1, n)]
        cosines = (unit @ unit.T)[tuple(zip(*pairs, strict=True))].clamp(-1, 1)
        yield Likeness(
            site=site.name,
            smallest=cosines.min().item(),
            mean=cosines.mean().item(),
            largest=cosines.max().item(),
            identical=tuple(
                p for p, c in zip(pairs, cosines.tolist(), strict=True) if c > 0.999 and _equal(vectors, *p)
            ),
        )


def _equal(vectors: torch.Tensor, i: int, j: int) -> bool:
    return torch.equal(vectors[i], vectors[j])


def _experts_of(anatomy: Anatomy, site: str) -> dict[int, list[Component]]:
    found: dict[int, list[Component]] = {}
    for c in anatomy.components:
        if c.name.startswith(f"{site}.experts["):
            found.setdefault(next(i for name, i in c.path if name == "experts") or 0, []).append(c)
    return found


def _weights(parts: Sequence[Component], tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    pieces = (s for c in parts for s in c.slices if s.tensor in tensors)
    return torch.cat([take(tensors[s.tensor], s).detach().float().reshape(-1) for s in pieces])


# --- from measurements to selections


def top(usage: Usage, n: int, by: Score) -> Chosen:
    """The `n` experts of every layer with the highest score; the lower index first among equals."""
    most = min(len(s.load) for s in usage.sites)
    if not 1 <= n <= most:
        raise RecipeError(f"top {n}: a layer of this model has {most} experts; name 1 to {most}")
    return {s.site: tuple(chosen(Ranked(n, by), s.scores(by))) for s in usage.sites}


def cover(usage: Usage, share: float, by: Score) -> Chosen:
    """In every layer, the fewest experts whose scores sum to at least `share`."""
    if not 0 < share <= 1:
        raise RecipeError(f"cover {share}: name a share above 0 and at most 1")
    return {s.site: tuple(chosen(Ranked(float(share), by), s.scores(by))) for s in usage.sites}


def scores_of(usage: Usage) -> Scores:
    """What selections are ranked by."""
    return {by: {s.site: s.scores(by) for s in usage.sites} for by in SCORES}


# --- ESFT's expert configurations


def write_esft(chosen: Chosen, path: str | Path, *, shared_experts: bool = False, non_expert: bool = False) -> None:
    """Write the file that ESFT trains by: layer → experts, and whether shared experts and all else learn too."""
    by_layer = {_layer(site): list(experts) for site, experts in chosen.items()}
    data = {"experts": by_layer, "shared_experts": shared_experts, "non_expert_modules": non_expert}
    Path(path).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def read_esft(path: str | Path, anatomy: Anatomy) -> str:
    """The plain selection that an ESFT expert configuration means in a model. Raises `RecipeError`."""
    try:
        return esft_expression(Path(path).read_text(encoding="utf-8"), anatomy, path)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read: {error}") from None


def esft_expression(text: str, anatomy: Anatomy, path: str | Path) -> str:
    """The same from the file's text; `path` is for messages."""
    try:
        data = json.loads(text)
        experts = {int(layer): tuple(int(e) for e in numbers) for layer, numbers in data["experts"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RecipeError(f"{path} is no expert configuration of ESFT: {type(error).__name__}: {error}") from None
    sites = {c.path[0][1] or 0: c.name.partition(".experts[")[0] for c in anatomy.components if ".experts[" in c.name}
    missing = sorted(set(experts) - set(sites))
    if missing:
        raise RecipeError(
            f"{path} names layer {missing[0]}, which has no experts; layers with experts: {sorted(sites)}"
        )
    by_site = {sites[layer]: numbers for layer, numbers in sorted(experts.items()) if numbers}
    terms = [expression_of(by_site)] if by_site else []
    has_shared = any("shared_expert" in c.name for c in anatomy.components)
    if data.get("non_expert_modules"):
        terms.append("(all - experts - shared_expert)" if has_shared else "(all - experts)")
    if data.get("shared_experts") and has_shared:
        terms.append("shared_expert")
    if not terms:
        raise RecipeError(f"{path} chooses nothing that could learn")
    return " | ".join(terms)


def _layer(site: str) -> str:
    return site.partition("[")[2].partition("]")[0]


def usage_from_json(data: Mapping[str, Any]) -> Usage:
    """The inverse of `usage_to_json`, likeness left out."""
    sites = tuple(
        SiteUsage(site=s["site"], layer=s["layer"], load=tuple(s["load"]), gate=tuple(s["gate"])) for s in data["sites"]
    )
    return Usage(n_tokens=data["n_tokens"], sites=sites, likeness=())


def usage_to_json(usage: Usage) -> dict[str, Any]:
    """The measurement as plain data, with what is read off it."""
    sites = [
        {**asdict(s), "largest_share": s.largest_share, "entropy": s.entropy, "never": list(s.never)}
        for s in usage.sites
    ]
    return {"n_tokens": usage.n_tokens, "sites": sites, "likeness": [asdict(x) for x in usage.likeness]}
