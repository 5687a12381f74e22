"""The meaning of each recipe parameter, for the schema of the configuration."""

from __future__ import annotations

DESCRIPTIONS = {
    "alpha": "weight of the stored logits in the loss",
    "anchor": "the penalty pulls toward the parameters after each task (all), or after the last task (last)",
    "average": "decay of the moving average of the generator's weights; null: no average",
    "balance": "share of the loss for replayed samples: by the number of tasks so far (tasks), or of samples so far (counts)",
    "beta": "weight of the stored labels in the loss",
    "budget": "maximum number of stored samples, of all tasks together",
    "decay": "factor on older importances at the end of each task; 1: they stay as they are",
    "epsilon": "the gradient is not projected if the squared norm of the reference gradient is far below this",
    "fisher": "labels for the Fisher information: all, weighted by their probability (exact), drawn from the model (sampled), "
    "or the true labels (empirical)",
    "fisher_decay": "share of the moving Fisher information that an update keeps",
    "gated": "brain-inspired: share of the decoder's units that is switched off for a class",
    "hidden": "units of each hidden layer of the generator",
    "interval": "number of updates after which the path's scores are computed",
    "latent": "size of the generator's code",
    "likelihood": "distribution of generated values: bernoulli for values from 0 to 1, gaussian for any; the default is "
    "gaussian with an encoder",
    "lr": "learning rate of the generator",
    "margin": "minimum weight of every past task's gradient in a step that is projected",
    "max_parameters": "maximum number of parameters of all columns; a task that needs more stops the daemon",
    "memory": "number of stored samples of each task",
    "momentum": "refuse an optimizer with momentum, which undoes the projection, or allow it",
    "per_class": "maximum number of stored samples of a class; needs selection: balanced",
    "prior": "conditional: draw the codes of a class from the distribution of its codes (moments), or from N(0, I) (normal)",
    "prune": "share of the free weights that a task leaves free for later tasks",
    "ratio": "replayed samples for each new sample",
    "reference": "number of stored samples for the reference gradient; null: the batch size",
    "retrain_epochs": "passes over the task's samples after the pruning",
    "samples": "number of samples of a task from which the importance is computed; all: every sample that is stored",
    "selection": "stored samples: every sample is equally likely (reservoir), or classes get equal numbers (balanced)",
    "step": "apply the penalty as a gradient (explicit), or as a step of its own that is stable at any strength (proximal)",
    "strength": "weight of the penalty in the loss",
    "targets": "targets of replayed samples: the previous model's probabilities (soft), or its most likely output (hard)",
    "temperature": "temperature of the softmax of soft targets; a higher one is softer",
    "variant": "generator: conditional on the class (conditional), plain (vae), or on top of the model's own layers "
    "(brain-inspired)",
    "xi": "added to the squared distance that each parameter moved, so that nothing is divided by zero",
    "joint.budget": "maximum number of stored samples; all: every sample",
    "er.balance": "share of the loss for replayed samples: their share of the batch (batch), or by the number of tasks so far "
    "(tasks), or of samples so far (counts)",
    "packnet.samples": "number of samples of a task on which it is retrained; all: every sample that is stored",
}


def describe_parameter(recipe: str, parameter: str) -> str:
    """Return the meaning of a recipe's parameter. Raises `KeyError` if it has no description."""
    return DESCRIPTIONS.get(f"{recipe}.{parameter}") or DESCRIPTIONS[parameter]
