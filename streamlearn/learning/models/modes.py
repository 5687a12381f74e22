"""Context managers that put a module into evaluation mode, or control the random generators that it uses."""

from __future__ import annotations

import random
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from streamlearn.learning.tensors import seeded_generator

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

NUMPY_SEEDS = 1 << 32


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode, and restore the mode of each submodule afterwards: the user may have frozen some."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def samples_are_independent(module: nn.Module) -> bool:
    """Return whether, in evaluation mode, a sample's output does not depend on the other samples of its batch.

    A batch normalisation without running statistics uses those of the batch in every mode.
    """
    norms = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]  # noqa: SLF001 - torch has no other name for all of them
    return all(part.running_mean is not None for part in norms)


@contextmanager
def differentiable_eval_mode(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode, such that gradients of all its parameters can be computed.

    cuDNN has no backward pass for recurrent layers in evaluation mode. They stay in training mode without dropout, which
    gives the same outputs.
    """
    recurrent = [part for part in module.modules() if isinstance(part, nn.RNNBase)]
    dropouts = [part.dropout for part in recurrent]
    with eval_mode(module):
        try:
            for part in recurrent:
                part.training, part.dropout = True, 0.0
            yield
        finally:
            for part, dropout in zip(recurrent, dropouts, strict=True):
                part.dropout = dropout


def flatten_recurrent(module: nn.Module) -> None:
    """Put the weights of recurrent layers into one block of memory, as cuDNN expects: deepcopy does not keep the block."""
    for part in module.modules():
        if isinstance(part, nn.RNNBase):
            part.flatten_parameters()


@contextmanager
def global_seed(seed: int) -> Iterator[None]:
    """Seed the global generators of torch, `numpy.random` and `random`, and restore their states afterwards."""
    with torch.random.fork_rng(devices=[]):
        python, numpy = random.getstate(), _swap_numpy_generator(np.random.MT19937())
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % NUMPY_SEEDS)  # noqa: NPY002 - the generator that a user's model may draw from
        try:
            yield
        finally:
            random.setstate(python)
            _swap_numpy_generator(numpy)


class LayerRng:
    """The random state of the layers of one model, for example of dropout: seeded, saved and restored with the learner.

    Layers draw from global generators, so this state is swapped into them: into those of torch and, with `has_user_code` (in
    the model or the encoder), also into those of `numpy.random` and `random`.
    """

    def __init__(self, seed: int, device: torch.device, *, has_user_code: bool = True) -> None:
        self.device = device
        cpu = seeded_generator(seed, "layers")
        self._states: dict[str, Any] = {"cpu": cpu.get_state()}
        if device.type == "cuda":
            self._states["cuda"] = seeded_generator(seed, "layers", device).get_state()
        self._seed = cpu.initial_seed() % NUMPY_SEEDS
        if has_user_code:
            self._states["random"] = random.Random(self._seed).getstate()  # noqa: S311 - no secret
            self._states["numpy"] = np.random.MT19937(self._seed)
            self._spare = np.random.MT19937()

    @contextmanager
    def in_use(self, *, keep: bool = True) -> Iterator[None]:
        """Swap this state into the global generators, and out again afterwards. Without `keep` it does not advance."""
        spare = not keep and "numpy" in self._states
        before = self._exchange({**self._states, "numpy": self._spare} if spare else self._states)
        if spare:  # seeding a spare generator is far faster than copying the state of the other one
            np.random.seed(self._seed)  # noqa: NPY002 - as above
        try:
            yield
        finally:
            after = self._exchange(before)
            self._states = after if keep else self._states

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to continue bit-equal."""
        tree: dict[str, Any] = {name: state for name, state in self._states.items() if name in {"cpu", "cuda"}}
        if "random" in self._states:
            _, key, gauss = self._states["random"]
            numpy = self._states["numpy"].state["state"]
            tree["random"] = {"key": torch.tensor(key), "gauss": gauss}
            tree["numpy"] = {"key": torch.from_numpy(numpy["key"].astype(np.int64)), "position": int(numpy["pos"])}
        return tree

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned. Generators that it lacks, as after a change of device, keep their seed."""
        self._states |= {name: state[name] for name in self._states.keys() & {"cpu", "cuda"} & state.keys()}
        if "random" in self._states and "random" in state:  # older checkpoints have neither
            version, *_ = self._states["random"]
            self._states["random"] = (version, tuple(state["random"]["key"].tolist()), state["random"]["gauss"])
            key = state["numpy"]["key"].numpy().astype(np.uint32)
            numpy = {"key": key, "pos": state["numpy"]["position"]}
            self._states["numpy"] = np.random.MT19937(self._seed)
            self._states["numpy"].state = {"bit_generator": "MT19937", "state": numpy}

    def _exchange(self, states: Mapping[str, Any]) -> dict[str, Any]:
        before: dict[str, Any] = {"cpu": torch.get_rng_state()}
        torch.set_rng_state(states["cpu"])
        if "cuda" in states:
            before["cuda"] = torch.cuda.get_rng_state(self.device)
            torch.cuda.set_rng_state(states["cuda"], self.device)
        if "random" in states:
            before["random"] = random.getstate()
            random.setstate(states["random"])
            # this always drops numpy's cached second normal number, so that a restart makes no difference
            before["numpy"] = _swap_numpy_generator(states["numpy"])
        return before


def _swap_numpy_generator(generator: np.random.BitGenerator) -> np.random.BitGenerator:
    """Set the global generator of `numpy.random`; return the previous one."""
    before: np.random.BitGenerator = np.random.get_bit_generator()  # type: ignore[attr-defined]  # not in numpy's types
    np.random.set_bit_generator(generator)  # type: ignore[attr-defined]  # as above
    return before
