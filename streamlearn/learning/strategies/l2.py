"""L2 penalty: every parameter has the same importance. A baseline for the other importances."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from streamlearn.learning.strategies.importance import Importance

if TYPE_CHECKING:
    from torch import Tensor

    from streamlearn.learning.strategies.slots import EndedTask


class UniformImportance(Importance):
    """The importance of every parameter is 1. The penalty is then plain L2 toward the parameters of the last task."""

    def compute(self, ended: EndedTask) -> list[Tensor]:
        return [torch.ones_like(param) for param in ended.params]
