"""Every Prometheus series, declared in one place. What is unknown is absent; a help text is the series' definition.

Counters start at 0 in each process, as Prometheus expects; totals over restarts are state, and shown by `status`.
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

from streamlearn.data import REJECT_REASONS

if TYPE_CHECKING:
    from streamlearn.data import Delivery, Partition, Progress
    from streamlearn.evaluation.matrix import AccuracyMatrix
    from streamlearn.learner import LearnStats
    from streamlearn.stream.reader import StreamStatus

PREFIX = "streamlearn_"
STATES = ("starting", "restoring", "running", "paused", "draining")
SAVE_TRIGGERS = ("interval", "task_end", "shutdown", "manual", "burst")
TASK_END_SOURCES = ("marker", "next_topic", "count", "idle", "command")  # of a task's end
START_CAUSES = ("first", "clean", "crash")  # of a start
SKIP_REASONS = ("retention", "corrupt", "oversize")  # why offsets are skipped
MAX_LABEL_VALUES = 100  # tasks, or topics, that get labels of their own
MAX_MATRIX_TASKS = 50
LOSS_SMOOTHING = 0.9

GAUGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "up_ready": ("1 when every readiness condition holds, else 0.", ()),
    "state": ("Lifecycle state: one series a state, 1 for the current one.", ("state",)),
    "heartbeat_timestamp_seconds": ("Unix time of the last turn of an internal loop.", ("loop",)),
    "start_timestamp_seconds": ("Unix time when this process started.", ()),
    "consumer_unread_records": (
        "Log end less the reader's next offset: what waits in the log, behind an open transaction too.",
        ("topic", "partition"),
    ),
    "consumer_position_offset": ("Next offset to be applied to the model.", ("topic", "partition")),
    "consumer_log_end_offset": ("The log's end when it was last asked for.", ("topic", "partition")),
    "consumer_lag_records": (
        "Log end less the next offset to be applied; where nothing was applied, the offsets that the log still holds.",
        ("topic", "partition"),
    ),
    "consumer_lag_seconds": ("Age of the newest applied record while the topic has lag, else 0.", ("topic",)),
    "consumer_committed_offset": ("Next offset of the last durable checkpoint.", ("topic", "partition")),
    "consumer_assigned_partitions": ("Partitions that are read now.", ()),
    "consumer_paused": ("1 while an operator has paused learning.", ()),
    "broker_connected": ("1 while the log answers.", ()),
    "broker_last_contact_timestamp_seconds": ("Unix time of the log's last answer.", ()),
    "train_loss": ("Training loss of the current task, exponentially smoothed over batches.", ("task",)),
    "train_prequential_accuracy_ratio": (
        "Accuracy of the model that probes see on each batch before it is learned, exponentially smoothed over batches.",
        ("task",),
    ),
    "train_gradient_norm": (
        "Norm of the gradient at the last step, penalty and projection included, before clipping.",
        (),
    ),
    "train_learning_rate": ("Learning rate of the last step.", ()),
    "train_batch_queue_samples": ("Samples read and not yet learned.", ()),
    "train_batch_queue_capacity_samples": ("Bound on the samples read ahead.", ()),
    "tasks_seen": ("Tasks begun.", ()),
    "task_active": ("1 for the task that is being learned, 0 for those that have ended.", ("task",)),
    "replay_buffer_samples": ("Stored samples of past tasks, for replay and for reference gradients.", ("task",)),
    "replay_agreement_ratio": (
        "Share of what is generated of a class that the solver takes for it, at the last task's end; of at most 200 classes.",
        ("task", "label"),
    ),
    "replay_buffer_capacity_samples": ("Bound on the stored samples.", ()),
    "replay_buffer_bytes": ("Bytes of the stored samples.", ()),
    "network_parameters": ("Parameters of the network, all of its tasks' columns included.", ()),
    "network_free_weights_ratio": ("Share of the packed weights that no task owns: the capacity left to PackNet.", ()),
    "importance_norm": ("L2 norm of the importance weights of all past tasks.", ()),
    "importance_last_update_timestamp_seconds": ("Unix time when importances were last consolidated.", ()),
    "probe_accuracy_ratio": ("Accuracy on the task's held-out probe, at the last evaluation.", ("task",)),
    "probe_accuracy_after_task_ratio": (
        "Accuracy matrix R[i,j]: on the probe of task j (task) after task i (trained_task) was learned.",
        ("trained_task", "task"),
    ),
    "probe_accuracy_best_ratio": (
        "Best accuracy on the task's probe at its own end, at the end of a later task, or now; absent until it has ended.",
        ("task",),
    ),
    "probe_loss": (
        "Mean cross-entropy on the task's probe, at the last evaluation, of the samples whose label competes.",
        ("task",),
    ),
    "probe_samples": ("Samples in the task's probe at the last evaluation; it grows until the task ends.", ("task",)),
    "probe_age_batches": (
        "Batches learned since the last evaluation: above 0, the figures of probes are older than the weights.",
        (),
    ),
    "probe_interval_batches": (
        "Batches from one evaluation to the next; each task's end has one of its own, and a slow stream further ones.",
        (),
    ),
    "probe_last_success_timestamp_seconds": (
        "Unix time of the last complete evaluation; after a restart, of the last one in the checkpoint.",
        (),
    ),
    "average_accuracy_ratio": ("ACC: mean probe accuracy over the tasks seen, at the last evaluation.", ()),
    "learning_accuracy_ratio": ("Mean over tasks of the accuracy on their probe when they ended.", ()),
    "backward_transfer": ("BWT: mean over earlier tasks of accuracy now less accuracy when the task ended.", ()),
    "forward_transfer": (
        "FWT: mean over later tasks of accuracy before the task began less accuracy untrained; absent in scenario class.",
        (),
    ),
    "forgetting_ratio": ("Best accuracy after any earlier task less accuracy now.", ("task",)),
    "average_forgetting_ratio": ("Mean forgetting over the tasks before the newest.", ()),
    "worst_forgetting_ratio": ("Largest forgetting of a task before the newest.", ()),
    "windowed_forgetting_ratio": (
        "WF: mean over tasks of the largest drop of accuracy, ever, within 10 evaluations in a row.",
        (),
    ),
    "min_accuracy_ratio": (
        "min-ACC: mean over the tasks before the newest of the lowest accuracy at any evaluation after the task's end.",
        (),
    ),
    "worst_case_accuracy_ratio": ("WC-ACC: accuracy on the newest of k tasks / k + (1 - 1/k) * min-ACC.", ()),
    "checkpoint_last_success_timestamp_seconds": ("Unix time of the last durable checkpoint.", ()),
    "checkpoint_last_size_bytes": ("Bytes of the last durable checkpoint, linked files included.", ()),
    "checkpoints_kept": ("Durable checkpoints on disk, after the last save.", ()),
    "checkpoint_records_since": ("Offsets applied since the last durable checkpoint.", ()),
    "state_dir_free_bytes": ("Free bytes on the file system of the state directory.", ()),
    "device_memory_allocated_bytes": ("Bytes of tensors on the device.", ("device",)),
    "device_memory_reserved_bytes": ("Bytes reserved by torch's caching allocator.", ("device",)),
    "device_memory_total_bytes": ("Memory of the device.", ("device",)),
}

COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "restarts": ("Starts from a state directory, by how the previous process ended.", ("cause",)),
    "records_consumed": ("Records applied, whatever became of their samples.", ("topic", "partition")),
    "samples_consumed": ("Samples of those records; an undecodable record counts as one.", ("topic",)),
    "consumed_bytes": ("Key and value bytes of those records.", ("topic",)),
    "samples_trained": ("Samples learned.", ("task",)),
    "samples_held_out": ("Samples kept for the probe, never learned.", ("task",)),
    "samples_late": ("Samples that came after their task had ended.", ("topic",)),
    "samples_rejected": ("Samples that cannot be used, now in the dead-letter topic.", ("topic", "reason")),
    "samples_duplicate": ("Samples of records that had already been applied.", ("topic",)),
    "samples_skipped": (
        "Samples of batches without a finite update, or without finite features.",
        ("reason",),
    ),
    "records_skipped_offsets": (
        "Offsets never seen: the log had lost them (`retention`), or their batch was `corrupt` or `oversize`.",
        ("topic", "reason"),
    ),
    "train_steps": ("Optimizer steps applied.", ("task",)),
    "train_steps_skipped": (
        "Optimizer steps dropped: nonfinite those of the solver, nonfinite_generator those of a generator alone.",
        ("reason",),
    ),
    "train_gradient_clipped": ("Optimizer steps whose gradient was clipped.", ()),
    "task_boundaries": ("Task ends, by how they were found.", ("source",)),
    "replay_samples_drawn": ("Samples drawn from stored ones into batches.", ()),
    "replay_samples_evicted": ("Stored samples that made room.", ()),
    "constraint_projections": (
        (
            "Optimizer steps whose gradient was projected, because it would have harmed a past task; of `agem` those whose "
            "reference has a squared norm above `epsilon`."
        ),
        (),
    ),
    "constraint_solver_failures": ("Projections that could not be solved: the step went on as it was.", ()),
    "probe_failures": ("Evaluations that gave a value that is not finite.", ("task",)),
    "checkpoints": ("Attempts to save.", ("result", "trigger")),
    "checkpoint_corrupt": ("Checkpoints refused by verification.", ()),
    "rollbacks": (
        "Returns to the newest checkpoint, because updates were not finite or past tasks lost more than `divergence.drop`.",
        (),
    ),
    "out_of_memory": (
        "Ends of the loop because host or device had no memory left. The process ends with it (75): few scrapes see it.",
        (),
    ),
    "errors": ("Errors handled.", ("component", "kind")),
    "dlq_records": (
        "Samples sent to the dead-letter topic; of `failure`, attempts that were not acknowledged.",
        ("result",),
    ),
    "control_requests": ("Requests that change something.", ("command", "result")),
    "metrics_labels_dropped": ("Increments of label values beyond the limit, counted under `other`.", ("metric",)),
}

HISTOGRAMS: dict[str, tuple[str, tuple[str, ...], tuple[float, ...]]] = {
    "record_delay_seconds": (
        "Time from a batch's newest record to its being learned.",
        (),
        (0.1, 0.3, 1, 3, 10, 30, 60, 300, 900, 3600),
    ),
    "train_batch_duration_seconds": (
        "Duration of learning one batch, all its updates.",
        (),
        (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10),
    ),
    "probe_duration_seconds": (
        "Duration of one evaluation of all probes.",
        (),
        (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
    ),
    "checkpoint_duration_seconds": (
        "Duration of a save, by phase: snapshot, for which learning waits, and write, beside it.",
        ("phase",),
        (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
    ),
}


class Gauges:
    """A collector of gauges that are absent until they are known, and again when they no longer are."""

    def __init__(self) -> None:
        self._values: dict[str, dict[tuple[str, ...], float]] = {name: {} for name in GAUGES}

    def set(self, name: str, value: float | None, *labels: str) -> None:
        """Set one child, or remove it where the value is None or not finite."""
        if value is None or not math.isfinite(value):
            self._values[name] = {key: old for key, old in self._values[name].items() if key != labels}
        else:
            self._values[name] = {**self._values[name], labels: float(value)}

    def replace(self, name: str, children: Mapping[Any, float | None]) -> None:
        """Set a whole family, by tuples of label values; children that are not named are removed."""
        self._values[name] = {k: float(v) for k, v in children.items() if v is not None and math.isfinite(v)}

    def collect(self) -> Iterator[Metric]:
        """Give every family that has a child."""
        for name, (text, labels) in GAUGES.items():
            if children := self._values[name]:
                family = GaugeMetricFamily(PREFIX + name, text, labels=labels)
                for key, value in children.items():
                    family.add_metric(key, value)
                yield family


class Metrics:
    """The series of one daemon, fed by its loop; a scrape only reads."""

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
        self._known: dict[str, set[str]] = {"task": set(), "topic": set()}
        self._declared: set[Partition | str] = set()  # topics and partitions whose counters exist
        self._smoothed: dict[tuple[str, str], float] = {}
        totals = ("drawn", "evicted", "projected", "failed", "dead letters", "dead letter failures")
        self._seen = dict.fromkeys(totals, 0)
        results = ("success", "failure")
        folded = [name for name, (_, labels) in COUNTERS.items() if {"topic", "task"} & set(labels)]
        closed: dict[str, Iterable[tuple[str, ...]]] = {
            "checkpoints": product(results, SAVE_TRIGGERS),
            "dlq_records": product(results),
            "metrics_labels_dropped": product(folded),
            "restarts": product(START_CAUSES),
            "samples_skipped": product(("nonfinite",)),
            "task_boundaries": product(TASK_END_SOURCES),
            "train_steps_skipped": product(("nonfinite", "nonfinite_generator")),
        }
        for name, children in closed.items():
            for labels in children:
                self.count(name, 0, *labels)

    def expose(self, accept: str) -> tuple[bytes, str]:
        """Return the exposition and its content type, Prometheus text or OpenMetrics."""
        encoder, content_type = choose_encoder(accept)
        return encoder(self.registry), content_type

    def count(self, name: str, amount: float, *labels: str) -> None:
        """Add to a counter; the cardinality guard folds label values beyond its limit into `other`."""
        kinds = COUNTERS[name][1]
        if not amount and not all(map(self._may_show, kinds, labels)):
            return
        allowed = [self._guard(name, kind, value) for kind, value in zip(kinds, labels, strict=True)]
        counter = self.counters[name].labels(*allowed) if kinds else self.counters[name]
        if amount:
            counter.inc(amount)

    def record_start(self, versions: Mapping[str, str], model: Mapping[str, str], started: float, cause: str) -> None:
        """Say what runs, since when, and how the process before it ended."""
        Info(PREFIX + "build", "Versions of what runs.", registry=self.registry).info(dict(versions))
        Info(PREFIX + "model", "What is learned, and how.", registry=self.registry).info(dict(model))
        self.gauges.set("start_timestamp_seconds", started)
        self.count("restarts", 1, cause)

    def clear_training_gauges(self) -> None:
        """Show nothing of what was learned from here on: it is not in the state that is restored now."""
        self._smoothed.clear()
        for name in ("train_loss", "train_prequential_accuracy_ratio", "train_gradient_norm"):
            self.gauges.replace(name, {})
        self.gauges.set("importance_last_update_timestamp_seconds", None)

    def declare_topics(self, topics: Iterable[str]) -> None:
        """Let the counters of topics exist at 0, so that a scrape can see their first increase.

        In the order given: where there are too many topics, the first ones have series of their own.
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
        """Do the same for partitions that the reader has found, whose topics no configuration may have named."""
        for place in partitions:
            if place in self._declared:
                continue
            self._declared.add(place)
            self.declare_topics([place[0]])
            self.count("records_consumed", 0, place[0], str(place[1]))

    def record_delivery(self, delivery: Delivery, stats: LearnStats | None, task: str, now: float) -> None:
        """Count what a turn of the loop applied."""
        found = delivery.observations
        for (topic, partition), records in found.records.items():
            self.count("records_consumed", records, topic, str(partition))
        for topic, num_bytes in found.num_bytes.items():
            self.count("consumed_bytes", num_bytes, topic)
        for topic, samples in found.consumed.items():
            self.count("samples_consumed", samples, topic)
        for (topic, outcome), samples in found.outcomes.items():
            if outcome in {"held_out", "late"}:
                self.count(f"samples_{outcome}", samples, topic)
            elif outcome == "duplicates":
                self.count("samples_duplicate", samples, topic)
        for (topic, reason), samples in found.rejected.items():
            self.count("samples_rejected", samples, topic, reason)
        for (topic, reason), offsets in found.lost_offsets.items():
            self.count("records_skipped_offsets", offsets, topic, reason)
        if delivery.task_end_reason is not None:
            self.count("task_boundaries", 1, delivery.task_end_reason)
        if stats is None:
            return
        if not delivery.is_refinement:
            trained = stats.samples if stats.outcome == "trained" else 0
            self.count("samples_trained", trained, task)
            self.count("samples_skipped", stats.samples - trained + stats.unusable, "nonfinite")
            self._smooth("train_prequential_accuracy_ratio", task, stats.accuracy if stats.samples else None)
            if delivery.newest_timestamp is not None:
                self.histograms["record_delay_seconds"].observe(max(0.0, now - delivery.newest_timestamp))
        self.count("train_steps", stats.applied, task)
        self.count("train_steps_skipped", stats.steps - stats.applied, "nonfinite")
        self.count("train_steps_skipped", stats.generator_dropped, "nonfinite_generator")
        self.count("train_gradient_clipped", stats.clipped)
        self.gauges.set("train_gradient_norm", stats.gradient_norm)
        self._smooth("train_loss", task, stats.loss)

    def record_evaluation(
        self, matrix: AccuracyMatrix, progress: Progress, sizes: Mapping[int, int], evaluated: float | None
    ) -> None:
        """Show the newest evaluation, when it was, and all figures made of the matrix."""
        names = {task.index: task.name for task in progress.tasks if self._may_show("task", task.name)}
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
        """Show where the reader and the applied positions stand."""
        self.declare_partitions(status.end_offsets)
        applied = {p: position.offset for p, position in progress.positions.by_partition.items()}
        shown = {
            p: (p[0], str(p[1])) for p in {*status.end_offsets, *applied, *committed} if self._may_show("topic", p[0])
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
        active = {(t.name,): t.state != "ended" for t in progress.tasks if self._may_show("task", t.name)}
        self.gauges.replace("task_active", active)

    def record_memory(self, sizes: Mapping[str, object], names: Mapping[int, str]) -> None:
        """Show what replay stores."""
        samples = sizes.get("samples")
        if isinstance(samples, Mapping):
            shown = {t: names[t] for t in samples if t in names and self._may_show("task", names[t])}
            self.gauges.replace("replay_buffer_samples", {(name,): samples[t] for t, name in shown.items()})
        for name, key in (("replay_buffer_capacity_samples", "capacity"), ("replay_buffer_bytes", "bytes")):
            value = sizes.get(key)
            self.gauges.set(name, value if isinstance(value, int) else None)
        for name, key in (("replay_samples_drawn", "drawn"), ("replay_samples_evicted", "evicted")):
            value = sizes.get(key)
            if isinstance(value, int):
                self.add_increase(name, key, value)

    def record_agreement(self, agreement: Mapping[tuple[str, str], float]) -> None:
        """Show how well a generator replays each class of each task."""
        shown = {(task, label): ratio for (task, label), ratio in agreement.items() if self._may_show("task", task)}
        self.gauges.replace("replay_agreement_ratio", shown)

    def record_constraint(self, counts: Mapping[str, int]) -> None:
        """Count the steps that a constraint changed."""
        for name, key in (("constraint_projections", "projected"), ("constraint_solver_failures", "failed")):
            if key in counts:
                self.add_increase(name, key, counts[key])

    def add_increase(self, name: str, key: str, total: int, *labels: str) -> None:
        """Add to a counter what a running total has gained since it was last looked at."""
        self.count(name, max(0, total - self._seen[key]), *labels)
        self._seen[key] = total

    def set_baseline(self, key: str, total: int) -> None:
        """Say that a running total that was restored from state does not count in this process."""
        self._seen[key] = total

    def record_state(self, state: str, *, ready: bool) -> None:
        """Show the lifecycle state, and whether every readiness condition holds."""
        self.gauges.replace("state", {(name,): name == state for name in STATES})
        self.gauges.set("up_ready", ready)
        self.gauges.set("consumer_paused", state == "paused")

    def _smooth(self, name: str, task: str, value: float | None) -> None:
        if value is None or not math.isfinite(value) or not self._may_show("task", task):
            return
        old = self._smoothed.get((name, task), value)
        self._smoothed[name, task] = LOSS_SMOOTHING * old + (1 - LOSS_SMOOTHING) * value
        self.gauges.replace(name, {(task,): self._smoothed[name, task]})  # what earlier tasks had is not of now

    def _may_show(self, kind: str, value: str) -> bool:
        known = self._known.get(kind)
        if known is None:
            return True
        if value not in known and len(known) < MAX_LABEL_VALUES:
            known.add(value)
        return value in known

    def _guard(self, metric: str, kind: str, value: str) -> str:
        if self._may_show(kind, value):
            return value
        if metric != "metrics_labels_dropped":
            self.counters["metrics_labels_dropped"].labels(metric).inc()
        return "other"
