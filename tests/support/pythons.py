"""Find other versions of CPython, and install the program's dependencies for them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from tests.support import jobs

ROOT = Path(__file__).parents[2]


def python(version: str) -> str:
    """Return the path of an interpreter of this version with the program's dependencies; skip if none is found.

    That is the running interpreter, or one in `.cache/python-VERSION`. The first call creates that environment and takes
    minutes, because it downloads torch.
    """
    if version == f"{sys.version_info.major}.{sys.version_info.minor}":
        return sys.executable
    directory = ROOT / ".cache" / f"python-{version}"
    found = directory / "bin" / "python"
    complete = directory / ".complete"
    if not complete.exists():
        interpreter = _find(version)
        jobs.require(interpreter, f"CPython {version} (python{version} on PATH, or one that uv finds)")
        needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
        uv = _uv()
        if uv is not None:
            _call(uv, "venv", "--quiet", "--allow-existing", "--python", str(interpreter), str(directory))
            _call(uv, "pip", "install", "--quiet", "--python", str(directory), *needed)
        else:
            _call(str(interpreter), "-m", "venv", str(directory))
            _call(str(found), "-m", "pip", "install", "--quiet", *needed)
        complete.touch()
    return str(found)


def _find(version: str) -> str | None:
    """Return the path of an interpreter that really runs: PATH may have a placeholder for a version not installed."""
    for command in ([f"python{version}"], [_uv() or "uv", "python", "find", version]):
        if shutil.which(command[0]) is None:
            continue
        asks = [*command, "-c", "import sys; print(sys.executable)"] if len(command) == 1 else command
        done = subprocess.run(asks, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return done.stdout.strip()
    return None


def _uv() -> str | None:
    own = ROOT / ".cache" / "uv" / "bin" / "uv"
    return shutil.which("uv") or (str(own) if own.exists() else None)


def _call(*command: str) -> None:
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": ""})
