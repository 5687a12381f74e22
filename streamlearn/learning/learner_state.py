"""The learner's state in a checkpoint: named groups of tensors and JSON values, with the keys that stand on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamlearn.core.immutable import Immutable
from streamlearn.learning.models.module_state import load_module_state, module_state
from streamlearn.learning.tensors import clones, from_numbered, numbered
from streamlearn.state import join_tensors, split_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from streamlearn.core.labels import Label
    from streamlearn.core.tasks import Task
    from streamlearn.learning.learner import Learner
    from streamlearn.learning.models.encoder import Encoder
    from streamlearn.learning.strategies.slots import State


def state_of(learner: Learner) -> dict[str, State]:
    """Return everything that a learner needs to continue bit-equal."""
    transfer, update, task = learner.measures_transfer, learner.update.state_dict(), learner.task
    return {
        "encoder": {} if learner.encoder is None else encoder_state(learner.encoder),
        "model": module_state(learner.model),
        "live": module_state(learner.strategy.network.module) if learner.spec.average is not None else {},
        "optimizer": update["optimizer"],
        "reservoir": task.reservoir.state_dict(),
        "transfer": {
            "initial": numbered(learner.initial_params) if transfer else {},
            "task_start": numbered(learner.task_start_params) if transfer else {},
        },
        "learner": {
            "step": learner.step,
            "task_steps": task.steps,
            "batches": learner.batches,
            "task": task.index,
            "cursor": task.batches_refined if task.is_refining else None,
            "num_outputs": learner.outputs.num_outputs,
            "slowed": update["lr_factor"],
            "draws": learner.generator.get_state(),
            "distort": update["distort"],
            "layer_draws": learner.layer_rng.state_dict(),
        },
        **{name: slot.state_dict() for name, slot in learner.strategy.slots.items()},
    }


def load_state(learner: Learner, state: Mapping[str, State], tasks: Sequence[Task], labels: Sequence[Label]) -> None:
    """Restore what `state_of` returned. `tasks` and `labels` are those seen so far."""
    values = state["learner"]
    learner.outputs.clear()
    if learner.encoder is not None:  # the saved encoder, because the model was trained on its features
        learner.encoder.load(join_tensors(state["encoder"]["frozen"], state["encoder"].get("rest", {})))
    if values["num_outputs"] > learner.outputs.num_outputs:
        learner.grow(values["num_outputs"])
    for name, slot in learner.strategy.slots.items():
        slot.load_state_dict(state[name])
    load_module_state(learner.strategy.network.module, state["live"] or state["model"])
    learner.parameters.read()
    # older checkpoints have neither `slowed` nor `layer_draws`
    update = {"lr_factor": values.get("slowed", 1.0), "distort": values["distort"]}
    learner.update.load_state_dict({"optimizer": state["optimizer"], **update}, learner.params)
    learner.start_average(learner.params)
    if learner.spec.average is not None:
        load_module_state(learner.model, state["model"])
    # empty if forward transfer is undefined; then values of the right shapes are enough
    device, transfer = learner.context.device, state["transfer"]
    learner.initial_params = from_numbered(transfer["initial"], device) or clones(learner.params)
    learner.task_start_params = from_numbered(transfer["task_start"], device) or clones(learner.params)
    task, cursor = learner.task, values["cursor"]
    task.reservoir.load_state_dict(state["reservoir"])
    task.index, task.steps = values["task"], values["task_steps"]
    task.is_refining, task.batches_refined = cursor is not None, cursor or 0
    learner.step, learner.batches = values["step"], values["batches"]
    learner.generator.set_state(values["draws"])
    learner.layer_rng.load_state_dict(values.get("layer_draws", {}))
    learner.set_active_outputs(tasks, labels)


def encoder_state(encoder: Encoder) -> State:
    """Return an encoder's state: tensors that never change, saved in a file of their own, and the rest."""
    tensors, rest = split_tensors(encoder.state_dict())
    return {"frozen": Immutable(tensors), "rest": rest}
