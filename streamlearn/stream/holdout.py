"""Which samples are held out for the probes: decided by a hash, so that a duplicate never leaks into training."""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from streamlearn.data import Label


class HoldOut:
    """Sends a fixed fraction of samples to their task's probe, by value (decoded `x` and `y`) or by the record's key."""

    def __init__(self, by: str, fraction: float) -> None:
        self.by = by
        self.threshold = int(fraction * 2**64)

    def is_held_out(self, x: np.ndarray, y: Label, key: bytes | None) -> bool:
        """Tell whether a sample is held out; the same in every codec and at every repetition."""
        if self.threshold == 0:
            return False
        if self.by == "key" and key is not None:
            digest = blake2b(key, digest_size=8)
        else:
            digest = blake2b(x.tobytes(), digest_size=8)
            digest.update(f"{type(y).__name__}:{y}".encode())
        return int.from_bytes(digest.digest(), "big") < self.threshold
