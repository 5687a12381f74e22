"""Give each chaos test its case, skip finished cases, and record successful ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.chaos.case import Case, open_results, result_digest

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    """Yield a case. The full form is skipped if it has a result for this code, and is recorded if it succeeds."""
    full = request.node.get_closest_marker("chaos") is not None
    key = f"{request.node.path.stem.removeprefix('test_')}/{request.node.name.removeprefix('test_')}"
    digest, results = result_digest(request.node.path, key), open_results()
    if full and results.has_result(key, digest) and not request.config.getoption("--again"):
        pytest.skip("finished with this code; --again runs it all the same")
    case = Case(key, request.config.getoption("--chaos-seed"))
    print(f"--chaos-seed {case.seed}")
    yield case
    assert case.entry is not None or request.node.stash.get(FAILED, False), "a case must call record"
    if full and case.entry is not None and not request.node.stash.get(FAILED, False):
        open_results().add(key, {"digest": digest, **case.entry})


FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Remember whether the test failed, because a fixture cannot see that."""
    if call.when == "call":
        item.stash[FAILED] = call.excinfo is not None
    yield
