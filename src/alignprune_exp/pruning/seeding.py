"""Addressed randomness: every random choice has a generator of its own, named by what it is for."""

import zlib

import numpy as np


def generator(seed: int, purpose: str, *where: int) -> np.random.Generator:
    """Return the generator of one choice, for example ``generator(seed, "select", epoch)``.

    The stream depends on (seed, purpose, where) alone, so a resumed run repeats the very same choices,
    ranks agree without talking, and one more draw somewhere shifts nothing elsewhere.
    """
    key = (zlib.crc32(purpose.encode()), *where)
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)))
