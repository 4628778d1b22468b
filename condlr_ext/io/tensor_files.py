"""Files of tensors in the safetensors format, each read and written through one descriptor.

A file is the length of its header in eight bytes, the header, which is JSON with the dtype, shape and place of each
tensor, and their bytes without gaps. The safetensors package itself opens a file by its name twice, and so may take
header and data of different files while a third party replaces it.

Files written here have a checksum of all else in their metadata, so that no flipped bit is loaded.
"""

import ctypes
import json
import math
import os
import stat
import zlib
from collections.abc import Iterable
from typing import BinaryIO

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .._files import whole_file
from .._modules import not_plain
from ..errors import CheckpointError
from ..ops import check_environment

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
CHECKSUM = "condlr_ext_crc32"  # a key of the metadata
_LARGEST_HEADER = 100_000_000  # bytes, a rule of the format
_MOST_DIMENSIONS = 64


def plain(place: str, t: Tensor) -> Tensor:
    """Return a tensor without its gradient, conjugation and negation, the values that are to be stored.

    Args:
        place: What the tensor is, for error texts.
        t: The tensor.

    Raises:
        TypeError: The format cannot hold it: its dtype, a sparse or quantized one, or one that stands for others.
        ValueError: It has no values, as on the meta device.
    """
    if reason := not_plain(t):
        raise TypeError(f"save: {place} {reason}; gather it first, or use torch.distributed.checkpoint or torch.save")
    if type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise TypeError(f"save: {place} must be a plain tensor, got {type(t).__name__}")
    if is_lazy(t) or t.is_meta:
        where = "is not initialized" if is_lazy(t) else "is on the meta device"
        raise ValueError(f"save: {place} {where} and has no values")
    if t.layout is not torch.strided or t.is_nested:
        kind = "nested" if t.is_nested else str(t.layout).removeprefix("torch.")
        raise TypeError(f"save: {place} must be a dense tensor, got a {kind} one")
    if t.dtype not in _NAMES:
        raise TypeError(f"save: {place} must have a dtype that safetensors files hold, got {t.dtype}")
    return t.detach().resolve_conj().resolve_neg()


def write_tensors(path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write contiguous tensors on the CPU, of dtypes in DTYPES, atomically.

    Raises:
        ValueError: The header would be larger than the format permits; nothing is written.
        OSError: The file cannot be written.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # so that all are aligned
    header, end = {"__metadata__": metadata}, 0
    for name in names:
        t = tensors[name]
        begin, end = end, end + t.nbytes
        header[name] = {"dtype": _NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [begin, end]}
    header["__metadata__"] = metadata | {CHECKSUM: _checksum(header, [tensors[name] for name in names])}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _LARGEST_HEADER:
        raise ValueError(
            f"save: {path} would have {len(text)} bytes of names and values outside of tensors, more than the"
            f" {_LARGEST_HEADER} that the format permits"
        )
    with whole_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            if tensors[name].nbytes:
                file.write(_memory(tensors[name]))


def read_tensors(path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a safetensors file, on the CPU, and its metadata without a checksum, which is compared.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    check_environment()  # before a file can be blamed
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for its writer
            raise ValueError("it is not a regular file")
        with open(path, "rb") as file:
            return _read(file)
    except (OSError, ValueError, RecursionError, RuntimeError) as error:  # RuntimeError: torch cannot allocate
        raise CheckpointError(f"cannot read {path}: {error}") from None


def _read(file: BinaryIO) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a file; nothing is allocated before all that the header claims has been compared with the size."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, _LARGEST_HEADER):
        raise ValueError("it is no safetensors file, or cut off: its header is not all there")
    header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata must be texts")
    entries = sorted((_entry(name, entry) for name, entry in header.items()), key=lambda entry: entry[3:])
    end = 0
    for name, _, _, begin, stop in entries:
        if begin != end:
            raise ValueError(f"tensor {name!r} must begin at byte {end} of the data, got {begin}")
        end = stop
    if end != size - 8 - length:
        raise ValueError(f"its tensors need {end} bytes, it has {size - 8 - length}")
    tensors = {}
    for name, dtype, shape, begin, stop in entries:
        t = tensors[name] = torch.empty(shape, dtype=dtype, device="cpu")
        if begin < stop and file.readinto(_memory(t)) != stop - begin:
            raise ValueError("it was cut off while it was read")
    checksum = metadata.pop(CHECKSUM, None)  # files of other tools and of earlier versions have none
    if checksum not in (None, _checksum(header | {"__metadata__": metadata}, tensors.values())):
        raise ValueError(
            f"its content is not what was written: the checksum differs. If another tool has changed it on purpose, it"
            f" must also leave {CHECKSUM} out of the metadata"
        )
    return tensors, metadata


def _entry(name: str, entry) -> tuple[str, torch.dtype, list[int], int, int]:
    """Return name, dtype, shape, begin and end of a tensor."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r} must have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"tensor {name!r} must have a dtype out of {', '.join(DTYPES)}, got {dtype!r}")
    for what, values in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(values, list) or not all(type(v) is int and 0 <= v < 2**63 for v in values):
            raise ValueError(f"{what} of tensor {name!r} must be integers >= 0")
    if len(shape) > _MOST_DIMENSIONS or len(offsets) != 2:
        raise ValueError(f"tensor {name!r} must have at most {_MOST_DIMENSIONS} dimensions and two data_offsets")
    need = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != need:
        raise ValueError(f"tensor {name!r} needs {need} bytes, its data_offsets are {offsets}")
    return name, DTYPES[dtype], shape, *offsets


def _checksum(header: dict, tensors: Iterable[Tensor]) -> str:
    """Return the CRC-32 of a header without checksum and of the tensors in their order: it tells every single flip."""
    crc = zlib.crc32(json.dumps(header, sort_keys=True).encode())
    for t in tensors:
        if t.nbytes:
            crc = zlib.crc32(_memory(t), crc)
    return f"{crc:08x}"


def _memory(t: Tensor) -> ctypes.Array:
    """Return the bytes of a contiguous tensor, which must live as long as they are used."""
    return (ctypes.c_char * t.nbytes).from_address(t.data_ptr())


def is_finite(t: Tensor) -> bool:
    """Return whether no element is NaN or Inf, in any dtype that a file may hold."""
    if not (t.is_floating_point() or t.is_complex()) or t.is_meta:
        return True
    return bool(torch.isfinite(t.float() if t.element_size() == 1 else t).all())
