"""Keys of older checkpoints are read, and today's keys are written."""

from __future__ import annotations

import json

from streamlearn import older_keys
from streamlearn.core.positions import Positions
from streamlearn.core.progress import Progress
from streamlearn.core.tasks import Task


def test_a_task_of_an_older_checkpoint_has_the_same_values() -> None:
    """Only the older keys are replaced; an older and a new tree of the same task give equal tasks."""
    task = Task(0, "a", forgiven_below={0: 7, 3: 9})
    new = json.loads(json.dumps(task.to_json()))
    old = {**new, "excused": new["forgiven_below"]}
    del old["forgiven_below"]
    assert older_keys.update_task_keys(old) == older_keys.update_task_keys(new) == new
    assert Task.from_json(old) == Task.from_json(new) == task
    tree = {**Progress().to_json(), "tasks": [old]}
    assert Progress.from_json(tree, Positions()).tasks == [task]


def test_older_keys_are_not_written() -> None:
    """The new key is written only if it has a value, because version 0.1.0 refuses a task with an unknown key."""
    assert "forgiven_below" not in Task(0, "a").to_json()
    assert Task(0, "a", forgiven_below={0: 7}).to_json()["forgiven_below"] == {"0": 7}
    assert not older_keys.TASK_KEYS.keys() & Task(0, "a", forgiven_below={0: 7}).to_json().keys()
