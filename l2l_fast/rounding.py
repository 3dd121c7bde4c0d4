"""Random rounding of float32 to 16 bits, whose expectation is the number itself.

A bfloat16 number has 8 significant bits: an update below 1/512 of a parameter is rounded away at every step, however
often it comes. Rounded up with the probability of the digits that are dropped, it counts on average.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

ROUNDED = (torch.float16, torch.bfloat16)

# Bits of a float32 number that the 16-bit one has no room for.
_DROPPED = {torch.float16: 13, torch.bfloat16: 16}

_SMALLEST_NORMAL = 2.0**-14  # of float16: below it, numbers are 2^-24 apart
_SUBNORMALS_PER_ONE = 2.0**24


def round_(target: Tensor, source: Tensor, generator: torch.Generator) -> None:
    """Put ``source``, rounded at random to a neighbour, into ``target``.

    Numbers that ``target``'s dtype has are kept; what is beyond its largest, or not finite, is rounded to nearest.

    Args:
        target: float16 or bfloat16, contiguous, any shape; overwritten.
        source: float32, contiguous, same shape and device.
        generator: on the same device; one number is drawn per element.
    """
    dropped = _DROPPED[target.dtype]
    bits = source.view(torch.int32)
    noise = torch.empty_like(bits).random_(0, 1 << dropped, generator=generator)
    # The magnitude grows by a random part of a unit in the last place of the target, and the rest is cut off.
    rounded = (noise + bits).bitwise_and_(-(1 << dropped)).view(torch.float32)
    if target.dtype == torch.float16:
        steps = (source.abs() * _SUBNORMALS_PER_ONE).add_(noise, alpha=2.0**-dropped).floor_()
        subnormal = steps.div_(_SUBNORMALS_PER_ONE).copysign_(source)
        rounded = torch.where(source.abs() < _SMALLEST_NORMAL, subnormal, rounded)
    target.copy_(torch.where(source.abs() < torch.finfo(target.dtype).max, rounded, source))


def seed_(generator: torch.Generator, *numbers: int) -> None:
    """Seed ``generator`` from all of ``numbers``: those of the CPU take 32 bits only, so they are mixed first."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=4).digest()
    generator.manual_seed(int.from_bytes(digest, "little"))
