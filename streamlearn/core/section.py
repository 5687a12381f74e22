"""The base of all sections of the configuration, and the types of values that several sections use."""

from __future__ import annotations

import json
import os
import re
import types
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    Strict,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import Self

    Violations = Iterator[tuple[str, str]]  # a dotted key, and why its value is not accepted

# pydantic looks for plugins in the metadata of every installed package; that takes time, and these models need none
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")


def _check_options(value: dict[str, Any]) -> dict[str, Any]:
    """Refuse what JSON cannot represent: options are written into checkpoints."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise PydanticCustomError(
            "options", "expected values that JSON can represent: {why}", {"why": str(error)}
        ) from error
    return value


# Upper bounds are far above every useful value, and small enough for torch, clocks and memory.
Int = Annotated[int, Strict()]  # strict, because otherwise `true` would be accepted as 1
Int32 = Annotated[Int, Field(le=(1 << 31) - 1)]
NumBytes = Annotated[Int, Field(ge=1, le=1 << 53)]
Seconds = Annotated[float, Field(gt=0, le=1e9)]
Options = Annotated[dict[str, Any], AfterValidator(_check_options)]
FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


class Section(BaseModel):
    """A section of the file. It is frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, validate_default=True)

    def rules(self) -> Iterator[Violations]:
        """Yield the rules that involve several keys, each as an iterator over its violations.

        Each rule is checked separately, and skipped when one of the keys that it reads is already invalid.
        """
        yield from ()

    def rules_in(self, context: Mapping[str, Any]) -> Iterator[Violations]:
        """Yield all rules; a section whose rules need pydantic's validation context overrides this."""
        del context
        return self.rules()

    @field_validator("*", mode="wrap")
    @classmethod
    def _check_rules(cls, value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        """Check the rules after the last field, because pydantic skips a model's own validators when a field is invalid."""
        if info.field_name != next(reversed(cls.model_fields)):
            return handler(value)
        valid, errors = dict(info.data), list[InitErrorDetails]()
        try:
            valid[info.field_name] = value = handler(value)
        except ValidationError as error:
            errors = [to_init_error(details) for details in error.errors()]
        partial = cls.model_construct(**valid)
        invalid = cls.model_fields.keys() - valid.keys()
        for name in invalid:  # so that a rule that reads it raises AttributeError
            vars(partial).pop(name, None)
        violations: list[tuple[str, str]] = []
        for rule in partial.rules_in(info.context or {}):
            try:
                violations += rule
            except AttributeError:
                if not invalid:
                    raise
        for key, why in violations:
            message = PydanticCustomError("rule", "{why}", {"why": why})
            loc = tuple(filter(None, key.split(".")))
            errors.append({"type": message, "loc": loc, "input": _value_at(partial, loc)})
        if errors:
            raise ValidationError.from_exception_data(cls.__name__, errors)
        return value

    @model_validator(mode="wrap")
    @classmethod
    def _locate_violations(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Remove the last field's name from the location of each violation: pydantic added it, but the key is another one."""
        try:
            return handler(value)
        except ValidationError as error:
            errors = error.errors()
            for details in errors:
                if details["type"] == "rule":
                    details.update({"type": "described", "loc": details["loc"][1:]})
            raise ValidationError.from_exception_data(
                cls.__name__, [to_init_error(details) for details in errors]
            ) from error


def to_init_error(details: ErrorDetails, model: type[BaseModel] | None = None) -> InitErrorDetails:
    """Return a validation error in the form that raises it again.

    `model`: the section where the error is, if the key alone does not determine it; the message then says what it accepts.
    """
    kind = details["type"] if model is None or details["type"] == "missing" else "described"
    message = PydanticCustomError(kind, "{why}", {"why": describe_accepted(details, model)})
    return {"type": message, "loc": details["loc"], "input": details["input"]}


def describe_accepted(details: ErrorDetails, model: type[BaseModel] | None) -> str:
    """Return the part of an error message that says what is accepted. `model`: the section of the invalid key, if known."""
    if details["type"] in {"model_type", "model_attributes_type"}:
        return "expected a section: keys and values"
    if details["type"] == "extra_forbidden" and model is not None:
        import difflib

        accepted = sorted(model.model_fields)
        similar = difflib.get_close_matches(str(details["loc"][-1]), accepted, n=1)
        hint = f" (did you mean {similar[0]}?)" if similar else ""
        return f"no such key{hint}; accepted: {', '.join(accepted)}"
    return details["msg"]


def section_at(model: type[BaseModel], key: Sequence[Any]) -> type[BaseModel] | None:
    """Return the class of the section at a key below `model`, or None if the key has no section."""
    for part in key:
        info = model.model_fields.get(str(part))
        if info is None:
            return None
        kinds = get_args(info.annotation) if get_origin(info.annotation) is types.UnionType else (info.annotation,)
        found = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not found:
            return None
        model = found[0]
    return model


def _value_at(section: Section, key: Sequence[str]) -> Any:
    """Return the value at a key below a section. If there is none, return {}, which error messages do not print."""
    found: Any = section
    for part in key:
        found = found.get(part) if isinstance(found, dict) else getattr(found, part, None)
    return {} if found is None else found
