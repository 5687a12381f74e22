"""Views of the configuration: the effective values, their digest, and those that shape what is learned."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from streamlearn.config.root import Config


REDACTED = "***"


def effective(config: Config) -> dict[str, Any]:
    """Return the effective values, defaults included, as a JSON tree; secrets are redacted."""
    tree: dict[str, Any] = json.loads(config.model_dump_json())
    return redact(tree)


def digest(config: Config) -> str:
    """Return the SHA-256 of the effective values."""
    import hashlib

    return hashlib.sha256(json.dumps(effective(config), sort_keys=True).encode()).hexdigest()


def shaping(config: Config) -> dict[str, Any]:
    """Return the values that shape the learned state, by dotted key. A checkpoint must have the same values."""
    tree = effective(config)
    keys = ("seed", "input", "classes", "grow_head", "scenario", "holdout", "model", "strategy")
    chosen = {key: tree[key] for key in keys}
    if (encoder := tree["input"].get("encoder")) is not None:
        # without its options: files may move, and the checkpoint contains the encoder's weights
        chosen["input"] = {**tree["input"], "encoder": encoder["name"]}
    chosen["stream.source"] = config.source  # positions in one source mean nothing in another one
    chosen["stream.codec"] = tree["stream"]["codec"]
    chosen["stream.batch_size"] = tree["stream"]["batch_size"]
    chosen["learner.optimizer.name"] = tree["learner"]["optimizer"]["name"]
    return dict(flatten(chosen))


def redact(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the tree with `***` in place of every password and secret; names of files stay."""
    return {
        key: redact(value)
        if isinstance(value, dict)
        else (
            REDACTED
            if ("password" in key or "secret" in key) and not key.endswith("_file") and value is not None
            else value
        )
        for key, value in tree.items()
    }


def flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return the values of a tree with their dotted keys; an empty section counts as a value."""
    flat: list[tuple[str, Any]] = []
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat += flatten(value, f"{prefix}{key}.")
        else:
            flat.append((f"{prefix}{key}", value))
    return flat
