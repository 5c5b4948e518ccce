"""Models unlike anything in transformers: resolved and proved, or refused in a way that helps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from frostline.anatomy import anatomy_of_parts, prove, prove_model, read_anatomy
from frostline.errors import AnatomyError, SelectionError
from frostline.selection import select


class OddConfig(PretrainedConfig):
    model_type = "odd"

    def __init__(self, hidden_size: int = 16, vocab_size: int = 64, **kwargs: Any) -> None:
        self.hidden_size, self.vocab_size = hidden_size, vocab_size
        super().__init__(**kwargs)


class WhirlAttention(nn.Module):
    """Causal mean of values, with projections called as nowhere else but q."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.bring_home = nn.Linear(width, width)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        n = hidden_states.shape[1]
        mean = torch.ones(n, n).tril()
        mean = mean / mean.sum(-1, keepdim=True)
        return self.bring_home(torch.sigmoid(self.q_proj(hidden_states)) * (mean @ self.v_proj(hidden_states)))


class PeakMLP(nn.Module):
    """A plain FFN; `leaky` makes it look at the token before, which an FFN must not."""

    leaky = False

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.leaky:
            hidden_states = hidden_states + hidden_states.roll(1, dims=1)
        return self.fc2(torch.relu(self.fc1(hidden_states)))


class LeakyMLP(PeakMLP):
    leaky = True


class Whirl(nn.Module):
    """One block; `swapped` uses its norms for the other branch than their names say."""

    mlp_class: type[PeakMLP] = PeakMLP
    swapped = False

    def __init__(self, width: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(width)
        self.spin = WhirlAttention(width)
        self.post_attention_layernorm = nn.LayerNorm(width)
        self.peak = self.mlp_class(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.input_layernorm, self.post_attention_layernorm
        if self.swapped:
            first, second = second, first
        x = x + 0.5 * self.spin(first(x))
        return x + self.peak(second(x))


class LeakyWhirl(Whirl):
    mlp_class = LeakyMLP


class SwappedWhirl(Whirl):
    swapped = True


class Tower(PreTrainedModel):
    config_class = OddConfig
    block_class: type[nn.Module] = Whirl

    def __init__(self, config: OddConfig) -> None:
        super().__init__(config)
        self.sockets = nn.Embedding(config.vocab_size, config.hidden_size)
        self.storeys = nn.ModuleList([self.block_class(config.hidden_size) for _ in range(2)])
        self.roof_norm = nn.LayerNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.sockets

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_decoder(self) -> nn.Module:
        return self

    def forward(self, input_ids: torch.Tensor, **_: Any) -> CausalLMOutput:
        x = self.sockets(input_ids)
        for storey in self.storeys:
            x = storey(x)
        return CausalLMOutput(logits=self.lm_head(self.roof_norm(x)))


class LeakyTower(Tower):
    block_class = LeakyWhirl


class SwappedTower(Tower):
    block_class = SwappedWhirl


class Riddle(nn.Module):
    """A block whose parts' names say nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.alpha = nn.Bilinear(width, width, width)
        self.omega = nn.PReLU(width)


class RiddleTower(Tower):
    block_class = Riddle


def test_a_model_with_unusual_names_is_resolved_and_proved() -> None:
    torch.manual_seed(0)
    model = Tower(OddConfig())
    anatomy = read_anatomy(model)
    names = [c.name for c in anatomy.components]
    assert names[:3] == ["embed", "layers[0].attn_norm", "layers[0].attn.q"]
    assert "layers[1].attn.bring_home" in names
    assert select(anatomy, "ffn").n_tensors == 8
    proof = prove_model(model)
    assert not proof.disagreements
    block = proof.blocks[1]
    assert block.mixes_tokens == {"attn": True, "ffn": False}
    assert block.residual_scale == {"stream": 1.0, "attn": 0.5, "ffn": 1.0}
    assert (block.topology, block.placement) == ("sequential", "pre-norm")


def test_an_ffn_that_looks_at_other_tokens_is_a_disagreement_with_both_sides() -> None:
    torch.manual_seed(0)
    found = prove_model(LeakyTower(OddConfig())).disagreements
    assert found == tuple(
        f"layers[{i}].ffn: its name says it treats every token alone, measured: it mixes tokens" for i in range(2)
    )


def test_norms_used_for_the_other_branch_are_a_disagreement_with_both_sides() -> None:
    torch.manual_seed(0)
    found = prove_model(SwappedTower(OddConfig())).disagreements
    assert "layers[0].attn_norm: its name says it feeds attn, measured: it feeds ffn" in found
    assert "layers[1].ffn_norm: its name says it feeds ffn, measured: it feeds attn" in found


def test_a_model_that_is_not_understood_is_refused_with_the_list() -> None:
    with pytest.raises(AnatomyError) as caught:
        read_anatomy(RiddleTower(OddConfig()))
    assert "6 tensors are not understood" in str(caught.value)
    assert "storeys.1.omega.weight (16,)" in str(caught.value)


def test_a_module_that_is_no_language_model_is_refused_with_the_way_out() -> None:
    with pytest.raises(AnatomyError, match="anatomy_of_parts"):
        read_anatomy(nn.Linear(2, 2))


def test_a_configuration_without_a_known_model_cannot_be_proved_and_says_why() -> None:
    with pytest.raises(AnatomyError, match="odd: no tiny model can be built"):
        prove(OddConfig())


def test_proving_leaves_no_hooks_behind() -> None:
    model = Tower(OddConfig())
    prove_model(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Adapter(nn.Module):
    """A linear layer with low-rank matrices beside it, laid out as PEFT does."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base.out_features, bias=False)})


def test_adapters_are_parts_of_their_own_and_not_of_what_they_adapt() -> None:
    model = Tower(OddConfig())
    for storey in model.storeys:
        storey.spin.q_proj = Adapter(storey.spin.q_proj)
    anatomy = read_anatomy(model)
    assert {s.tensor.split(".")[-3] for s in select(anatomy, "adapter").slices} == {"lora_A", "lora_B"}
    assert {s.tensor for s in select(anatomy, "layers[0].attn.q").slices} == {
        "storeys.0.spin.q_proj.base_layer.weight",
        "storeys.0.spin.q_proj.base_layer.bias",
    }
    assert anatomy.n_parameters == sum(p.numel() for p in model.parameters())


def test_quantised_weights_are_frozen_only_and_selecting_them_says_why() -> None:
    model = Tower(OddConfig())
    for storey in model.storeys:
        codes = torch.randint(-8, 8, storey.peak.fc1.weight.shape, dtype=torch.int8)
        storey.peak.fc1.weight = nn.Parameter(codes, requires_grad=False)
    anatomy = read_anatomy(model)
    assert not any(s.tensor.endswith("fc1.weight") for s in select(anatomy, "all").slices)
    with pytest.raises(SelectionError, match=r"quantised weights \(int8\)"):
        select(anatomy_of_parts(model.storeys[0].peak, {"codes": ["fc1.weight"], "rest": ["fc1.bias", "fc2"]}), "codes")


def test_parameters_that_share_storage_without_being_one_object_are_tied() -> None:
    model = Tower(OddConfig())
    model.lm_head.weight = nn.Parameter(model.sockets.weight.detach())
    anatomy = read_anatomy(model)
    assert anatomy.tied_components == (("head", "embed"),)
    with pytest.raises(SelectionError, match="tied"):
        select(anatomy, "head")
