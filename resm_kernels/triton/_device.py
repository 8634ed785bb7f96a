"""Device functions that the kernels share: exact loads and stores of every dtype, and the chunk of a program.

bf16 is loaded and rounded as integers. That is exact on every device and in Triton's interpreter, whose bf16 is not.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pointer_of(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """An address, or a pointer, as a pointer to elements; ALIGNED says that it is a multiple of 16 bytes."""
    if DTYPE == tl.bfloat16:
        pointer = address.to(tl.pointer_type(tl.uint16))
    else:
        pointer = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def load_as(address, offsets, mask, MASKED: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, TO: tl.constexpr):
    """Elements of the tensor at an address, widened to TO, fp32 or float64; 0 where masked."""
    pointer = pointer_of(address, DTYPE, ALIGNED) + offsets
    if MASKED:
        raw = tl.load(pointer, mask=mask, other=0)
    else:
        raw = tl.load(pointer)
    if DTYPE == tl.bfloat16:
        return (raw.to(tl.uint32) << 16).to(tl.float32, bitcast=True).to(TO)
    else:
        return raw.to(TO)


@triton.jit
def store_from(address, offsets, value, mask, MASKED: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Store fp32 or float64 values, rounded once to DTYPE, to nearest even."""
    pointer = pointer_of(address, DTYPE, ALIGNED) + offsets
    if DTYPE == tl.bfloat16:
        rounded = bf16_bits(value.to(tl.float32))
    elif DTYPE == tl.float16:
        rounded = value.to(tl.float32).to(tl.float16)  # as torch does
    else:
        rounded = value.to(DTYPE)
    if MASKED:
        tl.store(pointer, rounded, mask=mask)
    else:
        tl.store(pointer, rounded)


@triton.jit
def bf16_bits(value):
    """The 16 bits of the bf16 nearest to an fp32 value, ties to even; NaN stays NaN."""
    bits = value.to(tl.uint32, bitcast=True)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(value == value, nearest, 0x7FC0).to(tl.uint16)


@triton.jit
def bit_of(address, offsets, mask):
    """Whether the elements' bits in a mask of bits are set; False where masked."""
    bytes_ = tl.load(address.to(tl.pointer_type(tl.uint8)) + offsets // 8, mask=mask, other=0)
    return ((bytes_.to(tl.int32) >> (offsets % 8).to(tl.int32)) & 1) != 0


@triton.jit
def is_finite(value):
    return tl.abs(value) < float("inf")


@triton.jit
def chunk_of(length, CHUNK: tl.constexpr, BY_ROWS: tl.constexpr):
    """The row of this program's chunk, the chunk's first element, and the end of the row.

    Rows have `length` elements. BY_ROWS is False where there is one row: then the compiler knows that chunks begin at
    multiples of CHUNK.
    """
    program = tl.program_id(0).to(tl.int64)
    if BY_ROWS:
        chunks = (length + CHUNK - 1) // CHUNK
        row = program // chunks
        return row, row * length + program % chunks * CHUNK, (row + 1) * length
    else:
        return 0, program * CHUNK, length
