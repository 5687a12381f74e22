"""Named strategies: a function each, whose keyword parameters are its configuration. Add one, and its line in RECIPES.

No torch is imported here before a recipe is called: checking a configuration needs only the signatures.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, create_model
from pydantic_core import PydanticCustomError

from streamlearn.strategies.parameter_descriptions import describe_parameter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from streamlearn.config import Config, InputConfig, TextInputConfig
    from streamlearn.memory import EpisodicMemory
    from streamlearn.strategies.importance import Importance
    from streamlearn.strategies.slots import BuildContext, Network, Strategy

    Slots = dict[str, Any]  # a part for each slot, and where it refines, `refine_epochs`
    Check = Callable[[Config, str], Iterator[str]]


def _no_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("number", "expected a number")
    return value


Number = Annotated[float, BeforeValidator(_no_boolean)]  # not Strict: to YAML 1e4 is a string
Strength = Annotated[Number, Field(ge=0, le=1e30)]  # within float32, where it is multiplied
Positive = Annotated[int, Strict(), Field(ge=1)]  # or true would be 1
Width = Annotated[int, Strict(), Field(ge=1, le=1 << 16)]  # of a generator's layer
Ratio = Annotated[Number, Field(gt=0, le=100)]
Temperature = Annotated[Number, Field(gt=0, le=100)]
Balance = Literal["tasks", "counts"]
Decay = Annotated[float, Field(gt=0, le=1)]
Anchor = Literal["all", "last"]
Step = Literal["explicit", "proximal"]
Selection = Literal["reservoir", "balanced"]
Momentum = Literal["refuse", "allow"]


def naive(context: BuildContext) -> Slots:
    """Sequential learning: every slot at its default. The lower bound."""
    del context
    return {}


def joint(context: BuildContext, *, budget: Positive | Literal["all"] = "all") -> Slots:
    """Multi-task training on everything seen so far. The upper bound."""
    from streamlearn.memory import ALL, EpisodicMemory
    from streamlearn.strategies.replay import EpisodicReplay

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
    """Experience replay (Chaudhry et al. 2019) from a memory of `budget` samples, `ratio` replayed for each new one."""
    from streamlearn.strategies.replay import EpisodicReplay

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
    """Dark experience replay++ (Buzzega et al. 2020): stored logits weigh `alpha`, stored labels `beta`."""
    from streamlearn.strategies.replay import DarkReplay

    memory = _episodic_memory(context, budget, selection, per_class)
    return {"replay": DarkReplay(context, memory, alpha=alpha, beta=beta, ratio=ratio)}


def lwf(
    context: BuildContext,
    *,
    temperature: Temperature = 2.0,
    balance: Balance = "tasks",
) -> Slots:
    """Learning without forgetting (Li & Hoiem 2016): the current inputs, labelled by the previous solver."""
    from streamlearn.strategies.lwf import LearningWithoutForgetting

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
    """Deep generative replay (Shin et al. 2017): a generator replays the past, the frozen solver labels it.

    `conditional` draws the codes of a class from where its codes lie (`prior: moments`); `vae` is the plain published form, its
    prior always normal; `brain-inspired` (van de Ven et al. 2020) learns a prior a class and gates its decoder (`gated`).
    """
    from streamlearn.strategies.generative import FeedbackReplay, GenerativeReplay, GeneratorSpec, ReplayTargets

    moments = variant == "conditional" and prior == "moments"
    spec = GeneratorSpec(variant != "vae", hidden, latent, lr, likelihood, average, moments, gated)
    kind = FeedbackReplay if variant == "brain-inspired" else GenerativeReplay
    return {"replay": kind(context, spec, ReplayTargets(targets == "soft", temperature, ratio, balance))}


def l2(context: BuildContext, *, strength: Strength = 1.0, step: Step = "explicit") -> Slots:
    """Pull every parameter alike toward where the last task left it: what importance is compared with."""
    from streamlearn.strategies.l2 import UniformImportance

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

    Useful strengths are large, because the per-sample Fisher shrinks once a task is fitted.
    """
    from streamlearn.memory import ALL
    from streamlearn.strategies.ewc import FisherImportance
    from streamlearn.strategies.gradient_moments import check_per_sample_gradients

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
    from streamlearn.strategies.si import PathIntegral

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
    """Memory aware synapses (Aljundi et al. 2018): how much the output would change; needs no labels."""
    from streamlearn.memory import ALL
    from streamlearn.strategies.gradient_moments import check_per_sample_gradients
    from streamlearn.strategies.mas import OutputSensitivity

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
    """Riemannian walk (Chaudhry et al. 2018): a moving Fisher and path scores, both normalised; no second backward pass."""
    from streamlearn.strategies.rwalk import RiemannianWalk

    # all tasks so far are in what it returns, so what was there before goes
    return _penalty(context, RiemannianWalk(context, keep=fisher_decay, interval=interval), strength, "last", 0.0, step)


def gem(
    context: BuildContext,
    *,
    memory: Positive = 256,
    margin: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.5,
    momentum: Momentum = "refuse",
) -> Slots:
    """Gradient episodic memory (Lopez-Paz & Ranzato 2017), `memory` samples a task. Costs more with every task."""
    from streamlearn.memory import ALL, EpisodicMemory
    from streamlearn.strategies.gem import GEMConstraint

    del momentum  # a question of configuration
    kept = EpisodicMemory(ALL, context.max_bytes, context.seed)
    return {"constraint": GEMConstraint(context, kept, per_task=memory, margin=margin)}


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
    """Averaged GEM (Chaudhry et al. 2019): one gradient on `reference` stored samples (default: as many as the batch).

    Where its squared norm is far below `epsilon`, nothing is projected.
    """
    from streamlearn.strategies.gem import AGEMConstraint

    del momentum
    memory = _episodic_memory(context, budget, selection, per_class)
    return {"constraint": AGEMConstraint(context, memory, reference=reference, epsilon=epsilon)}


def pnn(context: BuildContext, *, max_parameters: Positive = 50_000_000) -> Slots:
    """Progressive networks (Rusu et al. 2016): a column a task, lateral connections at every hidden layer."""
    from streamlearn.strategies.pnn import ProgressiveNetwork

    return {"network": ProgressiveNetwork(context, max_parameters=max_parameters)}


def packnet(
    context: BuildContext,
    *,
    prune: Annotated[float, Field(gt=0, lt=1)] = 0.75,
    retrain_epochs: Positive = 1,
    samples: Positive | Literal["all"] = 20_000,
) -> Slots:
    """PackNet (Mallya & Lazebnik 2018): each task keeps `1 - prune` of the free weights, retrained on `samples` of its own."""
    from streamlearn.memory import ALL
    from streamlearn.strategies.packnet import OwnershipConstraint, PackedNetwork

    network = PackedNetwork(context, prune=prune, samples=ALL if samples == "all" else samples)
    return {"network": network, "constraint": OwnershipConstraint(network), "refine_epochs": retrain_epochs}


def _episodic_memory(context: BuildContext, budget: int, selection: str, per_class: int | None) -> EpisodicMemory:
    from streamlearn.memory import EpisodicMemory

    balanced = selection == "balanced"
    return EpisodicMemory(budget, context.max_bytes, context.seed, balanced=balanced, per_class=per_class)


def _penalty(
    context: BuildContext, importance: Importance, strength: float, anchor: str, decay: float, step: str
) -> Slots:
    from streamlearn.strategies.penalty import ImportancePenalty

    proximal = step == "proximal"
    return {"penalty": ImportancePenalty(context, importance, strength, anchor=anchor, decay=decay, proximal=proximal)}


def _refuse_momentum(config: Config, name: str) -> Iterator[str]:
    """Projection holds for the gradient; momentum, and Adam's, moves on along gradients from before it."""
    o = config.learner.optimizer
    if config.strategy[name]["momentum"] == "refuse" and (o.name != "sgd" or o.momentum):
        used = f"{o.name} with momentum {o.momentum}" if o.name == "sgd" else o.name
        yield (
            f"learner.optimizer is {used}: momentum undoes the projection; "
            f"accepted: {{name: sgd, momentum: 0}}, or {name}: {{momentum: allow}}"
        )


def _require_balanced(config: Config, name: str) -> Iterator[str]:
    chosen = config.strategy[name]
    if chosen["per_class"] is not None and chosen["selection"] != "balanced":
        yield f"per_class is {chosen['per_class']}, and selection {chosen['selection']}; accepted with selection: balanced"


def _require_gaussian(config: Config, name: str) -> Iterator[str]:
    """Refuse to make features, which nothing bounds, with a generator of numbers from 0 to 1."""
    if config.input.encoder is not None and config.strategy[name]["likelihood"] == "bernoulli":
        yield "with input.encoder it replays features, which are not in [0, 1]; accepted: generative: {likelihood: gaussian}"


def _likelihood_default(spec: InputConfig | TextInputConfig) -> dict[str, Any]:
    """Return the likelihood of what an encoder makes: features, which nothing bounds."""
    return {"likelihood": "gaussian"} if spec.encoder is not None else {}


def _refuse_unknown_tasks(config: Config, name: str) -> Iterator[str]:
    """Say what networks that isolate tasks cannot do."""
    if config.scenario.kind == "class":
        yield (
            f"{name} must be told the task of a sample, and scenario class does not tell; accepted: scenario task or domain"
        )
    if config.grow_head:
        yield f"{name} has outputs that do not grow; accepted: grow_head: false, with enough classes"


def _require_task_end(config: Config, name: str) -> Iterator[str]:
    topics, rule = config.stream.topics, config.stream.task_end
    if topics is not None and len(topics) == 1 and rule.next_topic:
        yield (
            f"{name} prunes at the end of a task, and the only topic, {topics[0]}, has none; "
            "accepted: stream.task_end records: N or idle: SECONDS, or more topics"
        )


def parameters_model(function: Callable[..., Any]) -> type[BaseModel]:
    """Return a model whose fields are the function's keyword-only parameters, each with its description."""
    hints = inspect.get_annotations(function, eval_str=False)
    scope = vars(inspect.getmodule(function))
    fields: dict[str, Any] = {
        name: (
            eval(hints[name], scope),  # noqa: S307 - our own annotations, kept as text
            Field(parameter.default, description=describe_parameter(function.__name__, name)),
        )
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    config = ConfigDict(extra="forbid", frozen=True)
    return create_model(function.__name__, __config__=config, __doc__=function.__doc__, **fields)


@dataclass(frozen=True)
class Recipe:
    """A recipe, the slots it fills, and what it cannot be combined or configured with."""

    build: Callable[..., Slots]
    slots: tuple[str, ...] = ()
    checks: tuple[Check, ...] = ()
    exclusive_reason: str | None = None  # why nothing is combined with it
    input_defaults: Callable[[InputConfig | TextInputConfig], dict[str, Any]] | None = (
        None  # defaults that depend on the input
    )

    @cached_property
    def parameters(self) -> type[BaseModel]:
        """A model of the function's keyword parameters."""
        return parameters_model(self.build)

    def defaults_for(self, spec: InputConfig | TextInputConfig) -> dict[str, Any]:
        """Return the defaults that are others for this input than the signature's."""
        return {} if self.input_defaults is None else self.input_defaults(spec)

    def conflicts(self, config: Config, name: str) -> Iterator[str]:
        """Give the reasons why a configuration that chose this recipe makes no sense, each with what is accepted."""
        others = " + ".join(other for other in config.strategy if other != name)
        if self.exclusive_reason is not None and others:
            yield f"cannot be combined with {others}: {self.exclusive_reason}"
        for check in self.checks:
            yield from check(config, name)


def build_strategy(chosen: Mapping[str, Mapping[str, Any]], context: BuildContext) -> Strategy:
    """Return the union of the chosen recipes' slots; the configuration has already refused two for one slot."""
    from streamlearn.strategies.slots import Network, Strategy

    slots: dict[str, Any] = {}
    for name, parameters in chosen.items():
        slots |= RECIPES[name].build(context, **parameters)
    slots.setdefault("network", Network(context.build_network(context.num_outputs)))
    return Strategy(**slots)


def build_network_slot(chosen: Mapping[str, Mapping[str, Any]], context: BuildContext) -> Network:
    """Return the network slot exclusive_reason, untrained: what is needed to use a saved model."""
    return build_strategy(
        {name: parameters for name, parameters in chosen.items() if "network" in RECIPES[name].slots}, context
    ).network


ISOLATES_TASKS = (
    "it isolates tasks, so nothing is forgotten, and samples or importances of other tasks have nothing to protect"
)

RECIPES: dict[str, Recipe] = {
    "naive": Recipe(naive, exclusive_reason="it is the lower bound: every slot at its default"),
    "joint": Recipe(
        joint,
        ("replay",),
        exclusive_reason="it is the upper bound: it learns every sample again, so nothing is to protect",
    ),
    "er": Recipe(er, ("replay",), (_require_balanced,)),
    "derpp": Recipe(derpp, ("replay",), (_require_balanced,)),
    "lwf": Recipe(lwf, ("replay",)),
    "generative": Recipe(generative, ("replay",), (_require_gaussian,), input_defaults=_likelihood_default),
    "l2": Recipe(l2, ("penalty",)),
    "ewc": Recipe(ewc, ("penalty",)),
    "si": Recipe(si, ("penalty",)),
    "mas": Recipe(mas, ("penalty",)),
    "rwalk": Recipe(rwalk, ("penalty",)),
    "gem": Recipe(gem, ("constraint",), (_refuse_momentum,)),
    "agem": Recipe(agem, ("constraint",), (_refuse_momentum, _require_balanced)),
    "pnn": Recipe(pnn, ("network",), (_refuse_unknown_tasks,), exclusive_reason=ISOLATES_TASKS),
    "packnet": Recipe(
        packnet, ("network", "constraint"), (_refuse_unknown_tasks, _require_task_end), exclusive_reason=ISOLATES_TASKS
    ),
}
