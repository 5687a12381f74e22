"""The JSON Schema of the configuration file, for editors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from streamlearn.config.root import Config

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from streamlearn.config.strategy import RecipeSchema


def schema(recipes: Mapping[str, RecipeSchema]) -> dict[str, Any]:
    """Return the JSON Schema of the file for editors, with all recipes and their parameters."""
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
    for section in (tree, *tree["$defs"].values()):  # a key without a description gets the one of its section
        for value in section["properties"].values():
            if "description" not in value and (name := next(_references(value), None)) is not None:
                value["description"] = tree["$defs"][name]["description"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **tree}


def _recipe_schema(recipe: RecipeSchema) -> dict[str, Any]:
    parameters = recipe.parameters.model_json_schema()
    return {"description": parameters.pop("description"), "anyOf": [parameters, {"type": "null"}]}


def _references(value: dict[str, Any]) -> Iterator[str]:
    """Yield the names of the sections that the value of a key may be."""
    if "$ref" in value:
        yield value["$ref"].removeprefix("#/$defs/")
    for part in value.get("anyOf", ()):
        yield from _references(part)
