"""Converts state to files and back: tensors to safetensors files, everything else to JSON. Nothing is ever pickled.

A state is a tree of dicts with one subtree per group: `{"model": {...}, "replay": {...}}`. The tensors of a group are
stored in `<group>.safetensors`, under their path in the tree, joined by `/`. An `Immutable` dict is stored in a file of its
own, named by its path, so that the next checkpoint can link the file. When a dict has many of them, neighbours share a file:
see `_split_into_blocks`. The rest of the tree is stored as JSON and contains every dict of the tree, so that a key with a
`/` is not mistaken for a path. Values that JSON cannot represent (tuples, bytes, numbers that are not finite), and tensors
of dtypes that safetensors cannot represent, are stored as a dict with one key that begins with `$`.
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

from streamlearn.core.errors import InputOutputError
from streamlearn.core.immutable import Immutable
from streamlearn.core.text import natural_key

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

SUFFIX = ".safetensors"
TAG = "$"
BLOCK = "block-"
BLOCK_BASE = 4
BLOCK_BYTES = 64 << 20  # files are merged into a larger one only up to this size
STORED = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8),
}
"""Dtypes that a safetensors file supports; tensors of all other dtypes are stored as their bytes."""
SEQUENCES: dict[str, type] = {f"{TAG}{kind.__name__}": kind for kind in (list, tuple, set, frozenset)}
"""Containers that are stored as a dict of their items, by the tag of that dict."""

Tree = dict[str, Any]


def pack(groups: Mapping[str, Tree]) -> tuple[dict[str, dict[str, Tensor]], Tree, set[str]]:
    """Return the tensors by file name, the rest of the tree, and the names of the files that never change."""
    files: dict[str, dict[str, Tensor]] = {}
    immutable: set[str] = set()
    rest: Tree = {}
    for group, tree in groups.items():
        rest[group] = _extract_tensors(_encode(tree), group, "", files, immutable)
    families: dict[str, list[str]] = {}
    for name in immutable:
        families.setdefault(name.removesuffix(SUFFIX).rpartition(".")[0], []).append(name)
    for family, names in families.items():
        names.sort(key=natural_key)
        sizes = [sum(value.nbytes for value in files[name].values()) for name in names]
        for members in _split_into_blocks(names, sizes):
            if len(members) > 1:
                block, tensors = _merge_files(family, members, files)
                files[block] = tensors
                immutable -= set(members)
                immutable.add(block)
    return files, rest, immutable


def unpack(files: Mapping[str, Mapping[str, Tensor]], rest: Mapping[str, Tree]) -> dict[str, Tree]:
    """Return the groups that were given to `pack`. Modifies `rest`."""
    groups = dict(rest)
    for name, tensors in files.items():
        group, *path = name.removesuffix(SUFFIX).split(".")
        if path:
            tree = groups[group]
            for key in path[:-1]:
                tree = tree.setdefault(key, {})
            if path[-1].startswith(BLOCK):
                for key, tensor in tensors.items():
                    member, _, inner = key.partition("/")
                    tree.setdefault(member, Immutable())[inner] = tensor
            else:
                tree[path[-1]] = Immutable(tensors)
            continue
        for key, tensor in tensors.items():
            _insert(groups[group], key, tensor)
    return {group: _decode(tree) for group, tree in groups.items()}


def split_tensors(tree: Mapping[str, Any]) -> tuple[dict[str, Tensor], Tree]:
    """Return the tensors of a tree by their path, and the rest of the tree, which JSON can represent."""
    files: dict[str, dict[str, Tensor]] = {}
    rest = _extract_tensors(_encode(tree), "", "", files, set())
    return files.get(SUFFIX, {}), rest


def join_tensors(tensors: Mapping[str, Tensor], rest: Tree) -> Tree:
    """Return the tree that was given to `split_tensors`. Modifies `rest`."""
    for key, tensor in tensors.items():
        _insert(rest, key, tensor)
    tree: Tree = _decode(rest)
    return tree


def round_trip(tree: Mapping[str, Any]) -> Tree:
    """Return a tree as a checkpoint would restore it. Raises whatever saving or loading it raises."""
    tensors, rest = split_tensors(tree)
    return join_tensors(from_bytes("", to_bytes(host_copies(tensors))), json.loads(json.dumps(rest, allow_nan=False)))


def equal(one: Any, other: Any) -> bool:
    """Return whether two values of a state are equal bit by bit."""
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
    """Return copies on the host that share no storage: safetensors refuses tensors that share one."""
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Return the content of a safetensors file. The tensors must be on the host and share no storage."""
    return save(dict(tensors))


def from_bytes(name: str, content: bytes) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file. Raises `InputOutputError` with its name if the content is not valid."""
    try:
        return load(content)
    except SafetensorError as error:
        raise InputOutputError(f"{name}: not a safetensors file: {error}") from error


def _split_into_blocks(names: Sequence[str], sizes: Sequence[int]) -> Iterator[Sequence[str]]:
    """Yield the members of each file, in order. n members need about 3 log n files; each member is written log n times.

    A file has 1, 4, 16 ... members and begins at a multiple of that number: four full files are merged into one, as in a
    log-structured store. The split depends on the members alone, so two runs of the same stream have the same files. New
    members come only at the end, so most files do not change from one checkpoint to the next, and are linked.
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


def _merge_files(
    family: str, members: Sequence[str], files: dict[str, dict[str, Tensor]]
) -> tuple[str, dict[str, Tensor]]:
    """Remove the members from `files`; return the merged file's name, which has a hash of the members, and its tensors."""
    digest = hashlib.sha256("\n".join(members).encode()).hexdigest()[:16]
    tensors = {}
    for name in members:
        member = name.removesuffix(SUFFIX).rpartition(".")[2]
        tensors.update({f"{member}/{key}": value for key, value in files.pop(name).items()})
    return f"{family}.{BLOCK}{digest}{SUFFIX}", tensors


def _extract_tensors(
    tree: Mapping[str, Any], group: str, prefix: str, files: dict[str, Any], immutable: set[str]
) -> Tree:
    rest: Tree = {}
    for key, raw in tree.items():
        try:
            value = _encode(raw)
        except TypeError as error:
            raise TypeError(f"{key}: {error}") from None
        if isinstance(value, Tensor):
            files.setdefault(f"{group}{SUFFIX}", {})[prefix + key] = value
        elif isinstance(value, Immutable):
            name = ".".join([group, *prefix.split("/")[:-1], key]) + SUFFIX
            files[name] = value
            immutable.add(name)
        elif isinstance(value, dict):
            rest[key] = _extract_tensors(value, group, f"{prefix}{key}/", files, immutable)
        else:
            rest[key] = value
    return rest


def _insert(tree: Tree, path: str, tensor: Tensor) -> None:
    """Put a tensor into a tree that has all its dicts. A part of the path that names no dict belongs to the tensor's key."""
    end = path.find("/")
    while end != -1:
        child = tree.get(path[:end])
        if isinstance(child, dict) and not isinstance(child, Immutable):
            tree, path, end = child, path[end + 1 :], -1
        end = path.find("/", end + 1)
    tree[path] = tensor


def _encode(value: Any) -> Any:
    """Return a value as a tensor, an `Immutable`, a dict with string keys, or JSON. Raises `TypeError` if it cannot."""
    if isinstance(value, Tensor):
        return _encode_tensor(value)
    if isinstance(value, Immutable) or _is_json(value):
        return value
    if isinstance(value, float):
        return {f"{TAG}float": repr(value)}
    if isinstance(value, dict):
        return (
            value if _has_plain_keys(value) else {f"{TAG}dict": {"keys": list(value), "values": list(value.values())}}
        )
    if isinstance(value, bytes):
        return {f"{TAG}bytes": base64.b64encode(value).decode()}
    if type(value) in SEQUENCES.values():
        return {f"{TAG}{type(value).__name__}": {str(number): item for number, item in enumerate(value)}}
    raise TypeError(
        f"a value of type {type(value).__name__}; expected tensors, numbers, strings, bytes and containers of them"
    )


def _has_plain_keys(tree: Mapping[Any, Any]) -> bool:
    """Return whether all keys are strings, none looks like a tag, and none like a path below another (`a/b` beside `a`)."""
    if not all(isinstance(key, str) and not key.startswith(TAG) for key in tree):
        return False
    slashed = [key for key in tree if "/" in key]
    return not any(key != other and key.startswith(f"{other}/") for key in slashed for other in tree)


def _encode_tensor(value: Tensor) -> Any:
    if value.is_meta:
        raise TypeError("a tensor on the device meta, which has no values; create it on a real device")
    if value.is_quantized:
        raise TypeError(
            f"a quantized tensor ({value.dtype}); store value.dequantize(), and quantize it again in forward"
        )
    if value.layout != torch.strided:
        raise TypeError(f"a tensor of layout {value.layout}; store value.to_dense(), and convert it again in forward")
    if value.dtype in STORED:
        return value
    dtype = str(value.dtype).removeprefix("torch.")
    return {f"{TAG}tensor": {"dtype": dtype, "shape": list(value.shape), "bits": _bits(value)}}


def _is_json(value: Any) -> bool:
    """Return whether JSON can represent a value, or a list of such values, without encoding."""
    if isinstance(value, list):
        return all(map(_is_json, value))
    return value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value))


def _decode(tree: Any) -> Any:
    """Return a tree with all values of `_encode` decoded."""
    if not isinstance(tree, dict) or isinstance(tree, Immutable):
        return tree
    for key, value in tree.items():
        tree[key] = _decode(value)
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
    """Return a tensor's bytes in C order, as uint8."""
    flat = value.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8)
