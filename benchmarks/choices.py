"""The strategies that the contract tests try and the hashes cover: every recipe, and compositions of several."""

from __future__ import annotations

from typing import Any

from streamlearn.learning.strategies.recipes import RECIPES
from streamlearn.testing import NEEDS, TASKS

__all__ = ["CHOICES", "NEEDS", "TASKS", "identify"]

CHOICES: list[dict[str, Any]] = [{name: {}} for name in RECIPES]
CHOICES += [
    {"generative": {}, "si": {}},
    {"er": {"selection": "balanced", "per_class": 3, "balance": "tasks"}, "rwalk": {"interval": 2}},
    {"er": {"budget": 20, "balance": "counts"}, "gem": {"memory": 9, "margin": 0.0}},
    {"derpp": {"budget": 16}, "mas": {"samples": "all", "step": "proximal"}, "agem": {"reference": 5}},
    {"lwf": {"balance": "counts"}, "l2": {"step": "proximal"}},
    {"packnet": {"retrain_epochs": 2, "prune": 0.5}},
    {"generative": {"variant": "vae", "targets": "hard", "likelihood": "gaussian"}},
    {"generative": {"average": None}},
    {"generative": {"prior": "normal", "balance": "counts"}},
    {"generative": {"variant": "brain-inspired", "gated": 0.3}},
    {"er": {}, "ewc": {"fisher": "sampled", "step": "proximal"}},
    {"ewc": {"fisher": "empirical", "anchor": "last", "decay": 0.9}},
    {"si": {"step": "proximal", "anchor": "all"}},
]


def identify(chosen: dict[str, Any]) -> str:
    """Return a name for a choice."""
    return "+".join(name + "".join(f"-{value}" for value in values.values()) for name, values in chosen.items())
