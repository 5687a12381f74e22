"""Named strategies: a function each, whose keyword parameters are its configuration. Add one, and its line in RECIPES.

No torch is imported here before a recipe is called: checking a configuration needs only the signatures.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from streamlearn.strategies.parts import Part, Strategy, World

    Slots = dict[str, Part]

Strength = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[int, Field(ge=1)]


def naive(world: World) -> Slots:
    """Sequential learning: every slot at its default. The lower bound."""
    del world
    return {}


def joint(world: World, *, budget: Positive | Literal["all"] = "all") -> Slots:
    """Multi-task training on everything seen so far. The upper bound."""
    from streamlearn.memory import ALL
    from streamlearn.strategies.replay import EpisodicReplay

    return {"replay": EpisodicReplay(world, budget=ALL if budget == "all" else budget, by_tasks=True)}


def er(world: World, *, budget: Positive = 2000, ratio: Annotated[float, Field(gt=0, le=100)] = 1.0) -> Slots:
    """Experience replay (Chaudhry et al. 2019) from a memory of `budget` samples, `ratio` replayed for each new one."""
    from streamlearn.strategies.replay import EpisodicReplay

    return {"replay": EpisodicReplay(world, budget=budget, ratio=ratio)}


def generative(
    world: World,
    *,
    variant: Literal["conditional", "vae"] = "conditional",
    targets: Literal["soft", "hard"] = "soft",
    temperature: Annotated[float, Field(gt=0, le=100)] = 2.0,
    ratio: Annotated[float, Field(gt=0, le=100)] = 2.0,
    hidden: Positive = 400,
    latent: Positive = 50,
    lr: Annotated[float, Field(gt=0, lt=1)] = 1e-3,
    likelihood: Literal["bernoulli", "gaussian"] = "bernoulli",
    average: Annotated[float, Field(gt=0, lt=1)] | None = 0.998,
) -> Slots:
    """Deep generative replay (Shin et al. 2017): a generator replays the past, the frozen solver labels it."""
    from streamlearn.strategies.generative import GenerativeReplay, GeneratorSpec

    spec = GeneratorSpec(variant == "conditional", hidden, latent, lr, likelihood, average)
    return {"replay": GenerativeReplay(world, spec, soft=targets == "soft", temperature=temperature, ratio=ratio)}


def ewc(
    world: World,
    *,
    strength: Strength = 5000.0,
    fisher: Literal["exact", "sampled", "empirical"] = "exact",
    anchor: Literal["all", "last"] = "all",
    decay: Annotated[float, Field(gt=0, le=1)] = 1.0,
    samples: Positive = 1000,
    step: Literal["explicit", "proximal"] = "explicit",
) -> Slots:
    """Elastic weight consolidation (Kirkpatrick et al. 2017); `anchor: last` is its online form (Schwarz et al. 2018).

    Useful strengths are large, because the per-sample Fisher shrinks once a task is fitted.
    """
    from streamlearn.strategies.importance import Fisher
    from streamlearn.strategies.penalty import ImportancePenalty

    importance = Fisher(world, kind=fisher, samples=samples)
    proximal = step == "proximal"
    return {"penalty": ImportancePenalty(world, importance, strength, anchor=anchor, decay=decay, proximal=proximal)}


def si(
    world: World,
    *,
    strength: Strength = 0.1,
    xi: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1,
    anchor: Literal["all", "last"] = "last",
    decay: Annotated[float, Field(gt=0, le=1)] = 1.0,
    step: Literal["explicit", "proximal"] = "explicit",
) -> Slots:
    """Synaptic intelligence (Zenke, Poole & Ganguli 2017)."""
    from streamlearn.strategies.importance import PathIntegral
    from streamlearn.strategies.penalty import ImportancePenalty

    importance = PathIntegral(world, xi=xi)
    proximal = step == "proximal"
    return {"penalty": ImportancePenalty(world, importance, strength, anchor=anchor, decay=decay, proximal=proximal)}


def signature_model(function: Callable[..., Any]) -> type[BaseModel]:
    """Return a model whose fields are the function's keyword-only parameters."""
    hints = inspect.get_annotations(function, eval_str=False)
    scope = vars(inspect.getmodule(function))
    fields: dict[str, Any] = {
        name: (eval(hints[name], scope), parameter.default)  # noqa: S307 - our own annotations, kept as text
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    return create_model(function.__name__, __config__=ConfigDict(extra="forbid", frozen=True), **fields)


@dataclass(frozen=True)
class Recipe:
    """A recipe and the slots it fills."""

    build: Callable[..., Slots]
    slots: tuple[str, ...]

    @classmethod
    def of(cls, build: Callable[..., Slots], *slots: str) -> Recipe:
        """Return the recipe of a function that fills these slots."""
        return cls(build, slots)

    @cached_property
    def parameters(self) -> type[BaseModel]:
        """A model of the function's keyword parameters."""
        return signature_model(self.build)


def compose(chosen: Mapping[str, Mapping[str, Any]], world: World) -> Strategy:
    """Return the union of the chosen recipes' slots; the configuration has already refused two for one slot."""
    from streamlearn.strategies.parts import Network, Strategy

    slots: dict[str, Any] = {}
    for name, parameters in chosen.items():
        slots |= RECIPES[name].build(world, **parameters)
    slots.setdefault("network", Network(world.build_network(world.num_outputs)))
    return Strategy(**slots)


RECIPES: dict[str, Recipe] = {
    "naive": Recipe.of(naive),
    "joint": Recipe.of(joint, "replay"),
    "er": Recipe.of(er, "replay"),
    "generative": Recipe.of(generative, "replay"),
    "ewc": Recipe.of(ewc, "penalty"),
    "si": Recipe.of(si, "penalty"),
}
