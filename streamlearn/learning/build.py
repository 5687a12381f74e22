"""Builds the learner of a configuration, and the network of a configuration or of a saved model."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from streamlearn.core.config import TextInputConfig
from streamlearn.core.errors import ConfigurationError
from streamlearn.learning.active_outputs import ActiveOutputs
from streamlearn.learning.augment import RandomAffine
from streamlearn.learning.learner import Learner
from streamlearn.learning.models import registry
from streamlearn.learning.models.encoder import Encoder
from streamlearn.learning.models.model_check import ModelCheck
from streamlearn.learning.strategies.recipes import build_strategy
from streamlearn.learning.strategies.slots import BuildContext
from streamlearn.learning.tensors import choose_device, make_preprocess
from streamlearn.learning.update import GradientUpdate

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from streamlearn.core.config import InputConfig
    from streamlearn.core.scenario import Scenario
    from streamlearn.learning.config import LearningConfig
    from streamlearn.learning.strategies.slots import Strategy


class NetworkBuilder:
    """Builds the encoder, the preprocessing and the networks that sections of a configuration, or a saved model, describe.

    `model` is the content of the section `model`, `encoder` of `input.encoder`; None if there is no encoder. Raises
    `ConfigurationError` if something cannot be built.
    """

    def __init__(
        self,
        model: Mapping[str, Any],
        encoder: Mapping[str, Any] | None,
        inputs: InputConfig | TextInputConfig,
        seed: int,
        device: torch.device,
    ) -> None:
        self.model = model
        self.seed = seed
        self.device = device
        self.vocabulary = inputs.vocabulary if isinstance(inputs, TextInputConfig) else None
        shape = tuple(inputs.shape)
        self.encoder = None if encoder is None else Encoder.build(encoder, shape, seed, device)
        self.input_shape = shape if self.encoder is None else self.encoder.shape  # of the network
        self.preprocess = make_preprocess(
            inputs.scale, device, token_ids=self.vocabulary is not None, encoder=self.encoder
        )

    @property
    def has_user_code(self) -> bool:
        """Whether model or encoder are code of the user."""
        return ":" in self.model["name"] or self.encoder is not None

    def build(self, num_outputs: int, seed_offset: int = 0) -> nn.Module:
        """Return an untrained network on the device."""
        seed = self.seed + seed_offset
        return registry.build(self.model, self.input_shape, num_outputs, seed, self.vocabulary).to(self.device)

    def context(self, num_outputs: int, max_bytes: int = 0, **limits: Any) -> BuildContext:
        """Return what a strategy's slots may read when they are built. `limits` are further fields of the context."""
        return BuildContext(
            self.seed, self.device, self.input_shape, num_outputs, max_bytes, self.preprocess, self.build,
            token_ids=self.vocabulary is not None, **limits,
        )  # fmt: skip

    def check_model(self, num_outputs: int, *, copies: bool) -> bool:
        """Check a user's model with a few samples; return whether it can learn a single sample. See `ModelCheck.run`."""

        def sample(count: int) -> Tensor:
            # values from 0 to 1: a model may use them as indices of an embedding, and these must be valid
            if self.vocabulary is not None:
                return torch.randint(2, (count, *self.input_shape)).to(self.device, torch.int32)
            return torch.rand(count, *self.input_shape).to(self.device)

        build = partial(self.build, num_outputs)
        return ModelCheck(self.model["name"], build, sample, self.seed).run(copies=copies)


def make_learner(config: LearningConfig, scenario: Scenario) -> Learner:
    """Return an untrained learner for a configuration.

    Raises `ConfigurationError` if model or strategy cannot be built, `ValueError` if the device does not exist.
    """
    spec, encoder = config.learner, config.input.encoder
    builder = NetworkBuilder(
        config.model.model_dump(), None if encoder is None else encoder.model_dump(), config.input, config.seed,
        choose_device(config.device),
    )  # fmt: skip
    if builder.encoder is not None:
        builder.encoder.check_state()
    context = builder.context(
        scenario.num_outputs([]), config.memory.max_bytes, batch_size=config.batch_size,
        task_names=config.topics, max_norm=spec.max_norm,
    )  # fmt: skip
    strategy = build_strategy(config.strategy, context)
    if config.grow_head and registry.head_of(strategy.network.module) is None:
        raise ConfigurationError("grow_head: the model needs a linear layer named head")
    outputs = ActiveOutputs(scenario, context.num_outputs, context.device)
    update = GradientUpdate(
        strategy, outputs, spec.optimizer, max_norm=spec.max_norm,
        distort=None if spec.augment is None else RandomAffine(spec.augment, context.seed, context.device),
        trains_single_samples=_trains_single_samples(builder, config, scenario, strategy),
    )  # fmt: skip
    return Learner(
        strategy, update, outputs, spec, context, encoder=builder.encoder, has_user_code=builder.has_user_code
    )


def _trains_single_samples(
    builder: NetworkBuilder, config: LearningConfig, scenario: Scenario, strategy: Strategy
) -> bool:
    """Return whether the model can learn a single sample in training mode; check a model of the user's own for it."""
    if ":" not in config.model.name:
        return True
    transfer = scenario.kind != "class" and strategy.network.supports_forward_transfer
    return builder.check_model(scenario.num_outputs([]), copies=config.learner.average is not None or transfer)
