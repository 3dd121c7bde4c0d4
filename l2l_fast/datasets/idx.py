"""IDX files of bytes, the format of MNIST."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

GZIP_MAGIC = b"\x1f\x8b"
BYTES_MAGIC = b"\x00\x00\x08"


def read_idx(path: Path, item_shape: tuple[int, ...]) -> Tensor:
    """The items ``[n, *item_shape]``, uint8, of an IDX file, plain or compressed by gzip, whatever its name.

    Raises:
        ValueError: if the file is damaged or holds something else.
        OSError: if it can't be read.

    Source: LeCun, Cortes and Burges, The MNIST database of handwritten digits, file formats.
    """
    content = _content(path)
    dimensions = 1 + len(item_shape)
    magic = BYTES_MAGIC + bytes([dimensions])
    if content[:4] != magic:
        raise damaged(path, f"the magic number {content[:4].hex() or 'of an empty file'}", magic.hex())
    header = 4 + 4 * dimensions
    if len(content) < header:
        raise damaged(path, f"{len(content)} bytes", f"a header of {header}")
    count, *shape = struct.unpack_from(f">{dimensions}I", content, 4)
    if tuple(shape) != item_shape or not count:
        raise damaged(path, f"{count} items of shape {shape}", f"at least one of shape {list(item_shape)}")
    expected = header + count * math.prod(item_shape)
    if len(content) != expected:
        raise damaged(path, f"{len(content)} bytes", f"{expected} for {count} items of shape {shape}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header).view(count, *item_shape)


def damaged(path: Path, got: str, expected: str) -> ValueError:
    """The error for a file that does not hold what it should."""
    return ValueError(
        f"{path} is damaged or holds something else: got {got}, expected {expected}; delete it to have it downloaded "
        "again, or name another folder with --data-dir or L2L_FAST_DATA"
    )


def _content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise OSError(error.errno, f"can't read {path}: {error.strerror}") from error
    if not content.startswith(GZIP_MAGIC):
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise damaged(path, f"broken gzip data ({error})", "a whole gzip file") from error
