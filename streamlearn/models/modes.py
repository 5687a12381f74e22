"""How a module runs: in evaluation mode for a while, and with random numbers that are one learner's own."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from streamlearn.tensors import seeded

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor, nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode, and afterwards each of its parts back into its own: an author may freeze some."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


class LayerDraws:
    """What layers draw by themselves, as dropout does: torch's global generators, seeded and saved as one learner's own."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.device = device
        self._states = {"cpu": seeded(seed, "layers").get_state()}
        if device.type == "cuda":
            self._states["cuda"] = seeded(seed, "layers", device).get_state()

    @contextmanager
    def taken(self, *, keep: bool = True) -> Iterator[None]:
        """Let layers draw from here, and give the process back its own state; what was drawn counts only where it is kept."""
        before = self._exchange(self._states)
        try:
            yield
        finally:
            after = self._exchange(before)
            self._states = after if keep else self._states

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything needed to go on bit-equal."""
        return dict(self._states)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` returned; what it has nothing of, as after a change of device, begins anew."""
        self._states |= {name: state[name] for name in self._states if name in state}

    def _exchange(self, states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        before = {"cpu": torch.get_rng_state()}
        torch.set_rng_state(states["cpu"])
        if "cuda" in states:
            before["cuda"] = torch.cuda.get_rng_state(self.device)
            torch.cuda.set_rng_state(states["cuda"], self.device)
        return before
