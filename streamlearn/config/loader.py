"""The configuration file: YAML becomes a `Config`; all errors are reported at once, each with its line, key and value."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, ValidationError

from streamlearn.config.root import Config
from streamlearn.config.views import REDACTED
from streamlearn.core.errors import AccessError, ConfigurationError
from streamlearn.core.section import describe_accepted, section_at

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from pydantic_core import ErrorDetails

    from streamlearn.config.strategy import RecipeSchema

MAX_ALIASED = 100_000  # values that aliases may repeat
MAX_SHOWN = 500  # characters of a value that an error message prints
ENV_PREFIX = "STREAMLEARN__"
MISTYPED_PREFIX = "STREAMLEARN_"
SECRET_WORDS = ("pass", "secret", "token", "key")  # a key that contains one of these may be a mistyped key of a secret
PUBLIC_SASL_KEYS = {"mechanism", "username", "client_id", "scope"}  # not token_url: a URL may contain credentials
# sections that may be written as one word, and the key that the word is the value of
SHORT_FORMS = {"model": "name", "scenario": "kind", "encoder": "name"}
# pydantic's locations of errors contain names of types that begin with these; they are no keys
TYPE_PREFIXES = ("list[", "union[", "function-", "constrained-", "literal[")
BOOLEAN_HINT = "; in YAML 1.1 yes, no, on and off mean true and false: write them in quotes"
SECRETS = (("kafka", "sasl", "password"), ("kafka", "sasl", "client_secret"), ("kafka", "ssl_password"))


def load(path: Path, recipes: Mapping[str, RecipeSchema], environ: Mapping[str, str]) -> Config:
    """Return the configuration from a YAML file; variables such as `STREAMLEARN__KAFKA__GROUP_ID` in `environ` override keys.

    Raises `ConfigurationError` with a line for every error: its key, its value and what is accepted; `AccessError` if reading
    the file is not permitted.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        kind = AccessError if isinstance(error, PermissionError) else ConfigurationError
        raise kind(f"{path}: cannot be read: {error.strerror}") from error
    tree, lines, problems = _parse(path, content)
    problems += [
        f"{path}: {'.'.join(key)}: a secret is not accepted in the file; set {_secret_sources(key)}"
        for key in SECRETS
        if _get(tree, key) is not None
    ]
    variables, invalid = _apply_environment({} if tree is None else tree, environ)
    problems += invalid
    if tree is None:
        raise ConfigurationError("\n".join(problems))
    try:
        config = Config.model_validate(tree, context={"recipes": recipes})
    except ValidationError as error:
        problems += [_describe(path, details, lines, variables) for details in error.errors()]
    if problems:
        raise ConfigurationError("\n".join(problems))
    return config


def dump(tree: Mapping[str, Any]) -> str:
    """Return values as YAML text."""
    return yaml.safe_dump(dict(tree), sort_keys=False)


def _parse(path: Path, content: bytes) -> tuple[dict[str, Any] | None, dict[tuple[str, ...], int], list[str]]:
    """Return the values (None if the text is unusable), the line of each key, and error messages about the text itself."""
    try:
        node, tree = _read_yaml(content)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist
        mark = getattr(error, "problem_mark", None)
        where = path if mark is None else f"{path}:{mark.line + 1}"
        return None, {}, [f"{where}: not YAML: {_one_line(error)}"]
    if not isinstance(tree, dict):
        return None, {}, [f"{path}: expected keys and values, got {type(tree).__name__}"]
    repeated = [f"{path}:{line}: {'.'.join(key)}: is set twice; set it once" for key, line in _repeated_keys(node)]
    return tree, _line_numbers(node), repeated


def _read_yaml(content: bytes | str) -> tuple[yaml.Node | None, Any]:
    """Return the nodes and the values of a YAML text; raises `yaml.YAMLError` or `ValueError`.

    An alias repeats everything in its anchor, so a few lines can mean more values than fit into memory, and an alias inside
    its own anchor means infinitely many. Both are refused before any code visits the values.
    """
    try:
        node = yaml.compose(content, Loader=yaml.SafeLoader)
        counted: dict[int, int | None] = {}
        if node is not None and _count_values(node, counted) - len(counted) > MAX_ALIASED:
            problem = f"its aliases repeat more than {MAX_ALIASED} values; write the values without aliases"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return node, yaml.safe_load(content)
    except RecursionError:
        raise yaml.YAMLError("lists and sections are nested too deeply") from None


def _count_values(node: yaml.Node, counted: dict[int, int | None]) -> int:
    """Return the number of values in a node, aliases expanded. `counted`: the nodes already counted, None while in progress."""
    if id(node) in counted:
        if (known := counted[id(node)]) is None:
            raise yaml.MarkedYAMLError(problem="an alias is inside its own anchor", problem_mark=node.start_mark)
        return known
    counted[id(node)] = None
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        children = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    counted[id(node)] = total = 1 + sum(_count_values(child, counted) for child in children)
    return total


def _describe(
    path: Path, details: ErrorDetails, lines: Mapping[tuple[str, ...], int], variables: Mapping[tuple[str, ...], str]
) -> str:
    """Return the message for a validation error. `variables`: the environment variable that set each overridden key."""
    key = tuple(str(part) for part in details["loc"] if not str(part).startswith(TYPE_PREFIXES))
    if key[-1:] in {("int",), ("str",)}:
        key = key[:-1]
    line = next((lines[key[:n]] for n in range(len(key), 0, -1) if key[:n] in lines), None)
    where = f"{path}:{line}" if line is not None else str(path)
    where = next((variables[key[:n]] for n in range(len(key), 0, -1) if key[:n] in variables), where)
    value = (
        ""
        if details["type"] == "missing" or isinstance(details["input"], (dict, BaseModel))
        else f" is {_shown(key, details['input'])};"
    )
    hint = BOOLEAN_HINT if isinstance(details["input"], bool) and key[:1] == ("classes",) else ""
    return f"{where}: {'.'.join(key) or '(top level)'}:{value} {describe_accepted(details, section_at(Config, key[:-1]))}{hint}"


def _shown(key: Sequence[str], value: Any) -> str:
    """Return a value as error messages print it: cut if it is long, redacted if it may be a secret."""
    if _is_secret(key):
        return REDACTED
    shown = repr(value)
    return shown if len(shown) <= MAX_SHOWN else f"{shown[:MAX_SHOWN]}..."


def _is_secret(key: Sequence[str]) -> bool:
    """Return whether a value may be a secret. The key may be mistyped, so a similar key counts too."""
    if "sasl" in key:
        return key[-1] not in PUBLIC_SASL_KEYS
    return any(word in part.lower() for part in key for word in SECRET_WORDS)


def _one_line(error: Exception) -> str:
    """Return the message of a YAML error as one line."""
    return " ".join(str(getattr(error, "problem", None) or error).split())


def _apply_environment(
    tree: dict[str, Any], environ: Mapping[str, str]
) -> tuple[dict[tuple[str, ...], str], list[str]]:
    """Set the environment's values in `tree`. Return the variable that set each key, and error messages about the others."""
    variables, problems = {}, []
    for name, text in sorted(environ.items()):
        section, _, below = name.removeprefix(MISTYPED_PREFIX).lower().partition("__")
        if name.startswith(MISTYPED_PREFIX) and below and section in Config.model_fields:
            problems.append(f"{name}: sets no key; a variable that sets a key begins with {ENV_PREFIX}")
        if not name.startswith(ENV_PREFIX):
            continue
        *parents, last = name.removeprefix(ENV_PREFIX).lower().split("__")
        node = tree
        for part in parents:
            if not isinstance(node.get(part), dict):
                node[part] = _expand_short_form(part, node.get(part))
            node = node[part]
        variables[*parents, last] = name
        try:  # a secret is text, even if it looks like a number
            node[last] = text if "password" in last or "secret" in last else _read_yaml(text)[1]
        except (yaml.YAMLError, ValueError) as error:
            problems.append(f"{name}: is {_shown((*parents, last), text)}; not YAML: {_one_line(error)}")
    return variables, problems


def _expand_short_form(key: str, value: Any) -> dict[str, Any]:
    """Return the section that a short form means, so that a variable can set one key in it; otherwise an empty section."""
    if key == "strategy" and isinstance(value, (str, list)):
        return {str(name): {} for name in ([value] if isinstance(value, str) else value)}
    return {SHORT_FORMS[key]: value} if key in SHORT_FORMS and isinstance(value, str) else {}


def _secret_sources(key: tuple[str, ...]) -> str:
    """Return where a secret may come from: its environment variable, and its key for a file if it has one."""
    name = ENV_PREFIX + "__".join(key).upper()
    return f"{name} in the environment" + ("" if key[-1].startswith("ssl") else f", or {key[-1]}_file")


def _line_numbers(node: yaml.Node | None, key: tuple[str, ...] = ()) -> dict[tuple[str, ...], int]:
    """Return the line of each key in the file."""
    lines = {}
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            below = (*key, str(name.value))
            lines[below] = name.start_mark.line + 1
            lines |= _line_numbers(value, below)
    return lines


def _repeated_keys(node: yaml.Node | None, key: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], int]]:
    """Yield each key that its section already has, and the line where it is repeated; PyYAML would use the last one."""
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for name, value in node.value:
            identity, below = (name.tag, str(name.value)), (*key, str(name.value))
            if identity in seen:
                yield below, name.start_mark.line + 1
            seen.add(identity)
            yield from _repeated_keys(value, below)


def _get(tree: Any, key: Sequence[str]) -> Any:
    """Return the value at a key of a tree, or None."""
    for part in key:
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree
