"""Layers: a module imports only lower rows, or its own package. `python -m tests.test_layers` writes ARCHITECTURE.md."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "streamlearn"
PAGE = PACKAGE.parent / "ARCHITECTURE.md"
BEGIN, END = "<!-- layers: begin -->", "<!-- layers: end -->"

ROWS = [
    {"older_keys"},
    {"core"},
    {"patterns", "logs", "stream/codecs", "__init__"},
    {"sections"},
    {"config"},
    {"checkpoint", "stream"},
    {"state"},
    {"learning", "control"},
    {"evaluation"},
    {"metrics", "observability", "testing"},
    {"runtime", "tools"},
    {"cli"},
    {"__main__"},
]
ONLY_IN = {
    "kafka": {
        "stream/logs/kafka.py",
        "stream/logs/kafka_connection.py",
        "stream/logs/kafka_failures.py",
        "stream/logs/kafka_oauth.py",
        "stream/logs/kafka_python.py",
        "stream/logs/kafka_writer.py",
    },
    "httpx": {"stream/logs/kafka_oauth.py"},
    "sqlite3": {"stream/logs/sqlite.py"},
    "prometheus_client": {"metrics.py"},
    "starlette": {"control/api.py", "control/server.py"},
    "uvicorn": {"control/server.py"},
    "yaml": {"config/loader.py"},
    "regex": {"patterns.py"},
    "matplotlib": {"tools/report.py"},
    "sklearn": {"tools/producer.py"},
    "safetensors": {"state.py"},
    "scipy": {"learning/strategies/gem.py"},
}
COMPOSING = {"config", "runtime", "cli", "tools", "testing"}
"""What puts components together, and may therefore read the whole configuration."""
WINGS = {"stream", "learning", "evaluation", "checkpoint", "observability", "control"}
"""The components. They do not import each other, except that evaluation uses learning."""

ROW_OF = {name: row for row, names in enumerate(ROWS) for name in names}


def imports(path: Path) -> list[str]:
    """Return every module that a file imports, wherever in it, as dotted names."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def unit(name: str) -> str:
    """Return the module or package of the top level that a dotted name belongs to.

    `config.py` in a package is that package's section of the configuration. All of these form the unit `sections`,
    but for that of `core`, which every component reads. The codecs are a unit below the sections, because the section
    `stream` lists their names.
    """
    first, *rest = name.split(".")
    if first == "stream" and rest[:1] == ["codecs"]:
        return "stream/codecs"
    return "sections" if "config" in rest and first not in {"config", "cli", "core"} else first


def unit_of(path: Path) -> str:
    """Return the unit of a file."""
    return unit(".".join(path.relative_to(PACKAGE).with_suffix("").parts))


FILES = sorted(PACKAGE.rglob("*.py"))
WING_FILES = [path for path in FILES if path.relative_to(PACKAGE).parts[0] in WINGS]


def page(text: str) -> str:
    """Return the document with the layer table, the highest row first, between its marks."""
    lines = ["| row | modules and packages | imported only here |", "|---|---|---|"]
    for row, names in sorted(enumerate(ROWS), reverse=True):
        shown = sorted(names - {"__init__"})
        owners = {name: sorted({file.split("/")[0].removesuffix(".py") for file in ONLY_IN[name]}) for name in ONLY_IN}
        libraries = sorted(f"{name} ({', '.join(owner)})" for name, owner in owners.items() if set(owner) & names)
        lines.append(f"| {row} | {', '.join(f'`{name}`' for name in shown)} | {', '.join(libraries)} |")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{rest.partition(END)[2]}"


def test_the_document_has_the_table() -> None:
    """ARCHITECTURE.md shows the rows of this file; `python -m tests.test_layers` writes them there."""
    assert page(PAGE.read_text()) == PAGE.read_text(), "run: python -m tests.test_layers"


def test_every_module_has_a_row() -> None:
    """Each module or package at the top level has a row."""
    assert {unit_of(path) for path in FILES} - set(ROW_OF) == set()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_lower_rows(path: Path) -> None:
    """No module imports its own row, or one above it, outside its package."""
    here = unit_of(path)
    edges = {unit(name.partition(".")[2]) for name in imports(path) if name.startswith("streamlearn.")}
    # a name that `__init__` itself defines, such as the version, has no row
    others = (edges & set(ROW_OF)) - {here}
    upward = sorted(f"{here} -> {there}" for there in others if ROW_OF[there] >= ROW_OF[here])
    assert upward == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_components_import_only_their_own_section(path: Path) -> None:
    """Only what composes imports `config/`, or the section of another component; those of `core` are for all."""
    here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    names = [name.split(".") for name in imports(path) if name.startswith("streamlearn.")]
    read = {name[1] for name in names if name[1] == "config" or unit(".".join(name[1:])) == "sections"}
    assert here in COMPOSING or read <= {"core", here}


@pytest.mark.parametrize("path", WING_FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_components_do_not_import_each_other(path: Path) -> None:
    """What needs several components stands in a package that composes, for example `runtime`."""
    here = path.relative_to(PACKAGE).parts[0]
    allowed = {here, "learning"} if here == "evaluation" else {here}
    names = [name.split(".") for name in imports(path) if name.startswith("streamlearn.")]
    assert {name[1] for name in names} & WINGS <= allowed


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_libraries_stay_in_their_place(path: Path) -> None:
    """Kafka is imported only under stream, prometheus_client only in metrics, and so on."""
    own = str(path.relative_to(PACKAGE))
    strays = [name for name in imports(path) if own not in ONLY_IN.get(name.split(".")[0], {own})]
    assert strays == []


ASKING = [
    ["--help"],
    ["status", "--state", "/nowhere"],
    ["config", "check", "configs/quickstart.yaml"],
    ["config", "schema"],
    ["checkpoint", "list", "--state", "/nowhere"],
]


@pytest.mark.parametrize("arguments", ASKING, ids=lambda arguments: arguments[0])
def test_asking_imports_neither_torch_nor_kafka(arguments: list[str]) -> None:
    """Commands that only ask answer without the seconds that importing torch and kafka takes."""
    code = (
        "import sys\nfrom streamlearn.cli.app import main\n"
        f"sys.argv = ['streamlearn', *{arguments!r}]\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'kafka', 'numpy') if m in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert done.stderr.splitlines()[-1] == "[]"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
