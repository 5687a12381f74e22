"""Tests of progress."""

from __future__ import annotations

import json
from collections import Counter

from streamlearn.core.deliveries import Delivery, Observations
from streamlearn.core.positions import Position, Positions
from streamlearn.core.progress import Progress
from streamlearn.core.samples import Outcome
from streamlearn.core.tasks import Task


def test_progress_counts_every_sample() -> None:
    """A delivery updates totals, the task's counts and its marked partitions; JSON keeps them."""
    progress = Progress(tasks=[Task(0, "a")])
    found = Observations(
        consumed=Counter(a=5, b=1),
        outcomes=Counter({("a", Outcome.HELD_OUT): 2, ("a", Outcome.REJECTED): 3, ("b", Outcome.LATE): 1}),
        new_labels=[(0, 7), (0, "x"), (0, 7)],
        new_words=["mary", "went"],
        task_end_markers=[("a", 0)],
    )
    progress.register_labels(found)
    progress.advance(Delivery(Positions({("a", 0): Position(5)}), found, end_offsets={0: 9}), Outcome.TRAINED)
    assert progress.unaccounted() == {}
    assert (progress.labels, progress.tasks[0].labels, progress.tasks[0].marked_partitions) == ([7, "x"], [7, "x"], [0])
    assert progress.tasks[0].end_offsets == {0: 9}
    progress.register_labels(Observations(new_words=["home"]))
    assert progress.vocabulary == ["mary", "went", "home"]
    tree = json.loads(json.dumps(progress.to_json()))
    assert Progress.from_json(tree, progress.positions) == progress
    progress.counts_by_topic["a"]["consumed"] += 1
    assert progress.unaccounted() == {"a": 1}
