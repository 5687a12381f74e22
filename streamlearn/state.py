"""State to files and back: tensors to safetensors, everything else to JSON. Nothing is ever pickled.

A state is a tree of dicts, by group: `{"model": {...}, "replay": {...}}`. The tensors of a group go to
`<group>.safetensors`, their place in the tree joined by `/`; an `Immutable` part has a file of its own, named by its
place, so that the next checkpoint can link it. Where a dict holds many of them, neighbours share files, see `_blocks`.
The rest of the tree is JSON, and has every dict of the tree: so a name that holds a `/` is not taken for a place. What JSON
cannot hold (a tuple, bytes, a number that is not finite) and tensors of other types than safetensors has become a dict with
one key that begins with `$`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from streamlearn.data import StreamlearnError, natural_key
from streamlearn.memory import Immutable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

SUFFIX = ".safetensors"
TAG = "$"
BLOCK = "block-"
BLOCK_BASE = 4
BLOCK_BYTES = 64 << 20  # the largest file that is written anew for the sake of fewer files
STORED = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8),
}
"""Types of tensors that a safetensors file can hold; all others are stored as their bytes."""

Tree = dict[str, Any]


def pack(groups: Mapping[str, Tree]) -> tuple[dict[str, dict[str, Tensor]], Tree, set[str]]:
    """Return the tensors by file name, the rest of the tree, and the names of files that never change."""
    files: dict[str, dict[str, Tensor]] = {}
    immutable: set[str] = set()
    rest: Tree = {}
    for group, tree in groups.items():
        rest[group] = _strip(_plain(tree), group, "", files, immutable)
    families: dict[str, list[str]] = {}
    for name in immutable:
        families.setdefault(name.removesuffix(SUFFIX).rpartition(".")[0], []).append(name)
    for family, names in families.items():
        names.sort(key=natural_key)
        for members in _blocks(names, [sum(value.nbytes for value in files[name].values()) for name in names]):
            if len(members) > 1:
                block, tensors = _joined(family, members, files)
                files[block] = tensors
                immutable -= set(members)
                immutable.add(block)
    return files, rest, immutable


def unpack(files: Mapping[str, Mapping[str, Tensor]], rest: Mapping[str, Tree]) -> dict[str, Tree]:
    """Return the groups that `pack` took apart; `rest` is taken over."""
    groups = dict(rest)
    for name, tensors in files.items():
        group, *place = name.removesuffix(SUFFIX).split(".")
        if place:
            tree = groups[group]
            for key in place[:-1]:
                tree = tree.setdefault(key, {})
            if place[-1].startswith(BLOCK):
                for key, tensor in tensors.items():
                    member, _, inner = key.partition("/")
                    tree.setdefault(member, Immutable())[inner] = tensor
            else:
                tree[place[-1]] = Immutable(tensors)
            continue
        for key, tensor in tensors.items():
            _insert(groups[group], key, tensor)
    return {group: _restored(tree) for group, tree in groups.items()}


def split_tensors(tree: Mapping[str, Any]) -> tuple[dict[str, Tensor], Tree]:
    """Return a tree's tensors by their place, and the rest of it, which JSON can hold."""
    files: dict[str, dict[str, Tensor]] = {}
    rest = _strip(_plain(tree), "", "", files, set())
    return files.get(SUFFIX, {}), rest


def join_tensors(tensors: Mapping[str, Tensor], rest: Tree) -> Tree:
    """Return the tree that `split_tensors` took apart; `rest` is taken over."""
    for key, tensor in tensors.items():
        _insert(rest, key, tensor)
    tree: Tree = _restored(rest)
    return tree


def round_trip(tree: Mapping[str, Any]) -> Tree:
    """Return a tree as it comes back from a checkpoint; raises whatever it fails with."""
    tensors, rest = split_tensors(tree)
    return join_tensors(from_bytes("", to_bytes(host_copies(tensors))), json.loads(json.dumps(rest, allow_nan=False)))


def equal(one: Any, other: Any) -> bool:
    """Tell whether two values of a state are the same, bit by bit."""
    if isinstance(one, Tensor):
        if not isinstance(other, Tensor) or (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        return torch.equal(_bits(one).cpu(), _bits(other).cpu())
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        same = type(one) is type(other) and len(one) == len(other)
        return same and all(equal(a, b) for a, b in zip(one, other, strict=True))
    return type(one) is type(other) and (one == other or (one != one and other != other))  # noqa: PLR0124 - NaN


def host_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
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


def _blocks(names: Sequence[str], sizes: Sequence[int]) -> Iterator[Sequence[str]]:
    """Give the members of each file, in order: n of them need about 3 log n files, and each is written log n times.

    A file holds 1, 4, 16 ... members, and begins at a multiple of that: four full ones become one, as in a log-structured
    store. What stands where depends on the members alone, so two runs of the same stream have the same files. Members only
    come at the end, so most files stay as they are from one checkpoint to the next, and are linked.
    """
    start = 0
    while start < len(names):
        count = 1
        while (
            start % (more := count * BLOCK_BASE) == 0
            and start + more <= len(names)
            and sum(sizes[start : start + more]) <= BLOCK_BYTES
        ):
            count = more
        yield names[start : start + count]
        start += count


def _joined(family: str, members: Sequence[str], files: dict[str, dict[str, Tensor]]) -> tuple[str, dict[str, Tensor]]:
    """Take the files of members away; return the one in their place, named by what it holds."""
    digest = hashlib.sha256("\n".join(members).encode()).hexdigest()[:16]
    tensors = {}
    for name in members:
        member = name.removesuffix(SUFFIX).rpartition(".")[2]
        tensors.update({f"{member}/{key}": value for key, value in files.pop(name).items()})
    return f"{family}.{BLOCK}{digest}{SUFFIX}", tensors


def _strip(tree: Mapping[str, Any], group: str, prefix: str, files: dict[str, Any], immutable: set[str]) -> Tree:
    rest: Tree = {}
    for key, found in tree.items():
        value = _plain(found)
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


def _insert(tree: Tree, place: str, tensor: Tensor) -> None:
    """Put a tensor into a tree that has all dicts already: what is no dict's name belongs to the tensor's."""
    end = place.find("/")
    while end != -1:
        below = tree.get(place[:end])
        if isinstance(below, dict) and not isinstance(below, Immutable):
            tree, place, end = below, place[end + 1 :], -1
        end = place.find("/", end + 1)
    tree[place] = tensor


def _plain(value: Any) -> Any:
    """Return a tensor, an `Immutable`, a dict with string keys, or what JSON can hold; raises `TypeError` for all else."""
    if isinstance(value, Tensor):
        return _plain_tensor(value)
    if isinstance(value, Immutable) or _is_json(value):
        return value
    if isinstance(value, float):
        return {f"{TAG}float": repr(value)}
    if isinstance(value, dict):
        return value if _is_clear(value) else {f"{TAG}dict": {"keys": list(value), "values": list(value.values())}}
    if isinstance(value, bytes):
        return {f"{TAG}bytes": base64.b64encode(value).decode()}
    if type(value) in SEQUENCES.values():
        return {f"{TAG}{type(value).__name__}": {str(number): item for number, item in enumerate(value)}}
    raise TypeError(
        f"a value of type {type(value).__name__}; expected tensors, numbers, strings, bytes and containers of them"
    )


def _is_clear(tree: Mapping[Any, Any]) -> bool:
    """Tell whether all names are strings, none looks like a tag, and none like a place below another, as `a/b` beside `a`."""
    if not all(isinstance(key, str) and not key.startswith(TAG) for key in tree):
        return False
    slashed = [key for key in tree if "/" in key]
    return not any(key != other and key.startswith(f"{other}/") for key in slashed for other in tree)


def _plain_tensor(value: Tensor) -> Any:
    if value.layout != torch.strided or value.is_quantized or value.is_meta:
        raise TypeError(f"a tensor of layout {value.layout} and type {value.dtype}; expected a dense one")
    if value.dtype in STORED:
        return value
    dtype = str(value.dtype).removeprefix("torch.")
    return {f"{TAG}tensor": {"dtype": dtype, "shape": list(value.shape), "bits": _bits(value)}}


SEQUENCES: dict[str, type] = {f"{TAG}{kind.__name__}": kind for kind in (list, tuple, set, frozenset)}


def _is_json(value: Any) -> bool:
    """Tell whether JSON can hold a value, or a list of them, as it is."""
    if isinstance(value, list):
        return all(map(_is_json, value))
    return value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value))


def _restored(tree: Any) -> Any:
    """Return a tree in which `_plain` is undone."""
    if not isinstance(tree, dict) or isinstance(tree, Immutable):
        return tree
    for key, value in tree.items():
        tree[key] = _restored(value)
    if len(tree) != 1:
        return tree
    ((tag, value),) = tree.items()
    if tag in SEQUENCES:
        return SEQUENCES[tag](value[str(number)] for number in range(len(value)))
    if tag == f"{TAG}dict":
        return dict(zip(value["keys"], value["values"], strict=True))
    if tag == f"{TAG}float":
        return float(value)
    if tag == f"{TAG}bytes":
        return base64.b64decode(value)
    if tag == f"{TAG}tensor":
        dtype = getattr(torch, value["dtype"])
        return value["bits"].view(dtype).reshape(value["shape"])
    return tree


def _bits(value: Tensor) -> Tensor:
    """Return a tensor's bytes, in C order."""
    flat = value.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8)
