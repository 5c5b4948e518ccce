"""What older versions of transformers do otherwise, where tests take a newer one for granted: each said once, here.

The tests are written for the version in constraints.txt; `make test-oldest` runs them on the oldest supported one.
"""

from __future__ import annotations

import pytest
import transformers
from packaging.version import Version
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

TRANSFORMERS = Version(transformers.__version__)
WRITTEN_FOR = Version("5.23")

POSITIONS_MULTIPLY = Version("5.19") > TRANSFORMERS
"""Rotary positions come from a matrix product, some hundred FLOPs of the part `position`; since 5.19 they do not."""


def older_than(version: str, why: str) -> pytest.MarkDecorator:
    """Skip on transformers before `version`, and say why."""
    return pytest.mark.skipif(Version(version) > TRANSFORMERS, reason=f"transformers before {version}: {why}")


def skip_unknown(model_type: str) -> None:
    """Skip what is about a model type that came later; the version that tests are written for must have all."""
    if TRANSFORMERS < WRITTEN_FOR and model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {TRANSFORMERS} has no {model_type}")


def position_flops(flops: dict[str, dict[str, int]]) -> int:
    """Of a step's FLOPs by part, those that newer versions do not have: a forward product and nothing else."""
    if not POSITIONS_MULTIPLY:
        assert "position" not in flops
        return 0
    found = flops["position"]
    assert found["forward"] == sum(found.values()) > 0
    return found["forward"]


def without_positions(flops: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """FLOPs by part, as newer versions have them."""
    position_flops(flops)
    return {part: kinds for part, kinds in flops.items() if part != "position"}


OTHERWISE = {
    "aria_text": older_than("5.18", "Aria's experts are a class of their own, which is read as one part"),
    "dbrx": older_than(
        "5.15", "DBRX multiplies by its experts' matrices the wrong way round, so that it runs in no real size"
    ),
}
"""Model type → why the slices of its experts are not those of newer versions."""
