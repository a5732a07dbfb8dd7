"""Into which batches images are cut, so that a compiled model sees few sizes and hardly a row is
computed for nothing.
"""

from __future__ import annotations

RUNGS, SMALLEST = 4, 8  # each size costs a compilation at every start
PADDING = 0.02  # of the images cut at once: tails of small shards cost a prototype that padded 22%


def ladder(batch: int) -> tuple[int, ...]:
    """The batch sizes worth compiling, largest first: the batch and its halves."""
    sizes = [batch >> n for n in range(RUNGS)]
    return tuple(size for size in sizes if size == batch or size >= SMALLEST)


def cut(images: int, sizes: tuple[int, ...], padding: float) -> list[int]:
    """Batch sizes, each of `sizes` (largest first), that hold the images in order.

    Only the last may have room to spare, at most the share `padding` of all images, or be smaller
    than every size.
    """
    batches, left = list[int](), images
    for size in sizes:
        batches += [size] * (left // size)
        left %= size
        if left and size - left <= images * padding:
            return [*batches, size]
    return [*batches, left] if left else batches


def share(images: int, batch: int, workers: int) -> list[int]:
    """Batch sizes of at most `batch`, as many for one worker as for another, and all alike."""
    batches = min(images, -(-images // (batch * workers)) * workers)
    return [images // batches + (n < images % batches) for n in range(batches)]
