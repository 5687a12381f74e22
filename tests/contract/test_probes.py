"""Held-out samples never change what is learned."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import re
from typing import TYPE_CHECKING, Any

import pytest
import torch

from benchmarks.common import merged
from streamlearn import state
from streamlearn.checkpoint.store import Store
from streamlearn.config.root import Config
from streamlearn.core.progress import Progress
from streamlearn.core.tasks import Task
from streamlearn.learning.strategies.recipes import RECIPES
from streamlearn.metrics import Metrics
from streamlearn.runtime import loop
from streamlearn.runtime.job import Job
from streamlearn.stream.assembler import Assembler, AssemblerSettings
from streamlearn.stream.codecs.registry import CODECS
from streamlearn.stream.deadletter import DeadLetterWriter
from streamlearn.stream.decoder import RecordDecoder
from streamlearn.stream.holdout import HoldOut
from streamlearn.stream.logs.base import CONTENT_TYPE, CONTROL_HEADER, PROBE, TASK_END, USE_HEADER
from streamlearn.stream.logs.memory import MemoryStore

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from streamlearn.core.deliveries import Delivery
    from streamlearn.core.positions import Positions

pytestmark = pytest.mark.usefixtures("daemon_mode")

TYPED = ((CONTENT_TYPE, CODECS["json"].content_type),)
LABELS = {"a": ["p", "q"], "b": ["r", "s"], "c": ["t", "p"]}
ALL = ["p", "q", "r", "s", "t", "never"]
Sample = tuple[Any, str]
Probes = dict[str, list[Sample]]  # by topic


class Direct:
    """Replaces the reader for the loop, without a thread."""

    def flush_dead_letters(self) -> None:
        """Do nothing: there are no dead letters to write."""

    def commit_positions(self, positions: Positions) -> None:
        """Do nothing: no log wants the positions."""


class NoCommands:
    """A control for the loop that gives no commands."""

    stopping = False
    paused = False

    def serve(self, *_: object, idle: bool) -> None:
        """Do nothing: there are no commands."""

    def wait(self, seconds: float) -> None:
        """Return at once."""


def learn(directory: Path, store: MemoryStore, **over: Any) -> Job:
    """Return a job that has learned all tasks."""
    tree: dict[str, Any] = {
        "state_dir": str(directory),
        "device": "cpu",
        "input": {"shape": [len(ALL)]},
        "classes": len(ALL),
        "holdout": {"fraction": 0.0},
        "stream": {"topics": list(LABELS), "batch_size": 8, "on_finished": "exit"},
        "model": {"hidden": [8]},
        "learner": {"updates_per_batch": 2},
        "probes": {"every": 1, "minimum": 1},
        "checkpoint": {"every_seconds": None},
    }
    complete = merged(tree, over) | {key: over[key] for key in ("input", "model") if key in over}
    config = Config.model_validate(complete, context={"recipes": RECIPES})
    job = Job.make(config, Store(directory), Metrics())
    dead = DeadLetterWriter(store, "dlq")
    holdout = HoldOut(config.holdout.by, config.holdout.fraction)
    rules = AssemblerSettings(
        RecordDecoder.from_config(config.input, config.stream), holdout, job.scenario, dead, config.stream.batch_size
    )
    assembler, stream = Assembler(rules, Progress()), Direct()
    for number, topic in enumerate(LABELS):
        declared = list(job.scenario.declared[topic]) if job.scenario.kind == "domain" else []
        apply(job, stream, assembler.begin_task(Task(number, topic, labels=declared)))
        assembler.set_partitions(topic, None, (0,))
        for each in store.records[topic, 0]:
            for delivery in assembler.feed(each):
                apply(job, stream, delivery)
    job.checkpointer.wait(stream)  # type: ignore[arg-type]  # has all methods that are called
    return job


def apply(job: Job, stream: Direct, delivery: Delivery) -> None:
    """Run one turn of the loop, and the refinement that it may start."""
    loop.turn(job, stream, delivery)  # type: ignore[arg-type]  # has all methods that are called
    loop.refine_task(job, stream, NoCommands())  # type: ignore[arg-type]


def record(sample: Sample) -> bytes:
    """Return a sample as JSON."""
    x, y = sample
    return json.dumps({"x": x, "y": y} if isinstance(x, list) else {**x, "answer": y}).encode()


def published(samples: Mapping[str, Sequence[Sample]], probes: Probes) -> MemoryStore:
    """Return a log with these samples; probe records come before and between them."""
    store = MemoryStore()
    for topic, some in samples.items():
        store.create_topic(topic, 1)
        held = list(probes.get(topic, []))
        before, between = held[: len(held) // 2], held[len(held) // 2 :]
        for sample in before:
            store.append(topic, 0, record(sample), headers=(*TYPED, (USE_HEADER, PROBE)))
        for place, sample in enumerate(some):
            store.append(topic, 0, record(sample), headers=TYPED)
            if place < len(between):
                store.append(topic, 0, record(between[place]), headers=(*TYPED, (USE_HEADER, PROBE)))
        store.append(topic, 0, TASK_END, headers=((CONTROL_HEADER, TASK_END),))
    return store


def digest(job: Job) -> str:
    """Return a hash of the learner's whole state, and of its labels and words."""
    files, rest, _ = state.pack(job.learner.state_dict())
    names = [job.progress.labels, [task.labels for task in job.progress.tasks], job.progress.vocabulary]
    found = hashlib.sha256(json.dumps([rest, names, job.learner.active_outputs.tolist()], sort_keys=True).encode())
    for name, content in sorted(files.items()):
        for key, tensor in sorted(content.items()):
            found.update(f"{name}:{key}".encode() + tensor.cpu().numpy().tobytes())
    return found.hexdigest()


def numbers(labels: Sequence[str], count: int, seed: int) -> list[Sample]:
    """Return samples; the index of the largest value is the label's."""
    rng = random.Random(seed)
    drawn = [rng.choice(labels) for _ in range(count)]
    return [([0.3 * rng.random() + (place == ALL.index(y)) for place in range(len(ALL))], y) for y in drawn]


def tasks(scenario: str) -> dict[str, list[str]]:
    """Return the labels of each task; all tasks of a domain scenario have the same."""
    return {topic: ["p", "q"] for topic in LABELS} if scenario == "domain" else LABELS


CHOICES: dict[str, dict[str, Any]] = {
    "class-count": {"scenario": "class", "classes": len(ALL)},
    "class-list": {"scenario": "class", "classes": ALL},
    "class-all": {"scenario": {"kind": "class", "active": "all"}, "classes": len(ALL)},
    "class-grow": {"scenario": "class", "classes": 2, "grow_head": True},
    "task-count": {"scenario": "task", "classes": len(ALL)},
    "task-list": {"scenario": "task", "classes": ALL},
    "domain": {"scenario": {"kind": "domain", "tasks": {topic: ["p", "q"] for topic in LABELS}}, "classes": ALL},
}
STRATEGIES: dict[str, Any] = {
    "naive": "naive",
    "default": {"generative": {"hidden": 8, "latent": 4}, "si": {}},
    "er+gem": {"er": {"selection": "balanced"}, "gem": {"memory": 5}},
    "derpp+ewc": {"derpp": {}, "ewc": {}},
    "lwf": "lwf",
    "packnet": "packnet",
    "pnn": "pnn",
}
ANY = list(CHOICES)
PAIRS = [
    *((choice, strategy) for choice in ANY for strategy in ("naive", "default")),
    *((choice, "er+gem") for choice in ("class-count", "task-list")),
    *((choice, "derpp+ewc") for choice in ("class-grow", "task-count", "domain")),
    *((choice, "lwf") for choice in ("class-list", "task-count")),
    *((choice, strategy) for choice in ("task-count", "task-list") for strategy in ("packnet", "pnn")),
]
SGD = {"optimizer": {"name": "sgd", "lr": 0.1}}


@pytest.mark.parametrize(("choice", "strategy"), PAIRS)
def test_probes_do_not_change_what_is_learned(tmp_path: Path, choice: str, strategy: str) -> None:
    """The same training samples give the same bits without probes, and with probes of known, all, or untrained labels."""
    own = tasks(choice)
    samples = {topic: numbers(labels, 24, seed) for seed, (topic, labels) in enumerate(own.items())}
    any_label = own["a"] if choice == "domain" else ALL
    probes: dict[str, Probes] = {
        "none": {},
        "own": {topic: numbers(labels, 10, 9 + seed) for seed, (topic, labels) in enumerate(own.items())},
        "all": {topic: numbers(any_label, 30, 19 + seed) for seed, topic in enumerate(own)},
        "never": {topic: numbers(any_label[-1:], 5, 29) for topic in own},
    }
    over = {**CHOICES[choice], "strategy": STRATEGIES[strategy], **({"learner": SGD} if "gem" in strategy else {})}
    ended = {name: learn(tmp_path / name, published(samples, held), **over) for name, held in probes.items()}
    assert len({digest(job) for job in ended.values()}) == 1
    assert {job.progress.totals()["rejected"] for job in ended.values()} == {0}
    if choice != "domain":
        assert ended["never"].matrix.latest_accuracy == dict.fromkeys(range(3), 0.0), (
            "what was never trained is a wrong answer"
        )
        assert ended["never"].matrix.latest_loss == {}


def test_the_log_has_accuracies_with_four_digits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The end of a task is one log line; forgetting is not defined before the second task."""
    caplog.set_level("INFO", "streamlearn.runtime.loop")
    samples = {topic: numbers(labels, 24, seed) for seed, (topic, labels) in enumerate(LABELS.items())}
    learn(tmp_path, published(samples, {topic: numbers(LABELS[topic], 7, 9) for topic in LABELS}), strategy="naive")
    lines = [message for message in caplog.messages if message.startswith("accuracy")]
    assert len(lines) == 3
    assert re.fullmatch(r"accuracy [01]\.\d{4}, forgetting -", lines[0])
    assert all(re.fullmatch(r"accuracy [01]\.\d{4}, forgetting -?[01]\.\d{4}", line) for line in lines[1:])


@pytest.mark.parametrize("choice", ["class-count", "task-count"])
def test_samples_held_out_by_hash_do_not_change_what_is_learned(tmp_path: Path, choice: str) -> None:
    """A sample held out by its hash registers no label, as if it were not in the log."""
    samples = {topic: numbers(labels, 40, seed) for seed, (topic, labels) in enumerate(LABELS.items())}
    samples["b"].insert(
        0, next(s for s in numbers(["never"], 99, 5) if HoldOut("value", 0.3).is_held_out(*hashed(s), None))
    )
    over = {**CHOICES[choice], "holdout": {"fraction": 0.3}, "strategy": {"er": {}, "si": {}}}
    kept = {
        topic: [s for s in some if not HoldOut("value", 0.3).is_held_out(*hashed(s), None)]
        for topic, some in samples.items()
    }
    whole, rest = (
        learn(tmp_path / "a", published(samples, {}), **over),
        learn(tmp_path / "b", published(kept, {}), **over),
    )
    assert whole.progress.totals()["held_out"] > 20
    assert rest.progress.totals()["held_out"] == 0
    assert digest(whole) == digest(rest)
    assert "never" in whole.progress.probe_labels


def hashed(sample: Sample) -> tuple[Any, str]:
    """Return the input of the hash."""
    return torch.tensor(sample[0], dtype=torch.float32).numpy(), sample[1]


def test_a_label_counts_as_wrong_until_training_sees_it(tmp_path: Path) -> None:
    """The accuracy on a sealed probe with labels of a later task rises when that task is learned."""
    samples = {topic: numbers(labels, 160, seed) for seed, (topic, labels) in enumerate(LABELS.items())}
    held: Probes = {"a": numbers(["p", "q"], 20, 9) + numbers(["r", "s"], 20, 10)}
    random.Random(0).shuffle(held["a"])
    job = learn(
        tmp_path, published(samples, held), strategy={"er": {}}, learner={"updates_per_batch": 20, "average": None}
    )
    assert job.matrix.row(0)[0] <= 0.5
    assert job.matrix.row(1)[0] > 0.9
    assert {"r", "s"} <= set(job.progress.probe_labels)
    probe = job.probes.samples(0)
    assert probe is not None
    assert int(probe[1].min()) >= 0


def test_the_words_of_a_probe_get_no_ids(tmp_path: Path) -> None:
    """Words of a probe are unknown until training sees them; only training adds words to the vocabulary."""

    def stories(words: Sequence[str], answers: Sequence[str], seed: int) -> list[Sample]:
        rng = random.Random(seed)
        drawn = [(rng.choice(words), rng.choice(answers)) for _ in range(16)]
        return [
            ({"story": [f"{word} went {answer}"], "question": f"where is {word}"}, answer) for word, answer in drawn
        ]

    text = {"kind": "text", "sentences": 2, "words": 4, "vocabulary": 30}
    over: dict[str, Any] = {"input": text, "model": {"name": "memnet", "embedding": 8, "heads": 2}, "strategy": "er"}
    samples = {topic: stories([f"w{topic}", f"v{topic}"], labels, 1) for topic, labels in LABELS.items()}
    other = {topic: stories(["strange", "wa", "wb", "vc"], ALL, 2) for topic in LABELS}
    one, two = (learn(tmp_path / name, published(samples, held), **over) for name, held in (("a", {}), ("b", other)))
    assert digest(one) == digest(two)
    assert "strange" in two.progress.probe_words
    assert "strange" not in two.progress.vocabulary
    probe = two.probes.samples(0)
    assert probe is not None
    ids = {word: place + 2 for place, word in enumerate(two.progress.vocabulary)}
    assert {ids["wb"], ids["vc"], 1} <= set(probe[0].flatten().tolist()) <= {0, 1, *ids.values()}


def test_probes_are_restored_after_a_restart(tmp_path: Path) -> None:
    """Labels and words that only probes contain are part of the state, and keep their numbers."""
    samples = {topic: numbers(labels, 24, seed) for seed, (topic, labels) in enumerate(LABELS.items())}
    held: Probes = {topic: numbers(ALL, 30, 19) for topic in LABELS}
    job = learn(tmp_path, published(samples, held), strategy="naive")
    again = Job.make(job.config, Store(tmp_path), Metrics())
    assert again.restore()
    assert again.progress.probe_labels == job.progress.probe_labels
    assert again.progress.probe_labels
    for task in range(3):
        one, two = job.probes.samples(task), again.probes.samples(task)
        assert one is not None
        assert two is not None
        assert torch.equal(one[1], two[1])
    before = copy.deepcopy(again.matrix.latest_accuracy)
    again.evaluate()
    assert again.matrix.latest_accuracy == before


def test_a_task_that_trained_or_measured_nothing_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One warning each: no sample trained, no probe, a class missing in the probe, a class only in the probe."""
    samples = {"a": numbers(["p", "q"], 24, 0), "b": [], "c": numbers(["t"], 24, 2)}
    held: Probes = {"a": numbers(["p"], 9, 3) + numbers(["never"], 2, 3), "b": numbers(["r"], 9, 4)}
    with caplog.at_level("WARNING"):
        learn(tmp_path, published(samples, held), strategy="naive")
    logged = [record.message for record in caplog.records if record.message.startswith("task ")]
    begin = [
        "task a: the probe has no sample of 1 trained classes ('q')",
        "task a: 2 of 11 samples of the probe have a class that the task did not train",
        "task b: no sample was trained: 4 samples consumed, 4 held out, 0 rejected, 0 skipped",
        "task c: the task has no probe: 24 samples were trained and none was held out",
    ]
    assert len(logged) == len(begin)
    assert all(line.startswith(start) for line, start in zip(logged, begin, strict=True)), logged
