"""One expert learns and no other byte moves, in every way that transformers stores experts."""

from __future__ import annotations

import pytest
import torch
from all_types import DECODERS, small_model

import frostline
from frostline.anatomy import fingerprint, read_anatomy, take
from frostline.errors import ModelError
from frostline.model_source import quiet_transformers
from frostline.moe import choice_of, find_sites, watch_routers

FAST = ("mixtral", "gpt_oss", "deepseek_v3")
"""Stacked matrices; transposed, interleaved and with biases; beside a shared expert and a correction of the router."""

EXPERTS = (
    "afmoe", "aria_text", "axk1", "axk2", "bailing_hybrid", "beam", "cohere2_moe", "dbrx", "deepseek_v2", "deepseek_v3",
    "deepseek_v32", "deepseek_v4", "dots1", "dots3_note_text", "ernie4_5_moe", "exaone_moe", "flex_olmo", "flint",
    "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "gpt_oss", "granitemoe", "granitemoe_swa", "granitemoehybrid",
    "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "hy_v4", "inkling2_text", "inkling_text", "jamba", "jetmoe",
    "kimi_linear", "kolibri1", "laguna", "lfm2_moe", "llama4_text", "longcat_flash", "mellum", "mimo_v2_flash",
    "minimax", "minimax_m2", "minimax_m3_vl_text", "mixtral", "nemotron_h", "olmoe", "phimoe", "qwen2_moe",
    "qwen3_5_moe_text", "qwen3_moe", "qwen3_next", "qwen4_exp_text", "solar_open", "zaya",
)  # fmt: skip
"""Every type whose FFN has experts; a test says that none is left out."""


def build(model_type):
    torch.manual_seed(0)
    with quiet_transformers():
        return small_model(model_type).float()


def tokens(model):
    n = model.config.get_text_config().vocab_size
    return torch.randint(5, min(n, 60), (4, 16), generator=torch.Generator().manual_seed(0))


def busiest(model, anatomy, ids):
    """(site, the expert that most tokens go to), so that it has something to learn."""
    site = find_sites(model, anatomy)[0]
    with watch_routers([site]) as seen, torch.no_grad():
        model.eval()(input_ids=ids, use_cache=False)
    try:
        index = choice_of(seen[site.name], site)
    except ModelError:  # experts that are not told who visits them
        return site, 0
    return site, int(torch.bincount(index[index < site.n_experts].flatten(), minlength=site.n_experts).argmax())


def hashes(model, anatomy):
    """Component → what its bytes are."""
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    return {c.name: [fingerprint(take(tensors[s.tensor], s)) for s in c.slices] for c in anatomy.components}


def check_one_expert_learns(model_type, folder):
    model = build(model_type)
    anatomy, ids = read_anatomy(model), tokens(model)
    site, expert = busiest(model, anatomy, ids)
    part = f"{site.name}.experts[{expert}]"
    before = hashes(model, anatomy)
    with frostline.learning(model.train(), part, out=folder) as run:
        optimizer = torch.optim.AdamW(run.parameter_groups(weight_decay=0.1), lr=1e-3)
        for _ in range(2):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    after = hashes(model, anatomy)
    moved = {name for name in before if before[name] != after[name]}
    assert moved == {c.name for c in anatomy.components if c.name.startswith(f"{part}.")}
    assert run.audit().passed


@pytest.mark.parametrize("model_type", FAST)
def test_one_expert_learns_and_the_other_experts_keep_their_bytes(model_type, tmp_path):
    check_one_expert_learns(model_type, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [t for t in EXPERTS if t not in FAST])
def test_one_expert_learns_in_every_type_and_the_others_keep_their_bytes(model_type, tmp_path):
    check_one_expert_learns(model_type, tmp_path / "run")


@pytest.mark.slow
def test_every_type_with_experts_is_in_the_list():
    found = []
    for model_type in DECODERS:
        with torch.device("meta"):
            anatomy = read_anatomy(build(model_type))
        if any(".ffn.experts[" in c.name or ".ffn[0].experts[" in c.name for c in anatomy.components):
            found.append(model_type)
    assert tuple(found) == EXPERTS
