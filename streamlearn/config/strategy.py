"""The key `strategy`: its short forms, and the parameters of each chosen recipe with their defaults."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from streamlearn.core.section import to_init_error

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pydantic import BaseModel
    from pydantic_core import InitErrorDetails

    from streamlearn.core.config import InputConfig, TextInputConfig
    from streamlearn.learning.strategies.config import CheckedConfig


class RecipeSchema(Protocol):
    """What the configuration needs to know about a recipe: its slots, its parameters, and its limits."""

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the slots that the recipe fills."""

    @property
    def parameters(self) -> type[BaseModel]:
        """A pydantic model made from the recipe's signature."""

    def defaults_for(self, spec: InputConfig | TextInputConfig) -> dict[str, Any]:
        """Return the parameters whose defaults depend on the input, with their values."""

    def conflicts(self, config: CheckedConfig, name: str) -> Iterator[str]:
        """Yield the reasons why this recipe cannot work with the rest of the configuration."""


def as_recipes(value: Any) -> dict[str, Any]:
    """Return the parameters by recipe; a name, or a list of names, is the short form without parameters."""
    if isinstance(value, str):
        return {value: {}}
    if isinstance(value, list) and value and all(isinstance(name, str) for name in value):
        return {name: {} for name in value}
    if isinstance(value, dict) and value:
        return {str(name): {} if parameters is None else parameters for name, parameters in value.items()}
    raise PydanticCustomError("strategy", "expected a recipe's name, a list of names, or names with parameters")


def complete_recipes(
    chosen: dict[str, Any], recipes: Mapping[str, RecipeSchema], spec: InputConfig | TextInputConfig | None
) -> dict[str, dict[str, Any]]:
    """Return all parameters of each chosen recipe, with defaults. Reports all errors at once.

    `spec`: the input, on which some defaults depend; None if it is invalid.
    """
    errors: list[InitErrorDetails] = []
    complete: dict[str, dict[str, Any]] = {}
    owner: dict[str, str] = {}
    for name, parameters in chosen.items():
        if name not in recipes:
            message = PydanticCustomError(
                "recipe", "no such recipe; accepted: {names}", {"names": ", ".join(sorted(recipes))}
            )
            errors.append({"type": message, "loc": (name,), "input": name})
            continue
        for slot in recipes[name].slots:
            if slot in owner:
                text = "slot {slot} is already filled by {other}; a strategy takes one recipe for each slot"
                message = PydanticCustomError("slot", text, {"slot": slot, "other": owner[slot]})
                errors.append({"type": message, "loc": (name,), "input": name})
            owner[slot] = name
        try:
            implied = recipes[name].defaults_for(spec) if spec is not None and isinstance(parameters, dict) else {}
            given = {**implied, **parameters} if implied else parameters
            complete[name] = recipes[name].parameters.model_validate(given).model_dump()
        except ValidationError as error:
            described = [to_init_error(details, recipes[name].parameters) for details in error.errors()]
            errors += [{**details, "loc": (name, *details["loc"])} for details in described]
    if errors:
        raise ValidationError.from_exception_data("strategy", errors)
    return complete
