"""What is said about mixtures of experts, settled by measurement: on a model, or on mixtures made from it.

Row S10 of the question the project grew from. A dense model without an exact way to a mixture gets the reason instead
of numbers. Read `a_mixture_computes_the_same` first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import nn

from frostline.engine.loss import logits_of
from frostline.errors import ModelError
from frostline.experiment.bench import N_STEPS, Bench, Claim, unmeasured
from frostline.moe import choice_of, find_sites, mixture_of, watch_routers
from frostline.recipe import MoeSpec

EXPERTS = 4
TOP_K = (1, 2)
LARGEST = 200_000_000
"""Parameters up to which a dense model is copied into mixtures."""
BALANCE = 0.01
"""Factor of the load-balancing loss."""


def a_mixture_computes_the_same(bench: Bench) -> Claim:
    """S10: logits of a dense model and of the mixtures made from it."""
    belief = "Replacing a dense model's FFNs by experts and a router makes it another function."
    try:
        with torch.no_grad():
            bench.learn("all")
            before = logits_of(bench.model.eval(), bench.batch.to(bench.device)).double()
            changes = {k: _change(before, mixture, bench) for k, mixture in _made_from(bench)}
    except ModelError as error:
        return unmeasured("S10", belief, error)
    return Claim(
        key="S10",
        belief=belief,
        verdict="FALSE for copies of the FFN",
        measured=f"With {EXPERTS} experts a layer, ‖Δlogits‖/‖logits‖ is "
        + " and ".join(f"{change:.1e} with top-{k} routing" for k, change in changes.items())
        + ".",
        holds=all(change < 1e-5 for change in changes.values()),
        numbers={f"change_of_logits_top_{k}": change for k, change in changes.items()},
    )


def _change(before: torch.Tensor, mixture: nn.Module, bench: Bench) -> float:
    after = logits_of(mixture.eval(), bench.batch.to(bench.device)).double()
    return float((after - before).norm() / before.norm())


@dataclass(frozen=True, kw_only=True, slots=True)
class _Trained:
    """What changed while experts and routers learned."""

    frozen: int
    """Bytes outside experts and routers that changed."""
    used: int
    """Experts that got tokens."""
    moved: int
    """Those of them that moved."""
    routers: int
    routers_moved: int

    @property
    def as_expected(self) -> bool:
        return not self.frozen and self.moved == self.used > 0 and self.routers_moved == self.routers > 0

    def __str__(self) -> str:
        return (
            f"{self.frozen} bytes of all else changed; {self.moved} of {self.used} experts with tokens and "
            f"{self.routers_moved} of {self.routers} routers moved"
        )


def experts_and_router_learn_alone(bench: Bench) -> Claim:
    """S10: attention and all that is shared frozen, experts and router learning."""
    belief = "With the shared attention frozen, experts and router alone can be trained."
    try:
        bench.learn("all")
        if find_sites(bench.model, bench.anatomy):
            found = {"its own routing": _train(bench)}
        else:
            found = {f"top-{k}": _train(Bench(mixture, bench.batch)) for k, mixture in _made_from(bench)}
    except ModelError as error:
        return unmeasured("S10", belief, error)
    return Claim(
        key="S10",
        belief=belief,
        verdict="TRUE",
        measured=f"After {N_STEPS} AdamW steps with a balancing loss, "
        + ", and ".join(f"{name}: {trained}" for name, trained in found.items())
        + ".",
        holds=all(trained.as_expected for trained in found.values()),
        numbers={f"{key} {name}": n for name, trained in found.items() for key, n in asdict(trained).items()},
    )


def _train(bench: Bench) -> _Trained:
    active = bench.learn("experts | router", moe=MoeSpec(balance=BALANCE), state="reset")
    sites = find_sites(bench.model, bench.anatomy)
    used: set[str] = set()
    for _ in range(N_STEPS):
        with watch_routers(sites) as seen:
            bench.backward()
        for site in sites:
            used |= {f"{site.name}.experts[{e}]" for e in choice_of(seen[site.name], site).unique().tolist()}
        bench.update(active)
    active.ownership.release()
    return _Trained(
        frozen=bench.bytes_changed(bench.select("~(experts | router)")),
        used=len(used),
        moved=sum(all(bench.moved(s) for s in bench.select(name).slices) for name in used),
        routers=len(sites),
        routers_moved=sum(any(bench.moved(s) for s in bench.select(f"{site.name}.router").slices) for site in sites),
    )


def _made_from(bench: Bench) -> Iterator[tuple[int, nn.Module]]:
    """Mixtures made from a dense model, by the experts that a token visits. Raises `ModelError` for what has none."""
    if find_sites(bench.model, bench.anatomy):
        raise ModelError("this model is a mixture of experts already")
    if bench.anatomy.n_parameters > LARGEST:
        raise ModelError(f"above {LARGEST:,} parameters no copies are made here; `frostline upcycle` measures this too")
    for k in TOP_K:
        yield k, mixture_of(bench.model, experts=EXPERTS, top_k=k).to(bench.device)


MOE_CLAIMS: tuple[Callable[[Bench], Claim], ...] = (a_mixture_computes_the_same, experts_and_router_learn_alone)
