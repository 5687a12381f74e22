"""The whole configuration: the keys at the top level, and every component's section."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from streamlearn.checkpoint.config import CheckpointConfig
from streamlearn.config import rules, views
from streamlearn.config.strategy import as_recipes, complete_recipes
from streamlearn.control.config import ServiceConfig
from streamlearn.core.config import InputConfig, Label, ScenarioConfig, TextInputConfig, read_input
from streamlearn.core.errors import StreamlearnError
from streamlearn.core.section import Int, Seconds, Section
from streamlearn.evaluation.config import HoldoutConfig, ProbesConfig
from streamlearn.learning.config import LearnerConfig, LearningConfig, MemoryConfig, ModelConfig
from streamlearn.observability.config import LogConfig
from streamlearn.runtime.config import DivergenceConfig
from streamlearn.stream.config import StreamConfig
from streamlearn.stream.logs.config import EmbeddedConfig, KafkaConfig

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from streamlearn.config.strategy import RecipeSchema
    from streamlearn.core.section import Violations


MAX_CLASSES = 1_000_000


def _check_directory(value: Any) -> Any:
    """Refuse an empty path: it would be the working directory."""
    if value == "":
        raise PydanticCustomError("directory", "expected a directory")
    return value


class Config(Section):
    """The whole configuration file."""

    name: str = Field(
        "streamlearn",
        pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$",
        description="name of the job, used in metrics, in the default group id and in the default dead-letter topic",
    )
    state_dir: Annotated[Path, BeforeValidator(_check_directory)] = Field(
        Path("state/streamlearn"),
        description="directory of checkpoints, lock and control socket; each job needs its own",
    )
    seed: Int = Field(
        0,
        ge=0,
        le=1 << 53,
        description="seed of every random draw; the same seed, stream and machine give bit-equal weights",
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda|cuda:[0-9]+)$",
        description="cpu, cuda, cuda:N, or auto (a GPU if there is one)",
    )
    threads: Int = Field(
        1, ge=1, le=1024, description="CPU threads of torch; another number changes the last bits of the results"
    )
    shutdown_grace: Seconds = Field(
        25.0, description="seconds to finish the batch and to save after a stop; after that the process ends with 1"
    )
    input: InputConfig | TextInputConfig
    classes: list[Label] | Int = Field(description="the labels as a list, or the largest number of different labels")
    grow_head: bool = Field(
        default=False,
        description="add an output for a label beyond the number of classes, instead of rejecting the label",
    )
    scenario: ScenarioConfig = ScenarioConfig()
    stream: StreamConfig
    kafka: KafkaConfig | None = None
    embedded: EmbeddedConfig = EmbeddedConfig()
    holdout: HoldoutConfig = HoldoutConfig()
    model: ModelConfig = ModelConfig()
    strategy: dict[str, dict[str, Any]] = Field({"generative": {}, "si": {}}, validate_default=True)
    learner: LearnerConfig = LearnerConfig()
    memory: MemoryConfig = MemoryConfig()
    probes: ProbesConfig = ProbesConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    divergence: DivergenceConfig = DivergenceConfig()
    service: ServiceConfig = ServiceConfig()
    log: LogConfig = LogConfig()

    @field_validator("input", mode="before")
    @classmethod
    def _choose_input(cls, value: Any) -> Any:
        if isinstance(value, (InputConfig, TextInputConfig)):
            return value
        if not isinstance(value, dict):
            raise PydanticCustomError("input", "expected keys and values: shape and others, or kind: text and others")
        return read_input(value)

    @field_validator("model", mode="before")
    @classmethod
    def _expand_model_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("scenario", mode="before")
    @classmethod
    def _expand_scenario_kind(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @field_validator("classes")
    @classmethod
    def _check_classes(cls, value: list[Label] | int) -> list[Label] | int:
        if isinstance(value, int) and not 1 <= value <= MAX_CLASSES:
            raise PydanticCustomError("classes", "a number of classes must be between 1 and {n}", {"n": MAX_CLASSES})
        if isinstance(value, list) and (not value or len(set(value)) != len(value)):
            raise PydanticCustomError("classes", "a list of classes must name at least one class, and each class once")
        return value

    @field_validator("strategy", mode="before")
    @classmethod
    def _complete_strategy(cls, value: Any, info: ValidationInfo) -> dict[str, dict[str, Any]]:
        return complete_recipes(as_recipes(value), (info.context or {}).get("recipes", {}), info.data.get("input"))

    def rules_in(self, context: Mapping[str, Any]) -> Iterator[Violations]:
        """Yield the rules between sections; the recipes, in the context, have rules of their own."""
        return rules.rules(self, context.get("recipes", {}))

    @property
    def source(self) -> str:
        """Where the topics are: `kafka` or `embedded`."""
        return self.stream.source or ("kafka" if self.kafka is not None else "embedded")

    @property
    def dead_letter_topic(self) -> str:
        """The topic to which rejected samples are sent."""
        return self.stream.dead_letter.topic or f"{self.name}.dlq"

    @property
    def group_id(self) -> str:
        """The consumer group to which positions are reported."""
        return (self.kafka.group_id if self.kafka else None) or f"streamlearn.{self.name}"

    @property
    def endless_topic(self) -> str | None:
        """The only topic, if nothing but a marker ends its task; otherwise None."""
        return self.stream.endless_topic

    @property
    def learning(self) -> LearningConfig:
        """What the learner is built from."""
        return LearningConfig(
            self.seed, self.device, self.input, self.model, self.strategy, self.learner, self.memory, self.grow_head,
            self.stream.batch_size, tuple(self.stream.topics or ()),
        )  # fmt: skip

    def warnings(self, recipes: Mapping[str, RecipeSchema]) -> list[str]:
        """Return warnings about values that are allowed but probably a mistake."""
        return rules.warnings(self, recipes)

    def unreadable_secret(self) -> str | None:
        """Return why the secret cannot be read here, or None. The daemon may run on another machine, so this is no error."""
        try:
            if self.kafka is not None and self.kafka.sasl is not None:
                self.kafka.sasl.secret()
        except StreamlearnError as error:
            return str(error)
        return None

    def effective(self) -> dict[str, Any]:
        """Return the effective values, defaults included, as a JSON tree; secrets are redacted."""
        return views.effective(self)

    def digest(self) -> str:
        """Return the SHA-256 of the effective values."""
        return views.digest(self)

    def shaping(self) -> dict[str, Any]:
        """Return the values that shape the learned state, by dotted key. A checkpoint must have the same values."""
        return views.shaping(self)
