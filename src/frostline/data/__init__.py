"""Data: files → examples → rows → batches. Read `example.py`, then `batch.py`, `tokens.py` and `order.py`."""

from frostline.data.batch import Batch, Documents, Kept, model_inputs
from frostline.data.example import Example, read_examples
from frostline.data.layouts import FlatRows, Layout, PackedRows, PaddedRows, RowSource
from frostline.data.order import rows_at
from frostline.data.pieces import Cutting, Pieces, cut
from frostline.data.sources import FileTally, Tally, files_to_hash, found_lines, texts_of
from frostline.data.store import Store
from frostline.data.text import Document, iter_documents, read_documents
from frostline.data.tokens import Rows, encode, train_byte_bpe

__all__ = [
    "Batch",
    "Cutting",
    "Document",
    "Documents",
    "Example",
    "FileTally",
    "FlatRows",
    "Kept",
    "Layout",
    "PackedRows",
    "PaddedRows",
    "Pieces",
    "RowSource",
    "Rows",
    "Store",
    "Tally",
    "cut",
    "encode",
    "files_to_hash",
    "found_lines",
    "iter_documents",
    "model_inputs",
    "read_documents",
    "read_examples",
    "rows_at",
    "texts_of",
    "train_byte_bpe",
]
