"""Write safetensors files and hash them while writing.

After `safetensors.torch.save_file`, a checkpoint of many gigabytes would have to be read again for
its checksum. The bytes are the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

# The format's dtype names, in the reverse of the order in which safetensors stores tensors.
DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3", torch.int16: "I16", torch.uint16: "U16",
    torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32", torch.uint32: "U32",
    torch.float32: "F32", torch.complex64: "C64", torch.float64: "F64", torch.int64: "I64",
    torch.uint64: "U64",
}  # fmt: skip
WIDTH_ORDER = {dtype: index for index, dtype in enumerate(DTYPES)}
ALIGNMENT = 8  # bytes to which the header is padded
CHUNK_BYTES = 1 << 24  # written and hashed in turn; both release the GIL


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> dict[str, str | int]:
    """Write a new file. Returns its manifest entry: sha256 and bytes.

    Tensors may be on any device; they are copied to the host one at a time. Raises OSError.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-WIDTH_ORDER[item[1].dtype], item[0]))
    digest, size = hashlib.sha256(), 0
    with path.open("xb") as stream:
        for chunk in _chunks(dict(ordered), metadata):
            stream.write(chunk)
            digest.update(chunk)
            size += len(chunk)
    return {"sha256": digest.hexdigest(), "bytes": size}


def _chunks(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None
) -> Iterator[bytes | memoryview]:
    header = _header(tensors, metadata)
    yield len(header).to_bytes(8, "little") + header
    for tensor in tensors.values():
        if tensor.numel() == 0:
            continue
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        data = flat.numpy().data
        for start in range(0, len(data), CHUNK_BYTES):
            yield data[start : start + CHUNK_BYTES]


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name, tensor in tensors.items():
        end = start + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape),
                         "data_offsets": [start, end]}  # fmt: skip
        start = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % ALIGNMENT)
