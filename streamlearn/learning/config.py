"""Sections `model`, `learner` and `memory`: what learns, and how a batch is learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from streamlearn.core.section import FUNCTION, Int, Int32, NumBytes, Options, Section

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from streamlearn.core.config import InputConfig, TextInputConfig


MODEL_KEYS = {"mlp": ("hidden",), "resnet": ("width",), "memnet": ("embedding", "hops", "heads")}
Width = Annotated[Int, Field(ge=1, le=1 << 20)]  # units of a layer


class ModelConfig(Section):
    """`mlp`, `resnet`, `memnet` (for text), or a model of your own (`package.module:function`) with its `options`."""

    name: str = Field("mlp", description="mlp, resnet, memnet (for text), or package.module:function of your own")
    hidden: list[Width] = Field([400, 400], min_length=1, description="mlp: widths of the hidden layers")
    width: Width = Field(16, description="resnet: channels of the first stage")
    embedding: Int32 = Field(48, ge=1, description="memnet: size of a word's embedding")
    hops: Int32 = Field(3, ge=1, description="memnet: number of passes over the story")
    heads: Int32 = Field(4, ge=1, description="memnet: attention heads in each hop")
    options: Options = Field(default_factory=dict, description="keyword arguments for a model of your own")

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: str) -> str:
        if value not in MODEL_KEYS and not FUNCTION.fullmatch(value):
            raise PydanticCustomError("model", "accepted: mlp, resnet, memnet, package.module:function")
        return value

    def unused_keys(self) -> Iterator[str]:
        """Yield the keys that are set but belong to another model."""
        own = ("name", *MODEL_KEYS.get(self.name, ("options",)))
        for key, default in ModelConfig.model_fields.items():
            if key not in own and getattr(self, key) != default.get_default(call_default_factory=True):
                yield key


class OptimizerConfig(Section):
    """The model's optimizer. It always uses torch's fused implementation."""

    name: Literal["adam", "sgd", "adamw"] = Field("adam", description="optimizer algorithm")
    lr: float = Field(1e-3, gt=0, allow_inf_nan=False, description="learning rate")
    momentum: float = Field(0.0, ge=0, lt=1, description="sgd: momentum factor")
    weight_decay: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="weight decay: decoupled for adamw, added to the gradient for adam and sgd",
    )


class AugmentConfig(Section):
    """Largest random distortions of images before the model sees them, both new and replayed images."""

    shift: float = Field(0.0, ge=0, allow_inf_nan=False, description="largest shift in each direction, in pixels")
    rotate: float = Field(0.0, ge=0, le=180, description="largest rotation in either direction, in degrees")
    zoom: float = Field(0.0, ge=0, lt=1, description="largest relative change of size, drawn for each axis separately")


class LearnerConfig(Section):
    """How a batch is learned."""

    updates_per_batch: Int32 = Field(10, ge=1, description="number of gradient steps on each batch")
    optimizer: OptimizerConfig = OptimizerConfig()
    average: float | None = Field(
        0.998, gt=0, lt=1, description="decay of the exponential moving average of the weights; null: no average"
    )
    max_norm: float | None = Field(
        None, gt=0, description="largest norm of a gradient, a larger one is clipped; null: no limit"
    )
    augment: AugmentConfig | None = Field(
        None, description="images only: random distortions, drawn again for every update"
    )


class MemoryConfig(Section):
    """A limit on stored samples, for each store: the current task's reservoir, the past tasks' memory, each probe."""

    max_bytes: NumBytes = Field(2 << 30, description="largest size of each store of samples, in bytes")


@dataclass(frozen=True)
class LearningConfig:
    """What a learner is built from: the sections and keys that learning reads, and no others."""

    seed: int
    device: str
    input: InputConfig | TextInputConfig
    model: ModelConfig
    strategy: Mapping[str, Mapping[str, Any]]
    learner: LearnerConfig
    memory: MemoryConfig
    grow_head: bool
    batch_size: int
    topics: tuple[str, ...]  # those listed as tasks; empty if a pattern chooses them
