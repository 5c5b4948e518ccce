"""TRL's `SFTTrainer`. Settings: any argument of its `SFTConfig`; `padding_free` holds only where rows differ in length.
Without settings its defaults, gradient checkpointing among them, apart from what makes every system compute the same.

Changed for that: a constant rate, no decay, rows in order, batch size, `bf16` as the job says (TRL's own is true, with
which an fp32 job would be none), no limit of length (TRL's own is 1,024), no auxiliary loss of routers. What learns is
marked by `requires_grad` before the trainer is made, for TRL has no setting for it. Its loss works in chunks and
computes the logits again in the backward pass; there is no switch for that.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from hugging import Watch, alike, documents, tokenizer
from job import Job, Meter, Result, load_model, main


def run(job: Job) -> Result:
    """Train."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    meter = Meter(job)
    rows = documents(job)
    model = load_model(job)
    settings = dict(job.settings)
    settings["padding_free"] = settings.get("padding_free", False) and not alike(rows)
    if "router_aux_loss_coef" in model.config.to_dict():
        settings["router_aux_loss_coef"] = 0.0
    with tempfile.TemporaryDirectory() as folder, Watch(meter, job) as watch:
        arguments = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=job.batch,
            num_train_epochs=1,
            learning_rate=job.lr,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            train_sampling_strategy="sequential",
            max_length=None,
            bf16=job.dtype == "bf16",
            use_cpu=job.device == "cpu",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **settings,
        )
        SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_dict({"input_ids": rows}),
            processing_class=tokenizer(model.config.vocab_size),
            callbacks=[watch],
        ).train()
    return watch.result()


if __name__ == "__main__":
    main(run)
