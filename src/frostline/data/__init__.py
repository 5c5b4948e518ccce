"""Data: text → tokens → rows → batches. Read `tokens.py`, then `order.py`."""

from frostline.data.order import rows_at
from frostline.data.text import Document, read_documents
from frostline.data.tokens import Batch, Rows, encode, train_byte_bpe

__all__ = ["Batch", "Document", "Rows", "encode", "read_documents", "rows_at", "train_byte_bpe"]
