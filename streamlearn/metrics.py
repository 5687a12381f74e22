"""All Prometheus series, declared in one place. The help text of a series is its definition.

A gauge whose value is unknown is absent. Counters start at 0 in each process, as Prometheus expects; totals over restarts
are part of the state, and `status` prints them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from typing import TYPE_CHECKING, Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    GCCollector,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import GaugeMetricFamily, Metric

from streamlearn.core.samples import REJECT_REASONS, Outcome
from streamlearn.core.states import DaemonState, SaveTrigger
from streamlearn.core.tasks import TaskEndReason, TaskState

if TYPE_CHECKING:
    from streamlearn.core.deliveries import Delivery
    from streamlearn.core.positions import Partition
    from streamlearn.core.progress import Progress
    from streamlearn.evaluation.matrix import AccuracyMatrix
    from streamlearn.learning.stats import LearnStats
    from streamlearn.stream.status import StreamStatus

PREFIX = "streamlearn_"
STATES = tuple(state for state in DaemonState if state is not DaemonState.STOPPED)  # a stopped daemon has no metrics
START_CAUSES = ("first", "clean", "crash")  # label `cause`: how the previous process ended
SKIP_REASONS = ("retention", "corrupt", "oversize")  # label `reason` of skipped offsets
MAX_LABEL_VALUES = 100  # tasks, and topics, that get series of their own
MAX_MATRIX_TASKS = 50
LOSS_SMOOTHING = 0.9

GAUGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "up_ready": ("1 if every readiness condition holds, otherwise 0.", ()),
    "state": ("State of the daemon: one series for each state, 1 for the current one.", ("state",)),
    "heartbeat_timestamp_seconds": ("Unix time of the last turn of an internal loop.", ("loop",)),
    "start_timestamp_seconds": ("Unix time at which this process started.", ()),
    "consumer_unread_records": (
        "Log end offset minus the reader's next offset: records that wait in the log, also behind an open transaction.",
        ("topic", "partition"),
    ),
    "consumer_position_offset": ("Offset of the next record to be applied to the model.", ("topic", "partition")),
    "consumer_log_end_offset": ("End offset of the log when it was last queried.", ("topic", "partition")),
    "consumer_lag_records": (
        "Log end offset minus the next offset to be applied; if none was applied yet, the number of offsets in the log.",
        ("topic", "partition"),
    ),
    "consumer_lag_seconds": ("Age of the newest applied record while the topic has lag, otherwise 0.", ("topic",)),
    "consumer_committed_offset": (
        "Offset of the next record to be applied, in the last durable checkpoint.",
        ("topic", "partition"),
    ),
    "consumer_assigned_partitions": ("Number of partitions that are being read.", ()),
    "consumer_paused": ("1 while an operator has paused learning, otherwise 0.", ()),
    "broker_connected": ("1 while the broker, or the embedded file, answers, otherwise 0.", ()),
    "broker_last_contact_timestamp_seconds": ("Unix time of the last answer from the broker or the embedded file.", ()),
    "train_loss": ("Training loss of the current task, smoothed exponentially over batches.", ("task",)),
    "train_prequential_accuracy_ratio": (
        "Accuracy on each batch before it is learned, with the weights that probes use, smoothed exponentially.",
        ("task",),
    ),
    "train_gradient_norm": (
        "Norm of the gradient in the last step, after penalty and projection, before clipping.",
        (),
    ),
    "train_learning_rate": ("Learning rate in the last step.", ()),
    "train_batch_queue_samples": ("Number of samples that are read but not yet learned.", ()),
    "train_batch_queue_capacity_samples": ("Limit on the samples that are read but not yet learned.", ()),
    "tasks_seen": ("Number of tasks that have started.", ()),
    "task_active": ("1 for the open task, 0 for tasks that have ended.", ("task",)),
    "replay_buffer_samples": (
        "Number of stored samples of past tasks, for replay and for reference gradients.",
        ("task",),
    ),
    "replay_agreement_ratio": (
        "Share of a class's generated samples that the model assigns to it, at the last task's end; for at most 200 classes.",
        ("task", "label"),
    ),
    "replay_buffer_capacity_samples": ("Limit on the stored samples.", ()),
    "replay_buffer_bytes": ("Size of the stored samples in bytes.", ()),
    "network_parameters": ("Number of parameters of the network, with the columns of all tasks.", ()),
    "network_free_weights_ratio": (
        "Share of the prunable weights that no task owns: the capacity that PackNet has left.",
        (),
    ),
    "importance_norm": ("L2 norm of the importance weights of all past tasks.", ()),
    "importance_last_update_timestamp_seconds": ("Unix time of the last update of the importance weights.", ()),
    "probe_accuracy_ratio": ("Accuracy on the task's probe at the last evaluation.", ("task",)),
    "probe_accuracy_after_task_ratio": (
        "Accuracy matrix R[i,j]: accuracy on the probe of task j (task) after task i (trained_task) was learned.",
        ("trained_task", "task"),
    ),
    "probe_accuracy_best_ratio": (
        "Best accuracy on the task's probe: at its own end, at a later task's end, or now; absent until the task has ended.",
        ("task",),
    ),
    "probe_loss": (
        "Mean cross-entropy on the task's probe at the last evaluation, over the samples whose label competes.",
        ("task",),
    ),
    "probe_samples": (
        "Number of samples in the task's probe at the last evaluation; it grows until the task ends.",
        ("task",),
    ),
    "probe_age_batches": (
        "Number of batches learned since the last evaluation; above 0, the weights are newer than the probe metrics.",
        (),
    ),
    "probe_interval_batches": (
        "Number of batches between two evaluations; there is one more at each task's end, and more on a slow stream.",
        (),
    ),
    "probe_last_success_timestamp_seconds": (
        "Unix time of the last complete evaluation; after a restart, of the last one in the checkpoint.",
        (),
    ),
    "average_accuracy_ratio": ("ACC: mean accuracy on the probes of all tasks seen, at the last evaluation.", ()),
    "learning_accuracy_ratio": ("Mean over tasks of the accuracy on their probe when they ended.", ()),
    "backward_transfer": (
        "BWT: mean over earlier tasks of the accuracy now minus the accuracy when the task ended.",
        (),
    ),
    "forward_transfer": (
        "FWT: mean over later tasks of the accuracy before the task minus the untrained accuracy; absent in scenario class.",
        (),
    ),
    "forgetting_ratio": ("Best accuracy at the end of any earlier task minus the accuracy now.", ("task",)),
    "average_forgetting_ratio": ("Mean forgetting of the tasks before the newest.", ()),
    "worst_forgetting_ratio": ("Largest forgetting of a task before the newest.", ()),
    "windowed_forgetting_ratio": (
        "WF: mean over tasks of the largest drop of accuracy so far within 10 consecutive evaluations.",
        (),
    ),
    "min_accuracy_ratio": (
        "min-ACC: mean over the tasks before the newest of the lowest accuracy at any evaluation after the task's end.",
        (),
    ),
    "worst_case_accuracy_ratio": ("WC-ACC: accuracy on the newest of k tasks / k + (1 - 1/k) * min-ACC.", ()),
    "checkpoint_last_success_timestamp_seconds": ("Unix time of the last durable checkpoint.", ()),
    "checkpoint_last_size_bytes": ("Size of the last durable checkpoint in bytes, with linked files.", ()),
    "checkpoints_kept": ("Number of durable checkpoints on disk after the last save.", ()),
    "checkpoint_records_since": ("Number of offsets applied since the last durable checkpoint.", ()),
    "state_dir_free_bytes": ("Free bytes on the file system of the state directory.", ()),
    "device_memory_allocated_bytes": ("Memory of tensors on the device, in bytes.", ("device",)),
    "device_memory_reserved_bytes": ("Memory reserved by torch's caching allocator, in bytes.", ("device",)),
    "device_memory_total_bytes": ("Memory of the device, in bytes.", ("device",)),
}

COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "restarts": ("Starts from a state directory, by how the previous process ended.", ("cause",)),
    "records_consumed": ("Records applied, whether or not their samples were learned.", ("topic", "partition")),
    "samples_consumed": ("Samples in the applied records; a record that cannot be decoded counts as one.", ("topic",)),
    "consumed_bytes": ("Key and value bytes of the applied records.", ("topic",)),
    "samples_trained": ("Samples learned.", ("task",)),
    "samples_held_out": ("Samples kept for the probe and never learned.", ("task",)),
    "samples_late": ("Samples that arrived after their task had ended.", ("topic",)),
    "samples_rejected": ("Samples that cannot be used and were sent to the dead-letter topic.", ("topic", "reason")),
    "samples_duplicate": ("Samples in records that had already been applied.", ("topic",)),
    "samples_skipped": (
        "Samples left out because their features, or all updates of their batch, were not finite.",
        ("reason",),
    ),
    "records_skipped_offsets": (
        "Offsets that were never read: deleted from the log (`retention`), or in a `corrupt` or `oversize` batch.",
        ("topic", "reason"),
    ),
    "train_steps": ("Optimizer steps applied.", ("task",)),
    "train_steps_skipped": (
        "Optimizer steps dropped: `nonfinite` for the model, `nonfinite_generator` for a generator alone.",
        ("reason",),
    ),
    "train_gradient_clipped": ("Optimizer steps with a clipped gradient.", ()),
    "task_boundaries": ("Task ends, by the rule that ended the task.", ("source",)),
    "replay_samples_drawn": ("Stored samples drawn into batches.", ()),
    "replay_samples_evicted": ("Stored samples removed to make room.", ()),
    "constraint_projections": (
        (
            "Optimizer steps whose gradient was projected because it conflicted with a past task; for `agem`, only if the "
            "squared norm of the reference is above `epsilon`."
        ),
        (),
    ),
    "constraint_solver_failures": ("Projections that could not be solved; the step used the unprojected gradient.", ()),
    "probe_failures": ("Evaluations whose result was not finite.", ("task",)),
    "checkpoints": ("Attempts to save a checkpoint.", ("result", "trigger")),
    "checkpoint_corrupt": ("Checkpoints that failed verification.", ()),
    "rollbacks": (
        "Returns to the newest checkpoint, because updates were not finite or past tasks lost more than `divergence.drop`.",
        (),
    ),
    "out_of_memory": (
        "Ends of the loop because host or device memory was exhausted. The process then ends (75), so few scrapes see it.",
        (),
    ),
    "errors": ("Errors that were handled.", ("component", "kind")),
    "dlq_records": (
        "Samples sent to the dead-letter topic; `failure` counts attempts that were not acknowledged.",
        ("result",),
    ),
    "control_requests": ("Control requests that change something.", ("command", "result")),
    "metrics_labels_dropped": (
        "Increments of label values beyond the limit; they are counted under `other`.",
        ("metric",),
    ),
}

HISTOGRAMS: dict[str, tuple[str, tuple[str, ...], tuple[float, ...]]] = {
    "record_delay_seconds": (
        "Time from a batch's newest record until the batch is learned.",
        (),
        (0.1, 0.3, 1, 3, 10, 30, 60, 300, 900, 3600),
    ),
    "train_batch_duration_seconds": (
        "Duration of learning one batch, with all its updates.",
        (),
        (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10),
    ),
    "probe_duration_seconds": (
        "Duration of one evaluation of all probes.",
        (),
        (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
    ),
    "checkpoint_duration_seconds": (
        "Duration of a save by phase: snapshot (learning waits for it) and write (in the background).",
        ("phase",),
        (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
    ),
}


class Gauges:
    """A Prometheus collector of gauges. A gauge is absent while its value is unknown."""

    def __init__(self) -> None:
        self._values: dict[str, dict[tuple[str, ...], float]] = {name: {} for name in GAUGES}

    def set(self, name: str, value: float | None, *labels: str) -> None:
        """Set the series with these label values, or remove it if the value is None or not finite."""
        if value is None or not math.isfinite(value):
            self._values[name] = {key: old for key, old in self._values[name].items() if key != labels}
        else:
            self._values[name] = {**self._values[name], labels: float(value)}

    def replace(self, name: str, children: Mapping[Any, float | None]) -> None:
        """Replace all series of a gauge, given by tuples of label values; None and non-finite values are left out."""
        self._values[name] = {k: float(v) for k, v in children.items() if v is not None and math.isfinite(v)}

    def collect(self) -> Iterator[Metric]:
        """Yield every gauge that has a value."""
        for name, (text, labels) in GAUGES.items():
            if children := self._values[name]:
                family = GaugeMetricFamily(PREFIX + name, text, labels=labels)
                for key, value in children.items():
                    family.add_metric(key, value)
                yield family


class Metrics:
    """The series of one daemon. The loop records values; a scrape only reads them."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        disable_created_metrics()
        self.registry = registry or CollectorRegistry()
        self.gauges = Gauges()
        self.registry.register(self.gauges)
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        self.counters = {
            n: Counter(PREFIX + n, text, labels, registry=self.registry) for n, (text, labels) in COUNTERS.items()
        }
        self.histograms = {
            name: Histogram(PREFIX + name, text, labels, buckets=buckets, registry=self.registry)
            for name, (text, labels, buckets) in HISTOGRAMS.items()
        }
        self._label_values: dict[str, set[str]] = {"task": set(), "topic": set()}
        self._declared: set[Partition | str] = set()  # topics and partitions that have counters
        self._smoothed: dict[tuple[str, str], float] = {}
        totals = ("drawn", "evicted", "projected", "failed", "dead letters", "dead letter failures")
        self._baselines = dict.fromkeys(totals, 0)
        results = ("success", "failure")
        limited = [name for name, (_, labels) in COUNTERS.items() if {"topic", "task"} & set(labels)]
        fixed_labels: dict[str, Iterable[tuple[str, ...]]] = {
            "checkpoints": product(results, SaveTrigger),
            "dlq_records": product(results),
            "metrics_labels_dropped": product(limited),
            "restarts": product(START_CAUSES),
            "samples_skipped": product(("nonfinite",)),
            "task_boundaries": product(TaskEndReason),
            "train_steps_skipped": product(("nonfinite", "nonfinite_generator")),
        }
        for name, children in fixed_labels.items():
            for labels in children:
                self.count(name, 0, *labels)

    def expose(self, accept: str) -> tuple[bytes, str]:
        """Return all series as text and its content type: Prometheus text or OpenMetrics, by the `Accept` header."""
        encoder, content_type = choose_encoder(accept)
        return encoder(self.registry), content_type

    def count(self, name: str, amount: float, *labels: str) -> None:
        """Add `amount` to a counter; 0 only creates the series. Label values beyond the limit are counted under `other`."""
        kinds = COUNTERS[name][1]
        if not amount and not all(map(self._admit_label, kinds, labels)):
            return
        allowed = [self._label_or_other(name, kind, value) for kind, value in zip(kinds, labels, strict=True)]
        counter = self.counters[name].labels(*allowed) if kinds else self.counters[name]
        if amount:
            counter.inc(amount)

    def record_start(self, versions: Mapping[str, str], model: Mapping[str, str], started: float, cause: str) -> None:
        """Record what runs, when this process started, and how the previous one ended."""
        for name, text, labels in (
            ("build", "Versions of streamlearn and its libraries.", versions),
            ("model", "Job, model, strategy and configuration.", model),
        ):
            Info(PREFIX + name, text, registry=self.registry).info(dict(labels))
        self.gauges.set("start_timestamp_seconds", started)
        self.count("restarts", 1, cause)

    def clear_training_gauges(self) -> None:
        """Remove the training gauges before a restore: they describe learning that the restored state does not contain."""
        self._smoothed.clear()
        for name in ("train_loss", "train_prequential_accuracy_ratio", "train_gradient_norm"):
            self.gauges.replace(name, {})
        self.gauges.set("importance_last_update_timestamp_seconds", None)

    def declare_topics(self, topics: Iterable[str]) -> None:
        """Create the counters of topics at 0, so that `increase()` sees their first increase.

        If there are too many topics, the first ones in the given order get series of their own.
        """
        for topic in topics:
            if topic in self._declared:
                continue
            self._declared.add(topic)
            for name in ("samples_consumed", "consumed_bytes", "samples_late", "samples_duplicate"):
                self.count(name, 0, topic)
            for reason in REJECT_REASONS:
                self.count("samples_rejected", 0, topic, reason)
            for reason in SKIP_REASONS:
                self.count("records_skipped_offsets", 0, topic, reason)
            for name in ("samples_trained", "samples_held_out", "train_steps", "probe_failures"):
                self.count(name, 0, topic)

    def declare_partitions(self, partitions: Iterable[Partition]) -> None:
        """Create counters of partitions that the reader found, and of their topics (unknown in advance with a pattern)."""
        for partition in partitions:
            if partition in self._declared:
                continue
            self._declared.add(partition)
            self.declare_topics([partition[0]])
            self.count("records_consumed", 0, partition[0], str(partition[1]))

    def record_delivery(self, delivery: Delivery, stats: LearnStats | None, task: str, now: float) -> None:
        """Count what one turn of the loop applied. `stats`: how the batch was learned, None if there was no batch."""
        observations = delivery.observations
        for (topic, partition), records in observations.records.items():
            self.count("records_consumed", records, topic, str(partition))
        for topic, num_bytes in observations.num_bytes.items():
            self.count("consumed_bytes", num_bytes, topic)
        for topic, samples in observations.consumed.items():
            self.count("samples_consumed", samples, topic)
        for (topic, outcome), samples in observations.outcomes.items():
            if outcome in {Outcome.HELD_OUT, Outcome.LATE}:
                self.count(f"samples_{outcome}", samples, topic)
            elif outcome == Outcome.DUPLICATES:
                self.count("samples_duplicate", samples, topic)
        for (topic, reason), samples in observations.rejected.items():
            self.count("samples_rejected", samples, topic, reason)
        for (topic, reason), offsets in observations.lost_offsets.items():
            self.count("records_skipped_offsets", offsets, topic, reason)
        if delivery.task_end_reason is not None:
            self.count("task_boundaries", 1, delivery.task_end_reason)
        if stats is None:
            return
        trained = stats.samples if stats.outcome == Outcome.TRAINED else 0
        self.count("samples_trained", trained, task)
        self.count("samples_skipped", stats.samples - trained + stats.unusable, "nonfinite")
        self._smooth("train_prequential_accuracy_ratio", task, stats.accuracy if stats.samples else None)
        if delivery.newest_timestamp is not None:
            self.histograms["record_delay_seconds"].observe(max(0.0, now - delivery.newest_timestamp))
        self.record_learned(stats, task)

    def record_learned(self, stats: LearnStats, task: str) -> None:
        """Count the steps of a batch, new or in refinement, and record its loss."""
        self.count("train_steps", stats.applied, task)
        self.count("train_steps_skipped", stats.steps - stats.applied, "nonfinite")
        self.count("train_steps_skipped", stats.generator_dropped, "nonfinite_generator")
        self.count("train_gradient_clipped", stats.clipped)
        self.gauges.set("train_gradient_norm", stats.gradient_norm)
        self._smooth("train_loss", task, stats.loss)

    def record_evaluation(
        self, matrix: AccuracyMatrix, progress: Progress, sizes: Mapping[int, int], evaluated: float | None
    ) -> None:
        """Record the newest evaluation, its time, and all summary metrics of the accuracy matrix."""
        names = {task.index: task.name for task in progress.tasks if self._admit_label("task", task.name)}
        tasks = [task for task in matrix.latest_accuracy if task in names]
        self.gauges.replace("probe_accuracy_ratio", {(names[t],): matrix.latest_accuracy[t] for t in tasks})
        self.gauges.replace("probe_loss", {(names[t],): matrix.latest_loss.get(t) for t in tasks})
        self.gauges.replace("probe_accuracy_best_ratio", {(names[t],): matrix.best_accuracy(t) for t in tasks})
        self.gauges.replace("forgetting_ratio", {(names[t],): matrix.forgetting(t) for t in tasks})
        self.gauges.replace("probe_samples", {(names[t],): size for t, size in sizes.items() if t in names})
        ended = matrix.ended_tasks
        rows = ended if len(ended) <= MAX_MATRIX_TASKS else ended[-1:]
        cells = {(names[i], names[j]): v for i in rows if i in names for j, v in matrix.row(i).items() if j in names}
        diagonal = {(names[i], names[i]): matrix.accuracy_at_end(i) for i in ended if i in names}
        self.gauges.replace("probe_accuracy_after_task_ratio", diagonal | cells)
        for name, value in matrix.metrics().items():
            self.gauges.set(name if name.endswith("transfer") else f"{name}_ratio", value)
        self.gauges.set("probe_last_success_timestamp_seconds", evaluated)

    def record_stream(
        self, status: StreamStatus, progress: Progress, committed: Mapping[Partition, int], queued: int
    ) -> None:
        """Record the positions of the reader, of the model and of the last checkpoint, and the lag."""
        self.declare_partitions(status.end_offsets)
        applied = {p: position.offset for p, position in progress.positions.by_partition.items()}
        shown = {
            p: (p[0], str(p[1]))
            for p in {*status.end_offsets, *applied, *committed}
            if self._admit_label("topic", p[0])
        }
        lag = status.lag(progress.positions.by_partition)
        self.gauges.replace("consumer_position_offset", {shown[p]: o for p, o in applied.items() if p in shown})
        self.gauges.replace("consumer_committed_offset", {shown[p]: o for p, o in committed.items() if p in shown})
        self.gauges.replace(
            "consumer_log_end_offset", {shown[p]: o for p, o in status.end_offsets.items() if p in shown}
        )
        self.gauges.replace("consumer_lag_records", {shown[p]: o for p, o in lag.items() if p in shown})
        unread = {shown[p]: count for p, count in status.unread().items() if p in shown}
        self.gauges.replace("consumer_unread_records", unread)
        self.gauges.set("checkpoint_records_since", sum(o - committed.get(p, 0) for p, o in applied.items()))
        self.gauges.set("consumer_assigned_partitions", status.num_assigned)
        self.gauges.set("broker_connected", status.connected)
        self.gauges.set("broker_last_contact_timestamp_seconds", status.last_contact)
        self.gauges.set("train_batch_queue_samples", queued)
        self.gauges.set("tasks_seen", len(progress.tasks))
        active = {(t.name,): t.state != TaskState.ENDED for t in progress.tasks if self._admit_label("task", t.name)}
        self.gauges.replace("task_active", active)

    def record_memory(self, sizes: Mapping[str, object], names: Mapping[int, str]) -> None:
        """Record how many samples replay stores, and how many were drawn and evicted. `names`: task names by index."""
        samples = sizes.get("samples")
        if isinstance(samples, Mapping):
            shown = {t: names[t] for t in samples if t in names and self._admit_label("task", names[t])}
            self.gauges.replace("replay_buffer_samples", {(name,): samples[t] for t, name in shown.items()})
        for name, key in (("replay_buffer_capacity_samples", "capacity"), ("replay_buffer_bytes", "bytes")):
            value = sizes.get(key)
            self.gauges.set(name, value if isinstance(value, int) else None)
        for name, key in (("replay_samples_drawn", "drawn"), ("replay_samples_evicted", "evicted")):
            value = sizes.get(key)
            if isinstance(value, int):
                self.add_increase(name, key, value)

    def record_agreement(self, agreement: Mapping[tuple[str, str], float]) -> None:
        """Record how often the model recognises generated samples, by task and class."""
        shown = {(task, label): ratio for (task, label), ratio in agreement.items() if self._admit_label("task", task)}
        self.gauges.replace("replay_agreement_ratio", shown)

    def record_constraint(self, counts: Mapping[str, int]) -> None:
        """Count the steps that a constraint projected, and those where that failed."""
        for name, key in (("constraint_projections", "projected"), ("constraint_solver_failures", "failed")):
            if key in counts:
                self.add_increase(name, key, counts[key])

    def add_increase(self, name: str, key: str, total: int, *labels: str) -> None:
        """Add the increase of a running total since the last call (or since `set_baseline`) to a counter."""
        self.count(name, max(0, total - self._baselines[key]), *labels)
        self._baselines[key] = total

    def set_baseline(self, key: str, total: int) -> None:
        """Set the value above which a running total counts: a total that was restored from state is not new in this process."""
        self._baselines[key] = total

    def record_state(self, state: DaemonState, *, ready: bool) -> None:
        """Record the state of the daemon, and whether every readiness condition holds."""
        self.gauges.replace("state", {(name,): name == state for name in STATES})
        self.gauges.set("up_ready", ready)
        self.gauges.set("consumer_paused", state is DaemonState.PAUSED)

    def _smooth(self, name: str, task: str, value: float | None) -> None:
        if value is None or not math.isfinite(value) or not self._admit_label("task", task):
            return
        old = self._smoothed.get((name, task), value)
        self._smoothed[name, task] = LOSS_SMOOTHING * old + (1 - LOSS_SMOOTHING) * value
        self.gauges.replace(name, {(task,): self._smoothed[name, task]})  # without the values of earlier tasks

    def _admit_label(self, kind: str, value: str) -> bool:
        """Return whether a label value has series of its own; the first `MAX_LABEL_VALUES` tasks and topics get them."""
        admitted = self._label_values.get(kind)
        if admitted is None:
            return True
        if value not in admitted and len(admitted) < MAX_LABEL_VALUES:
            admitted.add(value)
        return value in admitted

    def _label_or_other(self, metric: str, kind: str, value: str) -> str:
        if self._admit_label(kind, value):
            return value
        if metric != "metrics_labels_dropped":
            self.counters["metrics_labels_dropped"].labels(metric).inc()
        return "other"
