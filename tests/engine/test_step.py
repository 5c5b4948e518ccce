from __future__ import annotations

import tiny
import torch
from torch import nn

from frostline.data import Batch
from frostline.engine.loss import next_token_loss
from frostline.engine.step import step

CPU = torch.device("cpu")


def batch(n_rows: int = 4, length: int = 12, seed: int = 0) -> Batch:
    ids = torch.randint(tiny.VOCABULARY, (n_rows, length + 1), generator=torch.Generator().manual_seed(seed))
    return Batch(input_ids=ids[:, :-1], labels=ids[:, 1:].clone())


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_the_gradient_is_that_of_the_mean_loss_by_finite_differences() -> None:
    model = tiny.model("gpt2").double().eval()  # its norms and softmax stay in fp64, unlike Llama's
    data = batch()
    step(model, [data], next_token_loss, seed=0, device=CPU)

    def mean_loss() -> float:
        with torch.no_grad():
            logits = model(input_ids=data.input_ids).logits
            picked = logits.log_softmax(-1).gather(-1, data.labels[..., None])
            return float(-picked.mean())

    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        direction = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        direction /= direction.norm()
        epsilon = 1e-5
        with torch.no_grad():
            p += epsilon * direction
            above = mean_loss()
            p -= 2 * epsilon * direction
            below = mean_loss()
            p += epsilon * direction
        numeric, exact = (above - below) / (2 * epsilon), float((p.grad * direction).sum())  # type: ignore[operator]
        assert abs(numeric - exact) <= 1e-6 * max(1e-3, abs(exact)) + 1e-9, name


def test_micro_batches_of_any_size_give_the_gradient_of_the_whole_batch() -> None:
    data = batch(n_rows=6)
    data.labels[0, 3:] = -100  # uneven numbers of targets: every target must still weigh the same
    data.labels[4] = -100
    whole, parts = tiny.model("llama").double(), tiny.model("llama").double()
    one = step(whole, [data], next_token_loss, seed=0, device=CPU)
    many = step(parts, data.split(3), next_token_loss, seed=0, device=CPU)
    assert abs(one.loss - many.loss) < 1e-12
    assert one.n_targets == many.n_targets == 3 + 4 * 12
    for name, g in gradients(whole).items():
        assert float((g - gradients(parts)[name]).norm() / g.norm()) < 1e-6, name  # the softmax is in fp32


def test_dropout_is_a_function_of_the_seed_alone() -> None:
    model = tiny.model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5)
    model.train()
    losses = []
    for seed, disturb in ((1, 0), (1, 99), (2, 0)):
        torch.manual_seed(disturb)
        losses.append(step(model, [batch()], next_token_loss, seed=seed, device=CPU).loss)
    assert losses[0] == losses[1] != losses[2]


def test_a_batch_without_targets_has_no_loss_and_no_nan() -> None:
    model, data = tiny.model("llama"), batch()
    data.labels[:] = -100
    record = step(model, [data], next_token_loss, seed=0, device=CPU)
    assert record.loss == 0
    assert all(bool((g == 0).all()) for g in gradients(model).values())


def test_bf16_mixed_keeps_fp32_weights_and_gradients_and_changes_the_loss_a_little() -> None:
    model = tiny.model("llama")
    exact = step(model, [batch()], next_token_loss, seed=0, device=CPU)
    model.zero_grad()
    mixed = step(model, [batch()], next_token_loss, seed=0, device=CPU, bf16=True)
    assert 0 < abs(exact.loss - mixed.loss) < 0.05
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {g.dtype for g in gradients(model).values()} == {torch.float32}
