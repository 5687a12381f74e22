"""Generates the tables of configuration keys and metrics in docs/. To update them: `python -m tests.support.tables`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamlearn.config.root import Config
from streamlearn.config.schema import schema
from streamlearn.learning.strategies.recipes import RECIPES
from streamlearn.metrics import COUNTERS, GAUGES, HISTOGRAMS, PREFIX

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

DOCS = Path(__file__).parents[2] / "docs"
TABLES = {"configure.md": ["keys"], "metrics.md": ["gauges", "counters", "histograms"]}


def main() -> None:
    """Write the tables into the documents."""
    for name in TABLES:
        (DOCS / name).write_text(with_tables(name))


def with_tables(name: str) -> str:
    """Return the text of a document with new tables."""
    text = (DOCS / name).read_text()
    for table in TABLES[name]:
        begin, end = f"<!-- table: {table} -->\n", "<!-- end of table -->"
        before, _, rest = text.partition(begin)
        after = rest.partition(end)[2]
        assert after, f"docs/{name} has no table {table}"
        text = f"{before}{begin}{make_table(table)}{end}{after}"
    return text


def make_table(table: str) -> str:
    """Return a table as Markdown."""
    if table == "keys":
        return _markdown(("key", "default", "meaning"), keys())
    series = {"gauges": GAUGES, "counters": COUNTERS, "histograms": HISTOGRAMS}[table]
    suffix = "_total" if table == "counters" else ""
    rows = [
        (f"`{PREFIX}{name}{suffix}`", ", ".join(f"`{label}`" for label in labels) or "-", text)
        for name, (text, labels, *_) in series.items()  # type: ignore[attr-defined]
    ]
    return _markdown(("series", "labels", "meaning"), rows)


def keys() -> Iterator[tuple[str, str, str]]:
    """Yield each configuration key with its default and its description, but not the recipes under `strategy`."""
    tree = schema(RECIPES)
    strategy = tree["properties"]["strategy"]
    tree["properties"]["strategy"] = {
        "default": Config.model_fields["strategy"].default,
        "description": strategy["description"],
    }
    yield from dict.fromkeys(_keys_below(tree, "", tree["$defs"]))


def _keys_below(section: dict[str, Any], prefix: str, sections: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    for name, value in section["properties"].items():
        below = list(_sections_of(value, sections))
        default = json.dumps(value.get("default", {}), ensure_ascii=False)
        shown = "required" if name in section.get("required", ()) else "" if below else f"`{default}`"
        yield f"`{prefix}{name}`", shown, value["description"]
        for part in below:
            yield from _keys_below(part, f"{prefix}{name}.", sections)


def _sections_of(value: dict[str, Any], sections: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the sections that may be the value of a key."""
    if "$ref" in value:
        yield sections[value["$ref"].removeprefix("#/$defs/")]
    for choice in value.get("anyOf", ()):
        yield from _sections_of(choice, sections)


def _markdown(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(_escaped(cell) for cell in line)} |\n" for line in lines)


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    main()
