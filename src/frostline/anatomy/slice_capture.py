"""One branch of a tiny model, run by itself and watched: what `slice_proof` measures with.

A branch is the module of an attention or FFN part with the arguments that the model calls it with, its hidden states
replaced by random ones. `Watch` notes the products, softmaxes and choices inside a forward pass without knowing what
they belong to; `attentions` finds query, key and value among them, `choices` the experts. Read `run` first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - what everyone calls it
from torch import nn
from torch.overrides import TorchFunctionMode

from frostline.anatomy.access import put, take
from frostline.anatomy.slices import Slice
from frostline.errors import first_line

N_TOKENS = 48

_PRODUCTS = {
    torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm, torch.baddbmm,
    torch.Tensor.baddbmm, torch.einsum,
}  # fmt: skip
_SOFTMAXES = {F.softmax, torch.softmax, torch.Tensor.softmax}
_TOPKS = {torch.topk, torch.Tensor.topk}


class NotMeasuredError(Exception):
    """A measurement that could not be made; the message says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Branch:
    """A module and the arguments that it can be called with."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    n_rows: int
    """Tokens in its input."""
    parameters: dict[str, torch.Tensor]
    """Those of the whole model, by every name they have."""


@dataclass(frozen=True, slots=True)
class Product:
    """A product of two batched tensors."""

    first: torch.Tensor
    second: torch.Tensor
    result: torch.Tensor


@dataclass(frozen=True, slots=True)
class Attention:
    """What one softmax joined."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor

    @property
    def n_heads(self) -> int:
        """Query heads: everything before the last two dimensions, at batch size 1."""
        return self.query.shape[:-2].numel()


class Watch(TorchFunctionMode):
    """Notes batched products, softmaxes and choices of the forward pass that runs inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Product | torch.Tensor | Attention] = []
        """In order: products, results of softmaxes, whole attentions."""
        self.topk: list[torch.Tensor] = []
        """Indices that were chosen."""
        self.one_hot: list[torch.Tensor] = []
        """Indices that were turned into masks."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function and note it."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in _PRODUCTS:
            operands = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)][-2:]
            if len(operands) == 2 and all(t.dim() >= 3 for t in operands):
                self.events.append(Product(operands[0], operands[1], out))
        elif func in _SOFTMAXES:
            self.events.append(out)
        elif func is F.scaled_dot_product_attention:
            self.events.append(Attention(*(*args, *(kwargs[n] for n in ("query", "key", "value") if n in kwargs))[:3]))
        elif func in _TOPKS:
            self.topk.append(out[1])
        elif func is F.one_hot:
            self.one_hot.append(args[0])
        return out


def run(branch: Branch, watch: Watch | None = None) -> torch.Tensor:
    """The branch's output, one row per token, with its graph. Raises `NotMeasuredError`."""
    try:
        with torch.enable_grad(), watch or Watch():
            out = branch.module(*map(_fresh, branch.args), **{k: _fresh(v) for k, v in branch.kwargs.items()})
    except Exception as error:  # modules raise anything when they are called by themselves
        raise NotMeasuredError(f"its module does not run by itself: {first_line(error)}") from error
    out = out[0] if isinstance(out, (tuple, list)) else out
    if not isinstance(out, torch.Tensor) or not out.requires_grad or not bool(out.isfinite().all()):
        raise NotMeasuredError("its module returns no finite tensor with a gradient")
    return out.reshape(branch.n_rows, -1)


def _fresh(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value  # some modules add to their input in place


def find_branches(model: nn.Module, modules: Mapping[str, nn.Module], seed: int) -> dict[str, Branch]:
    """Part → branch, for each of `modules` that one forward pass of the model calls. Raises `NotMeasuredError`."""
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def note(name: str) -> Any:
        return lambda _, args, kwargs: calls.setdefault(name, (args, kwargs)) and None

    hooks = [m.register_forward_pre_hook(note(name), with_kwargs=True) for name, m in modules.items()]
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
    ids = torch.randint(3, vocabulary, (1, N_TOKENS), generator=generator)
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    except Exception as error:  # models raise anything when a tiny size does not suit them
        raise NotMeasuredError(f"the tiny model does not run: {first_line(error)}") from error
    finally:
        for hook in hooks:
            hook.remove()
    parameters: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return {name: _branch(modules[name], *call, parameters, generator) for name, call in calls.items()}


def _branch(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    parameters: dict[str, torch.Tensor],
    generator: torch.Generator,
) -> Branch:
    """The call of a module with random hidden states in place of its own."""
    named: dict[int | str, Any] = dict(enumerate(args))
    named.update(kwargs)
    data = [n for n, v in named.items() if isinstance(v, torch.Tensor) and v.is_floating_point()]
    key = "hidden_states" if "hidden_states" in data else data[0]
    named[key] = torch.randn(named[key].shape, generator=generator)
    return Branch(
        module=module,
        args=tuple(named[i] for i in range(len(args))),
        kwargs={k: named[k] for k in kwargs},
        n_rows=named[key].numel() // named[key].shape[-1],
        parameters=parameters,
    )


def attentions(watch: Watch) -> list[Attention]:
    """Every softmax of a product whose result weights another one: query and key before it, value after it."""
    out = [e for e in watch.events if isinstance(e, Attention)]
    for at, weights in enumerate(watch.events):
        if not isinstance(weights, torch.Tensor):
            continue
        before = [e for e in watch.events[:at] if isinstance(e, Product)]
        after = [e for e in watch.events[at:] if isinstance(e, Product)]
        scores = next((p for p in reversed(before) if _depends(weights, p.result)), None)
        context = next((p for p in after if _depends(p.first, weights)), None)
        if scores and context:
            out.append(Attention(scores.first, scores.second, context.second))
    return out


def _depends(result: torch.Tensor, on: torch.Tensor) -> bool:
    if not (result.requires_grad and on.requires_grad):
        return False
    return torch.autograd.grad(result.sum(), on, retain_graph=True, allow_unused=True)[0] is not None


def choices(watch: Watch, n_rows: int) -> list[frozenset[int]]:
    """Per token, the experts chosen for it: the last choice that has one row per token. Raises `NotMeasuredError`."""
    found = [i for i in (*watch.one_hot, *watch.topk) if i.dim() and i.numel() == n_rows * i.shape[-1]]
    if not found:
        raise NotMeasuredError("no choice with one row per token in its forward pass")
    return [frozenset(row) for row in found[-1].reshape(n_rows, -1).tolist()]


def touched(output: torch.Tensor, names: Iterable[str], branch: Branch) -> dict[str, torch.Tensor]:
    """Per parameter, the elements (bool) that a random functional of `output` depends on."""
    parameters = {n: branch.parameters[n] for n in names}
    gradients: tuple[torch.Tensor | None, ...] = (None,) * len(parameters)
    if output.requires_grad and parameters:
        cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
        inputs = list(parameters.values())
        gradients = torch.autograd.grad(output, inputs, cotangent, retain_graph=True, allow_unused=True)
    return {
        n: torch.zeros(p.shape, dtype=torch.bool) if g is None else g != 0
        for (n, p), g in zip(parameters.items(), gradients, strict=True)
    }


@contextmanager
def scaled(slices: Iterable[Slice], factor: float, branch: Branch) -> Iterator[None]:
    """Slices of the parameters multiplied by a factor for the time of the context."""
    slices = tuple(slices)
    before = [take(branch.parameters[s.tensor].detach(), s).clone() for s in slices]
    with torch.no_grad():
        for s, values in zip(slices, before, strict=True):
            put(branch.parameters[s.tensor], s, factor * values)
    try:
        yield
    finally:
        with torch.no_grad():
            for s, values in zip(slices, before, strict=True):
                put(branch.parameters[s.tensor], s, values)


@contextmanager
def linear_norms(norms: Iterable[nn.Module]) -> Iterator[None]:
    """Norms multiply by their weight only: the statistics of a norm over all heads or neurons would join them."""

    def plain(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        weight = getattr(module, "weight", None)
        if len(args) != 1 or weight is None or not isinstance(output, torch.Tensor):
            return None
        product = args[0] * weight
        return product if product.shape == output.shape else None

    hooks = [m.register_forward_hook(plain) for m in norms]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
