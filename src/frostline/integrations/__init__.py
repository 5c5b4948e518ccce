"""Frostline from inside other trainers: `attach(trainer, "ffn", out="runs/mine")` before `trainer.train()`.

The only place that imports their packages; nothing else of Frostline needs them. Read `hf_trainer.attach`.
"""

from frostline.integrations.hf_trainer import TrainerRun, attach

__all__ = ["TrainerRun", "attach"]
