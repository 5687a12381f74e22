"""Whether a checkpoint and the configuration fit together, and what bit-equal results depend on."""

from __future__ import annotations

import logging
import platform
from typing import TYPE_CHECKING, Any

import torch

from streamlearn.core.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from streamlearn.checkpoint.manifest import Checkpoint
    from streamlearn.config.root import Config

logger = logging.getLogger(__name__)

PARAMETERS_ADDED_LATER = {"strategy.agem.epsilon"}
"""Parameters added after format 1. A checkpoint without them is still compatible."""


def check_compatible(config: Config, checkpoint: Checkpoint) -> None:
    """Raise `ConfigurationError` if the configuration differs where the state depends on it."""
    ours, theirs = config.shaping(), checkpoint.manifest["shaping"]
    if "stream.source" not in theirs:  # written by an earlier version: only its status has the source
        theirs = {
            **theirs,
            "stream.source": checkpoint.read_json("status.json").get("source", ours["stream.source"]),
        }
    for key in sorted(PARAMETERS_ADDED_LATER & set(ours) - set(theirs)):
        recipe, _, parameter = key.rpartition(".")
        if any(known.startswith(f"{recipe}.") for known in theirs):
            logger.warning(
                "%s was written by a version without the parameter %s of %s: it is %s from now on",
                checkpoint.id,
                parameter,
                recipe,
                ours[key],
            )
            theirs = {**theirs, key: ours[key]}
    lines = _differences(theirs, ours)
    started = [task["name"] for task in checkpoint.read_json("state.json")["progress"]["tasks"]]
    listed = config.stream.topics
    if listed is not None and listed[: len(started)] != started:
        lines.append(
            f"stream.topics: the tasks {started} have started in this order and must stay first; "
            f"the configuration has {listed}"
        )
    if lines:
        raise ConfigurationError(
            f"{checkpoint.path}: not compatible with the configuration: {'; '.join(lines)}; "
            "restore the values of the checkpoint, or start a new job with another state_dir",
        )


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return a line for each value that differs between two configurations, with a hint if it concerns the outputs."""
    first, second = (
        list(dict.fromkeys(key.split(".")[1] for key in shaping if key.startswith("strategy.")))
        for shaping in (before, now)
    )
    lines = [] if set(first) == set(second) else [f"strategy: {' + '.join(first)}, now {' + '.join(second)}"]
    in_one = {*first} ^ {*second}  # the line above names these methods; their parameters need no lines
    differing = [
        key
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key) and not (key.startswith("strategy.") and key.split(".")[1] in in_one)
    ]
    lines += [f"{key}: the checkpoint has {before.get(key)!r}, the configuration {now.get(key)!r}" for key in differing]
    if {"classes", "grow_head"} & {*differing}:
        lines.append(
            "a job that has started cannot get more classes or switch grow_head on: start a new job with another state_dir, "
            "which reads the topics again; with grow_head: true and classes as a number it accepts new labels by itself"
        )
    return lines


def environment(config: Config) -> dict[str, Any]:
    """Return what bit-equal results depend on, besides the configuration and the stream."""
    return {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "flush_denormal": True,
        "device": config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu"),
    }
