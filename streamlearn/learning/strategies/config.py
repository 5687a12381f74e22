"""What the recipes' checks read of the configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from streamlearn.core.config import InputConfig, ScenarioConfig, TextInputConfig
    from streamlearn.learning.config import LearnerConfig


class CheckedConfig(Protocol):
    """The keys that a recipe may refuse to work with. A key that is invalid is absent: reading it raises AttributeError."""

    @property
    def strategy(self) -> Mapping[str, Mapping[str, Any]]:
        """The parameters of every chosen recipe."""

    @property
    def learner(self) -> LearnerConfig:
        """How a batch is learned."""

    @property
    def input(self) -> InputConfig | TextInputConfig:
        """What `x` is."""

    @property
    def scenario(self) -> ScenarioConfig:
        """Which outputs compete."""

    @property
    def grow_head(self) -> bool:
        """Whether outputs are added while the daemon runs."""

    @property
    def endless_topic(self) -> str | None:
        """The only topic, if nothing but a marker ends its task; otherwise None."""
