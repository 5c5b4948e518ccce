"""Hugging Face Trainer. Settings: any of its arguments, such as `torch_compile`; without any, its defaults, apart from
what makes every system compute the same: a constant rate, no decay, the same order of rows."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from hugging import Watch
from job import Job, Meter, Result, collate, load_model, main


def run(job: Job) -> Result:
    """Train."""
    import torch
    from transformers import Trainer, TrainingArguments

    meter = Meter(job)
    model = load_model(job)
    rows = torch.load(job.tokens)
    with tempfile.TemporaryDirectory() as folder, Watch(meter, job) as watch:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=job.batch,
            num_train_epochs=1,
            learning_rate=job.lr,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            train_sampling_strategy="sequential",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=job.device == "cpu",
            bf16=job.dtype == "bf16",
            remove_unused_columns=False,
            **job.settings,
        )
        Trainer(
            model=model,
            args=arguments,
            train_dataset=[i for indices in job.order(len(rows)) for i in indices],
            data_collator=lambda indices: collate(rows, indices),
            callbacks=[watch],
        ).train()
    return watch.result()


if __name__ == "__main__":
    main(run)
