"""The least that trains: the model of transformers, its own loss, fused AdamW. Settings: `compile`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from job import Job, Meter, Result, collate, load_model, main, tokens_of


def run(job: Job) -> Result:
    """Train."""
    import torch

    meter = Meter(job)
    model = load_model(job)
    model.train()
    rows = torch.load(job.tokens)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=job.lr, weight_decay=0.0, fused=True)
    forward = torch.compile(model) if job.settings.get("compile") else model
    losses, order = [], job.order(len(rows))
    meter.start()
    for indices in order:
        batch = {name: tensor.to(job.device) for name, tensor in collate(rows, indices).items()}
        with torch.autocast(job.device, torch.bfloat16, enabled=job.dtype == "bf16"):
            loss = forward(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        meter.tick()
    return Result(
        seconds=meter.seconds,
        losses=[x.item() for x in losses],
        peak_bytes=meter.peak_bytes(),
        tokens=tokens_of(rows, order),
        cpu_seconds=meter.cpu_seconds,
        n_learning=sum(p.numel() for p in learning),
    )


if __name__ == "__main__":
    main(run)
