"""What each parameter of a recipe means, for the schema of the configuration."""

from __future__ import annotations

DESCRIPTIONS = {
    "alpha": "weight of the stored logits in the loss",
    "anchor": "where importance pulls to: the parameters after each task (all), or after the last one",
    "average": "decay of the moving average of the generator's weights; null: none",
    "balance": "share of the loss for replayed samples: by the number of tasks, or of samples, so far",
    "beta": "weight of the stored labels in the loss",
    "budget": "samples that are stored at most, of all tasks together",
    "decay": "factor by which older importance shrinks at each task's end; 1: it stays",
    "epsilon": "nothing is projected where the squared norm of the reference gradient is far below this",
    "fisher": "labels of the Fisher information: all, weighted (exact), drawn from the model, or the samples' own (empirical)",
    "fisher_decay": "share of the moving Fisher information that an update keeps",
    "gated": "brain-inspired: share of the decoder's units that is switched off for a class",
    "hidden": "units of each hidden layer of the generator",
    "interval": "updates between two readings of the path's scores",
    "latent": "numbers of the generator's code",
    "likelihood": "of generated values: bernoulli for 0 to 1, gaussian for any; the default is gaussian with an encoder",
    "lr": "learning rate of the generator",
    "margin": "least weight of every past task's gradient in a step that is projected",
    "max_parameters": "parameters of all columns at most; a task that needs more ends the daemon",
    "memory": "samples that are stored of each task",
    "momentum": "refuse an optimizer whose momentum undoes the projection, or allow it",
    "per_class": "samples of a class at most; with selection: balanced",
    "prior": "conditional: codes of a class are drawn from where its codes lie (moments), or from the standard normal",
    "prune": "share of the free weights that a task leaves free for later ones",
    "ratio": "replayed samples for each new one",
    "reference": "stored samples for one reference gradient; null: as many as the batch has",
    "retrain_epochs": "passes over the task's samples after pruning",
    "samples": "samples of a task that importance is measured on; all: every one that is kept",
    "selection": "which samples are stored: every one equally likely (reservoir), or classes in equal numbers (balanced)",
    "step": "how importance acts: as a gradient (explicit), or as a step of its own that is stable at any strength (proximal)",
    "strength": "weight of the penalty in the loss",
    "targets": "labels of replayed samples: the previous solver's probabilities (soft), or its decision (hard)",
    "temperature": "of the softmax of soft targets; higher is softer",
    "variant": "generator: told the class (conditional), plain (vae), or on top of the solver's own layers (brain-inspired)",
    "xi": "added to the squared path of each parameter, so that none is divided by zero",
    "joint.budget": "samples that are stored at most; all: every one",
    "er.balance": "share of the loss for replayed samples: that of the batch, or by the number of tasks, or of samples, so far",
    "packnet.samples": "samples of a task that it is retrained on; all: every one that is kept",
}


def describe_parameter(recipe: str, parameter: str) -> str:
    """Return what a recipe's parameter means; raises `KeyError` for one without a description."""
    return DESCRIPTIONS.get(f"{recipe}.{parameter}") or DESCRIPTIONS[parameter]
