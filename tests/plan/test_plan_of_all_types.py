"""Every decoder-only type in a tiny size: planned as the real step is, or refused with the reason."""

from __future__ import annotations

import all_types
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from frostline.anatomy import read_anatomy
from frostline.errors import PlanError
from frostline.plan.plan import plan_errors
from frostline.plan.trace import trace_stage
from frostline.recipe import StageSpec
from frostline.schedule import Schedule
from frostline.selection import select

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

REFUSED = {
    **dict.fromkeys(("biogpt", "gemma3n_text", "jetmoe", "modernbert-decoder"), "reads the value of a tensor"),
    **dict.fromkeys(
        ("dbrx", "longcat_flash", "qwen4_exp_text"), "chooses the size of a tensor by the values of another"
    ),
}
"""Model type → why it cannot be executed without values."""


@pytest.mark.parametrize("model_type", all_types.DECODERS)
def test_flops_are_the_real_steps_and_its_peak_within_a_twentieth(model_type: str) -> None:
    config = all_types.small_config(model_type)
    with torch.device("meta"):
        anatomy = read_anatomy(AutoModelForCausalLM.from_config(config))
    spec = StageSpec(learn="layers[-1]", steps=1, lr=1e-3)
    (stage,) = Schedule.of([("s", spec, select(anatomy, "layers[-1]", ties="together"))]).stages
    size = {"rows": 2, "length": 32, "n_vocabulary": config.get_text_config().vocab_size}
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def planned() -> tuple[int, int]:
        with plan_errors(model_type):
            with mode, torch.device("cpu"):
                model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            cost = trace_stage(model, anatomy, stage, **size, mode=mode)
        return cost.total_flops, cost.peak_bytes

    if model_type in REFUSED:
        with pytest.raises(PlanError):
            planned()
        return
    flops, peak = planned()
    real = trace_stage(AutoModelForCausalLM.from_config(config, dtype=torch.float32), anatomy, stage, **size)
    assert flops == real.total_flops
    assert peak == pytest.approx(real.peak_bytes, rel=0.05)
