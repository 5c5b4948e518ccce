"""The anatomy: a complete, non-overlapping list of a model's named parts. Read `component.py`, then `read.py`."""

from frostline.anatomy.access import fingerprint, named_tensors, put, take
from frostline.anatomy.block_capture import part_modules
from frostline.anatomy.block_measures import BlockProof
from frostline.anatomy.component import (
    Anatomy,
    Component,
    Cut,
    TensorInfo,
    anatomy_from_json,
    anatomy_to_json,
    check_partition,
    parse_path,
    reaches_outside,
)
from frostline.anatomy.modules import module_of
from frostline.anatomy.prove import Proof, prove, prove_model, tiny_model
from frostline.anatomy.read import anatomy_of_parts, embedding_dropout, find_blocks, list_tensors, read_anatomy
from frostline.anatomy.shrink import tiny_config
from frostline.anatomy.slice_proof import SliceProof, prove_slices
from frostline.anatomy.slices import (
    Neighbours,
    Slice,
    intersect,
    intersect_all,
    merge,
    part,
    refine,
    slice_from_json,
    slice_to_json,
    subtract,
    subtract_all,
    whole,
)

__all__ = [
    "Anatomy",
    "BlockProof",
    "Component",
    "Cut",
    "Neighbours",
    "Proof",
    "Slice",
    "SliceProof",
    "TensorInfo",
    "anatomy_from_json",
    "anatomy_of_parts",
    "anatomy_to_json",
    "check_partition",
    "embedding_dropout",
    "find_blocks",
    "fingerprint",
    "intersect",
    "intersect_all",
    "list_tensors",
    "merge",
    "module_of",
    "named_tensors",
    "parse_path",
    "part",
    "part_modules",
    "prove",
    "prove_model",
    "prove_slices",
    "put",
    "reaches_outside",
    "read_anatomy",
    "refine",
    "slice_from_json",
    "slice_to_json",
    "subtract",
    "subtract_all",
    "take",
    "tiny_config",
    "tiny_model",
    "whole",
]
