"""`streamlearn predict`: predict the labels of a file's samples with a saved model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from streamlearn.cli.common import (
    JsonOption,
    StateOption,
    config_here,
    find_state_dir,
    format_percent,
    load_config,
    print_error,
    print_json,
    print_line,
)
from streamlearn.cli.source import HeaderOption  # noqa: TC001 - typer reads the annotations
from streamlearn.core.errors import DataError, StreamlearnError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from streamlearn.checkpoint.manifest import Checkpoint


def predict(
    file: Annotated[
        Path, typer.Argument(help="A .npz or .jsonl file, with or without labels, or a .csv file with labels.")
    ],
    checkpoint: Annotated[
        str,
        typer.Option(help="An id, its number, a tag, `latest`, or a checkpoint's directory, with a / in its path."),
    ] = "latest",
    state: StateOption = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", help="The configuration that names your own model or encoder; default: ./streamlearn.yaml."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="package.module:function, if the checkpoint's model is your own.")
    ] = None,
    encoder: Annotated[
        str | None, typer.Option(help="package.module:function, if the checkpoint's encoder is your own.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="The task, in scenarios task and domain.")] = None,
    split: Annotated[str, typer.Option(help="The split to use, if the file has several.")] = "test",
    classes: Annotated[str | None, typer.Option(help="Use only samples of these classes: 0,1.")] = None,
    header: HeaderOption = None,
    json_: JsonOption = False,
) -> None:
    """Predict labels with a saved model; print the accuracy if the file has labels, else the predicted labels.

    Of the checkpoint it reads only model.safetensors, model.json and, if there is one, the encoder.
    """
    from streamlearn.tools import producer
    from streamlearn.tools.predict import Model, accuracy

    def find_user_code(kind: str) -> tuple[str, Mapping[str, Any] | None] | None:
        """Return the name and options of the user's model or encoder; code is never imported because a checkpoint names it."""
        if (name := {"model": model, "encoder": encoder}[kind]) is not None:
            return name, None
        if (path := config or config_here()) is None:
            return None
        loaded = load_config(path)
        spec = loaded.model if kind == "model" else loaded.input.encoder
        return None if spec is None else (spec.name, spec.options)

    if (samples := producer.read_unlabelled(file, split)) is None:
        samples = producer.read_samples(str(file), split, producer.ReadOptions(header, notify=print_error))
    if classes is not None:
        groups = producer.resolve_groups(samples, [producer.parse_labels(classes)])
        samples = producer.split_by_classes(samples, groups)[0]
    done = Model(_find_checkpoint(checkpoint, state, config), find_user_code).predict(samples.x, task)
    tree: dict[str, Any] = {
        "samples": len(done.labels),
        "accuracy": accuracy(done.labels, samples.y) if samples.y else None,
    }
    rejected = [{"sample": n, "reason": error.reason, "why": str(error)} for n, error in done.rejected.items()]
    if json_:
        rounded = [None if n in done.rejected else round(float(p), 6) for n, p in enumerate(done.probabilities)]
        print_json({**tree, "rejected": rejected, "predictions": done.labels, "probabilities": rounded})
    elif samples.y:
        print_line(f"accuracy {format_percent(tree['accuracy'])} on {len(done.labels) - len(rejected)} samples")
    else:
        for label in done.labels:
            print_line("" if label is None else label)
    if rejected:
        first = rejected[0]
        message = (
            f"{file}: {len(rejected)} of {len(done.labels)} samples are rejected, "
            f"first sample {first['sample']} ({first['reason']}): {first['why']}"
        )
        if len(rejected) == len(done.labels):
            raise DataError(message)
        print_error(f"warning: {message}")


def _find_checkpoint(name: str, state: Path | None, config: Path | None) -> Checkpoint:
    """Return the checkpoint with this id, number or tag, or in this directory, after checking the files of its model."""
    from streamlearn.checkpoint.manifest import load
    from streamlearn.checkpoint.store import Store
    from streamlearn.tools.predict import Model

    if "/" in name:  # a path without a slash would be taken for an id
        return load(Path(name), *Model.FILES, optional=Model.OPTIONAL, named=False)
    where = find_state_dir(state) if config is None or state is not None else load_config(config).state_dir
    try:
        return Store(where).find(name, *Model.FILES, optional=Model.OPTIONAL)
    except StreamlearnError as error:
        hint = f"; for the directory, write ./{name}" if Path(name).is_dir() else ""
        raise error.with_message(f"{error}{hint}") from error
