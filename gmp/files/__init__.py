"""The only place that opens files from strangers, and the only one that writes model files.

Opening reads headers: nothing in a file is run or imported, and sizes are checked before anything is allocated.
Tensors are read one by one, straight from their bytes. Writing is atomic: temp file beside the target, fsync, rename.
"""

from .folder import is_weights
from .header import Header, TensorInfo
from .read import read_header, read_tensors, torch_dtypes
from .write import Pending, Stored, dtype_and_shape, read_json, write_bytes, write_json, write_safetensors, write_text

__all__ = (
    "Header", "Pending", "Stored", "TensorInfo", "dtype_and_shape", "is_weights", "read_header", "read_json",
    "read_tensors", "torch_dtypes", "write_bytes", "write_json", "write_safetensors", "write_text",
)  # fmt: skip
