"""Checkpoint files changed by attackers, bad disks and people: refused, or exactly the state that was saved."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from streamlearn import state
from streamlearn.checkpoint.manifest import MANIFEST, manifest_digest
from streamlearn.checkpoint.store import Store
from streamlearn.config import loader
from streamlearn.core.errors import StreamlearnError
from streamlearn.learning.strategies.recipes import RECIPES
from streamlearn.metrics import Metrics
from streamlearn.runtime.job import Job
from tests.support import jobs
from tests.support.chaos.case import FULL, Case

if TYPE_CHECKING:
    import random
    from collections.abc import Callable
    from pathlib import Path

    from streamlearn.config.root import Config

    Mutation = Callable[[Path, random.Random], None]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the configuration of a daemon that has ended, with its last two checkpoints."""
    directory = tmp_path_factory.mktemp("daemon")
    strategy = {"generative": {"hidden": 16, "latent": 4}, "si": {}}
    over = {"checkpoint": {"every_batches": None, "keep": 2, "hourly": 0, "task_ends": 0}, "model": {"hidden": [16]}}
    config = jobs.write_config(directory, strategy=strategy, **over)
    jobs.publish_embedded(directory / "topics.sqlite", 100)
    jobs.run_to_end(config)
    return config


def any_file(directory: Path, rng: random.Random) -> Path:
    """Return one of the checkpoint's files."""
    return rng.choice(sorted(directory.iterdir()))


def flip(directory: Path, rng: random.Random) -> None:
    """Change one or two bits."""
    path = any_file(directory, rng)
    content = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 2)):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def truncate(directory: Path, rng: random.Random) -> None:
    """Truncate a file, perhaps to zero bytes."""
    path = any_file(directory, rng)
    os.truncate(path, rng.choice([0, rng.randrange(path.stat().st_size)]))


def lengthen(directory: Path, rng: random.Random) -> None:
    """Add bytes to a file."""
    with any_file(directory, rng).open("ab") as file:
        file.write(rng.randbytes(rng.randint(1, 5000)))


def zero(directory: Path, rng: random.Random) -> None:
    """Fill a part of a file with zeros, as a file system does after a power cut."""
    path = any_file(directory, rng)
    content = path.read_bytes()
    start = rng.randrange(len(content))
    path.write_bytes(content[:start] + bytes(len(content) - start))


def swap(directory: Path, rng: random.Random) -> None:
    """Swap two files."""
    one, other = rng.sample(sorted(directory.iterdir()), 2)
    beside = directory / "beside"
    one.rename(beside)
    other.rename(one)
    beside.rename(other)


def remove(directory: Path, rng: random.Random) -> None:
    """Remove a file."""
    any_file(directory, rng).unlink()


def replace_by_previous(directory: Path, rng: random.Random) -> None:
    """Replace a file by that of the previous checkpoint."""
    before = min(path for path in directory.parent.iterdir() if path != directory)
    path = any_file(directory, rng)
    if (before / path.name).is_file():
        shutil.copy(before / path.name, path)


def forge_header(directory: Path, rng: random.Random) -> None:
    """Write any size into a safetensors header, and update the manifest."""
    path = rng.choice(sorted(directory.glob("*.safetensors")))
    size = rng.choice([0, 1, 2**31, 2**63, 2**64 - 1, 100_000_001, rng.randrange(2**64)])
    content = size.to_bytes(8, "little") + path.read_bytes()[8:]
    path.write_bytes(content)
    update_manifest(directory, path.name, content)


def replace_by_link(directory: Path, rng: random.Random) -> None:
    """Replace a file by a link (to a secret, a missing file, an endless device), a pipe or a directory."""
    path = any_file(directory, rng)
    path.unlink()
    kind = rng.choice(["/etc/passwd", "/nowhere", "/dev/zero", ".", "pipe", "directory"])
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(kind)


def corrupt_json(directory: Path, rng: random.Random) -> None:
    """Write nonsense into a JSON file, and update the manifest: hashes are not signatures."""
    path = directory / rng.choice(["state.json", "offsets.json"])
    content = rng.choice([b"", b"[" * 100_000, b"\xff", b"[]", b"NaN", b"{}", b'{"groups": 1}', b'"x"'])
    path.write_bytes(content)
    update_manifest(directory, path.name, content)


def edit_manifest(directory: Path, rng: random.Random) -> None:
    """Change or remove one value of the manifest."""
    path = directory / MANIFEST
    tree = json.loads(path.read_bytes())
    place, key = rng.choice(list(containers(tree)))
    if rng.random() < 0.5:
        del place[key]
    else:
        place[key] = rng.choice([None, -1, 2**70, "x", "../../../etc/passwd", [], {}, 1.5, True])
    path.write_bytes(rng.choice([json.dumps(tree).encode(), json.dumps(tree).encode(), b"[" * 100_000]))


def update_manifest(directory: Path, name: str, content: bytes) -> None:
    """Write a file's size and hash into the manifest, and update the manifest's own hash."""
    path = directory / MANIFEST
    tree = json.loads(path.read_bytes())
    tree["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    tree["sha256"] = manifest_digest(tree)
    path.write_text(json.dumps(tree))


def containers(tree: Any) -> Any:
    """Yield every (container, key) of a JSON tree."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from containers(tree[key])


MUTATIONS: list[Mutation] = [
    flip,
    truncate,
    lengthen,
    zero,
    swap,
    remove,
    replace_by_previous,
    forge_header,
    replace_by_link,
    corrupt_json,
    edit_manifest,
]


def restored_state(config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """Restore a job as a start does, and return its state: tensors as bytes by file, and everything else."""
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
    """A start on mutated files restores a saved state, bit for bit, or refuses with one line; it never crashes."""
    source = Store(daemon.parent / "state").root
    path = tmp_path / "job.yaml"
    path.write_text(daemon.read_text().replace(str(daemon.parent / "state"), str(tmp_path / "state")))
    config = loader.load(path, RECIPES, {})
    root = tmp_path / "state" / "checkpoints"
    known: list[Any] = []
    for keep in (slice(0, 2), slice(0, 1)):  # the newest; the previous one
        copy_checkpoints(source, root)
        for newer in sorted(root.iterdir())[keep.stop :]:
            shutil.rmtree(newer)
        known.append(restored_state(config))
    assert known[0] != known[1]
    outcomes = Counter[str]()
    for turn in range(number):
        copy_checkpoints(source, root)
        one, other = sorted(root.iterdir())
        mutate = MUTATIONS[turn % len(MUTATIONS)]
        both = case.rng.random() < 0.2
        mutate(other, case.rng)
        if both:
            case.rng.choice(MUTATIONS)(one, case.rng)
        what = f"mutation {turn}, {mutate.__name__}, seed {case.seed}"
        try:
            found = restored_state(config)
        except StreamlearnError:
            outcomes["refused with a one-line error"] += 1
        except Exception as error:
            raise AssertionError(f"{what}: {error!r}") from error
        else:
            assert found in known, f"{what}: a state that was never saved"
            outcomes[
                "the newest was used, because its state was unchanged"
                if found == known[0]
                else "the previous checkpoint was used"
            ] += 1
    for what, least in (("the previous checkpoint was used", number // 3), ("refused with a one-line error", 1)):
        case.assert_happened(what, outcomes.pop(what), least)
    for what, times in outcomes.items():
        case.assert_happened(what, times, 0)
    case.record("mutated checkpoint files", number)


def copy_checkpoints(source: Path, root: Path) -> None:
    """Copy both checkpoints as they were saved."""
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(source, root)
