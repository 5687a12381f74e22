"""Checkpoint files as malice, bad disks and careless hands leave them: refused, or the very state that was saved."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from streamlearn import configfile, state
from streamlearn.checkpoint import MANIFEST, Store, _digest
from streamlearn.data import StreamlearnError
from streamlearn.job import Job
from streamlearn.metrics import Metrics
from streamlearn.strategies.recipes import RECIPES
from tests.chaos.case import FULL, Case
from tests.support import jobs

if TYPE_CHECKING:
    import random
    from collections.abc import Callable
    from pathlib import Path

    from streamlearn.config import Config

    Mutation = Callable[[Path, random.Random], None]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the configuration of a daemon that has ended, whose last two checkpoints are kept."""
    directory = tmp_path_factory.mktemp("daemon")
    strategy = {"generative": {"hidden": 16, "latent": 4}, "si": {}}
    over = {"checkpoint": {"every_batches": None, "keep": 2, "hourly": 0, "task_ends": 0}, "model": {"hidden": [16]}}
    config = jobs.write_config(directory, strategy=strategy, **over)
    jobs.publish_embedded(directory / "topics.sqlite", 100)
    jobs.run_to_end(config)
    return config


def any_file(directory: Path, chance: random.Random) -> Path:
    """Return one of the checkpoint's files."""
    return chance.choice(sorted(directory.iterdir()))


def flip(directory: Path, chance: random.Random) -> None:
    """Change one or two bits."""
    path = any_file(directory, chance)
    content = bytearray(path.read_bytes())
    for _ in range(chance.randint(1, 2)):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def truncate(directory: Path, chance: random.Random) -> None:
    """Cut a file, perhaps to nothing."""
    path = any_file(directory, chance)
    os.truncate(path, chance.choice([0, chance.randrange(path.stat().st_size)]))


def lengthen(directory: Path, chance: random.Random) -> None:
    """Add bytes to a file."""
    with any_file(directory, chance).open("ab") as file:
        file.write(chance.randbytes(chance.randint(1, 5000)))


def zero(directory: Path, chance: random.Random) -> None:
    """Fill a part of a file with zeros, as a file system does after a power cut."""
    path = any_file(directory, chance)
    content = path.read_bytes()
    start = chance.randrange(len(content))
    path.write_bytes(content[:start] + bytes(len(content) - start))


def swap(directory: Path, chance: random.Random) -> None:
    """Exchange two files."""
    one, other = chance.sample(sorted(directory.iterdir()), 2)
    beside = directory / "beside"
    one.rename(beside)
    other.rename(one)
    beside.rename(other)


def remove(directory: Path, chance: random.Random) -> None:
    """Remove a file."""
    any_file(directory, chance).unlink()


def older(directory: Path, chance: random.Random) -> None:
    """Put a file of the checkpoint before it in its place."""
    before = min(path for path in directory.parent.iterdir() if path != directory)
    path = any_file(directory, chance)
    if (before / path.name).is_file():
        shutil.copy(before / path.name, path)


def header(directory: Path, chance: random.Random) -> None:
    """Claim a safetensors header of any size, and have the manifest agree."""
    path = chance.choice(sorted(directory.glob("*.safetensors")))
    size = chance.choice([0, 1, 2**31, 2**63, 2**64 - 1, 100_000_001, chance.randrange(2**64)])
    content = size.to_bytes(8, "little") + path.read_bytes()[8:]
    path.write_bytes(content)
    forge(directory, path.name, content)


def link(directory: Path, chance: random.Random) -> None:
    """Replace a file by a link: to a secret, to nothing, to a device that never ends, or by something that is no file."""
    path = any_file(directory, chance)
    path.unlink()
    kind = chance.choice(["/etc/passwd", "/nowhere", "/dev/zero", ".", "pipe", "directory"])
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(kind)


def wreck(directory: Path, chance: random.Random) -> None:
    """Write nonsense into a JSON file, and have the manifest agree: hashes are no signature."""
    path = directory / chance.choice(["state.json", "offsets.json"])
    content = chance.choice([b"", b"[" * 100_000, b"\xff", b"[]", b"NaN", b"{}", b'{"groups": 1}', b'"x"'])
    path.write_bytes(content)
    forge(directory, path.name, content)


def edit(directory: Path, chance: random.Random) -> None:
    """Change something in the manifest."""
    path = directory / MANIFEST
    tree = json.loads(path.read_bytes())
    place, key = chance.choice(list(places(tree)))
    if chance.random() < 0.5:
        del place[key]
    else:
        place[key] = chance.choice([None, -1, 2**70, "x", "../../../etc/passwd", [], {}, 1.5, True])
    path.write_bytes(chance.choice([json.dumps(tree).encode(), json.dumps(tree).encode(), b"[" * 100_000]))


def forge(directory: Path, name: str, content: bytes) -> None:
    """Write size and hash of a file into the manifest, and the manifest's own hash."""
    path = directory / MANIFEST
    tree = json.loads(path.read_bytes())
    tree["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    tree["sha256"] = _digest(tree)
    path.write_text(json.dumps(tree))


def places(tree: Any) -> Any:
    """Yield every (container, key) of a JSON tree."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from places(tree[key])


MUTATIONS: list[Mutation] = [flip, truncate, lengthen, zero, swap, remove, older, header, link, wreck, edit]


def held(config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """Restore a job as a start does, and return what it then holds: tensors as bytes by file, and the rest of the state."""
    job = Job.make(config, Store(config.state_dir), Metrics())
    assert job.restore()
    tensors, rest, _ = state.pack({**job.learner.state_dict(), "probes": job.probes.state_dict()})
    flat = {f"{name}:{key}": t.numpy().tobytes() for name, content in tensors.items() for key, t in content.items()}
    tree = {"groups": rest, "progress": job.progress.to_json(), "matrix": job.matrix.state_dict()}
    flat["matrix"] = job.matrix.table()
    return flat, {**json.loads(json.dumps(tree)), "offsets": job.progress.positions.to_json()}


@pytest.mark.usefixtures("daemon_mode")
@pytest.mark.parametrize("number", [pytest.param(60, id="short"), pytest.param(1000, id="1000", marks=FULL)])
def test_mutations(case: Case, daemon: Path, tmp_path: Path, number: int) -> None:
    """A start on mutated files takes a state that was saved, bit for bit, or refuses with one line; it never crashes."""
    source = Store(daemon.parent / "state").root
    path = tmp_path / "job.yaml"
    path.write_text(daemon.read_text().replace(str(daemon.parent / "state"), str(tmp_path / "state")))
    config = configfile.load(path, RECIPES, {})
    root = tmp_path / "state" / "checkpoints"
    known: list[Any] = []
    for keep in (slice(0, 2), slice(0, 1)):  # the newest; the one before it
        fresh(source, root)
        for newer in sorted(root.iterdir())[keep.stop :]:
            shutil.rmtree(newer)
        known.append(held(config))
    assert known[0] != known[1]
    became = Counter[str]()
    for turn in range(number):
        fresh(source, root)
        one, other = sorted(root.iterdir())
        mutate = MUTATIONS[turn % len(MUTATIONS)]
        both = case.chance.random() < 0.2
        mutate(other, case.chance)
        if both:
            case.chance.choice(MUTATIONS)(one, case.chance)
        what = f"mutation {turn}, {mutate.__name__}, seed {case.seed}"
        try:
            found = held(config)
        except StreamlearnError:
            became["refused with one line"] += 1
        except Exception as error:
            raise AssertionError(f"{what}: {error!r}") from error
        else:
            assert found in known, f"{what}: a state that nobody saved"
            became["the newest, for its state is untouched" if found == known[0] else "the one before it"] += 1
    for what, least in (("the one before it", number // 3), ("refused with one line", 1)):
        case.sometimes(what, became.pop(what), least)
    for what, times in became.items():
        case.sometimes(what, times, 0)
    case.report("mutated checkpoint files", number)


def fresh(source: Path, root: Path) -> None:
    """Lay out both checkpoints as they were saved."""
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(source, root)
