"""Configuration: every error at once, overrides, secrets, and the files that ship."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from streamlearn.config import Config, load, schema
from streamlearn.data import StreamlearnError
from streamlearn.strategies.recipes import RECIPES

ROOT = Path(__file__).parents[2]
MINIMAL: dict[str, Any] = {"input": {"shape": [4]}, "classes": 3, "stream": {"topics": ["a"]}}


def written(tmp_path: Path, tree: Any, **environ: str) -> Config:
    """Load a tree as a file."""
    path = tmp_path / "job.yaml"
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
    return load(path, RECIPES, environ)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_files_are_valid(path: Path) -> None:
    """Every file under configs/ loads."""
    assert load(path, RECIPES, {}).name


def test_every_recipe_has_a_file() -> None:
    """A strategy that ships has a configuration that shows it."""
    assert {name for name in RECIPES if not (ROOT / "configs" / f"{name}.yaml").exists()} == set()


def test_all_errors_are_told_at_once(tmp_path: Path) -> None:
    """Each error names file, line, key, value and what is accepted."""
    text = "input: {shape: [4], dtyp: uint8}\nclasses: 0\nstream: {topics: [a], batch_size: -1}\n"
    text += "strategy: {foo: {}}\nextra: 1\n"
    with pytest.raises(StreamlearnError) as caught:
        written(tmp_path, text)
    lines = str(caught.value).splitlines()
    assert caught.value.code == 78
    assert len(lines) == 5
    assert any("job.yaml:1: input.dtyp: is 'uint8'; no such key (did you mean dtype?)" in line for line in lines)
    assert any(
        "job.yaml:3: stream.batch_size: is -1; Input should be greater than or equal to 1" in line for line in lines
    )
    assert any(
        "strategy.foo" in line and "accepted: agem, derpp, er, ewc, gem, generative, joint" in line for line in lines
    )


REFUSED = [
    ("naive + er", {"strategy": ["naive", "er"]}, "strategy.naive: cannot be combined with er: it is the lower bound"),
    (
        "joint + ewc",
        {"strategy": ["joint", "ewc"]},
        "strategy.joint: cannot be combined with ewc: it is the upper bound",
    ),
    (
        "pnn + si",
        {"strategy": ["pnn", "si"], "scenario": "task"},
        "strategy.pnn: cannot be combined with si: it isolates",
    ),
    (
        "packnet + gem",
        {"strategy": ["packnet", "gem"]},
        "strategy.gem: is 'gem'; slot constraint is already filled by packnet",
    ),
    (
        "gem with adam",
        {"strategy": "gem"},
        "strategy.gem: learner.optimizer is adam: momentum undoes the projection; accepted",
    ),
    (
        "gem with momentum",
        {"strategy": "gem", "learner": {"optimizer": {"name": "sgd", "momentum": 0.9}}},
        "strategy.gem: learner.optimizer is sgd with momentum 0.9",
    ),
    ("pnn by class", {"strategy": "pnn"}, "strategy.pnn: pnn must be told the task of a sample"),
    (
        "packnet without an end",
        {"strategy": "packnet", "scenario": "task"},
        "strategy.packnet: packnet prunes at the end of a task, and the only topic, a, has none; accepted: stream.task_end",
    ),
    ("strength", {"strategy": {"mas": {"strength": float("nan")}}}, "strategy.mas.strength: is nan; Input should be"),
    ("misspelt", {"strategy": {"agem": {"budgt": 3}}}, "strategy.agem.budgt: is 3; no such key (did you mean budget?)"),
    (
        "per class",
        {"strategy": {"er": {"per_class": 3}}},
        "strategy.er: per_class is 3, and selection reservoir; accepted",
    ),
]


@pytest.mark.parametrize(("over", "line"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_strategies_that_make_no_sense_are_refused(tmp_path: Path, over: dict[str, Any], line: str) -> None:
    """One line names the key, and says why or what is accepted, before anything is consumed."""
    with pytest.raises(StreamlearnError) as caught:
        written(tmp_path, {**MINIMAL, **over})
    assert [line in one for one in str(caught.value).splitlines()] == [True], caught.value


TEXT: dict[str, Any] = {
    "input": {"kind": "text", "sentences": 3, "words": 5, "vocabulary": 9},
    "classes": 3,
    "stream": {"topics": ["a"]},
    "model": "memnet",
    "strategy": "er",
}


def test_input_may_be_text(tmp_path: Path) -> None:
    """A text's shape follows from its bounds: a row for the question, then one for each sentence."""
    config = written(tmp_path, TEXT)
    assert (config.input.shape, config.input.dtype, config.input.scale) == ([4, 5], "int32", 1.0)
    assert written(tmp_path, config.effective()) == config
    assert written(tmp_path, MINIMAL).input.shape == [4]


INPUTS: list[tuple[Any, str]] = [
    ({"kind": "txt"}, r"input\.kind: is 'txt'; accepted: numbers, text"),
    ({"kind": ["text"]}, r"input\.kind: is \['text'\]; accepted: numbers, text"),
    ({"kind": "text", "sentences": 3, "words": 5}, r"input\.vocabulary: Field required"),
    (
        {**TEXT["input"], "word": 1},
        r"input\.word: is 1; no such key \(did you mean words\?\); accepted: kind, sentences",
    ),
    ({**TEXT["input"], "words": 0}, r"input\.words: is 0; Input should be greater than or equal to 1"),
    ({"shape": [0]}, r"input\.shape: is \[0\]; every dimension must be at least 1"),
    ({"dtype": "uint8"}, r"input\.shape: Field required"),
    ([4], r"input: is \[4\]; expected keys and values"),
]


@pytest.mark.parametrize(("value", "message"), INPUTS)
def test_errors_of_either_input_are_told(tmp_path: Path, value: Any, message: str) -> None:
    """Each names its key, its value and what that kind of input accepts."""
    with pytest.raises(StreamlearnError, match=message):
        written(tmp_path, {**TEXT, "input": value})


MISFITS: list[tuple[dict[str, Any], str]] = [
    ({"strategy": "generative"}, "strategy generative replays what a VAE of numbers makes"),
    ({"strategy": ["generative", "si"]}, "cannot make the token ids of a text; er and joint replay stored samples"),
    ({"model": "mlp"}, "model mlp sees numbers, and input is text; accepted: memnet"),
    ({"input": {"shape": [4, 5]}}, "model memnet sees text"),
    ({"stream": {"topics": ["a"], "codec": "batch"}}, r"stream\.codec batch holds numbers"),
]


@pytest.mark.parametrize(("change", "message"), MISFITS)
def test_what_cannot_learn_text_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """Models, strategies and codecs of numbers do not go with text, and the line says why."""
    with pytest.raises(StreamlearnError, match=message):
        written(tmp_path, {**TEXT, **change})


def test_two_recipes_for_one_slot_are_refused(tmp_path: Path) -> None:
    """A strategy takes one recipe for each slot."""
    with pytest.raises(StreamlearnError, match="slot penalty is already filled by ewc"):
        written(tmp_path, {**MINIMAL, "strategy": ["ewc", "si"]})


def test_recipe_parameters_are_checked(tmp_path: Path) -> None:
    """A recipe's signature is its schema."""
    with pytest.raises(StreamlearnError, match=r"strategy\.er\.budgt.*did you mean budget"):
        written(tmp_path, {**MINIMAL, "strategy": {"er": {"budgt": 3}}})


def test_environment_overrides(tmp_path: Path) -> None:
    """Double underscores lead into sections; values are read as YAML."""
    config = written(tmp_path, MINIMAL, STREAMLEARN__LEARNER__UPDATES_PER_BATCH="3", STREAMLEARN__SEED="7", OTHER="1")
    assert (config.learner.updates_per_batch, config.seed) == (3, 7)


def test_a_password_is_never_in_the_file_nor_shown(tmp_path: Path) -> None:
    """Secrets come from the environment or a file, and are redacted wherever values are shown."""
    kafka = {"bootstrap_servers": "a:1", "security_protocol": "SASL_SSL", "sasl": {"username": "me"}}
    tree = {**MINIMAL, "kafka": kafka}
    config = written(tmp_path, tree, STREAMLEARN__KAFKA__SASL__PASSWORD="12345")
    assert config.kafka is not None
    assert config.kafka.sasl is not None
    assert config.kafka.sasl.secret() == "12345"
    assert "12345" not in json.dumps(config.effective())
    assert "12345" not in repr(config)
    with pytest.raises(StreamlearnError, match="a secret is not accepted in the file"):
        written(tmp_path, {**MINIMAL, "kafka": {**kafka, "sasl": {"username": "me", "password": "12345"}}})


def test_only_what_shapes_the_state_must_agree(tmp_path: Path) -> None:
    """Ports, learning rates and log levels may change between starts; the model and the batch may not."""
    one = written(tmp_path, MINIMAL)
    free = {
        "log": {"level": "debug"},
        "service": {"port": 1},
        "probes": {"every": 3},
        "learner": {"updates_per_batch": 3},
    }
    assert written(tmp_path, {**MINIMAL, **free}).shaping() == one.shaping()
    for change in (
        {"seed": 3},
        {"model": {"hidden": [7]}},
        {"strategy": "naive"},
        {"classes": 4},
        {"holdout": {"fraction": 0.5}},
    ):
        assert written(tmp_path, {**MINIMAL, **change}).shaping() != one.shaping()


def test_importance_alone_is_warned_about(tmp_path: Path) -> None:
    """EWC or SI without replay does not protect class-incremental learning."""
    assert written(tmp_path, {**MINIMAL, "strategy": "ewc"}).warnings(RECIPES) != []
    assert written(tmp_path, {**MINIMAL, "strategy": ["er", "ewc"]}).warnings(RECIPES) == []
    assert written(tmp_path, {**MINIMAL, "strategy": "ewc", "scenario": "task"}).warnings(RECIPES) == []


def test_schema_accepts_what_ships() -> None:
    """The JSON Schema for editors agrees with the files under configs/."""
    import jsonschema

    validator = jsonschema.Draft202012Validator(schema(RECIPES))
    for path in (ROOT / "configs").glob("*.yaml"):
        errors = [error.message for error in validator.iter_errors(yaml.safe_load(path.read_text()))]
        assert errors == [], path
