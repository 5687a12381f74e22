"""The parameters that are trained now, and copies of their values that must keep their form."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamlearn.learning.tensors import padded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from streamlearn.learning.strategies.slots import Network


class TrainedParameters:
    """The names and the tensors of a network's trained parameters, as two aligned lists."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self.names: list[str] = []
        self.tensors: list[Tensor] = []
        self.read()

    def read(self) -> list[int | None]:
        """Read the parameters again; return the former index of each, None for a new one."""
        old = {name: index for index, name in enumerate(self.names)}
        trained = self._network.trainable_parameters()
        self.names, self.tensors = list(trained), list(trained.values())
        return [old.get(name) for name in self.names]

    def carried_over(self, values: Sequence[Tensor], old_indices: Sequence[int | None]) -> list[Tensor]:
        """Return `values` of the former parameters for the current ones. New entries get the current values."""
        return [
            param.detach().clone() if index is None else padded(values[index], param, copy_rest=True)
            for index, param in zip(old_indices, self.tensors, strict=True)
        ]
