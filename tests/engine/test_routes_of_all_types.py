"""Every decoder-only type, tiny: its points are found and tried, or refused with a reason; stops change no bit."""

from __future__ import annotations

import all_types
import pytest
import torch
from torch import nn

from frostline.anatomy import read_anatomy
from frostline.engine import Points, place, set_routes
from frostline.schedule import Route

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

NO_STREAM_STOP = {"zamba", "zamba2", "zaya"}
"""Types whose blocks get something from the embedding or from blocks before them beside the stream."""


def logits(model: nn.Module) -> torch.Tensor:
    ids = torch.randint(3, 60, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.enable_grad():
        return model(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]


def layers_by_point(points: Points) -> dict[str, list[int]]:
    out: dict[str, list[int]] = {}
    for layer, block in enumerate(points.blocks):
        for point in block.wiring.points:
            out.setdefault(point, []).append(layer)
    return out


@pytest.mark.parametrize("model_type", all_types.DECODERS)
def test_every_point_is_tried_and_no_stop_changes_a_bit(model_type: str) -> None:
    model = all_types.small_model(model_type).eval()
    plain = logits(model)
    points = place(model, read_anatomy(model))
    assert torch.equal(logits(model), plain)
    found = layers_by_point(points)
    assert ("block.in" in found) != (model_type in NO_STREAM_STOP)
    for point, layers in found.items():
        set_routes(points, [Route(point=point, mode="stop", layers=tuple(layers))])
        assert torch.equal(logits(model), plain), point
    refused = [why for b in points.blocks for why in b.wiring.refused.values()]
    assert all(len(why) > 20 for why in refused)
