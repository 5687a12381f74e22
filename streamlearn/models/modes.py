"""How a module runs: in evaluation mode for a while, and with random numbers that belong to one learner."""

from __future__ import annotations

import random
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from streamlearn.tensors import seeded

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

NUMPY_SEEDS = 1 << 32  # numpy's global generator takes seeds below this number


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


def is_sample_by_sample(module: nn.Module) -> bool:
    """Tell whether in evaluation mode no sample's output depends on the others of its batch.

    A batch normalisation that keeps no running statistics takes those of the batch, in every mode.
    """
    norms = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]  # noqa: SLF001 - torch has no other name for all of them
    return all(part.running_mean is not None for part in norms)


@contextmanager
def differentiating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode, but so that gradients can be taken of every part.

    cuDNN has no backward pass for recurrent layers in evaluation mode. They stay in training mode, without dropout, which
    computes the same outputs.
    """
    recurrent = [part for part in module.modules() if isinstance(part, nn.RNNBase)]
    dropouts = [part.dropout for part in recurrent]
    with evaluating(module):
        try:
            for part in recurrent:
                part.training, part.dropout = True, 0.0
            yield
        finally:
            for part, dropout in zip(recurrent, dropouts, strict=True):
                part.dropout = dropout


def flatten_recurrent(module: nn.Module) -> None:
    """Lay the weights of recurrent layers into one block of memory again, as cuDNN needs it; a copy does not keep the block."""
    for part in module.modules():
        if isinstance(part, nn.RNNBase):
            part.flatten_parameters()


@contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """Seed the global generators of torch, `numpy.random` and `random` for a while; afterwards they go on as before."""
    with torch.random.fork_rng(devices=[]):
        before = _others()
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % NUMPY_SEEDS)  # noqa: NPY002 - the generator that a user's model may draw from
        try:
            yield
        finally:
            _set_others(before)


class LayerDraws:
    """What a model draws by itself, as dropout does: global generators, seeded and saved as one learner's own.

    These are the generators of torch, and those of `numpy.random` and `random`, which a user's model may call.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self.device = device
        cpu = seeded(seed, "layers")
        self._states: dict[str, Any] = {"cpu": cpu.get_state()}
        if device.type == "cuda":
            self._states["cuda"] = seeded(seed, "layers", device).get_state()
        with drawing_from(cpu.initial_seed()):
            self._states |= _others()

    @contextmanager
    def taken(self, *, keep: bool = True) -> Iterator[None]:
        """Let layers draw from here, and give the process back its own state; what was drawn counts only where it is kept."""
        before = self._exchange(self._states)
        try:
            yield
        finally:
            after = self._exchange(before)
            self._states = after if keep else self._states

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on bit-equal."""
        _, key, gauss = self._states["random"]
        numpy = self._states["numpy"]
        return {
            **{name: state for name, state in self._states.items() if name in {"cpu", "cuda"}},
            "random": {"key": torch.tensor(key), "gauss": gauss},
            "numpy": {
                "key": torch.from_numpy(numpy["state"]["key"].astype(np.int64)),
                "position": int(numpy["state"]["pos"]),
                "has_gauss": int(numpy["has_gauss"]),
                "gauss": float(numpy["gauss"]),
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned; what it has nothing of, as after a change of device, begins anew."""
        self._states |= {name: state[name] for name in self._states.keys() & {"cpu", "cuda"} & state.keys()}
        if "random" in state:  # checkpoints of earlier versions have neither
            version, *_ = self._states["random"]
            self._states["random"] = (version, tuple(state["random"]["key"].tolist()), state["random"]["gauss"])
            numpy = state["numpy"]
            key = numpy["key"].numpy().astype(np.uint32)
            self._states["numpy"] = {
                "bit_generator": "MT19937",
                "state": {"key": key, "pos": numpy["position"]},
                "has_gauss": numpy["has_gauss"],
                "gauss": numpy["gauss"],
            }

    def _exchange(self, states: Mapping[str, Any]) -> dict[str, Any]:
        before = {"cpu": torch.get_rng_state(), **_others()}
        torch.set_rng_state(states["cpu"])
        _set_others(states)
        if "cuda" in states:
            before["cuda"] = torch.cuda.get_rng_state(self.device)
            torch.cuda.set_rng_state(states["cuda"], self.device)
        return before


def _others() -> dict[str, Any]:
    """Return the states of Python's and numpy's global generators."""
    return {"random": random.getstate(), "numpy": np.random.get_state(legacy=False)}  # noqa: NPY002 - as above


def _set_others(states: Mapping[str, Any]) -> None:
    random.setstate(states["random"])
    np.random.set_state(states["numpy"])  # noqa: NPY002 - as above
