"""Brain-inspired replay: van de Ven, Siegelmann & Tolias 2020, "Brain-inspired replay for continual learning"."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamlearn.core.errors import ConfigurationError
from streamlearn.learning.models import registry
from streamlearn.learning.models.feedback import Feedback
from streamlearn.learning.models.modes import global_seed
from streamlearn.learning.strategies.generative import GenerativeReplay
from streamlearn.learning.strategies.generator_training import GeneratorTraining

if TYPE_CHECKING:
    from torch import Tensor

    from streamlearn.core.samples import Batch


class FeedbackReplay(GenerativeReplay):
    """Brain-inspired replay: the generator reads the model's last hidden layer, and its loss also trains that layer.

    So the model differs from naive's even before the first task has ended. The generator replays the model's inputs. These are
    hidden features, as in the publication, if `input.encoder` computes them: that needs lower layers that do not change.
    """

    needs_features = True

    def _make_training(self) -> GeneratorTraining:
        return GeneratorTraining(
            self._build_feedback, self.context.num_outputs, self.spec, self.context.max_norm, self.context.device
        )

    def _build_feedback(self, num_outputs: int) -> Feedback:
        """Return an untrained generator. Raises `ConfigurationError` if the model has no linear layer named `head`."""
        spec = self.spec
        head = registry.head_of(self.context.build_network(num_outputs))
        if head is None:
            message = (
                "strategy.generative: variant brain-inspired needs a model whose last layer is linear and named head"
            )
            raise ConfigurationError(message)
        with global_seed(self.context.seed):
            return Feedback(
                self.context.input_shape, head.in_features, num_outputs, hidden=spec.hidden, latent=spec.latent,
                likelihood=spec.likelihood, gated=spec.gated, seed=self.context.seed,
            ).to(self.context.device)  # fmt: skip

    def feature_loss(self, mixed: Batch, features: Tensor) -> Tensor:
        assert mixed.weight is not None
        assert isinstance(self.generator, Feedback)
        noise = self._draw_noise(len(mixed))
        return (self.generator.loss(features, mixed.x, mixed.y, noise) * mixed.weight).sum()

    def after_step(self, mixed: Batch, finite: Tensor) -> None:
        del mixed  # the generator already has its gradients: `feature_loss` was part of the model's loss
        self.training.step(finite)
