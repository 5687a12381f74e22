"""A recipe: a function that fills slots, the configuration keys that follow from its signature, and its checks."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, create_model

from streamlearn.learning.strategies.parameter_descriptions import describe_parameter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from streamlearn.core.config import InputConfig, TextInputConfig
    from streamlearn.learning.strategies.config import CheckedConfig

    Slots = dict[str, Any]  # keyword arguments of `Strategy`: an object for each slot, and `refine_epochs`
    Check = Callable[[CheckedConfig, str], Iterator[str]]


@dataclass(frozen=True)
class Recipe:
    """A recipe: its function, the slots that it fills, and the checks of its configuration."""

    build: Callable[..., Slots]
    slots: tuple[str, ...] = ()
    checks: tuple[Check, ...] = ()
    exclusive_reason: str | None = None  # why it cannot be combined with other recipes; None: it can
    # returns the defaults that depend on the input
    input_defaults: Callable[[InputConfig | TextInputConfig], dict[str, Any]] | None = None

    @cached_property
    def parameters(self) -> type[BaseModel]:
        """A pydantic model of the function's keyword parameters."""
        return parameters_model(self.build)

    def defaults_for(self, spec: InputConfig | TextInputConfig) -> dict[str, Any]:
        """Return the defaults that differ from the signature's for this input."""
        return {} if self.input_defaults is None else self.input_defaults(spec)

    def conflicts(self, config: CheckedConfig, name: str) -> Iterator[str]:
        """Yield the reasons why this recipe cannot work with the rest of the configuration, each with what is accepted."""
        others = " + ".join(other for other in config.strategy if other != name)
        if self.exclusive_reason is not None and others:
            yield f"cannot be combined with {others}: {self.exclusive_reason}"
        for check in self.checks:
            yield from check(config, name)


def parameters_model(function: Callable[..., Any]) -> type[BaseModel]:
    """Return a pydantic model whose fields are the function's keyword-only parameters, each with its description."""
    hints = inspect.get_annotations(function, eval_str=False)
    scope = vars(inspect.getmodule(function))
    fields: dict[str, Any] = {
        name: (
            eval(hints[name], scope),  # noqa: S307 - annotations of the function's module, as text
            Field(parameter.default, description=describe_parameter(function.__name__, name)),
        )
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    config = ConfigDict(extra="forbid", frozen=True)
    return create_model(function.__name__, __config__=config, __doc__=function.__doc__, **fields)
