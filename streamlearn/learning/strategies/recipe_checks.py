"""Checks of recipes: each yields why a recipe cannot work with the rest of the configuration, and what is accepted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from streamlearn.core.config import InputConfig, TextInputConfig
    from streamlearn.learning.strategies.config import CheckedConfig


def refuse_momentum(config: CheckedConfig, name: str) -> Iterator[str]:
    """Refuse an optimizer with momentum: it also moves along earlier gradients, which the projection did not change."""
    o = config.learner.optimizer
    if config.strategy[name]["momentum"] == "refuse" and (o.name != "sgd" or o.momentum):
        used = f"{o.name} with momentum {o.momentum}" if o.name == "sgd" else o.name
        yield (
            f"learner.optimizer is {used}: momentum undoes the projection; "
            f"accepted: {{name: sgd, momentum: 0}}, or {name}: {{momentum: allow}}"
        )


def require_balanced(config: CheckedConfig, name: str) -> Iterator[str]:
    """Refuse `per_class` without `selection: balanced`."""
    chosen = config.strategy[name]
    if chosen["per_class"] is not None and chosen["selection"] != "balanced":
        yield f"per_class is {chosen['per_class']}, and selection is {chosen['selection']}; per_class needs selection: balanced"


def require_gaussian(config: CheckedConfig, name: str) -> Iterator[str]:
    """Refuse an encoder with `likelihood: bernoulli`: features are unbounded, and its values are from 0 to 1."""
    if config.input.encoder is not None and config.strategy[name]["likelihood"] == "bernoulli":
        yield "with input.encoder it replays features, which are not in [0, 1]; accepted: generative: {likelihood: gaussian}"


def likelihood_default(spec: InputConfig | TextInputConfig) -> dict[str, Any]:
    """Return `likelihood: gaussian` if there is an encoder, because features are unbounded."""
    return {"likelihood": "gaussian"} if spec.encoder is not None else {}


def require_known_tasks(config: CheckedConfig, name: str) -> Iterator[str]:
    """Refuse scenario class and `grow_head` for networks that isolate tasks."""
    if config.scenario.kind == "class":
        yield f"{name} needs the task of each sample, which scenario class does not give; accepted: scenario task or domain"
    if config.grow_head:
        yield f"{name} cannot add outputs while it runs; accepted: grow_head: false, with enough classes"


def require_task_end(config: CheckedConfig, name: str) -> Iterator[str]:
    """Refuse a single topic that no rule ends."""
    if (topic := config.endless_topic) is not None:
        yield (
            f"{name} prunes at the end of a task, but the only topic, {topic}, never ends; "
            "accepted: stream.task_end records: N or idle: SECONDS, or more topics"
        )
