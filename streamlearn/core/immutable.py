"""Tensors that never change, which a checkpoint therefore writes only once."""

from __future__ import annotations

from torch import Tensor


class Immutable(dict[str, Tensor]):
    """Tensors that never change under this name: a checkpoint links their file from the previous one and writes nothing."""
