"""The rules between sections, and warnings about values that are allowed but probably a mistake."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from streamlearn.core.config import InputConfig, TextInputConfig
from streamlearn.core.labels import label_of_other_type
from streamlearn.learning.config import MODEL_KEYS
from streamlearn.stream.codecs.registry import TEXT_CODECS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from streamlearn.config.root import Config
    from streamlearn.config.strategy import RecipeSchema
    from streamlearn.core.section import Violations

LOOPBACK = re.compile(r"http://(localhost|127\.0\.0\.1|\[::1\])[:/].*")


def rules(config: Config, recipes: Mapping[str, RecipeSchema]) -> Iterator[Violations]:
    """Yield the rules between sections, each as an iterator over its violations.

    `config` may be incomplete: a rule that reads an invalid key raises AttributeError, and is skipped.
    """
    yield _source_is_configured(config)
    yield _tasks_are_declared(config)
    yield _classes_are_declared(config)
    yield _head_may_grow(config)
    yield _dead_letter_topic_is_no_task(config)
    yield _augments_images(config)
    yield _model_fits_input(config)
    yield _strategy_fits_input(config)
    yield _codec_fits_input(config)
    for name in getattr(config, "strategy", ()):
        yield ((f"strategy.{name}", why) for why in recipes[name].conflicts(config, name))


def _source_is_configured(config: Config) -> Violations:
    if config.source == "kafka" and config.kafka is None:
        yield "kafka", "stream.source is kafka, but there is no kafka section with bootstrap_servers"


def _tasks_are_declared(config: Config) -> Violations:
    spec = config.scenario
    if spec.kind == "domain" and not spec.tasks:
        if isinstance(config.classes, int):
            why = "the classes of each topic in order; or set classes to a list that all topics share"
            yield "scenario", f"scenario domain needs scenario.tasks: {why}"
        return
    topics = config.stream.topics
    if spec.kind == "domain" and (undeclared := [name for name in topics or () if name not in spec.tasks]):
        names = ", ".join(undeclared)
        why = f"scenario domain needs the classes of every topic; there are none for topic {names}"
        yield (
            "scenario.tasks",
            f"{why}; or leave scenario.tasks out and set classes to a list that all topics share",
        )
    unknown = [name for name in spec.tasks if topics is not None and name not in topics]
    if spec.kind in {"task", "domain"} and unknown:
        yield "scenario.tasks", f"{', '.join(unknown)}: not in stream.topics; accepted: {', '.join(topics or ())}"


def _classes_are_declared(config: Config) -> Violations:
    if isinstance(config.classes, list):
        declared = {label for labels in config.scenario.tasks.values() for label in labels}
        if unknown := sorted(map(repr, declared - set(config.classes))):
            similar = any(label_of_other_type(label) in config.classes for label in declared - set(config.classes))
            hint = "; a number and a string that look the same are two classes" if similar else ""
            why = f"scenario.tasks names classes that are not in classes: {', '.join(unknown)}"
            yield "scenario.tasks", why + hint


def _head_may_grow(config: Config) -> Violations:
    if config.grow_head and (isinstance(config.classes, list) or config.scenario.kind == "domain"):
        why = "grow_head needs a number of classes, and scenario class or task"
        if isinstance(config.classes, list):
            why += f"; a list of classes cannot grow; with classes: {len(config.classes)} labels get outputs as they appear"
        yield "grow_head", why


def _dead_letter_topic_is_no_task(config: Config) -> Violations:
    if config.dead_letter_topic in (config.stream.topics or ()):
        why = f"the dead-letter topic cannot be a task, but {config.dead_letter_topic} is in stream.topics"
        yield "stream.dead_letter.topic", why


def _augments_images(config: Config) -> Violations:
    images = isinstance(config.input, InputConfig) and len(config.input.shape) in {2, 3}
    if config.learner.augment is not None and not images:
        text = "learner.augment needs images: input.shape [height, width] or [channels, height, width], not"
        yield "learner.augment", f"{text} {config.input.shape}"
    if config.learner.augment is not None and config.input.encoder is not None:
        yield "learner.augment", "learner.augment needs images, but with input.encoder the model sees features"


def _model_fits_input(config: Config) -> Violations:
    name, text = config.model.name, isinstance(config.input, TextInputConfig)
    if text and name in {"mlp", "resnet"}:
        yield "model", f"model {name} needs numbers, but input is text; accepted: memnet, package.module:function"
    if name == "memnet" and not text:
        yield "model", "model memnet needs text: set input.kind to text"


def _strategy_fits_input(config: Config) -> Violations:
    if isinstance(config.input, TextInputConfig) and "generative" in config.strategy:
        why = "strategy generative cannot replay text, because its VAE generates numbers and not token ids; "
        yield "strategy", why + "er and joint replay stored samples of any kind"


def _codec_fits_input(config: Config) -> Violations:
    if isinstance(config.input, TextInputConfig) and config.stream.codec not in TEXT_CODECS:
        text = f"stream.codec {config.stream.codec} contains numbers, but input is text"
        yield "stream.codec", f"{text}; accepted: {', '.join(TEXT_CODECS)}"


def warnings(config: Config, recipes: Mapping[str, RecipeSchema]) -> list[str]:
    """Return found about values that are allowed but probably a mistake."""
    slots = {slot for name in config.strategy for slot in recipes[name].slots}
    found = []
    if slots == {"penalty"} and config.scenario.kind == "class":
        names = " + ".join(config.strategy)
        found.append(f"strategy {names}: importance alone does not protect class-incremental learning; add replay")
    named = {label for labels in config.scenario.tasks.values() for label in labels}
    named |= set() if isinstance(config.classes, int) else set(config.classes)
    if both := sorted(repr(label) for label in named if label_of_other_type(label) in named):
        found.append(f"classes {', '.join(both)}: a number and a string that look the same are two classes")
    topics = config.stream.topics or ()
    if (topic := config.endless_topic) is not None and "naive" not in config.strategy:
        found.append(
            f"strategy {' + '.join(config.strategy)}: protects nothing until a task has ended, and only a marker ends "
            f"the only topic, {topic}; set stream.task_end to records: N or idle: SECONDS"
        )
    integers = config.input.dtype.startswith(("int", "uint")) and isinstance(config.input, InputConfig)
    if integers and config.input.scale == 1 and config.strategy.get("generative", {}).get("likelihood") == "bernoulli":
        found.append(
            f"input.scale is 1 for dtype {config.input.dtype}, but generative replays values from 0 to 1 (bernoulli); "
            "set input.scale to the largest value; if some values are negative, also likelihood: gaussian"
        )
    accepted = ", ".join(MODEL_KEYS.get(config.model.name, ("options",)))
    # only a warning, because a job with an old checkpoint cannot remove the key
    ignored = f"is ignored: model {config.model.name} does not use it; it uses {accepted}"
    found += [f"model.{key} {ignored}" for key in config.model.unused_keys()]
    for name, parameters in config.strategy.items():
        if isinstance(budget := parameters.get("budget"), int) and budget < len(topics):
            found.append(f"strategy.{name}.budget is {budget}: too few for a sample of each of {len(topics)} tasks")
    if config.kafka is not None and config.kafka.security_protocol == "SASL_PLAINTEXT":
        found.append("kafka.security_protocol SASL_PLAINTEXT: credentials are sent unencrypted")
    if config.kafka is not None and not config.kafka.ssl_check_hostname:
        found.append("kafka.ssl_check_hostname is off: any certificate of a trusted authority is accepted")
    url = config.kafka.sasl.token_url if config.kafka is not None and config.kafka.sasl is not None else None
    if url is not None and url.startswith("http:") and not LOOPBACK.fullmatch(url):
        found.append("kafka.sasl.token_url is http: the client secret and the token are sent unencrypted")
    return found
