"""Uses a saved model: reads `model.json`, `model.safetensors` and the encoder's file, where there is one, and nothing else."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from streamlearn import state
from streamlearn.data import Rejected, StreamlearnError
from streamlearn.models import registry
from streamlearn.models.encoder import Encoder
from streamlearn.strategies.parts import World
from streamlearn.strategies.recipes import network_of
from streamlearn.stream.text import Vocabulary, parse
from streamlearn.tensors import prepare, scaling

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from streamlearn.data import Label
    from streamlearn.strategies.parts import Network

CHUNK = 512


class Model:
    """A model as it was saved, with its labels."""

    FILES = ("model.json", "model.safetensors")
    OPTIONAL = ("encoder.frozen.safetensors",)

    def __init__(self, directory: Path) -> None:
        try:
            self.description: dict[str, Any] = json.loads((directory / "model.json").read_bytes())
        except OSError as error:
            raise StreamlearnError(f"{error.filename}: {error.strerror}", code=74) from error
        weights = _tensors(directory / "model.safetensors")
        prepare(torch.get_num_threads())  # the same floating-point mode as the daemon's
        tree = self.description
        self.input: dict[str, Any] = tree["input"]
        self.text = self.input["kind"] == "text"
        cpu = torch.device("cpu")
        encoder, self.shape = None, tuple(self.input["shape"])
        if (spec := self.input.get("encoder")) is not None:
            encoder = Encoder.build(spec, self.shape, tree["seed"], cpu)
            encoder.load(_tensors(directory / "encoder.frozen.safetensors"))
            self.shape = encoder.shape
        self.scale = scaling(self.input["scale"], cpu, names=self.text, encoder=encoder)
        self.network = self._build()
        self.network.load_state_dict(tree["network"])
        self.network.module.load_state_dict(weights)
        self.network.module.eval()

    def _build(self) -> Network:
        tree, cpu = self.description, torch.device("cpu")
        vocabulary = self.input["vocabulary"] if self.text else None

        def build_network(num_outputs: int, offset: int = 0) -> nn.Module:
            return registry.build(tree["model"], self.shape, num_outputs, tree["seed"] + offset, vocabulary)

        world = World(tree["seed"], cpu, self.shape, tree["num_outputs"], 0, self.scale, build_network, names=self.text)
        return network_of(tree["strategy"], world)

    def outputs(self, task: str | None) -> list[int]:
        """Return the outputs that compete; raises `StreamlearnError` (2) where the scenario needs a task."""
        tasks = self.description["tasks"]
        if (shared := self.description.get("outputs")) is not None:
            return list(shared)
        if self.description["scenario"] == "class":  # of an earlier version, or without a task
            return sorted({output for entry in tasks.values() for output in entry["outputs"]})
        if task not in tasks:
            raise StreamlearnError(f"this model needs --task, one of: {', '.join(tasks)}", code=2)
        found: list[int] = tasks[task]["outputs"]
        return found

    def labels(self, task: str | None) -> list[Label]:
        """Return the labels in output order."""
        if self.description["scenario"] == "domain":
            found: list[Label] = self.description["tasks"][task]["labels"]
            return found
        known: list[Label] = self.description["labels"]
        return known

    @torch.no_grad()
    def predict(self, x: np.ndarray, task: str | None = None) -> tuple[list[Label], np.ndarray]:
        """Return the most likely labels of `x [n, ...]`, as it would arrive in a record, and their probabilities."""
        shape = self.input["shape"]
        if (x.dtype == object) != self.text:
            raise StreamlearnError(f"x is {'numbers' if self.text else 'text'}; the model expects {self.input['kind']}")
        if self.text:
            x = self._ids(x)
        if list(x.shape[1:]) != shape:
            raise StreamlearnError(f"x has shape {list(x.shape[1:])}; the model expects {shape}")
        outputs, labels = self.outputs(task), self.labels(task)
        forbidden = torch.ones(self.description["num_outputs"], dtype=torch.bool)
        forbidden[outputs] = False
        tasks = list(self.description["tasks"])
        place = tasks.index(task) if task in tasks else 0  # without a task, none is needed
        chosen, sure = [], []
        for part in torch.from_numpy(np.ascontiguousarray(x)).split(CHUNK):
            logits = self.network.forward(self.scale(part), torch.full((len(part),), place))
            logits = logits.masked_fill(forbidden, -torch.inf)
            best = functional.softmax(logits, 1).max(1)
            chosen.append(best.indices)
            sure.append(best.values)
        indices = torch.cat(chosen).tolist()
        return [labels[index] for index in indices], torch.cat(sure).numpy()

    def _ids(self, x: np.ndarray) -> np.ndarray:
        known = Vocabulary(self.description["vocabulary"], self.input["vocabulary"])
        found = []
        for number, text in enumerate(x):
            try:
                version = self.description.get("codec", 1)  # older checkpoints have none
                rows = parse(text, self.input["sentences"], self.input["words"], version)
            except Rejected as error:
                raise StreamlearnError(f"sample {number}: {error}") from error
            found.append(known.encode(rows, self.input["shape"]))
        return np.stack(found)


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return state.from_bytes(str(path), path.read_bytes())
    except OSError as error:
        raise StreamlearnError(f"{error.filename}: {error.strerror}", code=74) from error


def accuracy(predicted: Sequence[Label], y: Sequence[Label]) -> float:
    """Return the share of predictions that are right."""
    return sum(a == b for a, b in zip(predicted, y, strict=True)) / len(y)
