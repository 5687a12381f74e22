"""The recipes: one function for each strategy, whose keyword parameters are its configuration keys.

To add a recipe, write its function here and add it to `RECIPES`; its checks stand in `recipe_checks.py`. A recipe imports
torch only when it is called, so that a configuration can be checked without torch, from the signatures alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, Strict
from pydantic_core import PydanticCustomError

from streamlearn.learning.strategies import recipe_checks as checks
from streamlearn.learning.strategies.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Mapping

    from streamlearn.learning.memory import EpisodicMemory
    from streamlearn.learning.strategies.importance import Importance
    from streamlearn.learning.strategies.recipe import Slots
    from streamlearn.learning.strategies.slots import BuildContext, Network, Strategy


def _no_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("number", "expected a number")
    return value


Number = Annotated[float, BeforeValidator(_no_boolean)]  # not Strict, because YAML reads 1e4 as a string
Strength = Annotated[Number, Field(ge=0, le=1e30)]  # so that products stay within float32
Positive = Annotated[int, Strict(), Field(ge=1)]  # Strict, because pydantic reads true as 1
Width = Annotated[int, Strict(), Field(ge=1, le=1 << 16)]  # units of a generator's layer
Ratio = Annotated[Number, Field(gt=0, le=100)]
Temperature = Annotated[Number, Field(gt=0, le=100)]
Balance = Literal["tasks", "counts"]
Decay = Annotated[float, Field(gt=0, le=1)]
Anchor = Literal["all", "last"]
Step = Literal["explicit", "proximal"]
Selection = Literal["reservoir", "balanced"]
Momentum = Literal["refuse", "allow"]


def naive(context: BuildContext) -> Slots:
    """Train on one task after the other, with every slot at its default. The lower bound for other strategies."""
    del context
    return {}


def joint(context: BuildContext, *, budget: Positive | Literal["all"] = "all") -> Slots:
    """Train on all samples seen so far (multi-task training). The upper bound for other strategies."""
    from streamlearn.learning.memory import ALL, EpisodicMemory
    from streamlearn.learning.strategies.replay import EpisodicReplay

    memory = EpisodicMemory(ALL if budget == "all" else budget, context.max_bytes, context.seed)
    return {"replay": EpisodicReplay(context, memory, by_tasks=True)}


def er(
    context: BuildContext,
    *,
    budget: Positive = 2000,
    selection: Selection = "reservoir",
    per_class: Positive | None = None,
    ratio: Ratio = 1.0,
    balance: Literal["batch", "tasks", "counts"] = "batch",
) -> Slots:
    """Experience replay (Chaudhry et al. 2019): `ratio` samples from a memory of `budget` for each new sample."""
    from streamlearn.learning.strategies.replay import EpisodicReplay

    memory = _episodic_memory(context, budget, selection, per_class)
    return {"replay": EpisodicReplay(context, memory, ratio=ratio, balance=balance)}


def derpp(
    context: BuildContext,
    *,
    budget: Positive = 2000,
    selection: Selection = "reservoir",
    per_class: Positive | None = None,
    ratio: Ratio = 1.0,
    alpha: Strength = 0.5,
    beta: Strength = 0.5,
) -> Slots:
    """Dark experience replay++ (Buzzega et al. 2020): stored logits have weight `alpha` in the loss, stored labels `beta`."""
    from streamlearn.learning.strategies.replay import DarkReplay

    memory = _episodic_memory(context, budget, selection, per_class)
    return {"replay": DarkReplay(context, memory, alpha=alpha, beta=beta, ratio=ratio)}


def lwf(
    context: BuildContext,
    *,
    temperature: Temperature = 2.0,
    balance: Balance = "tasks",
) -> Slots:
    """Learning without forgetting (Li & Hoiem 2016): replays the current inputs with targets from the previous model."""
    from streamlearn.learning.strategies.lwf import LearningWithoutForgetting

    return {"replay": LearningWithoutForgetting(context, temperature=temperature, balance=balance)}


def generative(
    context: BuildContext,
    *,
    variant: Literal["conditional", "vae", "brain-inspired"] = "conditional",
    targets: Literal["soft", "hard"] = "soft",
    temperature: Temperature = 2.0,
    ratio: Ratio = 2.0,
    balance: Balance = "tasks",
    prior: Literal["moments", "normal"] = "moments",
    hidden: Width = 400,
    latent: Width = 50,
    gated: Annotated[float, Field(ge=0, lt=1)] = 0.5,
    lr: Annotated[float, Field(gt=0, lt=1)] = 1e-3,
    likelihood: Literal["bernoulli", "gaussian"] = "bernoulli",
    average: Annotated[float, Field(gt=0, lt=1)] | None = 0.998,
) -> Slots:
    """Deep generative replay (Shin et al. 2017): a generator makes samples of past tasks, a frozen model gives their targets.

    `conditional` draws the codes of a class from the distribution of its codes (`prior: moments`). `vae` is the plain published
    form; its prior is always N(0, I). `brain-inspired` (van de Ven et al. 2020) learns a prior for each class, and switches off
    a share of the decoder's units for each class (`gated`).
    """
    from streamlearn.learning.strategies.brain_inspired import FeedbackReplay
    from streamlearn.learning.strategies.generative import GenerativeReplay, ReplayTargets
    from streamlearn.learning.strategies.generator_training import GeneratorSpec

    moments = variant == "conditional" and prior == "moments"
    spec = GeneratorSpec(variant != "vae", hidden, latent, lr, likelihood, average, moments, gated)
    kind = FeedbackReplay if variant == "brain-inspired" else GenerativeReplay
    return {"replay": kind(context, spec, ReplayTargets(targets == "soft", temperature, ratio, balance))}


def l2(context: BuildContext, *, strength: Strength = 1.0, step: Step = "explicit") -> Slots:
    """L2 penalty toward the parameters after the last task, with equal importances. A baseline for the other penalties."""
    from streamlearn.learning.strategies.l2 import UniformImportance

    return _penalty(context, UniformImportance(), strength, "last", 0.0, step)


def ewc(
    context: BuildContext,
    *,
    strength: Strength = 5000.0,
    fisher: Literal["exact", "sampled", "empirical"] = "exact",
    anchor: Anchor = "all",
    decay: Decay = 1.0,
    samples: Positive | Literal["all"] = 1000,
    step: Step = "explicit",
) -> Slots:
    """Elastic weight consolidation (Kirkpatrick et al. 2017); `anchor: last` is its online form (Schwarz et al. 2018).

    Useful strengths are large, because the Fisher information of single samples is small after a task was learned well.
    """
    from streamlearn.learning.memory import ALL
    from streamlearn.learning.strategies.ewc import FisherImportance
    from streamlearn.learning.strategies.gradient_moments import check_per_sample_gradients

    check_per_sample_gradients(context, "ewc")
    importance = FisherImportance(context, kind=fisher, samples=ALL if samples == "all" else samples)
    return _penalty(context, importance, strength, anchor, decay, step)


def si(
    context: BuildContext,
    *,
    strength: Strength = 0.1,
    xi: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1,
    anchor: Anchor = "last",
    decay: Decay = 1.0,
    step: Step = "explicit",
) -> Slots:
    """Synaptic intelligence (Zenke, Poole & Ganguli 2017)."""
    from streamlearn.learning.strategies.si import PathIntegral

    return _penalty(context, PathIntegral(context, xi=xi), strength, anchor, decay, step)


def mas(
    context: BuildContext,
    *,
    strength: Strength = 1.0,
    anchor: Anchor = "last",
    decay: Decay = 1.0,
    samples: Positive | Literal["all"] = 1000,
    step: Step = "explicit",
) -> Slots:
    """Memory aware synapses (Aljundi et al. 2018): importance is how much the output would change; it needs no labels."""
    from streamlearn.learning.memory import ALL
    from streamlearn.learning.strategies.gradient_moments import check_per_sample_gradients
    from streamlearn.learning.strategies.mas import OutputSensitivity

    check_per_sample_gradients(context, "mas")
    importance = OutputSensitivity(context, samples=ALL if samples == "all" else samples)
    return _penalty(context, importance, strength, anchor, decay, step)


def rwalk(
    context: BuildContext,
    *,
    strength: Strength = 10.0,
    fisher_decay: Annotated[float, Field(gt=0, lt=1)] = 0.9,
    interval: Positive = 10,
    step: Step = "explicit",
) -> Slots:
    """Riemannian walk (Chaudhry et al. 2018): moving Fisher information plus path scores. Needs no second backward pass."""
    from streamlearn.learning.strategies.rwalk import RiemannianWalk

    # its importance already covers all tasks so far, so a decay of 0 removes the older one
    return _penalty(context, RiemannianWalk(context, keep=fisher_decay, interval=interval), strength, "last", 0.0, step)


def gem(
    context: BuildContext,
    *,
    memory: Positive = 256,
    margin: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.5,
    momentum: Momentum = "refuse",
) -> Slots:
    """Gradient episodic memory (Lopez-Paz & Ranzato 2017) with `memory` samples of each task. Costs more with every task."""
    from streamlearn.learning.memory import ALL, EpisodicMemory
    from streamlearn.learning.strategies.gem import GEMConstraint

    del momentum  # `recipe_checks.refuse_momentum` reads it
    episodic = EpisodicMemory(ALL, context.max_bytes, context.seed)
    return {"constraint": GEMConstraint(context, episodic, per_task=memory, margin=margin)}


def agem(
    context: BuildContext,
    *,
    budget: Positive = 2000,
    selection: Selection = "reservoir",
    per_class: Positive | None = None,
    reference: Positive | None = None,
    epsilon: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-7,
    momentum: Momentum = "refuse",
) -> Slots:
    """Averaged GEM (Chaudhry et al. 2019): one reference gradient, on `reference` stored samples (default: the batch size).

    If its squared norm is far below `epsilon`, the gradient is not projected.
    """
    from streamlearn.learning.strategies.gem import AGEMConstraint

    del momentum  # `recipe_checks.refuse_momentum` reads it
    memory = _episodic_memory(context, budget, selection, per_class)
    return {"constraint": AGEMConstraint(context, memory, reference=reference, epsilon=epsilon)}


def pnn(context: BuildContext, *, max_parameters: Positive = 50_000_000) -> Slots:
    """Progressive networks (Rusu et al. 2016): a column for each task, with lateral connections from all earlier columns."""
    from streamlearn.learning.strategies.pnn import ProgressiveNetwork

    return {"network": ProgressiveNetwork(context, max_parameters=max_parameters)}


def packnet(
    context: BuildContext,
    *,
    prune: Annotated[float, Field(gt=0, lt=1)] = 0.75,
    retrain_epochs: Positive = 1,
    samples: Positive | Literal["all"] = 20_000,
) -> Slots:
    """PackNet (Mallya & Lazebnik 2018): each task owns `1 - prune` of the free weights, and retrains them on its `samples`."""
    from streamlearn.learning.memory import ALL
    from streamlearn.learning.strategies.packnet import OwnershipConstraint, PackedNetwork

    network = PackedNetwork(context, prune=prune, samples=ALL if samples == "all" else samples)
    return {"network": network, "constraint": OwnershipConstraint(network), "refine_epochs": retrain_epochs}


def _episodic_memory(context: BuildContext, budget: int, selection: str, per_class: int | None) -> EpisodicMemory:
    from streamlearn.learning.memory import EpisodicMemory

    balanced = selection == "balanced"
    return EpisodicMemory(budget, context.max_bytes, context.seed, balanced=balanced, per_class=per_class)


def _penalty(
    context: BuildContext, importance: Importance, strength: float, anchor: str, decay: float, step: str
) -> Slots:
    from streamlearn.learning.strategies.penalty import ImportancePenalty

    proximal = step == "proximal"
    return {"penalty": ImportancePenalty(context, importance, strength, anchor=anchor, decay=decay, proximal=proximal)}


def build_strategy(chosen: Mapping[str, Mapping[str, Any]], context: BuildContext) -> Strategy:
    """Return the strategy of the chosen recipes. The configuration has already refused two recipes for one slot."""
    from streamlearn.learning.strategies.slots import Network, Strategy

    slots: dict[str, Any] = {}
    for name, parameters in chosen.items():
        slots |= RECIPES[name].build(context, **parameters)
    slots.setdefault("network", Network(context.build_network(context.num_outputs)))
    return Strategy(**slots)


def build_network_slot(chosen: Mapping[str, Mapping[str, Any]], context: BuildContext) -> Network:
    """Return only the network slot of the chosen recipes, untrained. Predicting with a saved model needs no other slot."""
    return build_strategy(
        {name: parameters for name, parameters in chosen.items() if "network" in RECIPES[name].slots}, context
    ).network


ISOLATES_TASKS = (
    "it isolates tasks, so nothing is forgotten, and there is nothing that a memory or a penalty could protect"
)

RECIPES: dict[str, Recipe] = {
    "naive": Recipe(naive, exclusive_reason="it is the lower bound: every slot at its default"),
    "joint": Recipe(
        joint,
        ("replay",),
        exclusive_reason="it is the upper bound: it learns every sample again, so there is nothing to protect",
    ),
    "er": Recipe(er, ("replay",), (checks.require_balanced,)),
    "derpp": Recipe(derpp, ("replay",), (checks.require_balanced,)),
    "lwf": Recipe(lwf, ("replay",)),
    "generative": Recipe(generative, ("replay",), (checks.require_gaussian,), input_defaults=checks.likelihood_default),
    "l2": Recipe(l2, ("penalty",)),
    "ewc": Recipe(ewc, ("penalty",)),
    "si": Recipe(si, ("penalty",)),
    "mas": Recipe(mas, ("penalty",)),
    "rwalk": Recipe(rwalk, ("penalty",)),
    "gem": Recipe(gem, ("constraint",), (checks.refuse_momentum,)),
    "agem": Recipe(agem, ("constraint",), (checks.refuse_momentum, checks.require_balanced)),
    "pnn": Recipe(pnn, ("network",), (checks.require_known_tasks,), exclusive_reason=ISOLATES_TASKS),
    "packnet": Recipe(
        packnet,
        ("network", "constraint"),
        (checks.require_known_tasks, checks.require_task_end),
        exclusive_reason=ISOLATES_TASKS,
    ),
}
