"""Prediction with a saved model: it rejects the samples that a stream would reject, and does not trust the checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from typer.testing import CliRunner

from streamlearn import state
from streamlearn.checkpoint.manifest import Checkpoint, load
from streamlearn.checkpoint.store import Store
from streamlearn.cli.app import app
from streamlearn.core.errors import StreamlearnError
from streamlearn.learning.models import registry
from streamlearn.learning.models.module_state import module_state
from streamlearn.tools.predict import Model
from tests.support import awkward

if TYPE_CHECKING:
    from collections.abc import Mapping

GOLDEN = Path(__file__).parents[2] / "golden" / "format-1"
OWN = "tests.support.awkward:make"
MLP = {"name": "mlp", "hidden": [5]}


def saved(
    state_dir: Path, *, model: Mapping[str, Any] = MLP, shape: int = 4, dtype: str = "float32", **over: Any
) -> Checkpoint:
    """Save an untrained model as the daemon does."""
    spec = {"options": {}, **model}
    module = registry.build(spec, [shape], 3, 0)
    tensors, rest = state.split_tensors(module_state(module))
    description: dict[str, Any] = {
        "format": 1,
        "model": spec,
        "input": {"kind": "numbers", "shape": [shape], "dtype": dtype, "scale": 1.0, "encoder": None},
        "vocabulary": [],
        "seed": 0,
        "num_outputs": 3,
        "scenario": "class",
        "labels": ["a", "b", "c"],
        "tasks": {"t1": {"labels": ["a", "b", "c"], "outputs": [0, 1, 2], "probe_accuracy": None}},
        "strategy": {"naive": {}},
        "network": {},
        "step": 1,
        "state": {"model": rest, "encoder": {}},
    }
    files: dict[str, Any] = {
        "model.json": json.dumps({**description, **over}).encode(),
        "model.safetensors": state.to_bytes(state.host_copies(tensors)),
    }
    info = {"step": 1, "batches": 1, "average_accuracy": None}
    return Store(state_dir).save(files, info)


def cli(*args: object) -> tuple[int, str, str]:
    """Run `streamlearn predict` in this process; return the exit code, stdout and stderr."""
    done = CliRunner().invoke(app, ["predict", *map(str, args)], catch_exceptions=True)
    if isinstance(done.exception, StreamlearnError):
        return done.exception.exit_code, done.stdout, str(done.exception)
    return done.exit_code, done.stdout, done.stderr


def rows(path: Path, x: np.ndarray, name: str = "x.npz") -> Path:
    """Write samples without labels to a file."""
    np.savez(path / name, x=x)
    return path / name


def test_samples_that_the_stream_would_reject_are_rejected(tmp_path: Path) -> None:
    """JSON has null and the reason for each; text has an empty line and one warning. The other samples are predicted."""
    saved(tmp_path / "state")
    x = np.ones((5, 4))
    x[1, 2], x[2, 0], x[3, 1] = np.nan, np.inf, 1e39
    code, out, _ = cli(rows(tmp_path, x), "--state", tmp_path / "state", "--json")
    tree = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (code, tree["samples"]) == (0, 5)
    assert [(entry["sample"], entry["reason"]) for entry in tree["rejected"]] == [(n, "nonfinite") for n in (1, 2, 3)]
    assert [label is None for label in tree["predictions"]] == [False, True, True, True, False]
    assert [p is None for p in tree["probabilities"]] == [False, True, True, True, False]
    code, out, err = cli(rows(tmp_path, x), "--state", tmp_path / "state")
    assert (code, out.splitlines()) == (0, [tree["predictions"][0], "", "", "", tree["predictions"][4]])
    assert err.startswith("warning: ")
    assert "3 of 5 samples are rejected, first sample 1 (nonfinite): x has a value that is not finite" in err


def test_a_file_with_only_rejected_samples_is_an_error(tmp_path: Path) -> None:
    """The JSON is still printed, and the exit code is that of wrong data."""
    saved(tmp_path / "state")
    code, out, err = cli(rows(tmp_path, np.full((2, 4), np.nan)), "--state", tmp_path / "state", "--json")
    assert (code, json.loads(out)["predictions"]) == (65, [None, None])
    assert "2 of 2 samples are rejected" in err


def test_numbers_are_accepted_in_the_dtypes_of_files(tmp_path: Path) -> None:
    """Whole numbers in range are accepted as integers, also as floats; others are rejected."""
    saved(tmp_path / "state", dtype="uint8")
    x = np.array([[0.0, 1, 2, 255], [0, 1, 2, 256], [0, 1, 2, -1], [0, 1, 2, 0.5], [0, 1, 2, np.nan]])
    code, out, _ = cli(rows(tmp_path, x), "--state", tmp_path / "state", "--json")
    tree = json.loads(out)
    assert code == 0
    assert [(entry["sample"], entry["reason"]) for entry in tree["rejected"]] == [(n, "schema") for n in (1, 2, 3, 4)]
    tree = json.loads(cli(rows(tmp_path, x[:1].astype(np.int64)), "--state", tmp_path / "state", "--json")[1])
    assert tree["rejected"] == []


def test_outputs_that_are_not_finite_are_rejected(tmp_path: Path) -> None:
    """A sample that overflows inside the model gets no label and no probability."""
    checkpoint = saved(tmp_path / "state")
    model = Model(checkpoint)
    for param in model.network.module.parameters():
        param.data *= 100
    done = model.predict(np.array([[1.0, 1, 1, 1], [3e38, 3e38, -3e38, 3e38]], np.float32))
    assert done.labels[0] is not None
    assert [(n, str(error)) for n, error in done.rejected.items()] == [(1, "the model's outputs for x are not finite")]
    empty = Model(checkpoint).predict(np.zeros((0, 4), np.float32))
    assert (empty.labels, empty.rejected) == ([], {})


def test_checkpoints_of_older_versions_are_loaded() -> None:
    """A `model.json` without the newer fields is enough."""
    for path in sorted(GOLDEN.glob("*/checkpoints/ckpt-*")):
        done = Model(load(path, *Model.FILES, named=False)).predict(np.zeros((2, 4), np.float32))
        assert len(done.labels) == 2
        assert done.rejected == {}


@pytest.mark.usefixtures("daemon_mode")
def test_code_is_imported_only_where_the_user_names_it(tmp_path: Path) -> None:
    """A function named only by a checkpoint is not imported; --model or a configuration must name the same one."""
    saved(tmp_path / "state", model={"name": OWN, "options": {"kind": "odd"}}, shape=12)
    where = (rows(tmp_path, np.ones((2, 12), np.float32)), "--state", tmp_path / "state")
    code, _, err = cli(*where)
    assert (code, "code that only a checkpoint names is not imported" in err) == (78, True)
    code, _, err = cli(*where, "--model", "tests.support.awkward:headless")
    assert (code, f"its model is {OWN}, and you named tests.support.awkward:headless" in err) == (78, True)
    code, out, err = cli(*where, "--model", OWN)
    assert (code, len(out.splitlines())) == (0, 2), err
    path = tmp_path / "job.yaml"
    path.write_text(json.dumps({
        "input": {"shape": [12]}, "classes": 3, "stream": {"topics": ["t1"]},
        "model": {"name": OWN, "options": {"kind": "odd"}}, "strategy": "naive",
    }))  # fmt: skip
    code, again, err = cli(*where, "--config", path)
    assert (code, again) == (0, out), err


def test_a_function_named_by_a_checkpoint_is_not_called(tmp_path: Path) -> None:
    """A checkpoint that names a function of Python, with its arguments as the shape, is refused before any import."""
    marker = tmp_path / "executed"
    checkpoint = saved(
        tmp_path / "state",
        model=MLP,
        input={"kind": "numbers", "shape": ["/bin/sh", "-c", f"touch {marker}"], "dtype": "float32", "scale": 1.0},
    )
    with pytest.raises(StreamlearnError, match=r"model\.json: not valid: input\..*shape.*integer") as caught:
        Model(checkpoint, lambda _: ("subprocess:run", None))
    assert caught.value.exit_code == 78
    for over in (
        {"model": {"name": "subprocess:run", "options": {}}},
        {"input": {"kind": "numbers", "shape": [4], "encoder": {"name": "subprocess:run", "options": {}}}},
    ):
        shutil.rmtree(tmp_path / "state")
        with pytest.raises(StreamlearnError, match="code that only a checkpoint names is not imported"):
            Model(_described(tmp_path / "state", over))
    assert not marker.exists()


def _described(state_dir: Path, over: dict[str, Any]) -> Checkpoint:
    checkpoint = saved(state_dir)
    tree = {**checkpoint.read_json("model.json"), **over}
    files = {"model.json": json.dumps(tree).encode(), "model.safetensors": checkpoint.read("model.safetensors")}
    return Store(state_dir).save(files, {"step": 1, "batches": 1, "average_accuracy": None})


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"num_outputs": -1}, "num_outputs: "),
    ({"num_outputs": 2}, "an output is not below num_outputs"),
    ({"seed": "0"}, "seed: "),
    ({"strategy": {"none": {}}}, "unknown strategy: 'none'"),
    ({"strategy": {"pnn": {"max_parameters": "many"}}}, "max_parameters"),
    ({"strategy": {"pnn": {}}, "network": {"columns": 1000}}, "more columns than tasks"),
    ({"model": {"name": "mlp", "hidden": ["x"]}}, r"model\.hidden\.0: "),
    ({"model": {"name": "mlp\x1b[31m"}}, r"model\.name: "),
    ({"model": {"name": "mlp", "hidden": [6]}}, "the weights do not fit the model"),
    ({"state": {"model": {"x": 1}}}, "the weights do not fit the model"),
    ({"labels": [None]}, r"labels\.0"),
    ({"input": 3}, "not valid"),
]


@pytest.mark.parametrize(("over", "why"), WRONG, ids=[str(number) for number in range(len(WRONG))])
def test_an_invalid_model_json_is_refused(tmp_path: Path, over: dict[str, Any], why: str) -> None:
    """Any invalid content with correct hashes gives one line and 78, never another exception."""
    with pytest.raises(StreamlearnError, match=why) as caught:
        Model(_described(tmp_path / "state", over)).predict(np.zeros((1, 4), np.float32))
    assert caught.value.exit_code == 78
    assert str(caught.value).isprintable()


def test_a_checkpoint_directory_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy under any name is accepted; a wrong hash or a missing manifest is refused."""
    checkpoint = saved(tmp_path / "state")
    file = rows(tmp_path, np.ones((1, 4), np.float32))
    copy = Path(shutil.copytree(checkpoint.path, tmp_path / "served"))
    assert cli(file, "--checkpoint", copy)[0] == 0
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 0x5A
    (copy / "model.safetensors").write_bytes(weights)
    code, _, err = cli(file, "--checkpoint", copy)
    assert (code, "does not match its hash" in err) == (74, True)
    (copy / "MANIFEST.json").unlink()
    code, _, err = cli(file, "--checkpoint", copy)
    assert (code, "MANIFEST.json: cannot be read" in err) == (74, True)
    monkeypatch.chdir(tmp_path)
    code, _, err = cli(file, "--checkpoint", "served", "--state", tmp_path / "state")
    assert (code, "for the directory, write ./served" in err) == (1, True)


def test_a_directory_called_latest_is_not_mistaken_for_the_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name without a slash is an id, a number or a tag."""
    saved(tmp_path / "state")
    (tmp_path / "latest").mkdir()
    monkeypatch.chdir(tmp_path)
    file = rows(tmp_path, np.ones((1, 4), np.float32))
    assert cli(file, "--state", tmp_path / "state")[0] == 0
    assert cli(file, "--state", tmp_path / "state", "--checkpoint", "./latest")[0] == 74


def test_extra_state_is_loaded(tmp_path: Path) -> None:
    """State that is not a tensor, and non-persistent buffers, come from the checkpoint."""
    spec = {"name": OWN, "options": {"kind": "odd"}}
    checkpoint = saved(tmp_path / "state", model=spec, shape=12)
    model = Model(checkpoint, lambda _: (OWN, None))
    body = model.network.module.body
    assert isinstance(body, awkward.Odd)
    assert body.seen["raw"] == b"\x00\xff"
