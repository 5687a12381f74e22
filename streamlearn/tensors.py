"""Arithmetic on aligned lists of tensors, and the floating-point mode that makes runs repeatable."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def configure_torch(threads: int) -> None:
    """Set the thread count and flush denormals; before any model is built, or runs are neither fast nor bit-equal."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # decaying moments become denormal and make a step several times slower
    if torch.cuda.is_available():  # sums there come in another order from run to run, unless told otherwise
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(mode=True, warn_only=True)
        # nothing here reads what it has not written; torch makes this a module that is a class
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def choose_device(name: str) -> torch.device:
    """Return the device that `auto`, `cpu`, `cuda` or `cuda:N` names; raises `ValueError` when it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ValueError(
            f"device: {name} is not here; accepted: auto, cpu"
            + "".join(f", cuda:{n}" for n in range(torch.cuda.device_count()))
        )
    return device


def seeded_generator(seed: int, part: str, device: torch.device | None = None) -> torch.Generator:
    """Return a generator of a part's own, so that adding a part never shifts the draws of another."""
    generator = torch.Generator(device=device or "cpu")
    mixed = seed
    for letter in part.encode():
        mixed = (mixed * 1_000_003 + letter) % (1 << 62)
    return generator.manual_seed(mixed)


def clones(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return detached copies."""
    return [tensor.detach().clone() for tensor in tensors]


def zeros(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return zeros of the same shapes."""
    return [torch.zeros_like(tensor) for tensor in tensors]


def dense(grad: Tensor | None, like: Tensor) -> Tensor:
    """Return a parameter's gradient as a plain tensor: an embedding may give a sparse one, an unused parameter has none."""
    if grad is None:
        return torch.zeros_like(like)
    return grad.to_dense() if grad.is_sparse else grad


def padded(old: Tensor, like: Tensor, *, copy_rest: bool = False) -> Tensor:
    """Return `old` enlarged to the shape of `like`, the new entries zero, or those of `like` where `copy_rest`."""
    if old.shape == like.shape:
        return old
    new = like.detach().clone() if copy_rest else torch.zeros_like(like)
    new[tuple(slice(0, size) for size in old.shape)] = old
    return new


def padded_all(old: Sequence[Tensor], like: Sequence[Tensor], *, copy_rest: bool = False) -> list[Tensor]:
    """Return every tensor of `old` enlarged to its partner in `like`."""
    return [padded(a, b, copy_rest=copy_rest) for a, b in zip(old, like, strict=True)]


@torch.no_grad()
def copy_into(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Write the values of `sources` into `targets`."""
    torch._foreach_copy_(list(targets), list(sources))


def finite_norm(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the norm of all tensors together, and whether it is finite: both on the device, nothing waits."""
    if tensors[0].is_cuda:  # one launch for all; on a CPU the plain function is a little faster
        norms = list(torch._foreach_norm(list(tensors)))  # noqa: SLF001 - see copy_into
    else:
        norms = [torch.linalg.vector_norm(tensor) for tensor in tensors]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    return norm, norm < torch.inf  # false for NaN, too


def finite_rows(x: Tensor) -> Tensor:
    """Return which rows of `x [B, ...]` hold finite numbers alone, `[B]`."""
    return x.flatten(1).isfinite().all(1)


def averaging_rate(decay: float, steps: int) -> float:
    """Return how far a moving average follows after so many steps of a task: quickly at first, then by 1 - `decay`.

    A fixed rate would still hold the weights of long ago at the end of a short task.
    """
    return max(1 - decay, 9 / (10 + steps))


def make_preprocess(
    divisor: float, device: torch.device, *, token_ids: bool = False, encoder: Callable[[Tensor], Tensor] | None = None
) -> Callable[[Tensor], Tensor]:
    """Return the function from samples as they arrived to what the network sees: float32, on the device, divided.

    Where they are `token_ids`, the token ids of a text, they stay integers; an `encoder` makes features of the rest.
    """

    def preprocess(x: Tensor) -> Tensor:
        if token_ids:
            return x.to(device)
        # of its own, for an encoder: what is stored must stay as it arrived, whatever a module does in place
        there = x.to(device, torch.float32, copy=encoder is not None)
        there = there if divisor == 1 else there / divisor
        return there if encoder is None else encoder(there)

    return preprocess
