"""Sections that several components read: what `x` is, and which classes compete."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from streamlearn.core.labels import MAX_LABEL_BYTES
from streamlearn.core.section import FUNCTION, Int, Int32, Options, Section, section_at, to_init_error

MAX_SAMPLE_SIZE = 1 << 28  # numbers in one sample


def _check_label(value: str) -> str:
    """Refuse a label that is too long: every record with it would be rejected."""
    if len(value.encode(errors="surrogatepass")) > MAX_LABEL_BYTES:
        raise PydanticCustomError("label", "a label has at most {n} bytes", {"n": MAX_LABEL_BYTES})
    return value


Label = Int | Annotated[str, AfterValidator(_check_label)]


class EncoderConfig(Section):
    """A frozen module of your own in front of the model. The model and the strategies see only its features."""

    name: str = Field(description="package.module:function, which is called with input.shape and the options")
    options: Options = Field(default_factory=dict, description="keyword arguments for the function")

    @field_validator("name")
    @classmethod
    def _is_function(cls, value: str) -> str:
        if not FUNCTION.fullmatch(value):
            raise PydanticCustomError("encoder", "expected package.module:function")
        return value


class InputConfig(Section):
    """What `x` is: its shape and dtype in the records, and the number by which it is divided for the model."""

    kind: Literal["numbers"] = Field("numbers", description="numbers (default) or text")
    shape: list[Int32] = Field(min_length=1, description="shape of one sample, for example [28, 28]")
    dtype: Literal["uint8", "int16", "int32", "int64", "float16", "float32", "float64"] = Field(
        "float32", description="dtype of the numbers in the records"
    )
    scale: float = Field(1.0, ge=1e-30, le=1e30, description="the model (or the encoder) sees x / scale")
    encoder: EncoderConfig | None = Field(None, description="frozen module in front of the model")

    @field_validator("encoder", mode="before")
    @classmethod
    def _expand_name(cls, value: Any) -> Any:
        if value is not None and not isinstance(value, (str, dict)):
            raise PydanticCustomError("encoder", "expected package.module:function, or a section with name and options")
        return {"name": value} if isinstance(value, str) else value

    @field_validator("shape")
    @classmethod
    def _check_shape(cls, value: list[int]) -> list[int]:
        if any(size < 1 for size in value):
            raise PydanticCustomError("shape", "every dimension must be at least 1")
        if math.prod(value) > MAX_SAMPLE_SIZE:
            raise PydanticCustomError("shape", "a sample may have {n} numbers at most", {"n": MAX_SAMPLE_SIZE})
        return value


class TextInputConfig(Section):
    """A story, a question about it, and the answer as the label. The model sees token ids of shape `[1 + sentences, words]`."""

    kind: Literal["text"] = Field(description="numbers (default) or text")
    sentences: Int = Field(ge=1, le=10_000, description="number of newest sentences of a story that the model sees")
    words: Int = Field(
        ge=1,
        le=10_000,
        description="largest number of words in a sentence; a sample with a longer sentence is rejected",
    )
    vocabulary: Int = Field(
        ge=1,
        le=10_000_000,
        description="largest number of different words; each gets an id in order of first appearance",
    )

    @property
    def encoder(self) -> None:
        """None: an encoder needs numbers, and token ids only name words."""

    @property
    def shape(self) -> list[int]:
        """`[1 + sentences, words]`: a row for the question, then a row for each sentence of the story."""
        return [1 + self.sentences, self.words]

    @property
    def dtype(self) -> str:
        """The dtype of token ids."""
        return "int32"

    @property
    def scale(self) -> float:
        """1.0, because token ids are never divided."""
        return 1.0


def read_input(value: dict[str, Any]) -> InputConfig | TextInputConfig:
    """Validate `input` as the section that `kind` names, so that errors concern that section alone."""
    kinds: dict[Any, type[InputConfig | TextInputConfig]] = {"numbers": InputConfig, "text": TextInputConfig}
    kind = value.get("kind", "numbers")
    if not isinstance(kind, str) or kind not in kinds:
        message = PydanticCustomError("kind", "accepted: {kinds}", {"kinds": ", ".join(kinds)})
        raise ValidationError.from_exception_data("input", [{"type": message, "loc": ("kind",), "input": kind}])
    try:
        return kinds[kind].model_validate(value)
    except ValidationError as error:
        described = [to_init_error(details, section_at(kinds[kind], details["loc"][:-1])) for details in error.errors()]
        raise ValidationError.from_exception_data("input", described) from error


class ScenarioConfig(Section):
    """Which outputs compete for a sample: those of its task, one set for all tasks, or those of all classes seen so far."""

    kind: Literal["task", "domain", "class"] = Field(
        "class",
        description="outputs that compete: those of the task (task), one set for all tasks (domain), or all classes (class)",
    )
    active: Literal["seen", "all"] = Field(
        "seen", description="class: only the classes seen so far compete, or all classes from the start"
    )
    tasks: dict[str, list[Label]] = Field(default_factory=dict, description="classes of each task, by topic")
