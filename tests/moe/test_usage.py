"""Which experts are used: counts against transformers' own record, likeness, selections from scores, ESFT's files."""

from __future__ import annotations

import json
import math

import pytest
import tiny
import torch

from frostline.anatomy import read_anatomy
from frostline.errors import ModelError, RecipeError
from frostline.moe import cover, find_sites, measure_usage, read_esft, top, usage_to_json, write_esft
from frostline.moe.usage import SiteUsage, Usage
from frostline.selection import expression_of, select

SITE = SiteUsage(site="layers[0].ffn", layer=0, load=(10, 60, 0, 30), gate=(0.3, 0.2, 0.0, 0.5))
USAGE = Usage(n_tokens=50, sites=(SITE, SiteUsage(site="layers[1].ffn", layer=1, load=(25,) * 4, gate=(0.25,) * 4)),
              likeness=())  # fmt: skip


@pytest.fixture(scope="module")
def mixtral():
    model = tiny.model("mixtral")
    with torch.no_grad():
        for site in find_sites(model, read_anatomy(model)):
            site.router.weight.mul_(30)
    return model


def ids(n=6, length=10):
    return torch.randint(tiny.VOCABULARY, (n, length), generator=torch.Generator().manual_seed(1))


def test_load_and_gate_are_those_of_the_routers_own_logits(mixtral):
    found = measure_usage(mixtral, read_anatomy(mixtral), ids().split(2))
    assert found.n_tokens == 60
    with torch.no_grad():
        logits = mixtral.eval()(ids(), output_router_logits=True).router_logits
    for site, of_layer in zip(found.sites, logits, strict=True):
        values, chosen = of_layer.softmax(-1).topk(2)
        assert list(site.load) == torch.bincount(chosen.flatten(), minlength=4).tolist()
        weights = torch.zeros(60, 4).scatter(1, chosen, values / values.sum(-1, keepdim=True))
        assert site.gate == pytest.approx(weights.mean(0).tolist(), abs=1e-6)
        assert sum(site.scores("gate")) == pytest.approx(1)


def test_measuring_leaves_the_mode_the_weights_and_no_hook(mixtral):
    mixtral.train()
    before = {n: p.clone() for n, p in mixtral.named_parameters()}
    hooks = [len(m._forward_hooks) for m in mixtral.modules()]
    measure_usage(mixtral, read_anatomy(mixtral), [ids()])
    assert mixtral.training
    assert all(torch.equal(before[n], p) for n, p in mixtral.named_parameters())
    assert [len(m._forward_hooks) for m in mixtral.modules()] == hooks


def test_entropy_is_1_in_balance_and_0_with_one_expert_and_the_unused_are_named():
    assert USAGE.sites[1].entropy == pytest.approx(1)
    alone = SiteUsage(site="layers[0].ffn", layer=0, load=(0, 9), gate=(0, 1.0))
    assert (alone.entropy, alone.largest_share, alone.never) == (0, 1, (0,))
    assert SITE.never == (2,)
    assert SITE.entropy == pytest.approx(
        -(0.1 * math.log(0.1) + 0.6 * math.log(0.6) + 0.3 * math.log(0.3)) / math.log(4)
    )


def test_identical_experts_are_found_and_different_ones_are_not(mixtral):
    same = tiny.model("mixtral")
    with torch.no_grad():
        for name, tensor in same.named_parameters():
            if "experts" in name:
                tensor[1] = tensor[3]
    found = measure_usage(same, read_anatomy(same), [ids()])
    assert all(like.identical == ((1, 3),) for like in found.likeness)
    assert all(like.largest == pytest.approx(1, abs=1e-5) for like in found.likeness)
    assert all(not like.identical for like in measure_usage(mixtral, read_anatomy(mixtral), [ids()]).likeness)


def test_a_cosine_is_that_of_all_weights_of_two_experts(mixtral):
    found = measure_usage(mixtral, read_anatomy(mixtral), [ids()])
    experts = mixtral.model.layers[0].mlp.experts
    flat = [torch.cat([experts.gate_up_proj[e].flatten(), experts.down_proj[e].flatten()]) for e in range(4)]
    cosines = [torch.cosine_similarity(flat[i], flat[j], dim=0).item() for i in range(4) for j in range(i)]
    assert found.likeness[0].mean == pytest.approx(sum(cosines) / 6, abs=1e-5)


def test_top_takes_the_highest_scores_and_the_two_scores_differ():
    assert top(USAGE, 2, "tokens")["layers[0].ffn"] == (1, 3)
    assert top(USAGE, 2, "gate")["layers[0].ffn"] == (3, 0)
    assert top(USAGE, 1, "tokens")["layers[1].ffn"] == (0,)  # the lower index among equals


def test_cover_takes_the_fewest_experts_that_reach_the_share():
    assert cover(USAGE, 0.6, "tokens")["layers[0].ffn"] == (1,)
    assert cover(USAGE, 0.61, "tokens")["layers[0].ffn"] == (1, 3)
    assert cover(USAGE, 1.0, "tokens")["layers[0].ffn"] == (1, 3, 0)
    assert cover(USAGE, 0.5, "gate")["layers[1].ffn"] == (0, 1)


@pytest.mark.parametrize("wrong", [lambda: top(USAGE, 5, "tokens"), lambda: top(USAGE, 0, "gate"),
                                   lambda: cover(USAGE, 0, "gate"), lambda: cover(USAGE, 1.1, "gate")])  # fmt: skip
def test_a_choice_that_no_layer_can_meet_is_refused(wrong):
    with pytest.raises(RecipeError, match=r"top|cover"):
        wrong()


def test_what_was_chosen_is_a_plain_selection_of_these_experts_and_no_others():
    anatomy = tiny.anatomy("mixtral")
    chosen = {"layers[0].ffn": (3, 1), "layers[2].ffn": (0,)}
    assert expression_of(chosen) == "layers[0].ffn.experts[1,3] | layers[2].ffn.experts[0]"
    names = {c.name.rpartition(".")[0] for c, _ in select(anatomy, expression_of(chosen)).by_component()}
    assert names == {"layers[0].ffn.experts[1]", "layers[0].ffn.experts[3]", "layers[2].ffn.experts[0]"}


def test_esft_files_are_written_as_esft_writes_them_and_read_back(tmp_path):
    write_esft({"layers[1].ffn": (3, 0), "layers[2].ffn": (2,)}, tmp_path / "cfg.json")
    assert json.loads((tmp_path / "cfg.json").read_text()) == {
        "experts": {"1": [3, 0], "2": [2]}, "shared_experts": False, "non_expert_modules": False,
    }  # fmt: skip
    assert (
        read_esft(tmp_path / "cfg.json", tiny.anatomy("mixtral"))
        == "layers[1].ffn.experts[0,3] | layers[2].ffn.experts[2]"
    )


def test_an_esft_file_that_trains_all_else_leaves_out_the_other_experts(tmp_path):
    write_esft({"layers[1].ffn": (3,)}, tmp_path / "cfg.json", non_expert=True)
    chosen = select(tiny.anatomy("mixtral"), read_esft(tmp_path / "cfg.json", tiny.anatomy("mixtral")))
    names = {c.name for c, _ in chosen.by_component()}
    assert {"embed", "layers[0].ffn.router", "layers[1].ffn.experts[3].up"} <= names
    assert not any("experts" in n and "layers[1].ffn.experts[3]" not in n for n in names)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "no expert configuration"),
        ("{", "no expert configuration"),
        ('{"experts": {"9": [0]}}', "names layer 9"),
        ('{"experts": {}}', "chooses nothing"),
    ],
)
def test_an_esft_file_that_does_not_fit_is_refused(tmp_path, text, said):
    (tmp_path / "cfg.json").write_text(text)
    with pytest.raises(RecipeError, match=said):
        read_esft(tmp_path / "cfg.json", tiny.anatomy("mixtral"))


def test_a_dense_model_has_no_experts_to_count():
    with pytest.raises(ModelError, match="no router"):
        measure_usage(tiny.model("llama"), tiny.anatomy("llama"), [ids()])


def test_no_tokens_are_an_error(mixtral):
    with pytest.raises(ModelError, match="no tokens"):
        measure_usage(mixtral, read_anatomy(mixtral), [])


def test_the_measurement_is_plain_data(mixtral):
    data = json.loads(json.dumps(usage_to_json(measure_usage(mixtral, read_anatomy(mixtral), [ids()]))))
    assert len(data["sites"]) == 3
    assert set(data["sites"][0]) == {"site", "layer", "load", "gate", "largest_share", "entropy", "never"}
