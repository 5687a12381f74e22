"""Loads a saved model and predicts. Reads only `model.json`, `model.safetensors` and, if there is one, the encoder's file.

A checkpoint may come from somebody else, so its content is not trusted: files must match their hashes, `model.json` is
validated, and no code is imported unless the user names it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch.nn import functional

from streamlearn import state
from streamlearn.core.config import InputConfig, TextInputConfig
from streamlearn.core.errors import ConfigurationError, StreamlearnError, UsageError, is_out_of_memory
from streamlearn.core.samples import Rejected
from streamlearn.learning.build import NetworkBuilder
from streamlearn.learning.config import ModelConfig
from streamlearn.learning.models.modes import global_seed
from streamlearn.learning.models.module_state import load_module_state
from streamlearn.learning.strategies.recipes import RECIPES, build_network_slot
from streamlearn.learning.tensors import configure_torch, finite_rows
from streamlearn.stream.codecs.text import Vocabulary, parse_text
from streamlearn.stream.decoder import RecordDecoder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from streamlearn.checkpoint.manifest import Checkpoint
    from streamlearn.core.labels import Label

CHUNK = 512
NO_FEATURES = Rejected("nonfinite", "the encoder's features for x are not finite")
NO_OUTPUTS = Rejected("nonfinite", "the model's outputs for x are not finite")

UserCode = Callable[[str], tuple[str, Mapping[str, Any] | None] | None]
"""Returns, for "model" or "encoder", the function that the user names and, if a configuration has them, its options."""

Count = Annotated[int, Field(strict=True, ge=0, le=(1 << 31) - 1)]


class _Lenient(BaseModel):
    model_config = ConfigDict(extra="ignore")


class _Task(_Lenient):
    labels: list[int | str]
    outputs: list[Count] = []
    probe_accuracy: float | None = None


class _State(_Lenient):
    """The state of the model and the encoder that is not tensors."""

    model: dict[str, Any] = {}
    encoder: dict[str, Any] = {}


class ModelDescription(_Lenient):
    """The content of `model.json`, validated."""

    model: ModelConfig
    input: InputConfig | TextInputConfig
    vocabulary: list[str]
    codec: Literal[1, 2] = 1  # older checkpoints have no version: theirs is 1
    seed: Count
    num_outputs: Count
    scenario: Literal["class", "domain", "task"]
    labels: list[int | str]
    outputs: list[Count] | None = None
    tasks: dict[str, _Task]
    strategy: dict[str, dict[str, Any]]
    network: dict[str, Count | bool]
    state: _State = _State()

    @classmethod
    def read(cls, checkpoint: Checkpoint) -> ModelDescription:
        """Read a checkpoint's `model.json`. Raises `ConfigurationError` if it is not valid."""
        where = f"{checkpoint.path / 'model.json'}"
        try:
            tree = checkpoint.read_json("model.json")
            section = TextInputConfig if tree["input"]["kind"] == "text" else InputConfig
            tree["input"] = {key: value for key, value in tree["input"].items() if key in section.model_fields}
            return cls.model_validate(tree)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            # pydantic's names of validators contain a bracket
            key = ".".join(str(name) for name in first["loc"] if "[" not in str(name))
            raise ConfigurationError(f"{where}: not valid: {key}: {first['msg']!s:.200}") from error
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise ConfigurationError(f"{where}: not valid: {error!r:.200}") from error

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        """Check the rules that involve several fields, and the strategy's parameters."""
        outputs = [*(self.outputs or []), *(output for task in self.tasks.values() for output in task.outputs)]
        if any(output >= self.num_outputs for output in outputs):
            raise ValueError("an output is not below num_outputs")
        if any(int(value) > max(1, len(self.tasks)) for value in self.network.values()):
            raise ValueError("network: more columns than tasks")
        for name, parameters in self.strategy.items():
            if name not in RECIPES:
                raise ValueError(f"unknown strategy: {name!r:.80}")
            self.strategy[name] = RECIPES[name].parameters.model_validate(parameters).model_dump()
        return self


@dataclass(frozen=True)
class Predictions:
    """The most likely label of each sample, its probability, and the samples that a stream would reject, by index.

    A rejected sample has label None and probability NaN.
    """

    labels: list[Label | None]
    probabilities: np.ndarray
    rejected: dict[int, Rejected]


class Model:
    """A model and its labels, loaded from a checkpoint."""

    FILES = ("model.json", "model.safetensors")
    OPTIONAL = ("encoder.frozen.safetensors",)

    def __init__(self, checkpoint: Checkpoint, user_code: UserCode = lambda _: None) -> None:
        self.checkpoint = checkpoint
        self.description = ModelDescription.read(checkpoint)
        configure_torch(torch.get_num_threads())  # the same floating-point mode as the daemon's
        tree = self.description
        self.text = isinstance(tree.input, TextInputConfig)
        encoder = tree.input.encoder
        builder = NetworkBuilder(
            encoder=None if encoder is None else self._allowed_spec(encoder.model_dump(), "encoder", user_code),
            model=self._allowed_spec(tree.model.model_dump(), "model", user_code),
            inputs=tree.input, seed=tree.seed, device=torch.device("cpu"),
        )  # fmt: skip
        if builder.encoder is not None:
            frozen = self._tensors("encoder.frozen.safetensors")
            builder.encoder.load(state.join_tensors(frozen, tree.state.encoder))
        self.preprocess = builder.preprocess
        self.has_encoder = builder.encoder is not None
        self.network = build_network_slot(tree.strategy, builder.context(tree.num_outputs))
        self.network.load_state_dict(tree.network)
        try:
            weights = state.join_tensors(self._tensors("model.safetensors"), tree.state.model)
            load_module_state(self.network.module, weights)
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            if is_out_of_memory(error):
                raise
            why = " ".join(str(error).split())
            raise ConfigurationError(f"{checkpoint.path}: the weights do not fit the model: {why:.300}") from error
        self.network.module.eval()

    def _allowed_spec(self, spec: dict[str, Any], kind: str, user_code: UserCode) -> dict[str, Any]:
        """Return the section for building it. Raises `ConfigurationError` if the user has not named its code."""
        name = spec["name"]
        if ":" not in name:
            return spec
        named = user_code(kind)
        if named is None:
            raise ConfigurationError(
                f"{self.checkpoint.path}: its {kind} is {name}, and code that only a checkpoint names is not imported; "
                f"if it is yours, give --{kind} {name}, or --config with the job's configuration",
            )
        if named[0] != name:
            raise ConfigurationError(f"{self.checkpoint.path}: its {kind} is {name}, and you named {named[0]}")
        return spec if named[1] is None else {**spec, "options": dict(named[1])}

    def _tensors(self, name: str) -> dict[str, torch.Tensor]:
        return state.from_bytes(str(self.checkpoint.path / name), self.checkpoint.read(name))

    def outputs(self, task: str | None) -> list[int]:
        """Return the active outputs. Raises `UsageError` if the scenario needs a task and none is given."""
        tree = self.description
        if tree.outputs is not None:
            return list(tree.outputs)
        if tree.scenario == "class":  # an older checkpoint, or no task yet
            return sorted({output for entry in tree.tasks.values() for output in entry.outputs})
        return list(self._task(task).outputs)

    def labels(self, task: str | None) -> list[Label]:
        """Return the labels in output order."""
        return list(self._task(task).labels if self.description.scenario == "domain" else self.description.labels)

    def _task(self, name: str | None) -> _Task:
        tasks = self.description.tasks
        if name not in tasks:
            raise UsageError(f"this model needs --task; accepted: {', '.join(tasks)}")
        return tasks[name]

    @torch.no_grad()
    def predict(self, x: np.ndarray, task: str | None = None) -> Predictions:
        """Predict the labels of `x [n, ...]`, in the form that a record would have.

        Raises `StreamlearnError` if the samples have another shape, or are text where numbers are expected or vice versa.
        """
        tree = self.description
        if (x.dtype == object) != self.text:
            raise StreamlearnError(f"x is {'numbers' if self.text else 'text'}; the model expects {tree.input.kind}")
        try:
            x, rejected = self._ids(x) if self.text else self._numbers(x)
        except Rejected as error:
            raise StreamlearnError(str(error)) from error
        outputs, labels = self.outputs(task), self.labels(task)
        inactive = torch.ones(tree.num_outputs, dtype=torch.bool)
        inactive[outputs] = False
        tasks = list(tree.tasks)
        task_index = tasks.index(task) if task in tasks else 0  # without a task, the model needs none
        accepted = [index for index in range(len(x)) if index not in rejected]
        predicted: list[Label | None] = [None] * len(x)
        probabilities = np.full(len(x), np.nan, np.float32)
        with global_seed(tree.seed):  # a model may draw random numbers in evaluation mode, too
            for rows in (accepted[start : start + CHUNK] for start in range(0, len(accepted), CHUNK)):
                for row, answer in zip(rows, self._answers(x[rows], task_index, inactive), strict=True):
                    if isinstance(answer, Rejected):
                        rejected[row] = answer
                    else:
                        predicted[row], probabilities[row] = labels[answer[0]], answer[1]
        return Predictions(predicted, probabilities, dict(sorted(rejected.items())))

    def _answers(self, x: np.ndarray, task: int, inactive: torch.Tensor) -> list[tuple[int, float] | Rejected]:
        """Return each sample's most likely output and its probability, or why it is rejected."""
        inputs = self.preprocess(torch.from_numpy(x))
        usable = finite_rows(inputs) if self.has_encoder else torch.ones(len(x), dtype=torch.bool)
        answers: list[tuple[int, float] | Rejected] = [NO_FEATURES] * len(x)
        if not bool(usable.any()):
            return answers
        logits = self.network.forward(inputs[usable], torch.full((int(usable.sum()),), task))
        best = functional.softmax(logits.masked_fill(inactive, -torch.inf), 1).max(1)
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        for row, pair in zip(usable.nonzero()[:, 0].tolist(), pairs, strict=True):
            answers[row] = pair if math.isfinite(pair[1]) else NO_OUTPUTS
        return answers

    def _numbers(self, x: np.ndarray) -> tuple[np.ndarray, dict[int, Rejected]]:
        tree = self.description.input
        return RecordDecoder(tree.shape, tree.dtype, "json", 0, scale=tree.scale).convert(x)

    def _ids(self, x: np.ndarray) -> tuple[np.ndarray, dict[int, Rejected]]:
        tree = self.description
        assert isinstance(tree.input, TextInputConfig)
        vocabulary = Vocabulary(tree.vocabulary, tree.input.vocabulary)
        ids = np.zeros((len(x), *tree.input.shape), tree.input.dtype)
        rejected = {}
        for number, text in enumerate(x):
            try:
                rows = parse_text(text, tree.input.sentences, tree.input.words, tree.codec)
            except Rejected as error:
                rejected[number] = error
            else:
                ids[number] = vocabulary.encode(rows, tree.input.shape)
        return ids, rejected


def accuracy(predicted: Sequence[Label | None], y: Sequence[Label]) -> float | None:
    """Return the share of correct predictions among the samples that are not rejected; None if all are rejected."""
    pairs = [(a, b) for a, b in zip(predicted, y, strict=True) if a is not None]
    return sum(a == b for a, b in pairs) / len(pairs) if pairs else None
