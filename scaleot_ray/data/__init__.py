"""Data: files and folders → rows → token examples → batches, one row at a time."""

from scaleot_ray.data.batches import Batch, TokenBatches, collate, fixed, padding_id
from scaleot_ray.data.examples import ChoiceExample, TokenExample, choice_examples, token_examples
from scaleot_ray.data.holdout import HoldOut
from scaleot_ray.data.rows import Row, Rows, open_rows

__all__ = [
    "Batch",
    "ChoiceExample",
    "HoldOut",
    "Row",
    "Rows",
    "TokenBatches",
    "TokenExample",
    "choice_examples",
    "collate",
    "fixed",
    "open_rows",
    "padding_id",
    "token_examples",
]
