"""The plot of a learning-rate range test, as a file. Read `draw_range_test`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from frostline.errors import RecipeError
from frostline.lr_range import RangeTest
from frostline.storage import storage_errors


def check_plot(path: Path) -> None:
    """Raise `RecipeError` unless a plot can be drawn to this path: asked before the test, which takes time."""
    if path.suffix not in (".png", ".svg"):
        raise RecipeError(f"--plot {path}: name a .png or .svg file")
    if not path.parent.is_dir():
        raise RecipeError(f"--plot {path}: there is no folder {path.parent}")
    if find_spec("matplotlib") is None:
        raise RecipeError("--plot needs matplotlib: pip install 'frostline[report]'")


def draw_range_test(test: RangeTest, path: Path) -> None:
    """Write the curves of every part to a PNG or SVG file. Raises `StorageError`."""
    from frostline.experiment.figures import rate_curves

    curves = [(p.part, p.rates, p.losses, p.suggestion) for p in test.parts]
    title = f"stage {test.stage}, {test.optimizer}: one step at each rate, from the same weights"
    figure = rate_curves(curves, test.parts[0].start_loss, title=title)
    with storage_errors(path):
        figure.savefig(path, dpi=150)
