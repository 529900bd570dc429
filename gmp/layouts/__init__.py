"""Layouts: how programs name, fuse and orient the tensors of a CLIP on disk.

`describe` tells what a file holds from its header; `open_text` and `open_vision` find a tower, `read_text` and
`read_vision` read it into canonical fp32 tensors; `write_text` and `write_clip` put it into a layout, `insert_text`
back into the checkpoint that it came from.
"""

from .detect import Contents, Part, describe
from .insert import insert_text
from .read import (
    OpenTower,
    Source,
    TowerFile,
    open_text,
    open_vision,
    projection_fault,
    read_lender,
    read_text,
    read_vision,
)
from .write import WRITERS, targets, write_clip, write_text

__all__ = (
    "WRITERS", "Contents", "OpenTower", "Part", "Source", "TowerFile",
    "describe", "insert_text", "open_text", "open_vision", "projection_fault", "read_lender", "read_text",
    "read_vision", "targets", "write_clip", "write_text",
)  # fmt: skip
