"""The configuration's file: YAML into `Config`, every error at once, each with its line, key, value and what is accepted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, ValidationError

from streamlearn.config import REDACTED, Config, expected, model_at
from streamlearn.data import StreamlearnError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from pydantic_core import ErrorDetails

    from streamlearn.config import RecipeSchema

MAX_ALIASED = 100_000  # values that aliases stand for
MAX_SHOWN = 500  # letters of a value that an error shows
ENV_PREFIX = "STREAMLEARN__"
NEARLY = "STREAMLEARN_"
SECRET_WORDS = ("pass", "secret", "token", "key")  # a key with one of these may be a mistyped password's
SHOWN_OF_SASL = {"mechanism", "username", "client_id", "scope"}  # an address may hold credentials
SHORT = {"model": "name", "scenario": "kind", "encoder": "name"}  # sections that may be a word, and what it is
INNER = ("list[", "union[", "function-", "constrained-", "literal[")  # pydantic's names for what is no key
HINT = "; to YAML 1.1 yes, no, on and off are true and false: quote them"
SECRETS = (("kafka", "sasl", "password"), ("kafka", "sasl", "client_secret"), ("kafka", "ssl_password"))


def load(path: Path, recipes: Mapping[str, RecipeSchema], environ: Mapping[str, str]) -> Config:
    """Return the configuration in a YAML file, with environment overrides (`STREAMLEARN__KAFKA__...`) laid over it.

    Raises `StreamlearnError` (78) whose message has a line for every error, with key, value and what is accepted.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        code = 77 if isinstance(error, PermissionError) else 78
        raise StreamlearnError(f"{path}: cannot be read: {error.strerror}", code=code) from error
    tree, lines, problems = _parse(path, content)
    problems += [
        f"{path}: {'.'.join(key)}: a secret is not accepted in the file; use {_instead(key)}"
        for key in SECRETS
        if _get(tree, key) is not None
    ]
    places, wrong = _overlay({} if tree is None else tree, environ)
    problems += wrong
    if tree is None:
        raise StreamlearnError("\n".join(problems), code=78)
    try:
        config = Config.model_validate(tree, context={"recipes": recipes})
    except ValidationError as error:
        problems += [_describe(path, details, lines, places) for details in error.errors()]
    if problems:
        raise StreamlearnError("\n".join(problems), code=78)
    return config


def schema(recipes: Mapping[str, RecipeSchema]) -> dict[str, Any]:
    """Return the JSON Schema of the file, recipes and their parameters included, for editors."""
    tree = Config.model_json_schema()
    names = sorted(recipes)
    tree["properties"]["strategy"] = {
        "description": "a recipe, or recipes with their parameters",
        "anyOf": [
            {"enum": names},
            {"type": "array", "items": {"enum": names}},
            {
                "type": "object",
                "additionalProperties": False,
                "properties": {name: _recipe_schema(recipes[name]) for name in names},
            },
        ],
    }
    for key, word in (("model", {"type": "string"}), ("scenario", {"enum": ["task", "domain", "class"]})):
        tree["properties"][key] = {"anyOf": [tree["properties"][key], word]}
    stream = tree["$defs"]["StreamConfig"]["properties"]
    stream["task_end"] = {"anyOf": [stream["task_end"], {"const": "next_topic"}]}
    tree["$defs"]["InputConfig"]["properties"]["encoder"]["anyOf"].append({"type": "string"})
    kafka = tree["$defs"]["KafkaConfig"]["properties"]
    servers = kafka["bootstrap_servers"]
    kafka["bootstrap_servers"] = {"description": servers["description"], "anyOf": [servers, {"type": "string"}]}
    for section in (tree, *tree["$defs"].values()):  # a key whose value is a section means what the section does
        for value in section["properties"].values():
            if "description" not in value and (name := next(_references(value), None)) is not None:
                value["description"] = tree["$defs"][name]["description"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **tree}


def _recipe_schema(recipe: RecipeSchema) -> dict[str, Any]:
    parameters = recipe.parameters.model_json_schema()
    return {"description": parameters.pop("description"), "anyOf": [parameters, {"type": "null"}]}


def _references(value: dict[str, Any]) -> Iterator[str]:
    """Give the names of the sections that a key's value may be."""
    if "$ref" in value:
        yield value["$ref"].removeprefix("#/$defs/")
    for part in value.get("anyOf", ()):
        yield from _references(part)


def dump(tree: Mapping[str, Any]) -> str:
    """Return a tree of values as YAML."""
    return yaml.safe_dump(dict(tree), sort_keys=False)


def _parse(path: Path, content: bytes) -> tuple[dict[str, Any] | None, dict[tuple[str, ...], int], list[str]]:
    """Return the file's tree, None where there is none, the line of each key, and what is wrong with the text itself."""
    try:
        node, tree = _values(content)
    except (yaml.YAMLError, ValueError) as error:  # a date that no calendar has is the second
        mark = getattr(error, "problem_mark", None)
        where = path if mark is None else f"{path}:{mark.line + 1}"
        return None, {}, [f"{where}: not YAML: {_one_line(error)}"]
    if not isinstance(tree, dict):
        return None, {}, [f"{path}: expected keys and values, got {type(tree).__name__}"]
    twice = [f"{path}:{line}: {'.'.join(key)}: is here twice; a key is accepted once" for key, line in _repeated(node)]
    return tree, _line_numbers(node), twice


def _values(content: bytes | str) -> tuple[yaml.Node | None, Any]:
    """Return a text's nodes and values; raises `yaml.YAMLError` or `ValueError`.

    An alias stands for all that its anchor holds, so a few lines can stand for more values than memory has, and an alias
    inside its own anchor for infinitely many. Both are refused before anything walks over them.
    """
    try:
        node = yaml.compose(content, Loader=yaml.SafeLoader)
        counted: dict[int, int | None] = {}
        if node is not None and _count(node, counted) - len(counted) > MAX_ALIASED:
            problem = f"its aliases stand for more than {MAX_ALIASED} values; write out what is meant"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return node, yaml.safe_load(content)
    except RecursionError:
        raise yaml.YAMLError("lists and sections are nested too deeply") from None


def _count(node: yaml.Node, counted: dict[int, int | None]) -> int:
    """Return the number of values that a node stands for, its aliases written out."""
    if id(node) in counted:
        if (known := counted[id(node)]) is None:
            raise yaml.MarkedYAMLError(problem="an alias stands inside its own anchor", problem_mark=node.start_mark)
        return known
    counted[id(node)] = None  # as long as it is being counted
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        children = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    counted[id(node)] = total = 1 + sum(_count(child, counted) for child in children)
    return total


def _describe(
    path: Path, details: ErrorDetails, lines: Mapping[tuple[str, ...], int], places: Mapping[tuple[str, ...], str]
) -> str:
    """Return the line for an error; `places` says which environment variables have set a key."""
    key = tuple(str(part) for part in details["loc"] if not str(part).startswith(INNER))
    if key[-1:] in {("int",), ("str",)}:
        key = key[:-1]
    line = next((lines[key[:n]] for n in range(len(key), 0, -1) if key[:n] in lines), None)
    where = f"{path}:{line}" if line is not None else str(path)
    where = next((places[key[:n]] for n in range(len(key), 0, -1) if key[:n] in places), where)
    value = (
        ""
        if details["type"] == "missing" or isinstance(details["input"], (dict, BaseModel))
        else f" is {_show(key, details['input'])};"
    )
    hint = HINT if isinstance(details["input"], bool) and key[:1] == ("classes",) else ""
    return f"{where}: {'.'.join(key) or '(top level)'}:{value} {expected(details, model_at(Config, key[:-1]))}{hint}"


def _show(key: Sequence[str], value: Any) -> str:
    if _is_secret(key):
        return REDACTED
    shown = repr(value)
    return shown if len(shown) <= MAX_SHOWN else f"{shown[:MAX_SHOWN]}..."


def _is_secret(key: Sequence[str]) -> bool:
    """Tell whether a value may be a secret, by a key that may be mistyped."""
    if "sasl" in key:
        return key[-1] not in SHOWN_OF_SASL
    return any(word in part.lower() for part in key for word in SECRET_WORDS)


def _one_line(error: Exception) -> str:
    return " ".join(str(getattr(error, "problem", None) or error).split())


def _overlay(tree: dict[str, Any], environ: Mapping[str, str]) -> tuple[dict[tuple[str, ...], str], list[str]]:
    """Lay the environment's values over a tree; return which key each has set, and what is wrong with the others."""
    places, problems = {}, []
    for name, text in sorted(environ.items()):
        section, _, below = name.removeprefix(NEARLY).lower().partition("__")
        if name.startswith(NEARLY) and below and section in Config.model_fields:
            problems.append(f"{name}: no key of the configuration; one begins with {ENV_PREFIX}")
        if not name.startswith(ENV_PREFIX):
            continue
        *parents, last = name.removeprefix(ENV_PREFIX).lower().split("__")
        node = tree
        for part in parents:
            if not isinstance(node.get(part), dict):
                node[part] = _written_out(part, node.get(part))
            node = node[part]
        places[*parents, last] = name
        try:  # a secret is text whatever it looks like
            node[last] = text if "password" in last or "secret" in last else _values(text)[1]
        except (yaml.YAMLError, ValueError) as error:
            problems.append(f"{name}: is {_show((*parents, last), text)}; not YAML: {_one_line(error)}")
    return places, problems


def _written_out(key: str, value: Any) -> dict[str, Any]:
    """Return what a section's short form stands for, so that a key below it is laid over that; else an empty section."""
    if key == "strategy" and isinstance(value, (str, list)):
        return {str(name): {} for name in ([value] if isinstance(value, str) else value)}
    return {SHORT[key]: value} if key in SHORT and isinstance(value, str) else {}


def _instead(key: tuple[str, ...]) -> str:
    name = ENV_PREFIX + "__".join(key).upper()
    return f"{name} in the environment" + ("" if key[-1].startswith("ssl") else f", or {key[-1]}_file")


def _line_numbers(node: yaml.Node | None, key: tuple[str, ...] = ()) -> dict[tuple[str, ...], int]:
    lines = {}
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            below = (*key, str(name.value))
            lines[below] = name.start_mark.line + 1
            lines |= _line_numbers(value, below)
    return lines


def _repeated(node: yaml.Node | None, key: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], int]]:
    """Give each key that its section has already, and the line where it comes again: YAML keeps the last one."""
    if isinstance(node, yaml.MappingNode):
        met = set()
        for name, value in node.value:
            one, below = (name.tag, str(name.value)), (*key, str(name.value))
            if one in met:
                yield below, name.start_mark.line + 1
            met.add(one)
            yield from _repeated(value, below)


def _get(tree: Any, key: Sequence[str]) -> Any:
    for part in key:
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree
