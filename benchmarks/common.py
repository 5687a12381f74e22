"""What benchmarks and tests share: where the data sets are, and configurations that replace parts of others."""

from __future__ import annotations

import os
from pathlib import Path

from streamlearn.testing import merged

__all__ = ["DATA", "merged"]

DATA = Path(os.environ.get("STREAMLEARN_DATA", Path(__file__).parents[2] / "shared" / "data"))
