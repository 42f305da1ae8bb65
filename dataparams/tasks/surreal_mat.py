"""A few variables out of a mat file of version 5, without inflating the others.

SciPy's `loadmat(variable_names=...)` inflates 128 KiB of every variable that it passes to learn its name: of a clip of
100 depth maps, 30 ms for one map. Here the lengths in the file lead from variable to variable, a few bytes of each give
its name, and SciPy parses what remains.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

HEADER = 128  # bytes before the first variable
COMPRESSED = 15  # type of a variable whose bytes are those of another, deflated
NAME_WITHIN = 160  # bytes in which the name of an array of two or three axes is found
DEFLATED_WITHIN = 1024  # bytes that give these, deflated: a code table comes first, of up to 300 bytes
ORDERS = {b"IM": "<", b"MI": ">"}


class MatError(ValueError):
    """A file that is damaged or of another version; the message says which."""


def load_variables(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Variables of a file; those that it does not have are left out.

    Raises:
        MatError: the file cannot be read.
        ImportError: SciPy is missing.
    """
    from scipy.io import loadmat

    wanted = set(names)
    try:
        with path.open("rb") as stream:
            header = stream.read(HEADER)
            order = byte_order(header)
            pieces = [header]
            for start, stop in variables(stream, order, path.stat().st_size):
                if not wanted:
                    break
                stream.seek(start)
                name = variable_name(stream.read(min(stop - start, DEFLATED_WITHIN)), order)
                if name in wanted:
                    wanted.remove(name)
                    stream.seek(start)
                    pieces.append(stream.read(stop - start))
        content = loadmat(io.BytesIO(b"".join(pieces)))
    except MatError:
        raise
    except Exception as error:  # damage meets SciPy's parser at any point, with any error
        raise MatError(f"{type(error).__name__}: {error}") from error
    return {name: np.asarray(content[name]) for name in names if name in content}


def count_variables(path: Path) -> int:
    """Number of variables, by their lengths alone.

    Raises:
        MatError: no mat file of version 5, or the last variable is longer than the file.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        order = byte_order(stream.read(HEADER))
        stops = [stop for _, stop in variables(stream, order, size)]
    if (stops or [HEADER])[-1] != size:
        raise MatError("truncated")
    return len(stops)


def byte_order(header: bytes) -> str:
    """Mark of the byte order, as in `struct`.

    Raises:
        MatError: not a mat file of version 5.
    """
    if header[126:128] not in ORDERS:
        raise MatError("not a mat file of version 5")
    order = ORDERS[header[126:128]]
    if struct.unpack(order + "H", header[124:126])[0] != 0x0100:
        raise MatError("not a mat file of version 5")
    return order


def variables(stream: BinaryIO, order: str, size: int) -> Iterator[tuple[int, int]]:
    """Start and stop of each variable, its tag included; the last stop lies beyond a truncated file."""
    position = HEADER
    while position < size:
        stream.seek(position)
        tag = stream.read(8)
        length = struct.unpack(order + "II", tag)[1] if len(tag) == 8 else size
        yield position, position + 8 + length
        position += 8 + length


def variable_name(head: bytes, order: str) -> str:
    """Name of a variable by its first bytes: tag, flags and axes come before it, each at a multiple of 8."""
    if struct.unpack(order + "I", head[:4])[0] == COMPRESSED:
        head = zlib.decompressobj().decompress(head[8:], NAME_WITHIN)
    axes = struct.unpack(order + "I", head[28:32])[0]
    place = 32 + (axes + 7) // 8 * 8
    kind, length = struct.unpack(order + "II", head[place : place + 8])
    if kind >> 16:  # at most four bytes: they take the place of the length
        return head[place + 4 : place + 4 + (kind >> 16)].decode("latin-1")
    return head[place + 8 : place + 8 + length].decode("latin-1")
