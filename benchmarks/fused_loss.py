"""Time and memory of the loss of a linear head: full logits, torch's chunked one, and ours, by chunk size.

`python benchmarks/fused_loss.py [--tokens 2048] [--width 512] [--vocabulary 8192 32000] [--device cpu]` prints seconds
of forward and backward (best of five) for a frozen and a learning head, and the peak of tensor bytes above the inputs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

import torch
from torch.nn import functional

from frostline.engine import linear_loss
from frostline.errors import PlanError
from frostline.plan import Meter

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def full(x: torch.Tensor, w: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(functional.linear(x, w).float(), labels, reduction="sum")


def chunked_by_torch(x: torch.Tensor, w: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions

    options = LinearCrossEntropyOptions()
    return functional.linear_cross_entropy(x, w, labels, reduction="sum", options=options)


def ours(elements: int) -> Loss:
    def loss(x: torch.Tensor, w: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        linear_loss.CHUNK_ELEMENTS["cpu"] = elements
        return linear_loss.linear_cross_entropy(x, w, None, labels)

    return loss


def measure(loss: Loss, x: torch.Tensor, w: torch.Tensor, labels: torch.Tensor) -> tuple[float, str]:
    """Seconds, and the peak of bytes where the operations can be looked into."""
    seconds = []
    for _ in range(6):
        x.grad = w.grad = None
        started = time.perf_counter()
        loss(x, w, labels).div(len(x)).backward()
        if x.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    x.grad = w.grad = None
    meter = Meter({"x": x, "w": w}, device="cuda" if x.is_cuda else "cpu")
    try:
        with meter:
            loss(x, w, labels).div(len(x)).backward()
    except PlanError:  # one operation that hides what it allocates
        return min(seconds[1:]), "?"
    return min(seconds[1:]), f"{meter.peak_bytes / 1e6:.0f}"


def losses() -> Iterator[tuple[str, Loss]]:
    yield "full logits", full
    if hasattr(functional, "linear_cross_entropy"):  # from torch 2.13 on
        yield "torch, chunked", chunked_by_torch
    for power in (19, 20, 21, 22, 23, 24, 25):
        yield f"ours, 2^{power} logits", ours(1 << power)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, nargs="*", default=[8192, 32000])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    asked = parser.parse_args()
    make = {"device": asked.device, "dtype": getattr(torch, asked.dtype)}
    for vocabulary in asked.vocabulary:
        for learns in (False, True):
            x = torch.randn(asked.tokens, asked.width, **make, requires_grad=True)
            w = (0.02 * torch.randn(vocabulary, asked.width, **make)).requires_grad_(learns)
            labels = torch.randint(vocabulary, (asked.tokens,), device=asked.device)
            for name, loss in losses():
                seconds, peak = measure(loss, x, w, labels)
                head = "learns" if learns else "frozen"
                print(f"V {vocabulary:>6} head {head}  {name:<22} {seconds:7.3f} s  {peak:>7} MB", flush=True)


if __name__ == "__main__":
    main()
