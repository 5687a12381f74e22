"""The job: its status, its checkpoints, its evaluations and its rollbacks."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from streamlearn.checkpoint.store import Store
from streamlearn.cli.status import format_summary, read_status
from streamlearn.core.deliveries import Delivery
from streamlearn.core.errors import InputOutputError, StreamlearnError
from streamlearn.core.positions import Position, Positions
from streamlearn.core.progress import Progress
from streamlearn.core.samples import Batch, HeldOut
from streamlearn.core.states import DaemonState, SaveTrigger
from streamlearn.core.tasks import Task, TaskState
from streamlearn.evaluation.matrix import AccuracyMatrix
from streamlearn.learning.stats import LearnStats
from streamlearn.metrics import Metrics
from streamlearn.runtime import loop
from streamlearn.runtime.config import DivergenceConfig
from streamlearn.runtime.control_desk import ControlDesk, Request
from streamlearn.runtime.daemon import learn
from streamlearn.runtime.divergence import Diverged
from streamlearn.runtime.job import MIN_REPLAY_AGREEMENT, Job
from streamlearn.runtime.snapshot import take_snapshot
from streamlearn.runtime.status import status_of
from streamlearn.stream.assembler import Assembler, AssemblerSettings
from streamlearn.stream.deadletter import DeadLetterWriter
from streamlearn.stream.decoder import RecordDecoder
from streamlearn.stream.holdout import HoldOut
from streamlearn.stream.logs.memory import MemoryReader, MemoryStore
from streamlearn.stream.reader import StreamReader
from tests.support.counting import work
from tests.support.in_process import BlockedStore, made

if TYPE_CHECKING:
    from streamlearn.checkpoint.manifest import Checkpoint


def test_lag_is_unknown_without_a_broker(tmp_path: Path) -> None:
    """Unknown is not 0: the status has null, and the plain output a dash, until the reader is connected."""
    job, stream = made(tmp_path)
    stream.status.waiting_for = "a"
    for away in (None, stream):
        status = status_of(job, away, DaemonState.RUNNING)
        assert status["lag"] is None
        assert "lag -" in format_summary(status)
    assert "lag -; waiting for topic a" in format_summary(status)
    stream.status.connected = True
    stream.status.end_offsets = {("a", 0): 10}
    status = status_of(job, stream, DaemonState.RUNNING)
    assert status["lag"] == {"a": {"0": 7}}
    assert status["topics"] == {}
    job.progress.counts_by_topic["a"] = Counter(consumed=3, trained=2, rejected=1)
    line = "a: 3 samples = 2 trained + 0 held out + 0 late + 1 rejected + 0 duplicates + 0 skipped + 0 queued"
    assert line in format_summary(status_of(job, stream, DaemonState.RUNNING)).splitlines()
    assert (status["waiting_for"], "lag 7 records; waiting for topic a" in format_summary(status)) == ("a", True)


def test_a_snapshot_does_not_change(tmp_path: Path) -> None:
    """Neither later updates nor later positions get into a checkpoint that is being written."""
    job, stream = made(tmp_path)
    before = job.learner.params[0].clone()
    saving = job.save(stream, SaveTrigger.MANUAL)
    with torch.no_grad():
        job.learner.params[0].add_(1)
    job.progress.positions = Positions({("a", 0): Position(4)})
    job.progress.labels.append(1)
    job.checkpointer.wait(stream)
    assert saving.checkpoint is not None
    assert job.checkpointer.saved_positions == Positions({("a", 0): Position(3)})
    assert saving.checkpoint.read_json("state.json")["progress"]["labels"] == []
    assert job.restore()
    assert torch.equal(job.learner.params[0], before)
    assert job.progress.positions == Positions({("a", 0): Position(3)})


def test_a_failed_checkpoint_is_one_log_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Training continues, the next attempt waits, and the previous checkpoint stays valid."""
    job, stream = made(tmp_path)
    job.save(stream, SaveTrigger.MANUAL)
    job.checkpointer.wait(stream)
    job.store.root = tmp_path / "file" / "checkpoints"
    (tmp_path / "file").write_text("")
    saving = job.save(stream, SaveTrigger.INTERVAL)
    job.checkpointer.wait(stream)
    assert (saving.finished, saving.checkpoint) == (True, None)
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == [
        f"checkpoint failed: {tmp_path}/file/checkpoints: cannot be created: Not a directory"
    ]
    assert job.checkpointer.newest is not None
    assert job.checkpointer.failed_at is not None


def test_an_io_error_while_listing_fails_only_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training continues after EIO, and the next save succeeds."""
    job, stream = made(tmp_path)
    job.save(stream, SaveTrigger.MANUAL)
    job.checkpointer.wait(stream)

    def fail(_: object) -> Any:
        raise OSError(5, "Input/output error", str(job.store.root))

    with monkeypatch.context() as broken:
        broken.setattr(Store, "paths", fail)
        job.save(stream, SaveTrigger.MANUAL)
        job.checkpointer.wait(stream)
        assert job.checkpointer.current is None
    failed, job.checkpointer.failed_at = job.checkpointer.failed_at, None
    assert failed is not None
    saving = job.save(stream, SaveTrigger.MANUAL)
    job.checkpointer.wait(stream)
    assert saving.checkpoint is not None


def test_repeated_rollbacks_go_further_back(tmp_path: Path) -> None:
    """The first rollback uses the newest checkpoint, the second the one before it, each with a lower learning rate."""
    job, stream = made(tmp_path)
    for _ in range(2):
        job.learner.step += 1
        job.save(stream, SaveTrigger.MANUAL)
        job.checkpointer.wait(stream)
    rate, restored = job.learner.update.lr, []
    for attempt in (1, 2, 3):
        job = job.roll_back(Diverged("no"))
        assert job.checkpointer.newest is not None
        restored.append(job.checkpointer.newest.origin)
        assert job.learner.update.lr == rate * 0.5**attempt
    assert restored == ["ckpt-000000000002", "ckpt-000000000001", "ckpt-000000000001"]
    assert job.store.newest_valid() == job.checkpointer.newest
    with pytest.raises(Diverged, match=r"no after 3 rollbacks: lower learner\.optimizer\.lr"):
        job.roll_back(Diverged("no"))


def last_success(job: Job) -> list[str]:
    """Return the metric with the time of the last evaluation."""
    lines = job.recorder.metrics.expose("")[0].decode().splitlines()
    return [line.split()[1] for line in lines if line.startswith("streamlearn_probe_last_success_timestamp_seconds ")]


def test_evaluation_is_due_after_every_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is due once after new batches, and evaluations take at most a tenth of the time."""
    job, _ = made(tmp_path)
    assert not job.evaluation_due()
    job.learner.batches += 1
    assert not job.evaluation_due()
    monkeypatch.setattr(job, "_evaluated_at", job._evaluated_at - 61)
    assert job.evaluation_due()
    before = job.matrix.state_dict()
    job.evaluate(live=True)
    assert (job.evaluation_due(), job.matrix.state_dict()) == (False, before)
    job.learner.batches += 1
    monkeypatch.setattr(job, "_evaluated_at", job._evaluated_at - 61)
    monkeypatch.setattr(job, "_evaluation_seconds", 7.0)
    assert not job.evaluation_due()
    monkeypatch.setattr(job, "_evaluated_at", job._evaluated_at - 10)
    assert job.evaluation_due()


def test_poor_replay_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Below the limit the warning names the worst classes and better strategies; the metric has every class."""
    job, _ = made(tmp_path)
    job.check_replay()  # a strategy that generates nothing
    job.progress.tasks = [Task(0, "t1", TaskState.ENDED, labels=["cat", "dog"])]
    job.progress.labels = ["cat", "dog"]
    job.learner.set_active_outputs(job.progress.tasks, job.progress.labels)
    for dog, warned in ((0.6, False), (0.4, True)):
        monkeypatch.setattr(job.learner.strategy.replay, "agreement", lambda dog=dog: {(0, 0): 1.0, (0, 1): dog})
        job.recorder.record_strategy(job)
        job.check_replay()
        assert (
            f'streamlearn_replay_agreement_ratio{{label="dog",task="t1"}} {dog}'
            in job.recorder.metrics.expose("")[0].decode()
        )
        assert bool(caplog.records) is warned
    message = caplog.records[0].getMessage()
    assert message.startswith(
        "generative replay works poorly: only 70 % of the generated samples are recognized as their class (dog of t1: 40%"
    )
    assert all(way in message for way in ("er", "derpp", "input.encoder"))


def test_an_idle_loop_evaluates_at_once(tmp_path: Path) -> None:
    """An idle loop does not wait for `every_seconds`; status and metrics have the age of the evaluation."""
    job, stream = made(tmp_path)
    assert not job.evaluation_due(idle=True)
    job.learner.batches += 3
    assert (job.evaluation_due(), job.evaluation_due(idle=True)) == (False, True)
    job.matrix.latest_accuracy = {0: 0.5}
    job.recorder.record_gauges(job, stream)
    status = status_of(job, None, DaemonState.RUNNING)
    assert status["batches_since_evaluation"] == 3
    assert "streamlearn_probe_age_batches 3.0" in job.recorder.metrics.expose("")[0].decode()
    assert "(measured 3 batches ago)" in format_summary(status)
    job.evaluate(live=True)
    job.matrix.latest_accuracy = {0: 0.5}
    job.recorder.record_gauges(job, stream)
    assert not job.evaluation_due(idle=True)
    assert status_of(job, None, DaemonState.RUNNING)["batches_since_evaluation"] == 0
    assert "batches ago" not in format_summary(status_of(job, None, DaemonState.RUNNING))
    assert "streamlearn_probe_age_batches 0.0" in job.recorder.metrics.expose("")[0].decode()


def test_an_accuracy_drop_on_past_tasks_is_divergence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If `drop` is set, a larger drop raises and forbids saving; the open task does not count."""
    job, _ = made(tmp_path, divergence={"drop": 0.2})
    job.progress.tasks = [Task(0, "t1", TaskState.ENDED), Task(1, "t2", TaskState.ENDED), Task(2, "t3")]
    found = {0: (0.9, 0.1), 1: (0.7, 0.1), 2: (0.9, 0.1)}
    monkeypatch.setattr(job.probes, "evaluate", lambda *_: dict(found))
    job.evaluate(after=0)
    job.evaluate(after=1)
    found.update({0: (0.75, 0.1), 1: (0.55, 0.1), 2: (0.1, 0.1)})  # each by 15 points, and the open one by 80
    job.learner.batches += 1
    job.evaluate(live=True)
    found.update({0: (0.3, 0.1)})
    job.learner.batches += 2
    with pytest.raises(Diverged, match=r"past tasks fell from 65\.0% to 42\.5% within 2 batches"):
        job.evaluate()
    assert (job.divergence.lost_past_tasks, job.may_be_saved) == (True, False)
    for over in ({"drop": None}, {"drop": 0.2, "then": "skip"}):
        monkeypatch.setattr(job.divergence, "spec", DivergenceConfig(**over))
        job.evaluate(live=True)


def after_accuracy_drop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **over: Any) -> tuple[Job, StreamReader]:
    """Return a job that has lost a past task since the last evaluation, and its stream reader."""
    job, stream = made(tmp_path, **over)
    job.progress.tasks = [Task(0, "t1", TaskState.ENDED), Task(1, "a")]
    job.learner.set_active_outputs(job.progress.tasks, job.progress.labels)
    monkeypatch.setattr(job.probes, "evaluate", lambda *_: {0: (0.9, 0.1)})
    job.evaluate(after=0)
    monkeypatch.setattr(job.probes, "evaluate", lambda *_: {0: (0.1, 0.1)})
    job.learner.batches += 1
    return job, stream


@pytest.mark.parametrize("trigger", SaveTrigger)
def test_every_save_evaluates_first_if_drop_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trigger: SaveTrigger
) -> None:
    """No checkpoint may contain weights that the next evaluation would refuse, whatever triggered the save."""
    job, stream = after_accuracy_drop(tmp_path, monkeypatch, divergence={"drop": 0.2})
    with pytest.raises(Diverged):
        job.save(stream, trigger)
    assert (job.may_be_saved, job.store.all()) == (False, [])
    job, stream = after_accuracy_drop(tmp_path, monkeypatch)
    job.save(stream, trigger)
    job.checkpointer.wait(stream)
    assert len(job.store.all()) == 1


@pytest.mark.parametrize("end", ["task end", "burst"])
def test_saves_within_a_delivery_evaluate_first_if_drop_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """The loop saves in the middle of a delivery when a task's end offsets are fixed, and after a burst."""
    job, stream = after_accuracy_drop(tmp_path, monkeypatch, divergence={"drop": 0.2})
    with pytest.raises(Diverged):
        loop.turn(job, stream, Delivery(end_offsets={0: 3}) if end == "task end" else Delivery(forgives_below={0: 3}))
    assert (job.may_be_saved, job.store.all()) == (False, [])


def test_a_stop_evaluates_before_it_saves_if_drop_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last checkpoint and the one of a command are refused if training has diverged."""
    job, stream = after_accuracy_drop(tmp_path, monkeypatch, divergence={"drop": 0.2})
    desk = ControlDesk(job.config, Metrics())
    desk.stopping = True
    with pytest.raises(Diverged, match="past tasks fell from"):
        learn(job, stream, desk)
    assert job.store.all() == []
    job, stream = after_accuracy_drop(tmp_path, monkeypatch, divergence={"drop": 0.2})
    desk._requests.append(request := Request("checkpoint", {}))
    with pytest.raises(Diverged):
        desk.serve(job, stream, idle=True)
    assert isinstance(request.answer.exception(timeout=0), Diverged)


def test_a_batch_without_usable_samples_is_not_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It changes nothing, so the evaluation after the previous batch is not repeated."""
    job, stream = made(tmp_path, probes={"every": 1})
    turns, evaluated = [3, 0], []
    job.progress.tasks = [Task(0, "a")]
    job.learner.set_active_outputs(job.progress.tasks, job.progress.labels)
    monkeypatch.setattr(job, "evaluate", lambda: evaluated.append(job.learner.batches))

    def learn_some(_: Batch) -> LearnStats:
        samples = turns.pop(0)
        job.learner.batches += samples > 0
        return LearnStats(0, samples, samples, samples, 0, 0.5, 0.5, 0.5, 3 - samples)

    monkeypatch.setattr(job.learner, "learn", learn_some)
    batch = Batch(torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64))
    for _ in range(2):
        loop.turn(job, stream, Delivery(batch=batch))
    assert evaluated == [1]


def test_the_warning_and_the_alert_on_replay_agree() -> None:
    """The warning at a task's end and the alert StreamlearnReplayPoor have the same limit."""
    rules = (Path(__file__).parents[3] / "deploy" / "prometheus" / "streamlearn.rules.yml").read_text()
    assert re.findall(r"\(streamlearn_replay_agreement_ratio\) < ([0-9.]+)", rules) == [str(MIN_REPLAY_AGREEMENT)]


def test_an_evaluation_of_an_idle_loop_changes_no_state(tmp_path: Path) -> None:
    """The loop evaluates after the last batch, and the saved matrix is as if it had not."""
    job, _ = made(tmp_path, probes={"every": 1000, "every_seconds": 0.1, "minimum": 1})
    job.progress.positions = Positions()
    store = MemoryStore()
    store.create_topic("a", 1)
    for number in range(20):
        store.append("a", 0, json.dumps({"x": [number], "y": number % 2}).encode())
    letters = DeadLetterWriter(store, "dlq")
    rules = AssemblerSettings(
        RecordDecoder([1], "float32", "json", 1000), HoldOut("value", 0.5), job.scenario, letters, 5
    )
    stream = StreamReader(MemoryReader(store), Assembler(rules, Progress()), job.config.stream, letters, "group")

    class Idle:
        stopping = paused = False

        def __init__(self) -> None:
            self.deadline = time.monotonic() + 60

        def serve(self, *_: object, idle: bool) -> None:
            self.stopping = bool(job.matrix.latest_accuracy) and idle
            assert time.monotonic() < self.deadline

        def wait(self, seconds: float) -> None: ...

    stream.start()
    loop.run(job, stream, Idle())
    stream.stop()
    assert job.learner.batches > 0
    assert job.matrix.state_dict() == AccuracyMatrix().state_dict()


def test_a_restart_keeps_the_time_of_the_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time is that of the evaluation, not that of the checkpoint from which its results are restored."""
    job, stream = made(tmp_path)
    monkeypatch.setattr(job.probes, "evaluate", lambda *_: {0: (0.5, 0.1)})
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    job.evaluate()
    monkeypatch.setattr(time, "time", lambda: 2000.0)
    job.evaluate(live=True)
    assert last_success(job) == ["2000.0"]
    monkeypatch.setattr(time, "time", lambda: 3000.0)
    monkeypatch.setattr(job.probes, "evaluate", lambda *_: {})
    job.evaluate()
    assert last_success(job) == ["2000.0"]  # this one had no result
    monkeypatch.undo()
    job.save(stream, SaveTrigger.MANUAL)
    job.checkpointer.wait(stream)
    again = Job.make(job.config, job.store, Metrics())
    again.restore()
    assert last_success(again) == ["1000.0"]
    assert status_of(again, None, DaemonState.RUNNING)["evaluated"] == "1970-01-01T00:16:40+00:00"


OUTPUTS = (
    "a job that has started cannot get more classes or switch grow_head on: start a new job with another state_dir, "
    "which reads the topics again; with grow_head: true and classes as a number it accepts new labels by itself"
)
CHANGES: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    ({"strategy": "er"}, {"strategy": "derpp"}, ["strategy: er, now derpp"]),
    ({"strategy": ["er", "si"]}, {"strategy": {"er": {"budget": 7}}}, [
        "strategy: er + si, now er",
        "strategy.er.budget: the checkpoint has 2000, the configuration 7",
    ]),
    ({"strategy": "naive"}, {"strategy": ["generative", "si"]}, ["strategy: naive, now generative + si"]),
    ({}, {"grow_head": True}, ["grow_head: the checkpoint has False, the configuration True", OUTPUTS]),
    ({"classes": [0, 1]}, {"classes": [0, 1, 2]}, [
        "classes: the checkpoint has [0, 1], the configuration [0, 1, 2]", OUTPUTS,
    ]),
]  # fmt: skip


@pytest.mark.parametrize(("before", "now", "lines"), CHANGES)
def test_an_incompatible_checkpoint_is_explained(
    tmp_path: Path, before: dict[str, Any], now: dict[str, Any], lines: list[str]
) -> None:
    """Another strategy is one difference, whatever its parameters; for labels that cannot be added there is a hint."""
    job, stream = made(tmp_path, **before)
    job.save(stream, SaveTrigger.MANUAL)
    job.checkpointer.wait(stream)
    other, _ = made(tmp_path, **(before | now))
    with pytest.raises(StreamlearnError) as caught:
        other.restore()
    why = "; ".join([*lines, "restore the values of the checkpoint, or start a new job with another state_dir"])
    assert str(caught.value) == f"{job.store.all()[0].path}: not compatible with the configuration: {why}"
    assert caught.value.exit_code == 78


def move(job: Job, offset: int) -> None:
    """Move the job to an offset of its topic, one step later."""
    job.learner.step += 1
    job.progress.positions = Positions({("a", 0): Position(offset)})


def test_learning_never_waits_for_the_disk(tmp_path: Path) -> None:
    """While a checkpoint is written every save returns at once: the newest snapshot waits, and replaces older ones."""
    job, stream = made(tmp_path)
    held = BlockedStore(job)
    first = job.save(stream, SaveTrigger.INTERVAL)
    assert held.begun.wait(60)
    move(job, 4)
    by_hand = job.save(stream, SaveTrigger.MANUAL, "mine")
    job.progress.tasks.append(Task(0, "a", end_offsets={0: 5}))
    job.learner.set_active_outputs(job.progress.tasks, job.progress.labels)
    move(job, 5)
    closed = job.save(stream, SaveTrigger.TASK_END)
    move(job, 6)
    job.progress.tasks[0].state = TaskState.ENDED
    ended = job.save(stream, SaveTrigger.TASK_END)
    assert (job.checkpointer.newest, first.finished, job.checkpointer.snapshot_positions) == (
        None,
        False,
        job.progress.positions,
    )
    held.open.set()
    job.checkpointer.wait(stream)
    assert [checkpoint.manifest["parent"] for checkpoint in job.store.all()] == ["ckpt-000000000001", None]
    assert first.checkpoint is not None
    assert first.checkpoint.read_json("offsets.json")["topics"]["a"]["partitions"]["0"]["offset"] == 3
    # who asked for a snapshot that was replaced gets the newer one, which has the tag
    assert by_hand is closed is ended
    assert ended.checkpoint == job.checkpointer.newest == job.store.find("mine")
    assert job.checkpointer.newest is not None
    # the end offsets of a task are in every checkpoint with batches learned after they were fixed
    saved = job.checkpointer.newest.read_json("state.json")["progress"]["tasks"]
    assert [(task["ends"], task["state"]) for task in saved] == [({"0": 5}, "ended")]
    assert job.checkpointer.saved_positions == job.progress.positions


def test_a_stop_writes_at_most_one_more_checkpoint(tmp_path: Path) -> None:
    """The last snapshot replaces the waiting one, the loop stays alive meanwhile, and everything is saved."""
    job, stream = made(tmp_path)
    desk = ControlDesk(job.config, Metrics())
    held = BlockedStore(job)
    job.save(stream, SaveTrigger.INTERVAL)
    move(job, 4)
    job.save(stream, SaveTrigger.INTERVAL)
    move(job, 5)
    beats = []

    def beat() -> None:
        beats.append(1)
        if len(beats) == 2:
            held.open.set()

    desk.heartbeat = beat  # type: ignore[method-assign]
    desk.stopping = True
    learn(job, stream, desk)
    assert len(beats) >= 2
    assert len(job.store.all()) == 2
    assert job.checkpointer.saved_positions == Positions({("a", 0): Position(5)})


def test_a_stop_saves_again_after_a_failed_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the checkpoint that is being written fails, another one is written."""
    job, stream = made(tmp_path)
    save, tried = job.store.save, []

    def fail_once(*arguments: Any, **more: Any) -> Checkpoint:
        tried.append(1)
        if len(tried) == 1:
            raise InputOutputError("no room")
        return save(*arguments, **more)

    monkeypatch.setattr(job.store, "save", fail_once)
    job.save(stream, SaveTrigger.INTERVAL)
    desk = ControlDesk(job.config, Metrics())
    desk.stopping = True
    learn(job, stream, desk)
    assert job.checkpointer.saved_positions == Positions({("a", 0): Position(3)})


def test_a_checkpoint_of_another_process_is_not_linked(tmp_path: Path) -> None:
    """A job links only files of its own newest checkpoint; otherwise it writes them."""
    job, stream = made(tmp_path)
    job.probes.add([HeldOut(0, np.ones((3, 1), np.float32), np.zeros(3, np.int64))])
    job.probes.seal(0)
    inodes = []
    for number in range(3):
        move(job, 4 + number)
        if number == 2:
            job.store.restore("1")
        saving = job.save(stream, SaveTrigger.MANUAL)
        job.checkpointer.wait(stream)
        assert saving.checkpoint is not None
        inodes.append((saving.checkpoint.path / "probes.sealed.0.safetensors").stat().st_ino)
    assert inodes[0] == inodes[1] != inodes[2]


def add_ended_tasks(job: Job, count: int) -> None:
    """Add tasks that have ended, each with a probe and a row of the matrix."""
    for index in range(len(job.progress.tasks), count):
        job.progress.tasks.append(
            Task(index, f"t{index}", state=TaskState.ENDED, labels=[0, 1], counts=Counter(consumed=5))
        )
        job.progress.counts_by_topic[f"t{index}"] = Counter(consumed=5, trained=5)
        job.probes.add([HeldOut(index, np.ones((3, 1), np.float32), np.zeros(3, np.int64))])
        job.probes.seal(index)
    job.learner.set_active_outputs(job.progress.tasks, job.progress.labels)
    for index in range(count):
        results = dict.fromkeys(range(index + 1), (2 / 3, 0.1))
        job.matrix.record(results, index, index, index, job.probes.sizes)


def test_status_and_checkpoint_grow_linearly_with_tasks(tmp_path: Path) -> None:
    """Four times as many tasks take about four times the work and JSON, and only a few more files.

    Above a limit the matrix is not part of the status; it has its own request.
    """
    job, stream = made(tmp_path)
    desk = ControlDesk(job.config, Metrics())
    costs, sizes = [], []
    for count in (60, 240):
        add_ended_tasks(job, count)
        costs.append([work(lambda: desk.publish(job, stream)), work(lambda: take_snapshot(job)), work(job.evaluate)])
        status = status_of(job, stream, DaemonState.RUNNING)
        assert (status["matrix"], len(status["tasks"])) == (None, count)
        move(job, 3 + count)
        saving = job.save(stream, SaveTrigger.TASK_END)
        job.checkpointer.wait(stream)
        assert saving.checkpoint is not None
        files = saving.checkpoint.manifest["files"]
        assert len(files) < 30
        sizes.append([len(json.dumps(status)), sum(files[name]["size"] for name in files if name.endswith(".json"))])
    assert [late for few, late in zip(*costs, strict=True) if late > 5 * few] == []
    assert [late for few, late in zip(*sizes, strict=True) if late > 5 * few] == []
    assert desk.matrix() == job.matrix.matrix()
    assert [len(row) - row.count(None) for row in desk.matrix()] == list(range(1, 241))
    # without a daemon `status --json` reads it from the checkpoint
    offline = read_status(tmp_path, matrix=True)
    assert (offline["matrix"], read_status(tmp_path)["matrix"]) == (job.matrix.matrix(), None)


def test_a_rollback_removes_the_metrics_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss, evaluation and importance metrics of the discarded state are gone after a rollback."""
    job, _ = made(tmp_path)
    monkeypatch.setattr(job.probes, "evaluate", lambda *_: {0: (0.5, 0.1)})
    job.progress.tasks.append(Task(0, "a"))
    job.evaluate()
    batch = Batch(torch.zeros(1, 1), torch.zeros(1), torch.zeros(1))
    job.recorder.metrics.record_delivery(Delivery(batch=batch), LearnStats(0, 1, 1, 1, 0, 1e9, 0.5, 1e9), "a", 0.0)
    job.recorder.metrics.gauges.set("importance_last_update_timestamp_seconds", 1.0)
    gone = (
        "train_loss",
        "train_gradient_norm",
        "train_prequential",
        "probe_accuracy",
        "probe_last",
        "average_acc",
        "importance_last",
    )
    shown = job.recorder.metrics.expose("")[0].decode()
    assert [name for name in gone if f"\nstreamlearn_{name}" not in shown] == []
    again = job.roll_back(Diverged("no"))
    shown = again.recorder.metrics.expose("")[0].decode()
    assert [name for name in gone if f"\nstreamlearn_{name}" in shown] == []
    again.recorder.metrics.record_delivery(Delivery(batch=batch), LearnStats(0, 1, 1, 1, 0, 0.5, 0.5, 1.0), "a", 0.0)
    assert 'streamlearn_train_loss{task="a"} 0.5' in again.recorder.metrics.expose("")[0].decode()
