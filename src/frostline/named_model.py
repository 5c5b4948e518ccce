"""The parts of a model that a person names, without its weights. Read `anatomy_of`."""

from __future__ import annotations

from frostline.anatomy import Anatomy, read_anatomy
from frostline.model import load_skeleton
from frostline.run_folder import checkpoint_of


def anatomy_of(model: str, *, trust_remote_code: bool = False) -> Anatomy:
    """The parts of a model: a folder, a hub name, a `config.json` or a run folder. Reads no weights.

    Raises `ModelError` for what is no model, `AnatomyError` for one that is not understood.
    """
    return read_anatomy(load_skeleton(checkpoint_of(model), trust_remote_code=trust_remote_code))
