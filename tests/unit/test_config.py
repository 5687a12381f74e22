"""The configuration: all errors at once, environment overrides, secrets, and the files in configs/."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from streamlearn.config.loader import load
from streamlearn.config.schema import schema
from streamlearn.core.errors import StreamlearnError
from streamlearn.learning.strategies.recipes import RECIPES
from streamlearn.stream.logs.config import SaslConfig
from tests.support import tables

if TYPE_CHECKING:
    from collections.abc import Iterator

    from streamlearn.config.root import Config

ROOT = Path(__file__).parents[2]
MINIMAL: dict[str, Any] = {"input": {"shape": [4]}, "classes": 3, "stream": {"topics": ["a"]}}
BOMB = b"a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + b"".join(
    b"a%d: &a%d [%s]\n" % (n, n, b", ".join([b"*a%d" % (n - 1)] * 10)) for n in range(1, 12)
)
TWO = {**MINIMAL, "stream": {"topics": ["a", "b"]}}  # a second topic, so that the first task ends


def written(tmp_path: Path, tree: Any, **environ: str) -> Config:
    """Load a tree as a file."""
    path = tmp_path / "job.yaml"
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
    return load(path, RECIPES, environ)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_files_in_configs_are_valid(path: Path) -> None:
    """Every file in configs/ is valid."""
    assert load(path, RECIPES, {}).name


def test_every_recipe_has_a_file() -> None:
    """Each recipe has an example configuration in configs/."""
    assert {name for name in RECIPES if not (ROOT / "configs" / f"{name}.yaml").exists()} == set()


def test_all_errors_are_reported_at_once(tmp_path: Path) -> None:
    """Each error message names the file, line, key, value and what is accepted."""
    text = "input: {shape: [4], dtyp: uint8}\nclasses: 0\nstream: {topics: [a], batch_size: -1}\n"
    text += "strategy: {foo: {}}\nextra: 1\n"
    with pytest.raises(StreamlearnError) as caught:
        written(tmp_path, text)
    lines = str(caught.value).splitlines()
    assert caught.value.exit_code == 78
    assert len(lines) == 5
    assert any("job.yaml:1: input.dtyp: is 'uint8'; no such key (did you mean dtype?)" in line for line in lines)
    assert any(
        "job.yaml:3: stream.batch_size: is -1; Input should be greater than or equal to 1" in line for line in lines
    )
    assert any(
        "strategy.foo" in line and "accepted: agem, derpp, er, ewc, gem, generative, joint" in line for line in lines
    )


def refused(tmp_path: Path, tree: Any, **environ: str) -> list[str]:
    """Return the error messages for an invalid configuration, without the directory."""
    with pytest.raises(StreamlearnError) as caught:
        written(tmp_path, tree, **environ)
    assert caught.value.exit_code == 78
    return str(caught.value).replace(f"{tmp_path}/", "").splitlines()


def test_violations_of_rules_are_reported_with_invalid_keys(tmp_path: Path) -> None:
    """An invalid key hides only the rules that read it, and a violated rule hides no other, in every section."""
    text = """
input: {shape: [4]}
classes: 3
threads: 0
scenario: domain
grow_head: true
learner: {augment: {shift: 1}}
stream: {topics: [a, a], batch_size: -1}
kafka: {security_protocol: SASL_SSL}
strategy: [pnn, gem]
log: {level: loud}
"""
    lines = refused(tmp_path, text)
    messages = [
        "4: threads: is 0; Input should be greater than or equal to 1",
        "5: scenario: scenario domain needs scenario.tasks",
        "6: grow_head: is True; grow_head needs a number of classes",
        "7: learner.augment: learner.augment needs images",
        "8: stream.batch_size: is -1; Input should be greater than or equal to 1",
        "8: stream.topics: is ['a', 'a']; a topic is listed twice",
        "9: kafka.bootstrap_servers: Field required",
        "9: kafka.sasl: security_protocol SASL_SSL needs a sasl section",
        "10: strategy.pnn: cannot be combined with gem",
        "10: strategy.pnn: pnn cannot add outputs while it runs",
        "10: strategy.gem: learner.optimizer is adam",
        "11: log.level: is 'loud'; Input should be 'debug', 'info', 'warning' or 'error'",
    ]
    assert [sum(line.startswith(f"job.yaml:{one}") for line in lines) for one in messages] == [1] * len(messages), lines
    assert len(lines) == len(messages)


def test_a_rule_is_skipped_if_a_key_that_it_reads_is_invalid(tmp_path: Path) -> None:
    """It would otherwise judge the default in place of the invalid value."""
    wrong = {"scenario": "domian", "model": {"name": "mlq"}, "input": TEXT["input"], "strategy": "er"}
    lines = refused(tmp_path, {**MINIMAL, **wrong, "grow_head": True, "stream": {}})
    assert [line.split(": ")[1] for line in lines] == ["scenario.kind", "stream", "model.name"]


def test_a_repeated_key_is_refused(tmp_path: Path) -> None:
    """PyYAML would silently use the second one. The message names its line, in sections too."""
    text = "input: {shape: [4]}\nclasses: 3\nstream:\n  topics: [a]\n  topics: [b]\nclasses: 4\n"
    assert refused(tmp_path, text) == [
        "job.yaml:5: stream.topics: is set twice; set it once",
        "job.yaml:6: classes: is set twice; set it once",
    ]


def test_an_override_that_is_not_yaml_is_reported(tmp_path: Path) -> None:
    """The message names the variable; all other errors are reported too."""
    lines = refused(tmp_path, {**MINIMAL, "threads": 0}, STREAMLEARN__NAME="[", STREAMLEARN__SEED="2020-13-45")
    assert lines == [
        "STREAMLEARN__NAME: is '['; not YAML: expected the node content, but found '<stream end>'",
        "STREAMLEARN__SEED: is '2020-13-45'; not YAML: month must be in 1..12",
        "job.yaml:8: threads: is 0; Input should be greater than or equal to 1",
    ]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"name: \xff\xfe\n", "job.yaml: not YAML: unacceptable character #x00ff: invalid start byte"),
        (b"a: [1\nb: 2\n", "job.yaml:2: not YAML: expected ',' or ']', but got ':'"),
        (BOMB, "job.yaml:1: not YAML: its aliases repeat more than 100000 values; write the values without aliases"),
        (b"a: &a [*a]\n", "job.yaml:1: not YAML: an alias is inside its own anchor"),
        (b"b: 1\na: &a {c: {<<: *a}}\n", "job.yaml:2: not YAML: an alias is inside its own anchor"),
        (b"a: " + b"[" * 5000, "job.yaml: not YAML: lists and sections are nested too deeply"),
        (b"a: 2020-13-45\n", "job.yaml: not YAML: month must be in 1..12"),
        (b"- a\n", "job.yaml: expected keys and values, got list"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_file_that_is_not_yaml_gives_one_message(tmp_path: Path, content: bytes, line: str) -> None:
    """One message; errors in the environment are reported too."""
    path = tmp_path / "job.yaml"
    path.write_bytes(content)
    with pytest.raises(StreamlearnError) as caught:
        load(path, RECIPES, {"STREAMLEARN__NAME": "["})
    lines = str(caught.value).replace(f"{tmp_path}/", "").splitlines()
    assert (caught.value.exit_code, len(lines)) == (78, 2)
    assert lines[0].startswith(line)
    assert lines[1].startswith("STREAMLEARN__NAME")


NUMBERS: list[tuple[dict[str, Any], str]] = [
    ({"input": {"shape": [80_000_000_000, 8]}}, "input.shape.0: is 80000000000; Input should be less than"),
    ({"input": {"shape": [1 << 20, 1 << 20]}}, "input.shape: is [1048576, 1048576]; a sample may have 268435456"),
    ({"classes": 10**12}, "classes: is 1000000000000; a number of classes must be between 1 and 1000000"),
    ({"threads": 10**10}, "threads: is 10000000000; Input should be less than or equal to 1024"),
    ({"seed": 1 << 63}, "seed: is 9223372036854775808; Input should be less than or equal to 9007199254740992"),
    ({"shutdown_grace": float("inf")}, "shutdown_grace: is inf; Input should be less than or equal to"),
    ({"classes": True}, "classes: is True; Input should be a valid integer"),
    ({"classes": [True, False]}, "classes.0: is True; Input should be a valid integer"),
    ({"stream": {"topics": ["a"], "batch_size": True}}, "stream.batch_size: is True; Input should be a valid integer"),
    ({"stream": {"topics": ["a"], "task_end": {"records": True}}}, "stream.task_end.records: is True; Input should be"),
]


@pytest.mark.parametrize(("over", "line"), NUMBERS)
def test_numbers_have_limits_and_are_no_booleans(tmp_path: Path, over: dict[str, Any], line: str) -> None:
    """A number too large for every machine is refused, and `yes` does not mean 1."""
    assert any(line in one for one in refused(tmp_path, {**MINIMAL, **over}))


@pytest.mark.parametrize("name", ["", "a b", "x/y", "a" * 300, "..", "ä", "a\n"])
def test_topic_names_are_those_that_kafka_accepts(tmp_path: Path, name: str) -> None:
    """The daemon would otherwise wait for ever for a topic that cannot exist."""
    assert "1 to 249 letters" in refused(tmp_path, {**MINIMAL, "stream": {"topics": [name]}})[0]
    letters = {"topics": ["a"], "dead_letter": {"topic": name}}
    assert "1 to 249 letters" in refused(tmp_path, {**MINIMAL, "stream": letters})[0]


APART = {"topics": ["a", "b.dlq"], "dead_letter": {"topic": "a"}}
TASKS: list[tuple[dict[str, Any], str]] = [
    ({"scenario": {"kind": "domain", "tasks": {"b": [1]}}}, "there are none for topic a"),
    ({"scenario": {"kind": "domain", "tasks": {"a": [1], "b": [1]}}}, "b: not in stream.topics; accepted: a"),
    ({"scenario": {"kind": "task", "tasks": {"b": [1]}}}, "b: not in stream.topics; accepted: a"),
    ({"stream": APART}, "stream.dead_letter.topic: is 'a'; the dead-letter topic cannot be a task, but a is in"),
    ({"stream": {"topics": ["b.dlq"]}, "name": "b"}, "stream.dead_letter.topic: the dead-letter topic cannot be"),
]


@pytest.mark.parametrize(("over", "line"), TASKS)
def test_topics_and_tasks_agree(tmp_path: Path, over: dict[str, Any], line: str) -> None:
    """Scenario domain has classes for every topic, each declared task is a topic, and no task is the dead-letter topic."""
    assert any(line in one for one in refused(tmp_path, {**MINIMAL, **over}))


def test_scenario_domain_accepts_one_list_of_classes(tmp_path: Path) -> None:
    """All topics share the list, whether they are listed or found by a pattern."""
    for stream in ({"topics": ["a", "b"]}, {"pattern": ".*"}):
        tree = {**MINIMAL, "classes": ["no", "yes"], "scenario": "domain", "stream": stream}
        assert written(tmp_path, tree).scenario.tasks == {}
    lines = refused(tmp_path, {**MINIMAL, "classes": 2, "scenario": "domain"})
    assert any("or set classes to a list that all topics share" in line for line in lines)


def test_labels_that_look_alike_are_reported(tmp_path: Path) -> None:
    """1 and "1" are two labels: declaring the other one for a task is an error, declaring both gives a warning."""
    tasks = {"scenario": {"kind": "task", "tasks": {"a": ["0", "1"]}}}
    lines = refused(tmp_path, {**MINIMAL, "classes": [0, 1], **tasks})
    assert any("'0', '1'; a number and a string that look the same are two classes" in line for line in lines)
    warnings = written(tmp_path, {**MINIMAL, "classes": [1, 2, "1", "٣"]}).warnings(RECIPES)
    assert any(line.startswith("classes '1', 1: ") for line in warnings)
    assert not any(
        "two classes" in line for line in written(tmp_path, {**MINIMAL, "classes": [3, "٣", "03"]}).warnings(RECIPES)
    )


def test_a_class_has_at_most_256_bytes(tmp_path: Path) -> None:
    """A longer label would be rejected in every record."""
    lines = refused(tmp_path, {**MINIMAL, "classes": ["é" * 129]})
    assert any("a label has at most 256 bytes" in line for line in lines)
    assert written(tmp_path, {**MINIMAL, "classes": ["é" * 128]}).classes == ["é" * 128]


def test_tasks_may_stay_undeclared(tmp_path: Path) -> None:
    """In scenario task some topics may lack a declaration, and the topics of a pattern are found later."""
    some = {"scenario": {"kind": "task", "tasks": {"a": [1]}}, "stream": {"topics": ["a", "b"]}}
    assert written(tmp_path, {**MINIMAL, **some}).stream.topics == ["a", "b"]
    domain = {"scenario": {"kind": "domain", "tasks": {"a": [1]}}, "stream": {"pattern": ".*"}}
    assert written(tmp_path, {**MINIMAL, **domain}).scenario.tasks == {"a": [1]}


WRONG_ENCODERS: list[tuple[Any, str]] = [
    (3, ": is 3; expected package.module:function, or a section with name and options"),
    (
        {"name": "m:f", "optons": {"a": 1}},
        ".optons: no such key (did you mean options?); accepted: name, options",
    ),
    (
        {"name": "m:f", "options": {"day": dt.date(2024, 1, 2)}},
        ".options: expected values that JSON can represent: Object of type date is not JSON serializable",
    ),
    (
        {"name": "m:f", "options": {"much": float("inf")}},
        ".options: expected values that JSON can represent: Out of range float values are not JSON compliant",
    ),
]


def test_options_of_an_encoder_may_change(tmp_path: Path) -> None:
    """They are not among the values that a checkpoint must agree with, because its weights are saved."""
    trees = [{"name": "m:f", "options": {"file": name}} for name in ("a", "b")]
    one, other = (
        written(tmp_path, {**MINIMAL, "strategy": "er", "input": {"shape": [4], "encoder": tree}}).shaping()
        for tree in trees
    )
    assert one == other
    assert one["input.encoder"] == "m:f"


def test_an_encoder_may_be_a_name(tmp_path: Path) -> None:
    """`input.encoder` may be the function's name alone. Its features are no images and have no bounds."""
    config = written(tmp_path, {**MINIMAL, "input": {"shape": [4], "encoder": "mine:front"}, "strategy": "er"})
    assert config.effective()["input"]["encoder"] == {"name": "mine:front", "options": {}}
    image = {"shape": [4, 4], "encoder": "mine:front"}
    pixels = {"generative": {"likelihood": "bernoulli"}}
    lines = refused(tmp_path, {**MINIMAL, "input": image, "strategy": pixels, "learner": {"augment": {}}})
    assert sorted(line.split(": ", 1)[1] for line in lines) == [
        "learner.augment: learner.augment needs images, but with input.encoder the model sees features",
        (
            "strategy.generative: with input.encoder it replays features, which are not in [0, 1]; "
            "accepted: generative: {likelihood: gaussian}"
        ),
    ]
    for encoder, message in WRONG_ENCODERS:
        lines = refused(tmp_path, {**MINIMAL, "strategy": "er", "input": {"shape": [4], "encoder": encoder}})
        assert [line.split("input.encoder", 1)[1][: len(message)] for line in lines] == [message]
    lines = refused(tmp_path, {**MINIMAL, "input": {"shape": [4], "encoder": "front"}})
    assert lines[0].endswith("input.encoder.name: is 'front'; expected package.module:function")


def test_the_likelihood_of_features_is_gaussian_by_default(tmp_path: Path) -> None:
    """With an encoder, `generative` gets likelihood gaussian in every short form, and also as the default strategy."""
    encoded = {**MINIMAL, "input": {"shape": [4], "encoder": "mine:front"}}
    explicit = {"strategy": {"generative": {"likelihood": "gaussian"}, "si": {}}}
    shapings = [
        written(tmp_path, {**encoded, **over}).shaping()
        for over in (explicit, {}, {"strategy": ["generative", "si"]}, {"strategy": {"generative": None, "si": None}})
    ]
    assert shapings[1:] == shapings[:1] * 3
    assert shapings[0]["strategy.generative.likelihood"] == "gaussian"
    assert written(tmp_path, MINIMAL).strategy["generative"]["likelihood"] == "bernoulli"


REFUSED_STRATEGIES = [
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
    ("pnn by class", {"strategy": "pnn"}, "strategy.pnn: pnn needs the task of each sample"),
    (
        "packnet without an end",
        {"strategy": "packnet", "scenario": "task"},
        "strategy.packnet: packnet prunes at the end of a task, but the only topic, a, never ends; accepted: stream.task_end",
    ),
    ("strength", {"strategy": {"mas": {"strength": float("nan")}}}, "strategy.mas.strength: is nan; Input should be"),
    (
        "too strong",
        {"strategy": {"l2": {"strength": 1e300}}},
        "strategy.l2.strength: is 1e+300; Input should be less than",
    ),
    (
        "a true strength",
        {"strategy": {"l2": {"strength": True}}},
        "strategy.l2.strength: is True; expected a number",
    ),
    (
        "a wide generator",
        {"strategy": {"generative": {"latent": 10**8}}},
        "strategy.generative.latent: is 100000000; Input",
    ),
    ("none", {"strategy": []}, "strategy: is []; expected a recipe's name, a list of names, or names with parameters"),
    ("a list of nothing", {"strategy": {"ewc": []}}, "strategy.ewc: is []; "),
    ("misspelt", {"strategy": {"agem": {"budgt": 3}}}, "strategy.agem.budgt: is 3; no such key (did you mean budget?)"),
    (
        "a boolean",
        {"strategy": {"er": {"budget": True}}},
        "strategy.er.budget: is True; Input should be a valid integer",
    ),
    (
        "per class",
        {"strategy": {"er": {"per_class": 3}}},
        "strategy.er: per_class is 3, and selection is reservoir; per_class needs",
    ),
]


UNUSABLE: list[tuple[dict[str, Any], str]] = [
    ({"model": {"hidden": [0]}}, "job.yaml:6: model.hidden.0: is 0; Input should be greater than or equal to 1"),
    ({"model": ":f"}, "job.yaml:5: model.name: is ':f'; accepted: mlp, resnet, memnet, package.module:function"),
    ({"state_dir": ""}, "job.yaml:5: state_dir: is ''; expected a directory"),
    (
        {"kafka": {"bootstrap_servers": "localhost:abc"}},
        "job.yaml:6: kafka.bootstrap_servers: is 'localhost:abc'; expected host:port, got localhost:abc",
    ),
    ({"strategy": {"joint": {"budget": 0}}}, "job.yaml:7: strategy.joint.budget: is 0; Input should be greater"),
    (
        {"kafka": {"bootstrap_servers": "localhost:٩٠٩٢"}},  # digits of another script, which Python's int takes
        "job.yaml:6: kafka.bootstrap_servers: is 'localhost:٩٠٩٢'; expected host:port",
    ),
    ({"device": "cuda:٣"}, "job.yaml:2: device: is 'cuda:٣'; String should match pattern"),
]


@pytest.mark.parametrize(("over", "line"), UNUSABLE)
def test_unusable_values_are_refused(tmp_path: Path, over: dict[str, Any], line: str) -> None:
    """Values that would be ignored, or would fail only while running, are reported with their key."""
    lines = refused(tmp_path, {**MINIMAL, **over})
    assert [one for one in lines if one.startswith(line)], lines
    assert "constrained" not in " ".join(lines)


@pytest.mark.parametrize(
    ("model", "line"),
    [
        (
            {"name": "nets:make", "width": 4},
            "model.width is ignored: model nets:make does not use it; it uses options",
        ),
        ({"options": {"a": 1}}, "model.options is ignored: model mlp does not use it; it uses hidden"),
    ],
)
def test_parameters_of_another_model_give_a_warning(tmp_path: Path, model: dict[str, Any], line: str) -> None:
    """They would have no effect."""
    assert written(tmp_path, {**TWO, "model": model}).warnings(RECIPES) == [line]


SERVERS = ["a", "a:1,b:2", ["a:1 ", " b"], "[::1]:9092", "::1", "[fe80::1%eth0]:9092", "SASL_SSL://a.b.c:9092"]


@pytest.mark.parametrize("servers", SERVERS)
def test_every_form_of_a_server_address_is_accepted(tmp_path: Path, servers: Any) -> None:
    """With or without a port, IPv4 and IPv6, and with the protocol in front, as in a broker's listener setting."""
    assert written(tmp_path, {**MINIMAL, "kafka": {"bootstrap_servers": servers}}).kafka is not None


def test_a_strength_may_have_an_exponent(tmp_path: Path) -> None:
    """1e4 is a number, although it is a string in YAML 1.1."""
    text = "input: {shape: [4]}\nstream: {topics: [a, b]}\nclasses: 3\nstrategy: {ewc: {strength: 1e4}}\n"
    path = tmp_path / "job.yaml"
    path.write_text(text)
    assert load(path, RECIPES, {}).strategy["ewc"]["strength"] == 10_000.0


def test_what_yaml_reads_as_a_boolean_is_explained(tmp_path: Path) -> None:
    """Unquoted `yes` and `no` are booleans in YAML, so they cannot be labels."""
    lines = refused(tmp_path, "input: {shape: [4]}\nstream: {topics: [a, b]}\nclasses: [yes, no]\n")
    assert lines[0].startswith("job.yaml:3: classes.0: is True; ")
    assert lines[0].endswith("; in YAML 1.1 yes, no, on and off mean true and false: write them in quotes")


def test_an_invalid_override_is_reported_with_its_variable(tmp_path: Path) -> None:
    """Not with a line of the file, which is valid. A variable with one underscore too few is an error too."""
    others = {"STREAMLEARN_STATE_DIR": "s", "STREAMLEARN_DB__URL": "of another program"}
    environ = {"STREAMLEARN__INPUT__SHAPE": "8,8", "STREAMLEARN_LEARNER__AVERAGE": "0.9", **others}
    lines = refused(tmp_path, MINIMAL, **environ)
    assert lines == [
        "STREAMLEARN_LEARNER__AVERAGE: sets no key; a variable that sets a key begins with STREAMLEARN__",
        "STREAMLEARN__INPUT__SHAPE: input.shape: is '8,8'; Input should be a valid list",
    ]


def test_values_that_a_generator_cannot_generate_give_a_warning(tmp_path: Path) -> None:
    """Integers that are not divided are outside [0, 1]."""
    pixels = {**TWO, "input": {"shape": [4], "dtype": "uint8"}}
    (warning,) = written(tmp_path, pixels).warnings(RECIPES)
    assert warning.startswith("input.scale is 1 for dtype uint8, but generative replays values from 0 to 1")
    for fine in (
        {"input": {**pixels["input"], "scale": 255}},
        {"strategy": {"generative": {"likelihood": "gaussian"}}},
    ):
        assert written(tmp_path, {**pixels, **fine}).warnings(RECIPES) == []


@pytest.mark.parametrize(
    ("over", "line"), [case[1:] for case in REFUSED_STRATEGIES], ids=[case[0] for case in REFUSED_STRATEGIES]
)
def test_strategies_that_cannot_work_are_refused(tmp_path: Path, over: dict[str, Any], line: str) -> None:
    """One message names the key and says why, or what is accepted."""
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
    """The shape of a text: a row for the question, then one for each sentence."""
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
def test_errors_in_either_kind_of_input_are_reported(tmp_path: Path, value: Any, message: str) -> None:
    """Each message names the key, the value and what this kind of input accepts."""
    with pytest.raises(StreamlearnError, match=message):
        written(tmp_path, {**TEXT, "input": value})


UNFIT_FOR_TEXT: list[tuple[dict[str, Any], str]] = [
    ({"strategy": "generative"}, "strategy generative cannot replay text, because its VAE generates numbers"),
    ({"strategy": ["generative", "si"]}, "and not token ids; er and joint replay stored samples"),
    ({"model": "mlp"}, "model mlp needs numbers, but input is text; accepted: memnet"),
    ({"input": {"shape": [4, 5]}}, "model memnet needs text"),
    ({"stream": {"topics": ["a"], "codec": "batch"}}, r"stream\.codec batch contains numbers"),
]


@pytest.mark.parametrize(("change", "message"), UNFIT_FOR_TEXT)
def test_what_cannot_learn_text_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """Models, strategies and codecs that need numbers are refused with the reason."""
    with pytest.raises(StreamlearnError, match=message):
        written(tmp_path, {**TEXT, **change})


def test_two_recipes_for_one_slot_are_refused(tmp_path: Path) -> None:
    """A strategy takes one recipe for each slot."""
    with pytest.raises(StreamlearnError, match="slot penalty is already filled by ewc"):
        written(tmp_path, {**MINIMAL, "strategy": ["ewc", "si"]})


def test_recipe_parameters_are_checked(tmp_path: Path) -> None:
    """A recipe accepts the parameters of its signature and no others."""
    with pytest.raises(StreamlearnError, match=r"strategy\.er\.budgt.*did you mean budget"):
        written(tmp_path, {**MINIMAL, "strategy": {"er": {"budgt": 3}}})


def test_environment_overrides(tmp_path: Path) -> None:
    """Two underscores separate sections from keys; values are read as YAML."""
    config = written(tmp_path, MINIMAL, STREAMLEARN__LEARNER__UPDATES_PER_BATCH="3", STREAMLEARN__SEED="7", OTHER="1")
    assert (config.learner.updates_per_batch, config.seed) == (3, 7)


def test_a_password_is_refused_in_the_file_and_never_shown(tmp_path: Path) -> None:
    """Secrets come from the environment or a file of their own, and are redacted wherever values are printed."""
    kafka = {"bootstrap_servers": "a:1", "security_protocol": "SASL_SSL", "sasl": {"username": "me"}}
    tree = {**MINIMAL, "kafka": kafka}
    config = written(tmp_path, tree, STREAMLEARN__KAFKA__SASL__PASSWORD="12345")
    assert config.kafka is not None
    assert config.kafka.sasl is not None
    assert config.kafka.sasl.secret() == "12345"
    assert "12345" not in json.dumps(config.effective())
    assert "12345" not in repr(config)
    empty = refused(tmp_path, tree, STREAMLEARN__KAFKA__SASL__PASSWORD="")
    name = "STREAMLEARN__KAFKA__SASL__PASSWORD"
    assert empty == [f"{name}: kafka.sasl.password: is ***; Value should have at least 1 item after validation, not 0"]
    with pytest.raises(StreamlearnError, match="a secret is not accepted in the file"):
        written(tmp_path, {**MINIMAL, "kafka": {**kafka, "sasl": {"username": "me", "password": "12345"}}})


@pytest.mark.parametrize("name", ["KAFKA__SASL__PASSWRD", "KAFKA__SASL__PW", "KAFKA__SASL", "API_TOKEN", "KAFKA__PASS"])
def test_the_value_of_a_mistyped_secret_is_not_printed(tmp_path: Path, name: str) -> None:
    """The message names the key but never the value."""
    for value in ("canary", "canary: [", "[canary"):
        lines = refused(tmp_path, MINIMAL, **{f"STREAMLEARN__{name}": value})
        assert lines
        assert not any("canary" in line for line in lines), lines


OAUTH: dict[str, Any] = {"mechanism": "OAUTHBEARER", "token_url": "https://id.example/token", "client_id": "me"}


def test_a_client_secret_is_text_and_never_shown(tmp_path: Path) -> None:
    """It comes from the environment, as text even if it looks like a number, and is refused in the file."""
    kafka = {"bootstrap_servers": "a:1", "security_protocol": "SASL_SSL", "sasl": OAUTH}
    name = "STREAMLEARN__KAFKA__SASL__CLIENT_SECRET"
    config = written(tmp_path, {**MINIMAL, "kafka": kafka}, **{name: "12345"})
    assert config.kafka is not None
    assert config.kafka.sasl is not None
    assert config.kafka.sasl.secret() == "12345"
    assert config.effective()["kafka"]["sasl"]["client_secret"] == "***"
    assert "12345" not in json.dumps(config.effective()) + repr(config)
    lines = refused(tmp_path, {**MINIMAL, "kafka": {**kafka, "sasl": {**OAUTH, "client_secret": "12345"}}})
    use = f"set {name} in the environment, or client_secret_file"
    assert lines == [f"job.yaml: kafka.sasl.client_secret: a secret is not accepted in the file; {use}"]
    lines = refused(tmp_path, {**MINIMAL, "kafka": {"bootstrap_servers": "a:1", "ssl_password": "12345"}})
    use = "set STREAMLEARN__KAFKA__SSL_PASSWORD in the environment"
    assert lines == [f"job.yaml: kafka.ssl_password: a secret is not accepted in the file; {use}"]


def test_an_override_keeps_the_rest_of_a_short_form(tmp_path: Path) -> None:
    """`scenario: task` stays scenario task if a variable sets another key of it; so do model, strategy and encoder."""
    tree = {
        **MINIMAL,
        "scenario": "task",
        "model": "m:f",
        "strategy": ["er", "si"],
        "input": {"shape": [4], "encoder": "m:g"},
    }
    environment = {
        "STREAMLEARN__SCENARIO__ACTIVE": "all",
        "STREAMLEARN__MODEL__OPTIONS__DEPTH": "3",
        "STREAMLEARN__STRATEGY__ER__BUDGET": "50",
        "STREAMLEARN__INPUT__ENCODER__OPTIONS__DEPTH": "2",
    }
    config = written(tmp_path, tree, **environment)
    assert (config.scenario.kind, config.scenario.active) == ("task", "all")
    assert (config.model.name, config.model.options) == ("m:f", {"depth": 3})
    assert (list(config.strategy), config.strategy["er"]["budget"]) == (["er", "si"], 50)
    assert config.effective()["input"]["encoder"] == {"name": "m:g", "options": {"depth": 2}}


WRONG_SASL: list[tuple[dict[str, Any], list[str]]] = [
    (
        {"mechanism": "OAUTHBEARER"},
        [
            "kafka.sasl.token_url: mechanism OAUTHBEARER needs a token_url",
            "kafka.sasl.client_id: mechanism OAUTHBEARER needs a client_id",
            (
                "kafka.sasl: no client secret: set STREAMLEARN__KAFKA__SASL__CLIENT_SECRET in the environment, or "
                "client_secret_file"
            ),
        ],
    ),
    (
        {**OAUTH, "client_secret_file": "s", "username": "me"},
        ["kafka.sasl.username: is 'me'; not accepted with mechanism OAUTHBEARER"],
    ),
    (
        {"mechanism": "PLAIN", "username": "me", "password_file": "p", "scope": "x", "client_secret_file": "s"},
        [
            "kafka.sasl.client_secret_file: is ***; not accepted with mechanism PLAIN",
            "kafka.sasl.scope: is 'x'; not accepted with mechanism PLAIN",
        ],
    ),
    ({"password_file": "p"}, ["kafka.sasl.username: mechanism SCRAM-SHA-512 needs a username"]),
    (
        {**OAUTH, "client_secret_file": "s", "token_url": "ftp://id.example"},
        [("kafka.sasl.token_url: is ***; expected https://HOST/PATH or http://HOST/PATH, without credentials in it")],
    ),
    (
        {**OAUTH, "client_secret_file": "s", "token_url": "https://id.example:99999/token"},
        [("kafka.sasl.token_url: is ***; expected https://HOST/PATH or http://HOST/PATH, without credentials in it")],
    ),
    (
        {**OAUTH, "mechanism": "GSSAPI"},
        [
            (
                "kafka.sasl.mechanism: is 'GSSAPI'; Input should be 'PLAIN', 'SCRAM-SHA-256', 'SCRAM-SHA-512' or "
                "'OAUTHBEARER'"
            )
        ],
    ),
]


@pytest.mark.parametrize(("sasl", "messages"), WRONG_SASL, ids=[str(n) for n in range(len(WRONG_SASL))])
def test_each_mechanism_has_its_own_keys(tmp_path: Path, sasl: dict[str, Any], messages: list[str]) -> None:
    """Missing keys and keys that the mechanism does not use are reported."""
    kafka = {"bootstrap_servers": "a:1", "security_protocol": "SASL_SSL", "sasl": sasl}
    lines = refused(tmp_path, {**MINIMAL, "kafka": kafka})
    assert sorted(line.split(": ", 1)[1] for line in lines) == sorted(messages)


def test_a_secret_in_a_url_is_refused_and_not_printed(tmp_path: Path) -> None:
    """`config show` would print credentials in token_url, so they are refused, and the message does not contain them."""
    sasl = {**OAUTH, "client_secret_file": "s", "token_url": "https://me:canary@id.example/token"}
    lines = refused(tmp_path, {**MINIMAL, "kafka": {"bootstrap_servers": "a:1", "sasl": sasl}})
    assert "canary" not in "".join(lines)


def test_a_token_over_plain_http_gives_a_warning(tmp_path: Path) -> None:
    """A server on the same machine gives no warning."""
    secret = tmp_path / "s"
    secret.write_text("12345")
    sasl = {**OAUTH, "client_secret_file": str(secret)}
    found = {}
    for url in ("http://id.example/token", "http://localhost:8080/token", "https://id.example/token"):
        kafka = {"bootstrap_servers": "a:1", "security_protocol": "SASL_SSL", "sasl": {**sasl, "token_url": url}}
        found[url] = written(tmp_path, {**TWO, "kafka": kafka}).warnings(RECIPES)
    warning = "kafka.sasl.token_url is http: the client secret and the token are sent unencrypted"
    assert list(found.values()) == [[warning], [], []]


def test_a_secret_that_cannot_be_read_here_gives_a_warning(tmp_path: Path) -> None:
    """It is no error, because the daemon may run on another machine."""
    path = tmp_path / "absent"
    sasl = {**OAUTH, "client_secret_file": str(path)}
    kafka = {"bootstrap_servers": "a:1", "security_protocol": "SASL_SSL", "sasl": sasl}
    config = written(tmp_path, {**TWO, "kafka": kafka})
    assert config.unreadable_secret() == f"kafka.sasl.client_secret_file: [Errno 2] No such file or directory: '{path}'"
    assert config.warnings(RECIPES) == []
    path.write_text("12345")
    assert config.unreadable_secret() is None


@pytest.mark.parametrize("protocol", ["PLAINTEXT", "SSL"])
def test_credentials_without_authentication_are_refused(tmp_path: Path, protocol: str) -> None:
    """A `sasl` section with a protocol without SASL is a mistake: the client would be anonymous."""
    sasl = {**OAUTH, "client_secret_file": "s"}
    kafka = {"bootstrap_servers": "a:1", "security_protocol": protocol, "sasl": sasl}
    why = f"a sasl section needs security_protocol SASL_SSL or SASL_PLAINTEXT, not {protocol}"
    assert refused(tmp_path, {**MINIMAL, "kafka": kafka}) == [f"job.yaml:7: kafka.sasl: {why}"]


@pytest.mark.parametrize("value", ["rollback", None, 3])
def test_a_value_that_is_no_section_gets_a_plain_message(tmp_path: Path, value: object) -> None:
    """The message does not name a Python class."""
    found = refused(tmp_path, {**MINIMAL, "divergence": value})
    assert found == [f"job.yaml:2: divergence: is {value!r}; expected a section: keys and values"]


def test_a_password_file_may_not_be_empty(tmp_path: Path) -> None:
    """An empty secret is reported before a broker refuses it."""
    (tmp_path / "secret").write_text("\n")
    sasl = SaslConfig(username="me", password_file=tmp_path / "secret")
    with pytest.raises(StreamlearnError, match="secret is empty"):
        sasl.secret()


def test_only_values_that_shape_the_state_must_stay(tmp_path: Path) -> None:
    """Ports, intervals and log levels may change between starts; the model, strategy, seed and classes may not."""
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


def test_importance_alone_gives_a_warning(tmp_path: Path) -> None:
    """EWC or SI without replay does not protect class-incremental learning."""
    assert written(tmp_path, {**TWO, "strategy": "ewc"}).warnings(RECIPES) != []
    assert written(tmp_path, {**TWO, "strategy": ["er", "ewc"]}).warnings(RECIPES) == []
    assert written(tmp_path, {**TWO, "strategy": "ewc", "scenario": "task"}).warnings(RECIPES) == []


def test_a_task_that_never_ends_gives_a_warning(tmp_path: Path) -> None:
    """A strategy protects a task only after it has ended, and the only topic does not end without a marker."""
    alone = {"stream": {"topics": ["a"]}}
    (warning,) = written(tmp_path, {**MINIMAL, **alone, "strategy": "er"}).warnings(RECIPES)
    assert warning == (
        "strategy er: protects nothing until a task has ended, and only a marker ends the only topic, a; "
        "set stream.task_end to records: N or idle: SECONDS"
    )
    assert written(tmp_path, {**MINIMAL, **alone, "strategy": "naive"}).warnings(RECIPES) == []
    ended = {"stream": {"topics": ["a"], "task_end": {"records": 500}}}
    assert written(tmp_path, {**MINIMAL, **ended, "strategy": "er"}).warnings(RECIPES) == []


def test_a_budget_below_the_number_of_tasks_gives_a_warning(tmp_path: Path) -> None:
    """Such a memory has no room for a sample of each task."""
    topics = {"stream": {"topics": ["a", "b", "c"]}}
    (warning,) = written(tmp_path, {**MINIMAL, **topics, "strategy": {"er": {"budget": 2}}}).warnings(RECIPES)
    assert warning == "strategy.er.budget is 2: too few for a sample of each of 3 tasks"
    assert written(tmp_path, {**MINIMAL, **topics, "strategy": {"er": {"budget": 3}}}).warnings(RECIPES) == []


def keys(node: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every key below a part of the schema, with its schema."""
    for name, value in node.get("properties", {}).items():
        yield f"{path}.{name}", value
        yield from keys(value, f"{path}.{name}")
    for part in node.get("anyOf", []):
        yield from keys(part, path)


def test_every_key_has_a_description() -> None:
    """Sections, keys, recipes and their parameters have one, which editors show."""
    tree = schema(RECIPES)
    found = list(keys(tree, "")) + [pair for name, node in tree["$defs"].items() for pair in keys(node, name)]
    assert len(found) > 190
    assert [key for key, value in found if not value.get("description")] == []


def test_every_key_is_in_the_document() -> None:
    """docs/configure.md lists each key of the schema; `python -m tests.support.tables` writes the list."""
    text = (ROOT / "docs" / "configure.md").read_text()
    assert text == tables.with_tables("configure.md")
    assert "| `divergence.slow_down` | `0.5` |" in text


def test_the_schema_accepts_the_files_in_configs() -> None:
    """The JSON Schema for editors accepts every file in configs/."""
    import jsonschema

    validator = jsonschema.Draft202012Validator(schema(RECIPES))
    for path in (ROOT / "configs").glob("*.yaml"):
        errors = [error.message for error in validator.iter_errors(yaml.safe_load(path.read_text()))]
        assert errors == [], path
