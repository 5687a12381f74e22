"""The rules and the dashboard in deploy/, checked by Prometheus itself and against a real daemon."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import torch
import yaml

from benchmarks.kafka_broker import free_port
from streamlearn.control.api import COMMANDS
from streamlearn.core.deliveries import Delivery
from streamlearn.core.progress import Progress
from streamlearn.core.samples import REJECT_REASONS, Batch
from streamlearn.core.states import SaveTrigger
from streamlearn.core.tasks import TaskEndReason
from streamlearn.learning.stats import LearnStats
from streamlearn.metrics import (
    COUNTERS,
    GAUGES,
    HISTOGRAMS,
    MAX_LABEL_VALUES,
    PREFIX,
    SKIP_REASONS,
    START_CAUSES,
    STATES,
    Metrics,
)
from streamlearn.stream.status import StreamStatus
from tests.support import jobs, tables
from tests.support.agreement import has_finished, scrape

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
RULES = DEPLOY / "prometheus" / "streamlearn.rules.yml"
DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboards" / "streamlearn.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
ALERTS = [
    rule["alert"] for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"] if "alert" in rule
]

LABELS = 'job="streamlearn", instance="a:1"'
FAULTS: dict[str, dict[str, str]] = {
    "Down": {f"up{{{LABELS}}}": "0x60"},
    "NotReady": {f"streamlearn_up_ready{{{LABELS}}}": "0x60"},
    "CrashLooping": {f"streamlearn_start_timestamp_seconds{{{LABELS}}}": "1+60x60"},
    "Stalled": {f'streamlearn_heartbeat_timestamp_seconds{{{LABELS}, loop="consume"}}': "0x60"},
    "BrokerUnavailable": {f"streamlearn_broker_connected{{{LABELS}}}": "0x60"},
    "LagGrowing": {f'streamlearn_consumer_unread_records{{{LABELS}, topic="t", partition="0"}}': "2000+10x60"},
    "LagOld": {
        f'streamlearn_consumer_lag_seconds{{{LABELS}, topic="t"}}': "700x60",
        f'streamlearn_consumer_unread_records{{{LABELS}, topic="t", partition="0"}}': "5x60",
    },
    "Paused": {f"streamlearn_consumer_paused{{{LABELS}}}": "1x60"},
    "NoProgress": {
        f'streamlearn_consumer_unread_records{{{LABELS}, topic="t", partition="0"}}': "5x60",
        f'streamlearn_train_steps_total{{{LABELS}, task="t"}}': "7x60",
        f"streamlearn_consumer_paused{{{LABELS}}}": "0x60",
    },
    "DataLoss": {f'streamlearn_records_skipped_offsets_total{{{LABELS}, topic="t", reason="retention"}}': "0x30 5x30"},
    "LateSamples": {f'streamlearn_samples_late_total{{{LABELS}, topic="t"}}': "0x30 5x30"},
    "RejectRatioHigh": {
        f'streamlearn_samples_rejected_total{{{LABELS}, topic="t", reason="decode"}}': "0+5x60",
        f'streamlearn_samples_consumed_total{{{LABELS}, topic="t"}}': "0+100x60",
    },
    "DlqFailing": {f'streamlearn_dlq_records_total{{{LABELS}, result="failure"}}': "0+1x60"},
    "NonFinite": {f'streamlearn_train_steps_skipped_total{{{LABELS}, reason="nonfinite"}}': "0+2x60"},
    "CheckpointStale": {
        f"streamlearn_checkpoint_last_success_timestamp_seconds{{{LABELS}}}": "0x60",
        f"streamlearn_checkpoint_records_since{{{LABELS}}}": "9x60",
    },
    "CheckpointFailing": {f'streamlearn_checkpoints_total{{{LABELS}, result="failure", trigger="interval"}}': "0+1x60"},
    "CheckpointCorrupt": {f"streamlearn_checkpoint_corrupt_total{{{LABELS}}}": "0x30 1x30"},
    "StateDiskFilling": {
        f"streamlearn_state_dir_free_bytes{{{LABELS}}}": "100x60",
        f"streamlearn_checkpoint_last_size_bytes{{{LABELS}}}": "50x60",
    },
    "Forgetting": {
        f'streamlearn_forgetting_ratio{{{LABELS}, task="t"}}': "0.5x60",
        f'streamlearn_probe_samples{{{LABELS}, task="t"}}': "100x60",
    },
    "ReplayPoor": {
        f'streamlearn_replay_agreement_ratio{{{LABELS}, task="t", label="cat"}}': "0.9x60",
        f'streamlearn_replay_agreement_ratio{{{LABELS}, task="t", label="dog"}}': "0.4x60",
    },
    "ProbesStale": {
        f"streamlearn_probe_last_success_timestamp_seconds{{{LABELS}}}": "0x60",
        f'streamlearn_train_steps_total{{{LABELS}, task="t"}}': "0+9x60",
    },
    "MemoryGrowth": {f"process_resident_memory_bytes{{{LABELS}}}": "1e9+1e8x600"},
    "CardinalityGuard": {f'streamlearn_metrics_labels_dropped_total{{{LABELS}, metric="m"}}': "0x30 1x30"},
    "DeviceMemoryHigh": {
        f'streamlearn_device_memory_allocated_bytes{{{LABELS}, device="cuda"}}': "95x60",
        f'streamlearn_device_memory_total_bytes{{{LABELS}, device="cuda"}}': "100x60",
    },
}
OF_OTHER_SCENARIOS = "forward_transfer"  # absent in scenario class, which the test job uses
OF_OTHER_STRATEGIES = {"Free weights"}  # only PackNet has them


def promtool(*arguments: str | Path) -> None:
    """Run promtool; fail with its output if it fails."""
    jobs.require(shutil.which("promtool"), "promtool (Debian: prometheus)")
    done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_configuration_and_rules_are_valid() -> None:
    """Promtool accepts the Prometheus configuration and the rules; every lint warning is an error."""
    promtool("check", "config", DEPLOY / "prometheus" / "prometheus.yml")
    promtool("check", "rules", "--lint=all", "--lint-fatal", RULES)


def test_every_alert_fires_on_its_fault_only(tmp_path: Path) -> None:
    """`promtool test rules`: each alert fires on its fault, and none fires with the series of a healthy daemon."""
    assert {f"Streamlearn{name}" for name in FAULTS} == set(ALERTS)
    tests: list[dict[str, Any]] = [
        {
            "interval": "1m",
            "input_series": [{"series": series, "values": values} for series, values in inputs.items()],
            "promql_expr_test": [
                {
                    "expr": f'count(ALERTS{{alertname="Streamlearn{name}", alertstate="firing"}})',
                    "eval_time": "590m" if name == "MemoryGrowth" else "35m",
                    "exp_samples": [{"labels": "{}", "value": 1}],
                }
            ],
        }
        for name, inputs in FAULTS.items()
        if name not in {"Stalled", "CheckpointStale", "ProbesStale"}
    ]
    tests += [  # these alerts use time(), which starts at 0 in a test
        {
            "interval": "1m",
            "input_series": [{"series": s, "values": re.sub(r"x60$", "x120", v)} for s, v in FAULTS[name].items()],
            "promql_expr_test": [
                {
                    "expr": f'count(ALERTS{{alertname="Streamlearn{name}", alertstate="firing"}})',
                    "eval_time": "100m",
                    "exp_samples": [{"labels": "{}", "value": 1}],
                }
            ],
        }
        for name in ("Stalled", "CheckpointStale", "ProbesStale")
    ]
    healthy = {
        f"up{{{LABELS}}}": "1x60",
        f"streamlearn_up_ready{{{LABELS}}}": "1x60",
        f"streamlearn_broker_connected{{{LABELS}}}": "1x60",
        f'streamlearn_heartbeat_timestamp_seconds{{{LABELS}, loop="consume"}}': "0+60x60",
        f'streamlearn_consumer_unread_records{{{LABELS}, topic="t", partition="0"}}': "0x60",
        f'streamlearn_consumer_lag_seconds{{{LABELS}, topic="t"}}': "0x60",
        f'streamlearn_samples_consumed_total{{{LABELS}, topic="t"}}': "0+100x60",
        f'streamlearn_samples_rejected_total{{{LABELS}, topic="t", reason="decode"}}': "0x60",
        f"streamlearn_checkpoint_last_success_timestamp_seconds{{{LABELS}}}": "0+60x60",
        f"streamlearn_checkpoint_records_since{{{LABELS}}}": "5x60",
        f'streamlearn_forgetting_ratio{{{LABELS}, task="t"}}': "0.05x60",
        f'streamlearn_probe_samples{{{LABELS}, task="t"}}': "1000x60",
        # 7 of 12 samples: with so few samples this may be chance
        f'streamlearn_forgetting_ratio{{{LABELS}, task="small"}}': "0.58x60",
        f'streamlearn_probe_samples{{{LABELS}, task="small"}}': "12x60",
    }
    tests.append(
        {
            "interval": "1m",
            "input_series": [{"series": series, "values": values} for series, values in healthy.items()],
            "promql_expr_test": [{"expr": "count(ALERTS)", "eval_time": "50m", "exp_samples": []}],
        }
    )
    check_rules(tmp_path, tests)


def check_rules(tmp_path: Path, tests: list[dict[str, Any]]) -> None:
    """Run promtool's tests of the rules."""
    path = tmp_path / "tests.yml"
    path.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": tests}))
    promtool("test", "rules", path)


START = f"streamlearn_start_timestamp_seconds{{{LABELS}}}"
OLD = "-100000x150"  # a daemon that started a day ago
LATER = "_x70 -100000x80"  # the same, scraped from minute 70 on
RESTARTED = "-100000x70 4200x80"  # a process that started a day ago, and its successor from minute 70 on
GROWTH_ALERTS = {  # alert -> a counter that must not grow, and the window of the alert in minutes
    "DataLoss": (f'streamlearn_records_skipped_offsets_total{{{LABELS}, topic="t", reason="retention"}}', 15),
    "LateSamples": (f'streamlearn_samples_late_total{{{LABELS}, topic="t"}}', 15),
    "DlqFailing": (f'streamlearn_dlq_records_total{{{LABELS}, result="failure"}}', 10),
    "CheckpointFailing": (f'streamlearn_checkpoints_total{{{LABELS}, result="failure", trigger="interval"}}', 15),
    "CheckpointCorrupt": (f"streamlearn_checkpoint_corrupt_total{{{LABELS}}}", 60),
    "CardinalityGuard": (f'streamlearn_metrics_labels_dropped_total{{{LABELS}, metric="m"}}', 60),
    "NonFinite": (f'streamlearn_train_steps_skipped_total{{{LABELS}, reason="nonfinite"}}', 10),
}


def fires(name: str, inputs: dict[str, str], at: dict[int, bool]) -> dict[str, Any]:
    """Return a promtool test of whether an alert fires, by minute."""
    expr = f'count(ALERTS{{alertname="Streamlearn{name}", alertstate="firing"}})'
    fired = [{"labels": "{}", "value": 1}]
    return {
        "interval": "1m",
        "input_series": [{"series": series, "values": values} for series, values in inputs.items()],
        "promql_expr_test": [
            {"expr": expr, "eval_time": f"{minute}m", "exp_samples": fired if yes else []} for minute, yes in at.items()
        ],
    }


def test_alerts_see_the_first_increase(tmp_path: Path) -> None:
    """An alert fires if a counter is above 0 at its first scrape, and if a restart brings a counter back to its old value.

    It ends when its window is over. A new Prometheus does not alert on what an old process counted before.
    """
    tests = []
    for name, (series, window) in GROWTH_ALERTS.items():
        ended = 70 + window + 3
        if name != "NonFinite":  # its only series exists at 0 from the start
            tests.append(fires(name, {series: "_x70 9x80", START: OLD}, {69: False, 72: True, ended: False}))
        tests.append(fires(name, {series: "9x150", START: RESTARTED}, {69: False, 72: True, ended: False}))
        tests.append(fires(name, {series: "_x70 9x80", START: LATER}, {72: False, ended: False}))
    check_rules(tmp_path, tests)


def test_alerts_see_what_never_happened(tmp_path: Path) -> None:
    """Alerts on a missing event fire even if the event never happened, so that its series does not exist."""
    steps = {f'streamlearn_train_steps_total{{{LABELS}, task="t"}}': "0+9x150"}
    unread = {f'streamlearn_consumer_unread_records{{{LABELS}, topic="t", partition="0"}}': "5x150"}
    paused = f"streamlearn_consumer_paused{{{LABELS}}}"
    since = {f"streamlearn_checkpoint_records_since{{{LABELS}}}": "9x150"}
    saved = {f"streamlearn_checkpoint_last_success_timestamp_seconds{{{LABELS}}}": "0+60x150"}
    probe = {f'streamlearn_probe_samples{{{LABELS}, task="t"}}': "9x150"}
    evaluated = {f"streamlearn_probe_last_success_timestamp_seconds{{{LABELS}}}": "0+60x150"}
    check_rules(
        tmp_path,
        [
            fires("NoProgress", {**unread, paused: "0x150"}, {25: True}),
            fires("NoProgress", {**unread, **steps, paused: "0x150"}, {25: False}),
            fires("NoProgress", {**unread, paused: "1x150"}, {25: False}),
            fires("CheckpointStale", {**since, START: "0x150"}, {10: False, 20: True}),
            fires("CheckpointStale", {**since, **saved, START: "0x150"}, {20: False}),
            fires("ProbesStale", {**probe, **steps, START: "0x150"}, {25: False, 50: True}),
            fires("ProbesStale", {**probe, **steps, **evaluated, START: "0x150"}, {50: False}),
            fires("ProbesStale", {**probe, START: "0x150"}, {50: False}),
        ],
    )


def test_counters_of_topics_exist_at_zero() -> None:
    """A topic's counters exist before they grow, whether the configuration names the topic or a pattern finds it."""
    metrics = Metrics()
    metrics.declare_topics(["named"])
    status = StreamStatus(end_offsets={("found", 1): 10})
    metrics.record_stream(status, Progress(), {}, 0)
    text = metrics.expose("")[0].decode()
    for topic in ("named", "found"):
        for name, labels in (
            ("records_skipped_offsets", f'reason="retention",topic="{topic}"'),
            ("samples_late", f'topic="{topic}"'),
            ("samples_rejected", f'reason="decode",topic="{topic}"'),
            ("train_steps", f'task="{topic}"'),
            ("probe_failures", f'task="{topic}"'),
        ):
            assert f"streamlearn_{name}_total{{{labels}}} 0.0" in "\n".join(map(sort_labels, text.splitlines()))
    assert 'streamlearn_records_consumed_total{partition="1",topic="found"} 0.0' in map(sort_labels, text.splitlines())
    metrics.declare_topics(f"t{number}" for number in range(500))
    assert 'streamlearn_metrics_labels_dropped_total{metric="samples_late"} 0.0' in metrics.expose("")[0].decode()


def sort_labels(line: str) -> str:
    """Return a line of /metrics with its labels sorted."""
    return re.sub(r"\{(.*)\}", lambda match: "{" + ",".join(sorted(match[1].split(","))) + "}", line)


def test_training_gauges_are_of_the_current_task_alone() -> None:
    """Loss and prequential accuracy have one series, because their values for an earlier task are old."""
    metrics = Metrics()
    for task in ("a", "b"):
        batch = Batch(torch.zeros(1, 1), torch.zeros(1), torch.zeros(1))
        metrics.record_delivery(Delivery(batch=batch), LearnStats(0, 1, 1, 1, 0, 0.5, 0.5, 1.0), task, 0.0)
    lines = metrics.expose("")[0].decode().splitlines()
    for name in ("train_loss", "train_prequential_accuracy_ratio"):
        assert [line for line in lines if line.startswith(PREFIX + name)] == [f'{PREFIX}{name}{{task="b"}} 0.5']


def test_runbook_urls_are_absolute(tmp_path: Path) -> None:
    """A real Prometheus serves the runbooks at the URL that its alerts name."""
    jobs.require(shutil.which("prometheus"), "prometheus")
    urls = {
        rule["annotations"]["runbook_url"]
        for group in yaml.safe_load(RULES.read_text())["groups"]
        for rule in group["rules"]
        if "alert" in rule
    }
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["prometheus"]
    assets = next(part.split("=")[1] for part in compose["command"] if part.startswith("--web.user-assets"))
    assert f"../docs:{assets}:ro" in compose["volumes"]
    port = free_port()
    (tmp_path / "prometheus.yml").write_text("{}")
    command = ["prometheus", f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data",
               f"--web.listen-address=127.0.0.1:{port}", f"--web.user-assets={ROOT}/docs", "--log.level=error"]  # fmt: skip
    prometheus = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + 60
        url = f"http://127.0.0.1:{port}"
        (page,) = {address.replace("{{ externalURL }}", url).split("#")[0] for address in urls}
        while True:
            try:
                with urllib.request.urlopen(page, timeout=10) as answer:
                    assert answer.read() == (ROOT / "docs" / "runbooks.md").read_bytes()
                break
            except urllib.error.URLError:
                assert time.monotonic() < deadline, "Prometheus does not answer"
                time.sleep(0.1)
    finally:
        prometheus.terminate()
        prometheus.wait(20)


def test_every_alert_has_its_runbook() -> None:
    """`runbook_url` names a section that exists, and the section has the alert's summary and severity."""
    text = (ROOT / "docs" / "runbooks.md").read_text()
    for group in yaml.safe_load(RULES.read_text())["groups"]:
        for rule in (rule for rule in group["rules"] if "alert" in rule):
            head = f"## {rule['alert']}\n\n*{rule['annotations']['summary']}* ({rule['labels']['severity']}).\n"
            assert head in text
            assert rule["annotations"]["runbook_url"].endswith(f"/runbooks.md#{rule['alert'].lower()}")


def fill_variables(query: str) -> str:
    """Return a query with values in place of Grafana's variables."""
    return re.sub(
        r"\$(job|name|instance|topic|task)", ".*", query.replace("$__rate_interval", "1m").replace("$__interval", "1m")
    )


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_panels_are_well_made(panel: dict[str, Any]) -> None:
    """Each has a title, a description, a unit, the selected data source, and valid queries by job and instance."""
    assert panel["title"]
    assert panel["description"]
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["datasource"]["uid"] == "${datasource}"
    for target in panel["targets"]:
        promql_parser.parse(fill_variables(target["expr"]))
        assert 'job=~"$job"' in target["expr"]
        assert 'instance=~"$instance"' in target["expr"]
        if "_total" in target["expr"] or "_bucket" in target["expr"]:
            assert "[$__rate_interval]" in target["expr"]


def test_dashboard_is_provisionable() -> None:
    """It has a fixed uid, is not editable, and needs no input on import."""
    assert (DASHBOARD["uid"], DASHBOARD["editable"], DASHBOARD["id"]) == ("streamlearn-overview", False, None)
    assert "__inputs" not in DASHBOARD
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def used_metrics(text: str) -> set[str]:
    """Return the names of streamlearn's series in a text."""
    return set(re.findall(r"\bstreamlearn_[a-z_]+[a-z]\b", text))


def declared() -> set[str]:
    """Return the names of all series that metrics.py declares, as they are on /metrics."""
    names = {PREFIX + name for name in GAUGES} | {f"{PREFIX}{name}_total" for name in COUNTERS}
    names |= {f"{PREFIX}{name}_{part}" for name in HISTOGRAMS for part in ("bucket", "sum", "count")}
    return names | {"streamlearn_build_info", "streamlearn_model_info"}


def test_only_declared_series_are_used() -> None:
    """No alert, rule or panel queries a series that the daemon does not declare."""
    panels = " ".join(target["expr"] for panel in PANELS for target in panel["targets"])
    rules = " ".join(rule["expr"] for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"])
    recorded = {name for name in used_metrics(rules) if ":" in name} | {"streamlearn_samples_rejected"}
    assert used_metrics(panels + rules) - declared() - recorded == set()


def test_every_series_is_documented() -> None:
    """docs/metrics.md lists each series with its help text; `python -m tests.support.tables` writes the tables."""
    assert (ROOT / "docs" / "metrics.md").read_text() == tables.with_tables("metrics.md")


def test_label_values_are_documented_and_exist() -> None:
    """docs/metrics.md, the code and the series at 0 agree on the values of each label with fixed values."""
    text = (ROOT / "docs" / "metrics.md").read_text()
    known = {
        "`reason` of a rejection": REJECT_REASONS,
        "`trigger`": tuple(SaveTrigger),
        "`state`": STATES,
        "`source` of a task's end": tuple(TaskEndReason),
        "`cause` of a start": START_CAUSES,
        "`command` of a control request": COMMANDS,
        "`reason` of skipped offsets": SKIP_REASONS,
    }
    for what, values in known.items():
        assert f"{what} ({', '.join(values)})" in text
    code = "".join(path.read_text() for path in (ROOT / "streamlearn" / "stream").glob("*.py"))
    reasons = set(re.findall(r"\.skip_lost_offsets\([^\n]*, \"(\w+)\"\)", code))
    assert {"corrupt", "retention"} <= reasons <= set(SKIP_REASONS)
    shown = Metrics().expose("")[0].decode()
    for source in TaskEndReason:
        assert f'streamlearn_task_boundaries_total{{source="{source}"}} 0.0' in shown


def test_a_gauge_of_unknown_value_is_absent() -> None:
    """A new process exposes no gauge whose value it cannot know, and never NaN."""
    text, _ = Metrics().expose("")
    exposed = used_metrics(text.decode())
    assert exposed & {PREFIX + name for name in GAUGES} == set()
    metrics = Metrics()
    metrics.gauges.set("train_loss", math.nan, "t")
    metrics.gauges.set("average_accuracy_ratio", 0.5)
    metrics.gauges.set("average_accuracy_ratio", None)
    assert "NaN" not in metrics.expose("")[0].decode()
    assert "average_accuracy_ratio" not in metrics.expose("")[0].decode()


def test_cardinality_is_bounded() -> None:
    """After a hundred topics a counter counts new ones under `other`, and the number of these increments is counted."""
    metrics = Metrics()
    for number in range(150):
        metrics.count("samples_late", 2, f"t{number}")
    text = metrics.expose("")[0].decode()
    assert 'streamlearn_samples_late_total{topic="other"} 100.0' in text
    assert 'streamlearn_metrics_labels_dropped_total{metric="samples_late"} 50.0' in text


def test_stored_samples_have_a_bounded_number_of_series() -> None:
    """After a hundred tasks the gauge of stored samples leaves the later ones out."""
    metrics, count = Metrics(), MAX_LABEL_VALUES + 50
    metrics.record_memory({"samples": dict.fromkeys(range(count), 3)}, {n: f"t{n}" for n in range(count)})
    shown = re.findall(
        r'^streamlearn_replay_buffer_samples{task="(\w+)"} 3.0', metrics.expose("")[0].decode(), re.MULTILINE
    )
    assert shown == [f"t{n}" for n in range(MAX_LABEL_VALUES)]


def test_every_panel_is_answered(tmp_path: Path) -> None:
    """A real Prometheus that scrapes a real daemon has finite values for every query of every panel."""
    jobs.require(shutil.which("prometheus"), "prometheus")
    config = jobs.write_config(tmp_path / "job", stream={"on_finished": "wait", "batch_size": 20})
    with jobs.Daemon(config) as daemon:
        daemon.until(lambda status: status["state"] == "running")
        port = free_port()
        settings = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
        settings["global"] = {"scrape_interval": "500ms", "evaluation_interval": "1s"}
        settings["rule_files"] = [str(RULES)]
        settings["scrape_configs"][0]["static_configs"][0]["targets"] = [daemon.http.removeprefix("http://")]
        (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(settings))
        command = ["prometheus", f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data",
                   f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"]  # fmt: skip
        prometheus = subprocess.Popen(command)
        try:
            await_scrapes(port, 2)
            jobs.publish_embedded(tmp_path / "job" / "topics.sqlite", 300)
            daemon.until(has_finished)
            await_scrapes(port, int(scrapes(port)) + 4)
            empty = [
                f"{panel['title']}: {target['expr']}"
                for panel in PANELS
                for target in panel["targets"]
                if panel["title"] not in OF_OTHER_STRATEGIES
                and OF_OTHER_SCENARIOS not in target["expr"]
                and not finite(ask(port, fill_variables(target["expr"])))
            ]
            assert empty == []
            for variable in DASHBOARD["templating"]["list"][1:]:
                match = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
                assert match is not None
                assert {result["metric"].get(match[2]) for result in ask(port, fill_variables(match[1]))} != set()
            exposed = {name for name, _ in scrape(daemon.http)}
            assert {
                name for name in exposed if name.startswith(("probe", "samples")) and PREFIX + name not in declared()
            } == set()
        finally:
            prometheus.terminate()
            prometheus.wait(20)
        assert daemon.stop() == 0


def scrapes(port: int) -> float:
    """Return the number of scrapes of the daemon in the last minute, 0 while Prometheus does not answer."""
    try:
        found = ask(port, "count_over_time(streamlearn_heartbeat_timestamp_seconds[1m])")
    except OSError:
        return 0.0
    return float(found[0]["value"][1]) if found else 0.0


def await_scrapes(port: int, count: int) -> None:
    """Wait until the daemon was scraped `count` times."""
    deadline = time.monotonic() + 60
    while scrapes(port) < count:
        assert time.monotonic() < deadline, "Prometheus does not scrape"
        time.sleep(0.2)


def ask(port: int, query: str) -> list[Any]:
    """Return the result of an instant query; fail if Prometheus refuses it."""
    url = f"http://127.0.0.1:{port}/api/v1/query?" + urllib.parse.urlencode({"query": query})
    with urllib.request.urlopen(url, timeout=10) as answer:
        tree = json.loads(answer.read())
    assert tree["status"] == "success"
    found: list[Any] = tree["data"]["result"]
    return found


def finite(results: list[Any]) -> bool:
    """Return whether there are results and all are finite."""
    return bool(results) and all(math.isfinite(float(result["value"][1])) for result in results)


def test_compose_file_is_valid() -> None:
    """The compose file matches the schema of the Compose specification."""
    command = [
        sys.executable,
        "-m",
        "check_jsonschema",
        "--builtin-schema",
        "vendor.compose-spec",
        str(DEPLOY / "compose.yaml"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_deployed_configuration_is_valid() -> None:
    """The job of the compose file is valid, and reads the topics that the producer there publishes."""
    from streamlearn.config.loader import load
    from streamlearn.learning.strategies.recipes import RECIPES

    config = load(DEPLOY / "streamlearn.yaml", RECIPES, {})
    assert config.stream.topics == ["digits-0-1", "digits-2-3", "digits-4-5", "digits-6-7", "digits-8-9"]
    assert str(config.service.port) in (DEPLOY / "prometheus" / "prometheus.yml").read_text()


def test_of_too_many_topics_the_first_have_series() -> None:
    """The first topics in the order of learning get series of their own, not random ones."""
    metrics = Metrics()
    names = [f"t{number:03d}" for number in range(3 * MAX_LABEL_VALUES)]
    metrics.declare_topics(names)
    metrics.declare_partitions((name, 0) for name in names)
    text = metrics.expose("text/plain")[0].decode()
    for name in ("streamlearn_samples_consumed_total", "streamlearn_records_consumed_total"):
        shown = re.findall(rf'^{name}{{.*?topic="(\w+)"', text, re.MULTILINE)
        assert sorted(shown) == names[:MAX_LABEL_VALUES]
