"""The house's layers: a module imports only lower rows, or its own package."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "streamlearn"

ROWS = [
    {"older_keys"},
    {"data", "patterns", "tensors", "logs", "__init__"},
    {"config", "table"},
    {"configfile", "scenario"},
    {"augment", "memory", "optimizers", "models", "checkpoint", "stream"},
    {"state", "strategies", "evaluation"},
    {"learner", "service", "predict", "producer", "report"},
    {"metrics"},
    {"job"},
    {"loop"},
    {"daemon", "demo"},
    {"cli"},
    {"__main__"},
]
ONLY_IN = {
    "kafka": {"stream/kafka.py", "stream/batches.py", "stream/connection.py", "stream/oauth.py"},
    "httpx": {"stream/oauth.py"},
    "sqlite3": {"stream/embedded.py"},
    "prometheus_client": {"metrics.py"},
    "starlette": {"service/api.py", "service/server.py"},
    "uvicorn": {"service/server.py"},
    "yaml": {"configfile.py"},
    "regex": {"patterns.py"},
    "matplotlib": {"report.py"},
    "sklearn": {"producer.py"},
    "safetensors": {"state.py"},
    "scipy": {"strategies/projection.py"},
}
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


def unit(path: Path) -> str:
    """Return the module or package of the top level that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(PACKAGE.rglob("*.py"))


def test_every_module_has_a_row() -> None:
    """A new module or package is given its place before anything else."""
    assert {unit(path) for path in FILES} - set(ROW_OF) == set()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_lower_rows(path: Path) -> None:
    """No module imports its own row, or one above it, outside its package."""
    here = unit(path)
    edges = [name.split(".")[1] for name in imports(path) if name.startswith("streamlearn.") and name.count(".") > 1]
    upward = sorted({f"{here} -> {there}" for there in edges if there != here and ROW_OF[there] >= ROW_OF[here]})
    assert upward == []


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
    """What people ask at 3 am answers without the seconds that torch and kafka take to import."""
    code = (
        "import sys\nfrom streamlearn.cli.app import main\n"
        f"sys.argv = ['streamlearn', *{arguments!r}]\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'kafka', 'numpy') if m in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert done.stderr.splitlines()[-1] == "[]"
