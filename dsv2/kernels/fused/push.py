"""Write rows straight into the memory of other GPUs of the machine.

The addresses come from torch's symmetric memory. The kernel reads all sizes on the device, so the host need
not know them. Programs take the destinations in turn: so all links carry rows at the same time.
"""

import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 132  # a Hopper GPU's multiprocessors
BLOCK = 1024


@triton.jit
def _words(source, target, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    for start in tl.static_range(0, WORDS, BLOCK):
        word = start + tl.arange(0, BLOCK)
        tl.store(target + word, tl.load(source + word, mask=word < WORDS), mask=word < WORDS)


@triton.jit
def _push(
    addresses,
    segments,
    slots,
    rows,
    numbers,
    offset,
    pitch,
    first,
    RANKS: tl.constexpr,
    SLOTS: tl.constexpr,
    ROW: tl.constexpr,
    NUMBERS: tl.constexpr,
    BLOCK: tl.constexpr,
    SMALL: tl.constexpr,
):
    """Copy each segment of rows, and of the numbers beside them, to its rank.

    `segments` [3, RANKS]: each rank's first row here, its number of rows, and the first row's position there.
    SLOTS is 0 if the rows are in order. Otherwise a row's slot, divided by SLOTS, is its index in `rows`.
    """
    most = tl.load(segments + RANKS)
    for other in tl.static_range(1, RANKS):
        most = tl.maximum(most, tl.load(segments + RANKS + other))
    for turn in range(tl.program_id(0).to(tl.int64), most * RANKS, tl.num_programs(0)):
        rank = (turn + first) % RANKS
        row = turn // RANKS
        if row < tl.load(segments + RANKS + rank):
            source = tl.load(segments + rank) + row
            if SLOTS > 0:
                source = tl.load(slots + source) // SLOTS
            position = tl.load(segments + 2 * RANKS + rank) + row
            target = tl.load(addresses + rank).to(tl.pointer_type(tl.int32)) + (offset + position * pitch)
            target = tl.multiple_of(target, 16)
            _words(rows + source * ROW, target, ROW, BLOCK)
            if NUMBERS > 0:
                _words(numbers + source * NUMBERS, target + ROW, NUMBERS, SMALL)


def push(
    addresses: Tensor,
    segments: Tensor,
    slots: Tensor | None,
    rows: Tensor,
    numbers: Tensor | None,
    *,
    offset: int,
    pitch: int,
    n_slots: int,
    rank: int,
) -> None:
    """Push `rows` and the `numbers` beside them, int32 words [rows, words], to the buffers at `addresses`.

    Args:
        addresses: of each rank's buffer, int64 [ranks].
        segments: int64 [3, ranks]; `_push` explains them.
        slots: each row's slot; None: rows and numbers are in order.
        offset: words of a buffer before its first row.
        pitch: words between two rows of a buffer.
        n_slots: slots per token.
        rank: of this process.
    """
    n_numbers = 0 if numbers is None else numbers.shape[1]
    _push[(PROGRAMS,)](
        addresses=addresses,
        segments=segments,
        slots=segments if slots is None else slots,
        rows=rows,
        numbers=rows if numbers is None else numbers,
        offset=offset,
        pitch=pitch,
        first=rank,
        RANKS=len(addresses),
        SLOTS=0 if slots is None else n_slots,
        ROW=rows.shape[1],
        NUMBERS=n_numbers,
        BLOCK=min(BLOCK, triton.next_power_of_2(rows.shape[1])),
        SMALL=triton.next_power_of_2(max(n_numbers, 1)),
    )
