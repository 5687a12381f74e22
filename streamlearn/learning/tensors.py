"""Functions on aligned lists of tensors, seeded random generators, and torch settings that make runs repeatable."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


def configure_torch(threads: int) -> None:
    """Set the number of threads, flush denormals, and make CUDA deterministic. Call it before any model is built.

    Without it runs are neither fast nor bit-equal.
    """
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # decaying moments become denormal and make a step several times slower
    if torch.cuda.is_available():  # by default CUDA may add in another order in every run
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(mode=True, warn_only=True)
        # no code here reads uninitialised memory, so filling it would only cost time; mypy does not know the attribute
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def choose_device(name: str) -> torch.device:
    """Return the device for `auto`, `cpu`, `cuda` or `cuda:N`. Raises `ValueError` if this machine does not have it."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ValueError(
            f"device: {name} does not exist on this machine; accepted: auto, cpu"
            + "".join(f", cuda:{n}" for n in range(torch.cuda.device_count()))
        )
    return device


def seeded_generator(seed: int, purpose: str, device: torch.device | None = None) -> torch.Generator:
    """Return a random generator for one purpose, so that a new purpose does not change the draws of the others."""
    generator = torch.Generator(device=device or "cpu")
    mixed = seed
    for byte in purpose.encode():
        mixed = (mixed * 1_000_003 + byte) % (1 << 62)
    return generator.manual_seed(mixed)


def clones(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return detached copies of the tensors."""
    return [tensor.detach().clone() for tensor in tensors]


def zeros(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors of zeros with the same shapes."""
    return [torch.zeros_like(tensor) for tensor in tensors]


def numbered(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return tensors by their index, as a state stores a list of them."""
    return {str(number): tensor for number, tensor in enumerate(tensors)}


def from_numbered(values: Mapping[str, Tensor], device: torch.device) -> list[Tensor]:
    """Return copies, on the device, of the tensors that were given to `numbered`."""
    return [values[str(number)].to(device, copy=True) for number in range(len(values))]


def dense(grad: Tensor | None, like: Tensor) -> Tensor:
    """Return a parameter's gradient as a dense tensor: an embedding may have a sparse one, an unused parameter has None."""
    if grad is None:
        return torch.zeros_like(like)
    return grad.to_dense() if grad.is_sparse else grad


def padded(old: Tensor, like: Tensor, *, copy_rest: bool = False) -> Tensor:
    """Return `old` enlarged to the shape of `like`. New entries are zero, or those of `like` if `copy_rest`."""
    if old.shape == like.shape:
        return old
    new = like.detach().clone() if copy_rest else torch.zeros_like(like)
    new[tuple(slice(0, size) for size in old.shape)] = old
    return new


def padded_all(old: Sequence[Tensor], like: Sequence[Tensor], *, copy_rest: bool = False) -> list[Tensor]:
    """Return every tensor of `old` enlarged to the shape of its partner in `like`, as `padded` does."""
    return [padded(a, b, copy_rest=copy_rest) for a, b in zip(old, like, strict=True)]


@torch.no_grad()
def copy_into(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy the values of `sources` into `targets`."""
    torch._foreach_copy_(list(targets), list(sources))


def finite_norm(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the norm of all tensors together, and whether it is finite. Both are on the device; nothing waits for it."""
    if tensors[0].is_cuda:  # one kernel for all tensors; on a CPU the other way is a little faster
        norms = list(torch._foreach_norm(list(tensors)))  # noqa: SLF001 - torch has no public name for it
    else:
        norms = [torch.linalg.vector_norm(tensor) for tensor in tensors]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    return norm, norm < torch.inf  # also false for NaN


def clip_norm(grads: Sequence[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scale gradients, whose norm together is `norm`, in place to a norm of at most `max_norm`."""
    torch._foreach_mul_(list(grads), (max_norm / (norm + 1e-6)).clamp(max=1.0))


def finite_rows(x: Tensor) -> Tensor:
    """Return which rows of `x [B, ...]` have only finite numbers, `[B]`."""
    return x.flatten(1).isfinite().all(1)


def averaging_rate(decay: float, steps: int) -> float:
    """Return the rate of a moving average after `steps` steps of a task: large at first, later 1 - `decay`.

    With a fixed rate, the average at the end of a short task would still contain much of the weights from before it.
    """
    return max(1 - decay, 9 / (10 + steps))


def make_preprocess(
    divisor: float, device: torch.device, *, token_ids: bool = False, encoder: Callable[[Tensor], Tensor] | None = None
) -> Callable[[Tensor], Tensor]:
    """Return the function that turns samples as they arrived into the network's input, on the device.

    Samples are cast to float32 and divided by `divisor`; then an `encoder`, if there is one, turns them into features.
    `token_ids` of a text stay integers.
    """

    def preprocess(x: Tensor) -> Tensor:
        if token_ids:
            return x.to(device)
        # an encoder gets a copy: it may change its input in place, and a stored sample must stay as it arrived
        scaled = x.to(device, torch.float32, copy=encoder is not None)
        scaled = scaled if divisor == 1 else scaled / divisor
        return scaled if encoder is None else encoder(scaled)

    return preprocess
