"""One hash for each thing that a job has learned, so that a change of form can prove that no number has changed.

`python -m benchmarks.hashes` prints the hashes of this tree. `python -m benchmarks.hashes --against COMMIT` runs that
commit beside it, on the same machine, and compares. Only the public interface is used (command line, configuration and
checkpoint files), so that the same script runs both.

Each case learns two tasks, stops, goes on from its checkpoint, and learns a third. With `--against` this tree also goes
on from the checkpoint that the other commit has written: old checkpoints must still be read, and lead to the same end.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import runpy
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from safetensors.numpy import load_file
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("STREAMLEARN_DATA", ROOT.parent / "shared" / "data"))
SIZE, PER_TASK, PROBE, BATCH = 12, 44, 15, 8  # of the small cases; 44 samples leave a short batch at a task's end
WORDS = ["the", "kitchen", "garden", "apple", "mary", "john", "went", "took", "where", "is"]
GROUPS = {  # the files of a checkpoint, by how their names begin
    "weights": ("model", "live", "encoder", "learner", "network", "transfer"),
    "optimizer": ("optimizer",),
    "memories": ("reservoir", "replay.slots", "constraint"),
    "generator": ("replay",),
    "importances": ("penalty",),
    "matrix": ("matrix", "probes"),
}


# -- the cases


def cases() -> dict[str, dict[str, Any]]:
    """Return every case's configuration by its name."""
    from benchmarks.choices import CHOICES, NEEDS, TASKS, identify

    found = {}
    for chosen in CHOICES:
        tree: dict[str, Any] = {"strategy": chosen}
        for name in chosen:
            tree = {**tree, **NEEDS.get(name, {})}
        found[identify(chosen)] = small(tree)
    default: dict[str, Any] = {"generative": {}, "si": {}}
    both: dict[str, Any] = {
        "class, active all": {"scenario": {"kind": "class", "active": "all"}},
        "task": {"scenario": {"kind": "task", "tasks": TASKS}},
        "task, er": {"scenario": {"kind": "task", "tasks": TASKS}, "strategy": {"er": {}}},
        "grown head": {"classes": 2, "grow_head": True, "strategy": {"er": {}, "ewc": {}}},
        "images": {
            "input": {"shape": [4, 3]},
            "learner": {"updates_per_batch": 3, "augment": {"shift": 1, "rotate": 20, "zoom": 0.1}},
        },
        "resnet": {"input": {"shape": [1, 4, 3]}, "model": {"name": "resnet", "width": 4}, "strategy": {"er": {}}},
        "two partitions": {"stream": {"batch_size": BATCH, "merge": "fixed"}, "strategy": {"derpp": {}}},
        "sgd": {"learner": {"optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.001}}},
        "encoder": {
            "input": {"shape": [SIZE], "encoder": {"name": "hashes:encoder"}},
            "strategy": {"generative": {"likelihood": "gaussian"}, "si": {}},
        },
        "own model": {"model": {"name": "hashes:own_model"}, "strategy": {"er": {}, "ewc": {}}},
        "text": {
            "input": {"kind": "text", "sentences": 4, "words": 6, "vocabulary": 30},
            "model": {"name": "memnet", "embedding": 8, "hops": 2, "heads": 2},
            "strategy": {"er": {}},
        },
    }
    found |= {name: small({"strategy": default, **tree}) for name, tree in both.items()}
    found["default on digits"] = {
        "input": {"shape": [8, 8], "dtype": "uint8", "scale": 16},
        "classes": 10,
        "holdout": {"fraction": 0},
        "learner": {"updates_per_batch": 20},
        "probes": {"every": 5},
        "stream": {"batch_size": 10},
    }
    if (DATA / "mnist.npz").exists():
        found["default on MNIST"] = {
            "input": {"shape": [28, 28], "dtype": "uint8", "scale": 255},
            "classes": 10,
            "holdout": {"fraction": 0},
        }
    else:
        print(f"left out: default on MNIST, for {DATA / 'mnist.npz'} is missing", file=sys.stderr)
    return found


def small(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of a small case."""
    base: dict[str, Any] = {
        "input": {"shape": [SIZE]},
        "classes": 6,
        "holdout": {"fraction": 0.1},
        "stream": {"batch_size": BATCH},
        "model": {"hidden": [16]},
        "learner": {"updates_per_batch": 3},
        "probes": {"every": 2},
    }
    return {**base, **tree}


def complete(name: str, tree: dict[str, Any]) -> dict[str, Any]:
    """Return the whole configuration: paths are relative, so that a state can be copied and go on elsewhere."""
    return {
        "name": "hashes",
        "state_dir": "state",
        "embedded": {"path": "topics.sqlite"},
        "device": "cpu",
        "seed": 3,
        "service": {"port": 0},
        **tree,
        "probes": {**tree.get("probes", {}), "every_seconds": None},
        "stream": {**tree.get("stream", {}), "pattern": "[abc]", "on_finished": "exit"},
        **({} if "MNIST" not in name and "digits" not in name else {"model": {"hidden": [100, 100]}}),
    }


def encoder(input_shape: Sequence[int]) -> nn.Module:
    """Return an encoder of random features, which are always the same."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(math.prod(input_shape), 7), nn.Tanh())


def own_model(input_shape: Sequence[int], num_outputs: int) -> nn.Module:
    """Return a model as users write them, with statistics of batches and dropout."""
    size = math.prod(input_shape)
    return nn.Sequential(
        nn.Linear(size, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, num_outputs)
    )


# -- one run, by the command line alone


def command(*arguments: str) -> None:
    """Run the command line in this process, which saves the start of an interpreter; raises where it fails."""
    sys.argv = ["streamlearn", *arguments]
    try:
        runpy.run_module("streamlearn", run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"streamlearn {' '.join(arguments)}: exit code {end.code}") from end


def publish(name: str, tree: dict[str, Any], task: int) -> None:
    """Publish one of the three tasks to its topic."""
    topic, how = "abc"[task], ["--config", "job.yaml", "--no-shuffle", "--topic", "abc"[task]]
    if "digits" in name or "MNIST" in name:
        source = "digits" if "digits" in name else str(DATA / "mnist.npz")
        command("produce", source, *how, "--groups", f"{2 * task},{2 * task + 1}", "--probe", "test", "--limit", "300")
        return
    if tree["input"].get("kind") == "text":
        for part, count in (("train", PER_TASK), ("probe", PROBE)):
            Path(f"{topic}-{part}.jsonl").write_text("".join(f"{line}\n" for line in stories(task, part, count)))
        command("produce", f"{topic}-train.jsonl", *how, "--probe", f"{topic}-probe.jsonl")
        return
    shape = tree["input"]["shape"]
    for part, count in (("train", PER_TASK), ("probe", PROBE)):
        rng = np.random.default_rng([task, part == "probe"])
        y = rng.integers(0, 2, count)
        x = rng.random((count, SIZE)).astype(np.float32) * 0.3
        x[np.arange(count), 2 * task + y] += 0.7
        np.savez(f"{topic}-{part}.npz", x=x.reshape(-1, *shape), y=2 * task + y)
    partitions = "2" if tree["stream"].get("merge") == "fixed" else "1"
    how += ["--batch", "5", "--partitions", partitions]
    command("produce", f"{topic}-train.npz", *how, "--probe", f"{topic}-probe.npz")


def stories(task: int, part: str, count: int) -> list[str]:
    """Return samples of text as JSON lines."""
    rng = np.random.default_rng([task, part == "probe"])
    lines = []
    for _ in range(count):
        chosen = [" ".join(rng.choice(WORDS, 4)) for _ in range(3)]
        answer = 2 * task + int(chosen[0].split()[0] < "k")
        question = f"where is {chosen[1].split()[0]}"
        lines.append(json.dumps({"story": chosen, "question": question, "answer": f"answer {answer}"}))
    return lines


def learn(directory: Path, name: str, tree: dict[str, Any], *, resumed: Path | None = None) -> dict[str, str]:
    """Learn two tasks and then the third, or the third alone from a state that another run has left; return the hashes."""
    directory.mkdir(parents=True)
    os.chdir(directory)
    Path("job.yaml").write_text(yaml.safe_dump(complete(name, tree), sort_keys=False))
    if resumed is None:
        for task in range(2):
            publish(name, tree, task)
        command("run", "job.yaml", "--quiet")
        Path("first").mkdir(mode=0o700)
        shutil.copytree("state", "first/state")
        shutil.copy("topics.sqlite", "first")
    else:
        shutil.copytree(resumed / "first" / "state", "state")
        shutil.copy(resumed / "first" / "topics.sqlite", ".")
    publish(name, tree, 2)
    command("run", "job.yaml", "--quiet")
    newest = max(Path("state", "checkpoints").glob("ckpt-*"), key=lambda path: path.name)
    return hashed(newest)


def hashed(checkpoint: Path) -> dict[str, str]:
    """Return a hash for each group of a checkpoint's files: of tensors by content, whatever their names."""
    contents: dict[str, list[str]] = {group: [] for group in [*GROUPS, "positions", "figures"]}
    for path in sorted(checkpoint.glob("*.safetensors")):
        # the longest beginning that fits: `replay.slots` before `replay`
        fitting = [
            (len(start), group) for group, starts in GROUPS.items() for start in starts if path.name.startswith(start)
        ]
        group = max(fitting)[1] if fitting else "weights"
        for value in load_file(path).values():
            digest = hashlib.sha256(f"{value.dtype}{value.shape}".encode() + value.tobytes())
            contents[group].append(digest.hexdigest())
    status = json.loads((checkpoint / "status.json").read_text())
    contents["positions"] = [json.dumps(status["positions"], sort_keys=True)]
    shown = ["step", "batches", "samples", "labels", "matrix", "average_accuracy", "average_forgetting"]
    contents["figures"] = [json.dumps({key: status.get(key) for key in shown}, sort_keys=True)]
    return {
        group: hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest()[:12] if parts else "-"
        for group, parts in contents.items()
    }


def work(directory: Path, resume: Path | None) -> None:
    """Run the cases that stand in a directory's `cases.json`, and write their hashes beside it."""
    results: dict[str, Any] = {}
    sys.path.append(str(Path(__file__).parent))  # `hashes:encoder` is found there
    for number, (name, tree) in enumerate(json.loads((directory / "cases.json").read_text()).items()):
        try:
            results[name] = learn(directory / str(number), name, tree)
            if resume is not None:
                results[f"{name} (from the other's checkpoint)"] = learn(
                    directory / f"{number}-resumed", name, tree, resumed=resume / str(number)
                )
        except (Exception, SystemExit) as error:  # noqa: BLE001 - one case that fails hides no other
            results[name] = {"error": str(error)}
        (directory / "hashes.json").write_text(json.dumps(results))


# -- the comparison


def run(tree: Path, directory: Path, chosen: dict[str, Any], resume: Path | None = None) -> dict[str, dict[str, str]]:
    """Run cases with the program of a source tree, in a process of its own; return their hashes."""
    directory.mkdir(parents=True)
    (directory / "cases.json").write_text(json.dumps(chosen))
    arguments = [str(directory)] if resume is None else [str(directory), str(resume)]
    environment = {**os.environ, "PYTHONPATH": str(tree), "STREAMLEARN_DATA": str(DATA)}
    with (directory / "log").open("w") as log:
        subprocess.run(
            [sys.executable, "-P", str(Path(__file__).resolve()), "--work", *arguments],
            cwd=directory, env=environment, stdout=log, stderr=log, check=True,
        )  # fmt: skip
    hashes: dict[str, dict[str, str]] = json.loads((directory / "hashes.json").read_text())
    return hashes


def check_out(commit: str, directory: Path) -> Path:
    """Write a commit's files to a directory."""
    archive = directory / "tree.tar"
    subprocess.run(["git", "-C", str(ROOT), "archive", "-o", str(archive), commit], check=True)
    with tarfile.open(archive) as packed:
        packed.extractall(directory / "tree", filter="data")
    return directory / "tree"


def main() -> None:
    """Print a line for each case; exit with 1 where two runs differ or a case has failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="COMMIT", help="compare with this commit")
    parser.add_argument("--only", default="", help="cases whose names contain this")
    parser.add_argument("--keep", type=Path, help="keep the runs' files in this directory, which must not exist")
    parser.add_argument("--work", nargs="+", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(given.work[0], given.work[1] if len(given.work) > 1 else None)
        return
    chosen = {name: tree for name, tree in cases().items() if given.only in name}
    if not chosen:
        sys.exit(f"no case contains {given.only!r}; there are: {', '.join(cases())}")
    with tempfile.TemporaryDirectory() as temporary:
        place = given.keep or Path(temporary)
        other: dict[str, dict[str, str]] = {}
        if given.against:
            place.mkdir(exist_ok=True, parents=True)
            other = run(check_out(given.against, place), place / "other", chosen)
        hashes = run(ROOT, place / "this", chosen, place / "other" if given.against else None)
    failed = sum(compared(name, found, other.get(name.split(" (from")[0])) for name, found in hashes.items())
    if given.against:
        print(f"{len(hashes) - failed} of {len(hashes)} equal to {given.against}")
    sys.exit(1 if failed else 0)


def compared(name: str, found: dict[str, str], expected: dict[str, str] | None) -> bool:
    """Print a case's hashes, and return whether it has failed or differs from the other commit."""
    differing = [] if expected is None else sorted(key for key in found if found[key] != expected.get(key))
    state = (
        "FAILED  "
        if "error" in found
        else ""
        if expected is None
        else f"DIFFERS in {', '.join(differing)}  "
        if differing
        else "equal  "
    )
    print(f"{name:62}{state}", *(f"{key} {value}" for key, value in found.items()), flush=True)
    return bool(differing) or "error" in found


if __name__ == "__main__":
    main()
