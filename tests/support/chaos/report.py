"""Write the table of the finished cases into docs/reliability.md: `python -m tests.support.chaos.report`."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from tests.support.chaos.case import ROOT, open_results

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- chaos: begin -->", "<!-- chaos: end -->"


def table(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """Return one line for each fault: tried, lost, learned twice, and observed events, summed over its cases."""
    by_fault: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for entry in entries.values():
        by_fault[entry["fault"]].append(entry)
    lines = ["| fault | times tried | lost | learned twice | what was seen to happen |", "|---|---:|---:|---:|---|"]
    for fault, found in by_fault.items():
        seen: dict[str, int] = defaultdict(int)
        for entry in found:
            for what, times in entry["seen"].items():
                seen[what] += times
        events = "; ".join(f"{what}: {times:,}" for what, times in seen.items())
        tried, lost, twice = (sum(entry[name] for entry in found) for name in ("tried", "lost", "twice"))
        lines.append(f"| {fault} | {tried:,} | {lost:,} | {twice:,} | {events} |")
    return "\n".join([*lines, "", _footer(entries.values())])


def _footer(entries: Iterable[Mapping[str, Any]]) -> str:
    found = list(entries)
    if not found:
        return "No case is finished yet."
    days = sorted({entry["date"] for entry in found})
    seeds = ", ".join(str(seed) for seed in sorted({entry["seed"] for entry in found}))
    minutes = sum(entry["seconds"] for entry in found) / 60
    dates = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return f"{len(found)} cases, {minutes:.0f} minutes, {dates}; `--chaos-seed` {seeds}."


def page(text: str, entries: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the document with the table between its markers."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(entries)}\n{END}{after}"


def main() -> None:
    """Write the table into the document."""
    PAGE.write_text(page(PAGE.read_text(), open_results().entries))
    print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
