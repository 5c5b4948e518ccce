"""One self-contained page about data: `frostline data … --html FILE`. Renders; never computes.

Everything from the data is escaped, and the page may load and run nothing.
"""

from __future__ import annotations

from pathlib import Path

from frostline.storage import write_text
from frostline.survey import Survey


def write_data_page(survey: Survey, path: str | Path) -> Path:
    """Write the page. Raises `StorageError`."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("frostline", "experiment/templates"), autoescape=True, undefined=StrictUndefined
    )
    path = Path(path)
    write_text(path, environment.get_template("data.html.j2").render(survey=survey))
    return path
