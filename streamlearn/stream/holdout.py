"""Decide by a hash which samples are held out for the probes, so that a copy of a held-out sample is never trained."""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from streamlearn.core.labels import Label


class HoldOut:
    """Holds out a fixed fraction of the samples. The hash is of the value (decoded `x` and `y`) or of the record's key."""

    def __init__(self, by: str, fraction: float) -> None:
        self.by = by  # value | key
        self.threshold = int(fraction * 2**64)

    def is_held_out(self, x: np.ndarray, y: Label, key: bytes | None) -> bool:
        """Return whether a sample is held out. The answer is the same in every codec and whenever the sample occurs."""
        if self.threshold == 0:
            return False
        if self.by == "key" and key is not None:
            digest = blake2b(key, digest_size=8)
        else:
            digest = blake2b(x.tobytes(), digest_size=8)
            digest.update(f"{type(y).__name__}:{y}".encode())
        return int.from_bytes(digest.digest(), "big") < self.threshold
