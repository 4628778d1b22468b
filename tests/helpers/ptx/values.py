"""What arithmetic instructions compute, on arrays with one element per thread.

Integers wrap around and floating point rounds as NumPy's does. Exceptions: fma.f32 is rounded to float64 first, so one
result in 2^29 is the wrong one of two neighbors; fma.f64 goes through long double, which has 64 bits of the product.
"""

import numpy as np
from numpy import float32, float64, uint8, uint16, uint32, uint64


def fma32(a, b, c):
    return (a.astype(float64) * b + c).astype(float32)


def fma64(a, b, c):
    return (a.astype(np.longdouble) * b + c).astype(float64)


def flush(x):
    """Set subnormal numbers to zero of the same sign (.ftz)."""
    return np.where(np.abs(x) < np.finfo(x.dtype).tiny, np.copysign(x.dtype.type(0), x), x)


def perturb(x, ulps, seed):
    """Return x, or with a seed x moved by up to so many ulps and rounded; equal numbers are moved by the same."""
    if seed is None:
        return x
    hashed = (x.view(uint32) * uint32(2654435761) + uint32(seed)) >> uint32(16)
    off = (hashed % uint32(2 * ulps + 1)).astype(float32) - float32(ulps)
    return x + x * off * float32(2.0**-23)


def shift_left(x, count):
    bits = 8 * x.itemsize
    return np.where(count < bits, x << np.minimum(count, bits - 1).astype(x.dtype), x.dtype.type(0))


def shift_right(x, count):
    """Shift in zeros, or copies of the sign where x is signed."""
    bits = 8 * x.itemsize
    shifted = x >> np.minimum(count, bits - 1).astype(x.dtype)
    return shifted if x.dtype.kind == "i" else np.where(count < bits, shifted, x.dtype.type(0))


def extract(x, position, count):
    """Return `count` bits of x from `position` on, extended by their highest bit where x is signed (bfe)."""
    bits = 8 * x.itemsize
    position, count = position & uint32(255), count & uint32(255)
    end = np.minimum(position + count, bits)  # bits beyond the sign are copies of it
    unused = (bits - end).astype(uint32)
    shifted = shift_right(shift_left(x, unused), unused + position)
    beyond = x.dtype.type(0) if x.dtype.kind == "u" else x >> x.dtype.type(bits - 1)
    return np.where(count == 0, x.dtype.type(0), np.where(position >= bits, beyond, shifted))


def permute(a, b, selector):
    """Return four bytes of the eight of b:a, each by four bits of the selector, the highest: copies of the sign."""
    eight = a.astype(uint64) | b.astype(uint64) << uint64(32)
    result = np.zeros_like(a)
    for k in range(4):
        nibble = selector >> uint32(4 * k) & uint32(15)
        byte = (eight >> ((nibble & uint32(7)) * uint32(8)).astype(uint64)).astype(uint8)
        sign = (byte.view(np.int8) >> np.int8(7)).view(uint8)
        result |= np.where(nibble & uint32(8), sign, byte).astype(uint32) << uint32(8 * k)
    return result


def divide(a, b):
    """Return the quotient of integers, cut toward zero; unspecified for a divisor of 0."""
    b = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // b
    return quotient + ((quotient < 0) & (quotient * b != a)).astype(a.dtype)


def remainder(a, b):
    return a - divide(a, b) * b


def pack(parts):
    """Join registers to one of their widths together, the first lowest."""
    return np.stack(parts, 1).view(f"u{len(parts) * parts[0].itemsize}").reshape(-1)


def unpack(x, count):
    """Split a register into so many, the lowest first."""
    return list(np.ascontiguousarray(x.view(f"u{x.itemsize // count}").reshape(-1, count).T))


def bfloat16(x):
    """Round float32 to the bits of bfloat16, halfway cases to even."""
    bits = x.view(uint32)
    rounded = (bits + uint32(0x7FFF) + (bits >> uint32(16) & uint32(1))) >> uint32(16)
    return np.where(np.isnan(x), uint16(0x7FFF), rounded.astype(uint16))


def from_bfloat16(bits):
    return (bits.astype(uint32) << uint32(16)).view(float32)


def float16(x):
    """Round to the bits of float16, halfway cases to even."""
    return x.astype(np.float16).view(uint16)


def tf32(x):
    """Round float32 to the eleven bits of TF32, halfway cases away from zero (cvt.rna)."""
    rounded = (x.view(uint32) + uint32(0x1000)) & uint32(0xFFFFE000)
    return np.where(np.isnan(x), uint32(0x7FFFFFFF), rounded).view(float32)


def cut_to_tf32(bits):
    """Return the float32 that the tensor core sees of these bits: it ignores the lowest thirteen."""
    return (bits & uint32(0xFFFFE000)).view(float32)
