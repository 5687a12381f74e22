"""State to files and back: tensors to safetensors, everything else to JSON. Nothing is ever pickled.

A state is a tree of dicts, by group: `{"model": {...}, "replay": {...}}`. The tensors of a group go to
`<group>.safetensors`, their place in the tree joined by `/`; an `Immutable` part has a file of its own, named by its
place, so that the next checkpoint can link it. The rest of the tree is JSON.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from streamlearn.data import StreamlearnError
from streamlearn.memory import Immutable

if TYPE_CHECKING:
    from collections.abc import Mapping

SUFFIX = ".safetensors"
Tree = dict[str, Any]


def pack(groups: Mapping[str, Tree]) -> tuple[dict[str, dict[str, Tensor]], Tree, set[str]]:
    """Return the tensors by file name, the rest of the tree, and the names of files that never change."""
    files: dict[str, dict[str, Tensor]] = {}
    immutable: set[str] = set()
    rest: Tree = {}
    for group, tree in groups.items():
        rest[group] = _strip(tree, group, "", files, immutable)
    return files, rest, immutable


def unpack(files: Mapping[str, Mapping[str, Tensor]], rest: Mapping[str, Tree]) -> dict[str, Tree]:
    """Return the groups that `pack` took apart; `rest` is taken over."""
    groups = dict(rest)
    for name, tensors in files.items():
        group, *place = name.removesuffix(SUFFIX).split(".")
        if place:
            _at(groups[group], place[:-1])[place[-1]] = Immutable(tensors)
            continue
        for key, tensor in tensors.items():
            *parents, last = key.split("/")
            _at(groups[group], parents)[last] = tensor
    return groups


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies on the host, each with a storage of its own: views of one cannot be told apart in a file."""
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Return a safetensors file's content, of tensors on the host that share no storage."""
    return save(dict(tensors))


def from_bytes(name: str, content: bytes) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file; raises `StreamlearnError` naming it when it is not one."""
    try:
        return load(content)
    except SafetensorError as error:
        raise StreamlearnError(f"{name}: not a safetensors file: {error}", code=74) from error


def _strip(tree: Mapping[str, Any], group: str, prefix: str, files: dict[str, Any], immutable: set[str]) -> Tree:
    rest: Tree = {}
    for key, value in tree.items():
        if isinstance(value, Tensor):
            files.setdefault(f"{group}{SUFFIX}", {})[prefix + key] = value
        elif isinstance(value, Immutable):
            name = ".".join([group, *prefix.split("/")[:-1], key]) + SUFFIX
            files[name] = value
            immutable.add(name)
        elif isinstance(value, dict):
            rest[key] = _strip(value, group, f"{prefix}{key}/", files, immutable)
        else:
            rest[key] = value
    return rest


def _at(tree: Tree, place: list[str]) -> Tree:
    for key in place:
        tree = tree.setdefault(key, {})
    return tree
