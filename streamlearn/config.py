"""What may be configured: a frozen model for each section, and the rules that hold between keys."""

from __future__ import annotations

import json
import math
import os
import re
import types
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, get_args, get_origin
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    SecretStr,
    Strict,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from streamlearn import patterns
from streamlearn.data import MAX_LABEL_BYTES, TOPIC_NAME, StreamlearnError, label_of_other_type

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import Self

    Rule = Iterator[tuple[str, str]]  # dotted keys, each with the reason why what is there cannot be accepted

# looking for plugins reads the metadata of every package that is installed, and none is meant for these models
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")

REDACTED = "***"
TOKEN_URL = re.compile(r"https?://[^\s/@?#]+(/[^\s@#]*)?")
LOOPBACK = re.compile(r"http://(localhost|127\.0\.0\.1|\[::1\])[:/].*")
SAMPLE_SIZE = 1 << 28  # numbers in one sample
MAX_CLASSES = 1_000_000


def _options(value: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise PydanticCustomError("options", "expected what JSON can hold: {why}", {"why": str(error)}) from error
    return value


def _directory(value: Any) -> Any:
    if value == "":
        raise PydanticCustomError("directory", "expected a directory")
    return value


def _topic(value: str) -> str:
    """Refuse what Kafka refuses."""
    if not TOPIC_NAME.fullmatch(value):
        why = "a topic's name is 1 to 249 letters, digits, dots, hyphens and underscores, and not . or .."
        raise PydanticCustomError("topic", why)
    return value


def _label(value: str) -> str:
    """Refuse what no record may have for a label."""
    if len(value.encode(errors="surrogatepass")) > MAX_LABEL_BYTES:
        raise PydanticCustomError("label", "a label has at most {n} bytes", {"n": MAX_LABEL_BYTES})
    return value


# Bounds of numbers are far beyond what is useful, and within what torch, clocks and memory can bear.
Int = Annotated[int, Strict()]  # or true would be 1
Whole = Annotated[Int, Field(le=(1 << 31) - 1)]
NumBytes = Annotated[Int, Field(ge=1, le=1 << 53)]
Seconds = Annotated[float, Field(gt=0, le=1e9)]
Label = Int | Annotated[str, AfterValidator(_label)]
Topic = Annotated[str, AfterValidator(_topic)]
Width = Annotated[Int, Field(ge=1, le=1 << 20)]  # of a layer
FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
SERVER = re.compile(r"([A-Za-z_]+://)?(\[[^\s\[\]]+\]|[^\s:/\[\]]+)(:[0-9]{1,5})?|[0-9a-fA-F:.]+(%\w+)?")
Options = Annotated[dict[str, Any], AfterValidator(_options)]


class RecipeSchema(Protocol):
    """What configuration needs to know of a strategy's recipe: the slots it fills and the parameters it takes."""

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the slots it fills."""

    @property
    def parameters(self) -> type[BaseModel]:
        """A model made from the recipe's signature."""

    def defaults_for(self, spec: InputConfig | TextInputConfig) -> dict[str, Any]:
        """Return the parameters whose defaults depend on the input, with their values."""

    def conflicts(self, config: Config, name: str) -> Iterator[str]:
        """Give the reasons why a configuration that chose this recipe makes no sense."""


class Section(BaseModel):
    """A part of the file: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, validate_default=True)

    def rules(self, recipes: Mapping[str, RecipeSchema]) -> Iterator[Rule]:
        """Give what must hold between keys, apart from each other: a rule is left out where a key that it reads is wrong."""
        del recipes
        yield from ()

    @field_validator("*", mode="wrap")
    @classmethod
    def _follow_rules(cls, value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        """Check the rules together with the last field: a model's own validators are not run where a field is wrong."""
        if info.field_name != next(reversed(cls.model_fields)):
            return handler(value)
        valid, errors = dict(info.data), list[InitErrorDetails]()
        try:
            valid[info.field_name] = value = handler(value)
        except ValidationError as error:
            errors = [_told(details) for details in error.errors()]
        partial = cls.model_construct(**valid)
        wrong = cls.model_fields.keys() - valid.keys()
        for name in wrong:  # to read it is an AttributeError now
            vars(partial).pop(name, None)
        broken: list[tuple[str, str]] = []
        for rule in partial.rules((info.context or {}).get("recipes", {})):
            try:
                broken += rule
            except AttributeError:
                if not wrong:
                    raise
        for key, why in broken:
            message = PydanticCustomError("rule", "{why}", {"why": why})
            loc = tuple(filter(None, key.split(".")))
            errors.append({"type": message, "loc": loc, "input": _value_at(partial, loc)})
        if errors:
            raise ValidationError.from_exception_data(cls.__name__, errors)
        return value

    @model_validator(mode="wrap")
    @classmethod
    def _place_rules(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Take the last field's name off the keys of broken rules: they are those of this section."""
        try:
            return handler(value)
        except ValidationError as error:
            errors = error.errors()
            for details in errors:
                if details["type"] == "rule":
                    details.update({"type": "told", "loc": details["loc"][1:]})
            raise ValidationError.from_exception_data(cls.__name__, [_told(details) for details in errors]) from error


class SaslConfig(Section):
    """Credentials; a password or client secret comes from the environment or a file, never from the YAML."""

    mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"] = Field(
        "SCRAM-SHA-512", description="how the client signs in"
    )
    username: str | None = Field(None, description="the user; not for OAUTHBEARER")
    password: SecretStr | None = Field(
        None,
        min_length=1,
        description="the user's password: from STREAMLEARN__KAFKA__SASL__PASSWORD in the environment, never in this file",
    )
    password_file: Path | None = Field(None, description="a file that holds the password")
    token_url: str | None = Field(None, description="OAUTHBEARER: where tokens are given for client credentials")
    client_id: str | None = Field(None, min_length=1, description="OAUTHBEARER: who asks for a token")
    client_secret: SecretStr | None = Field(
        None,
        min_length=1,
        description="OAUTHBEARER: the client's secret, from STREAMLEARN__KAFKA__SASL__CLIENT_SECRET in the environment",
    )
    client_secret_file: Path | None = Field(None, description="OAUTHBEARER: a file that holds the client's secret")
    scope: str | None = Field(None, min_length=1, description="OAUTHBEARER: of the token; default: the server's")

    @field_validator("token_url")
    @classmethod
    def _is_url(cls, value: str | None) -> str | None:
        if value is not None and not (TOKEN_URL.fullmatch(value) and _has_possible_port(value)):
            raise PydanticCustomError(
                "url", "expected https://HOST/PATH or http://HOST/PATH, without credentials in it"
            )
        return value

    def rules(self, recipes: Mapping[str, RecipeSchema]) -> Iterator[Rule]:
        del recipes
        yield self._has_password()
        yield self._has_client()

    def _has_password(self) -> Rule:
        if self.mechanism == "OAUTHBEARER":
            yield from self._not_accepted("username", "password", "password_file")
            return
        if self.username is None:
            yield "username", f"mechanism {self.mechanism} needs a username"
        if self.password is None and self.password_file is None:
            yield "", "no password: set STREAMLEARN__KAFKA__SASL__PASSWORD in the environment, or password_file"

    def _has_client(self) -> Rule:
        if self.mechanism != "OAUTHBEARER":
            yield from self._not_accepted("token_url", "client_id", "client_secret", "client_secret_file", "scope")
            return
        for key in ("token_url", "client_id"):
            if getattr(self, key) is None:
                yield key, f"mechanism OAUTHBEARER needs a {key}"
        if self.client_secret is None and self.client_secret_file is None:
            name = "STREAMLEARN__KAFKA__SASL__CLIENT_SECRET"
            yield "", f"no client secret: set {name} in the environment, or client_secret_file"

    def _not_accepted(self, *keys: str) -> Rule:
        for key in keys:
            if getattr(self, key) is not None:
                yield key, f"not accepted with mechanism {self.mechanism}"

    def secret(self) -> str:
        """Return the password, or the client's secret; raises `StreamlearnError` (77) when its file has none to read."""
        key = "client_secret" if self.mechanism == "OAUTHBEARER" else "password"
        if (secret := getattr(self, key)) is not None:
            return str(secret.get_secret_value())
        key += "_file"
        path = getattr(self, key)
        try:
            text = Path(str(path)).read_text().rstrip("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise StreamlearnError(f"kafka.sasl.{key}: {error}", code=77) from error
        if not text:
            raise StreamlearnError(f"kafka.sasl.{key}: {path} is empty", code=77)
        return text


class KafkaConfig(Section):
    """How to reach the brokers; security keys are named as kafka-python names them."""

    bootstrap_servers: list[str] = Field(
        min_length=1,
        description="HOST:PORT of one or more brokers, from which all others are learned: a list, or text with commas",
    )
    client_id: str = Field("streamlearn", description="name of this client in the brokers' logs and quotas")
    group_id: str | None = Field(None, description="only reports positions, for lag graphs; default streamlearn.<name>")
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT", description="whether the connection is encrypted (SSL) and whether the client signs in (SASL)"
    )
    ssl_cafile: Path | None = Field(
        None, description="PEM file of the certificate authorities to trust; default: those of the system"
    )
    ssl_certfile: Path | None = Field(
        None, description="PEM file of this client's certificate, for brokers that ask for one"
    )
    ssl_keyfile: Path | None = Field(None, description="PEM file of the private key of ssl_certfile")
    ssl_password: SecretStr | None = Field(
        None,
        min_length=1,
        description="password of ssl_keyfile: from STREAMLEARN__KAFKA__SSL_PASSWORD in the environment, never in this file",
    )
    ssl_check_hostname: bool = Field(
        default=True, description="refuse a broker whose certificate is for another host name"
    )
    sasl: SaslConfig | None = None
    isolation_level: Literal["read_committed", "read_uncommitted"] = Field(
        "read_committed",
        description="records of transactions: those that are committed, or all at once, also those that are aborted later",
    )
    metadata_refresh_seconds: Seconds = Field(10.0, description="how soon new topics and partitions are found")
    replication_factor: Int = Field(
        -1, ge=-1, le=32767, description="of topics created here (dead letters); -1 is the broker's default"
    )

    @field_validator("bootstrap_servers", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @field_validator("bootstrap_servers")
    @classmethod
    def _are_servers(cls, value: list[str]) -> list[str]:
        for server in value:
            if not SERVER.fullmatch(server.strip()):
                raise PydanticCustomError("server", "expected host:port, got {server}", {"server": server})
        return value

    def rules(self, recipes: Mapping[str, RecipeSchema]) -> Iterator[Rule]:
        del recipes
        yield self._has_sasl()

    def _has_sasl(self) -> Rule:
        signs_in = self.security_protocol.startswith("SASL")
        if signs_in and self.sasl is None:
            yield "sasl", f"security_protocol {self.security_protocol} needs a sasl section"
        if not signs_in and self.sasl is not None:
            yield (
                "sasl",
                f"security_protocol {self.security_protocol} signs nobody in; expected SASL_SSL or SASL_PLAINTEXT",
            )


class EmbeddedConfig(Section):
    """Topics in one SQLite file, for trying everything with nothing installed."""

    path: Path = Field(Path("state/topics.sqlite"), description="the file; it is created if it does not exist")


class QueueConfig(Section):
    """Bounds on what the reader may have waiting for the learner."""

    samples: Whole = Field(
        20_000, ge=1, description="samples that wait at most; the reader then pauses until half of them are learned"
    )
    megabytes: float = Field(256.0, gt=0, description="their size at most, in megabytes (10^6 bytes)")


class TaskEndConfig(Section):
    """The rule that ends a task when no marker does: exactly one of these."""

    next_topic: bool = Field(
        default=False, description="the task ends at the records that its topic has when a later topic has its first"
    )
    records: Whole | None = Field(None, ge=1, description="samples after which the task ends, those of a probe too")
    idle: Seconds | None = Field(None, description="seconds without a record, once caught up")

    def rules(self, recipes: Mapping[str, RecipeSchema]) -> Iterator[Rule]:
        del recipes
        yield self._is_one()

    def _is_one(self) -> Rule:
        if (self.records is not None) + (self.idle is not None) + self.next_topic != 1:
            yield "", "exactly one of next_topic, records: N, idle: SECONDS is accepted"


class DeadLetterConfig(Section):
    """Where samples that cannot be used go."""

    topic: Topic | None = Field(None, description="default: <name>.dlq")
    burst: Whole | None = Field(
        1000, ge=1, description="samples rejected in a row that are a changed schema; null: none"
    )
    on_burst: Literal["stop", "continue", "exit"] = Field(
        "stop", description="stop: stand still until `streamlearn resume`, or a restart"
    )


class StreamConfig(Section):
    """Which topics are tasks, in which order, and when a task ends."""

    source: Literal["kafka", "embedded"] | None = Field(None, description="default: kafka where configured")
    topics: list[Topic] | None = Field(None, min_length=1, description="tasks in this order")
    pattern: str | None = Field(None, description="a regular expression that must match a topic's whole name")
    order: Literal["name", "first_record"] = Field(
        "name",
        description="pattern: topics by name, with digits compared as numbers, or by the time of their first record",
    )
    task_end: TaskEndConfig = TaskEndConfig(next_topic=True)
    on_finished: Literal["wait", "exit"] = Field(
        "wait", description="after the last task: wait for more, or end the daemon with 0"
    )
    codec: Literal["json", "msgpack", "batch"] = Field("json", description="of records without a content-type header")
    batch_size: Whole = Field(100, ge=1, description="samples of a batch, which is learned as one")
    merge: Literal["arrival", "fixed"] = Field(
        "arrival",
        description="several partitions: as they arrive, or in an order that waits for the slowest and is repeatable",
    )
    late: Literal["count", "dead_letter"] = Field(
        "count",
        description="a sample that comes after its task's end: count it, or send it to the dead-letter topic as well",
    )
    linger: Seconds | None = Field(None, description="seconds after which a short batch is learned all the same")
    max_record_bytes: NumBytes = Field(
        16 << 20, description="bytes of a record's value at most; a larger record is rejected as oversize"
    )
    on_offset_out_of_range: Literal["stop", "earliest", "latest", "exit"] = Field(
        "stop",
        description="where unread records are gone: stop reading, go on at the earliest or latest record, or end the daemon",
    )
    startup_timeout: Seconds | None = Field(None, description="seconds to wait for a broker; default: for ever")
    queue: QueueConfig = QueueConfig()
    dead_letter: DeadLetterConfig = DeadLetterConfig()

    @field_validator("task_end", mode="before")
    @classmethod
    def _word(cls, value: Any) -> Any:
        return {"next_topic": True} if value == "next_topic" else value

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        if value is not None and (why := patterns.syntax_error(value)) is not None:
            raise PydanticCustomError("pattern", "not a regular expression: {why}", {"why": why})
        return value

    def reads(self, topic: str) -> bool:
        """Tell whether a topic is a task, by its name: internal topics and dead letters (`*.dlq`) match no pattern."""
        if self.topics is not None:
            return topic in self.topics
        return not topic.startswith("__") and not topic.endswith(".dlq") and patterns.matches(self.pattern or "", topic)

    def rules(self, recipes: Mapping[str, RecipeSchema]) -> Iterator[Rule]:
        del recipes
        yield self._topics_or_pattern()
        yield self._topics_differ()

    def _topics_or_pattern(self) -> Rule:
        if (self.topics is None) == (self.pattern is None):
            yield "", "exactly one of topics (a list) and pattern (a regular expression) is needed"

    def _topics_differ(self) -> Rule:
        if self.topics is not None and len(set(self.topics)) != len(self.topics):
            yield "topics", "a topic is listed twice"


class EncoderConfig(Section):
    """A module of yours that never learns: the model and every strategy see its features, and a generator replays those."""

    name: str = Field(description="package.module:function, called with input.shape")
    options: Options = Field(default_factory=dict, description="keyword arguments of the function")

    @field_validator("name")
    @classmethod
    def _is_function(cls, value: str) -> str:
        if not FUNCTION.fullmatch(value):
            raise PydanticCustomError("encoder", "expected package.module:function")
        return value


class InputConfig(Section):
    """What `x` is: its shape and dtype as it arrives, and the division that scales it for the model."""

    kind: Literal["numbers"] = Field("numbers", description="numbers (the default) or text")
    shape: list[Whole] = Field(min_length=1, description="shape of one sample, as [28, 28]")
    dtype: Literal["uint8", "int16", "int32", "int64", "float16", "float32", "float64"] = Field(
        "float32", description="dtype of a sample's numbers, as they arrive"
    )
    scale: float = Field(1.0, ge=1e-30, le=1e30, description="the model, or the encoder, sees x / scale")
    encoder: EncoderConfig | None = Field(None, description="stands before the model, and is frozen")

    @field_validator("encoder", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if value is not None and not isinstance(value, (str, dict)):
            raise PydanticCustomError("encoder", "expected package.module:function, or a section with name and options")
        return {"name": value} if isinstance(value, str) else value

    @field_validator("shape")
    @classmethod
    def _positive(cls, value: list[int]) -> list[int]:
        if any(size < 1 for size in value):
            raise PydanticCustomError("shape", "every dimension must be at least 1")
        if math.prod(value) > SAMPLE_SIZE:
            raise PydanticCustomError("shape", "a sample may have {n} numbers at most", {"n": SAMPLE_SIZE})
        return value


class TextInputConfig(Section):
    """A story, a question about it, and its answer as the label: the model sees `[1 + sentences, words]` token ids."""

    kind: Literal["text"] = Field(description="numbers (the default) or text")
    sentences: Int = Field(ge=1, le=10_000, description="of a story, the newest; older ones are left out")
    words: Int = Field(ge=1, le=10_000, description="in a sentence at most; a text with a longer one is rejected")
    vocabulary: Int = Field(ge=1, le=10_000_000, description="words that are told apart, in order of first appearance")

    @property
    def encoder(self) -> None:
        """None: a text's ids are names, and no features."""

    @property
    def shape(self) -> list[int]:
        """The question's row, then the story's."""
        return [1 + self.sentences, self.words]

    @property
    def dtype(self) -> str:
        """That of token ids."""
        return "int32"

    @property
    def scale(self) -> float:
        """Ids are names: no division."""
        return 1.0


class ScenarioConfig(Section):
    """Which outputs compete for a sample: those of its task, those of its domain, or every class seen so far."""

    kind: Literal["task", "domain", "class"] = Field(
        "class",
        description="outputs that compete: of the sample's task (task), one set for all tasks (domain), or all classes (class)",
    )
    active: Literal["seen", "all"] = Field("seen", description="class: only classes seen so far, or all from the start")
    tasks: dict[str, list[Label]] = Field(default_factory=dict, description="declared classes of each task, by topic")


class HoldoutConfig(Section):
    """Which samples are kept for the probes and never trained on."""

    by: Literal["value", "key"] = Field(
        "value",
        description="what a hash is taken of: a sample's x and y, or its record's key, which keeps an entity on one side",
    )
    fraction: float = Field(
        0.1, ge=0, lt=1, description="share of the samples that is held out, from 0 (none) to below 1"
    )
    max: Whole | None = Field(1000, ge=1, description="samples of a task's probe; null: no bound")


class OptimizerConfig(Section):
    """The solver's optimizer; always the fused kernel."""

    name: Literal["adam", "sgd", "adamw"] = Field("adam", description="the update rule")
    lr: float = Field(1e-3, gt=0, allow_inf_nan=False, description="learning rate")
    momentum: float = Field(0.0, ge=0, lt=1, description="sgd: share of the last update that is added to the next")
    weight_decay: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="share by which weights shrink: decoupled for adamw, added to the gradient for adam and sgd",
    )


class AugmentConfig(Section):
    """How far images are distorted at random before the solver sees them: new ones and replayed ones alike."""

    shift: float = Field(0.0, ge=0, allow_inf_nan=False, description="pixels, up to, in each direction")
    rotate: float = Field(0.0, ge=0, le=180, description="degrees, up to, either way")
    zoom: float = Field(0.0, ge=0, lt=1, description="up to so much larger or smaller, each axis by itself")


class LearnerConfig(Section):
    """How a batch is learned."""

    updates_per_batch: Whole = Field(10, ge=1, description="gradient steps on each batch")
    optimizer: OptimizerConfig = OptimizerConfig()
    average: float | None = Field(0.998, gt=0, lt=1, description="decay of the weights' moving average; null: none")
    max_norm: float | None = Field(None, gt=0, description="clip the gradient's norm")
    augment: AugmentConfig | None = Field(None, description="images only: distort them at random, at every update anew")


BELONGS = {"mlp": ("hidden",), "resnet": ("width",), "memnet": ("embedding", "hops", "heads")}


class ModelConfig(Section):
    """`mlp`, `resnet`, `memnet` (of text), or `package.module:function` with parameters of its own under `options`."""

    name: str = Field("mlp", description="mlp, resnet, memnet (of text), or package.module:function of your own")
    hidden: list[Width] = Field([400, 400], min_length=1, description="mlp: widths of the hidden layers")
    width: Width = Field(16, description="resnet: channels of the first stage")
    embedding: Whole = Field(48, ge=1, description="memnet: numbers that stand for a word")
    hops: Whole = Field(3, ge=1, description="memnet: how often the story is consulted")
    heads: Whole = Field(4, ge=1, description="memnet: sentences that a hop can tell apart at once")
    options: Options = Field(default_factory=dict, description="keyword arguments of a model of your own")

    @field_validator("name")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in BELONGS and not FUNCTION.fullmatch(value):
            raise PydanticCustomError("model", "accepted: mlp, resnet, memnet, package.module:function")
        return value

    def ignored(self) -> Iterator[str]:
        """Give the keys that say something, and are of another model."""
        for key, default in ModelConfig.model_fields.items():
            own = ("name", *BELONGS.get(self.name, ("options",)))
            if key not in own and getattr(self, key) != default.get_default(call_default_factory=True):
                yield key


class MemoryConfig(Section):
    """A bound on the samples that are kept: the reservoir of the current task, and the memories of past ones."""

    max_bytes: NumBytes = Field(2 << 30, description="bytes at most, of all samples that are kept together")


class ProbesConfig(Section):
    """When held-out samples are evaluated."""

    every: Whole = Field(20, ge=1, description="batches between evaluations")
    every_seconds: Seconds | None = Field(
        60.0, description="seconds after which what was learned since is evaluated, however few batches; null: never"
    )
    minimum: Whole = Field(20, ge=1, description="samples from which on the open task's probe is shown")


class CheckpointConfig(Section):
    """When the state is saved, besides at every task's end and at the stop."""

    every_batches: Whole | None = Field(None, ge=1, description="batches between checkpoints; null: the clock alone")
    every_seconds: Seconds | None = Field(30.0, description="seconds between checkpoints; null: the batches alone")
    keep: Whole = Field(3, ge=1, description="newest checkpoints kept; several of the same step count as one")
    hourly: Whole = Field(24, ge=0, description="older checkpoints kept, one for each hour")
    task_ends: Annotated[Whole, Field(ge=0)] | Literal["all"] = Field(
        5, description="checkpoints kept of ends of tasks: of the last so many tasks, or of all"
    )


class DivergenceConfig(Section):
    """What is done when update after update is not finite, or past tasks are lost at once; single updates are dropped."""

    after: Whole = Field(10, ge=1, description="batches in a row without one finite update")
    then: Literal["rollback", "stop", "skip"] = Field(
        "rollback", description="go back to the newest checkpoint, stop the daemon, or go on without these updates"
    )
    slow_down: float = Field(
        0.5, gt=0, lt=1, description="rollback: what the learning rate is multiplied by, each time"
    )
    attempts: Whole = Field(3, ge=1, description="rollbacks in a row, after which the daemon stops")
    drop: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="how far the mean accuracy on past tasks' probes may fall from one evaluation to the next; null: any",
    )


class ServiceConfig(Section):
    """The read-only HTTP listener."""

    host: str = Field(
        "127.0.0.1", description="address that it listens on; anybody who reaches it can read metrics and status"
    )
    port: Int = Field(9464, ge=0, le=65535, description="0: any free port, shown in status")
    liveness_timeout: Seconds = Field(
        60.0, description="seconds without a turn of the loop, after which /healthz answers 503"
    )


class LogConfig(Section):
    """What is logged, and how."""

    level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least severe lines that are written"
    )
    format: Literal["auto", "json", "console"] = Field(
        "auto", description="one JSON object a line, plain text (console), or by itself: text on a terminal, else JSON"
    )


class Config(Section):
    """The whole file."""

    name: str = Field(
        "streamlearn",
        pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$",
        description="name of the job: in metrics, in the default group id and in the default dead-letter topic",
    )
    state_dir: Annotated[Path, BeforeValidator(_directory)] = Field(
        Path("state/streamlearn"), description="directory of checkpoints, lock and control socket: one for each job"
    )
    seed: Int = Field(
        0,
        ge=0,
        le=1 << 53,
        description="seed of every random draw: with it, stream and machine the same, weights are equal, bit by bit",
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda|cuda:[0-9]+)$",
        description="cpu, cuda, cuda:N, or auto: a GPU if there is one",
    )
    threads: Int = Field(
        1, ge=1, le=1024, description="CPU threads of torch; another number changes the last bits of results"
    )
    shutdown_grace: Seconds = Field(
        25.0, description="seconds to finish the batch and save at a stop; the process then ends with 1"
    )
    input: InputConfig | TextInputConfig
    classes: list[Label] | Int = Field(description="the labels, or how many there may be")
    grow_head: bool = Field(
        default=False,
        description="give a label beyond the number of classes an output of its own, instead of rejecting it",
    )
    scenario: ScenarioConfig = ScenarioConfig()
    stream: StreamConfig
    kafka: KafkaConfig | None = None
    embedded: EmbeddedConfig = EmbeddedConfig()
    holdout: HoldoutConfig = HoldoutConfig()
    model: ModelConfig = ModelConfig()
    strategy: dict[str, dict[str, Any]] = Field({"generative": {}, "si": {}}, validate_default=True)
    learner: LearnerConfig = LearnerConfig()
    memory: MemoryConfig = MemoryConfig()
    probes: ProbesConfig = ProbesConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    divergence: DivergenceConfig = DivergenceConfig()
    service: ServiceConfig = ServiceConfig()
    log: LogConfig = LogConfig()

    @field_validator("input", mode="before")
    @classmethod
    def _input(cls, value: Any) -> Any:
        if isinstance(value, (InputConfig, TextInputConfig)):
            return value
        if not isinstance(value, dict):
            raise PydanticCustomError("input", "expected keys and values: shape and others, or kind: text and others")
        return _check_input(value)

    @field_validator("model", mode="before")
    @classmethod
    def _model_word(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("scenario", mode="before")
    @classmethod
    def _scenario_word(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @field_validator("classes")
    @classmethod
    def _classes(cls, value: list[Label] | int) -> list[Label] | int:
        if isinstance(value, int) and not 1 <= value <= MAX_CLASSES:
            raise PydanticCustomError(
                "classes", "a number of classes must be at least 1, and {n} at most", {"n": MAX_CLASSES}
            )
        if isinstance(value, list) and (not value or len(set(value)) != len(value)):
            raise PydanticCustomError("classes", "a list of classes must name each once, and at least one")
        return value

    @field_validator("strategy", mode="before")
    @classmethod
    def _strategy(cls, value: Any, info: ValidationInfo) -> dict[str, dict[str, Any]]:
        return _check_strategy(_as_recipes(value), (info.context or {}).get("recipes", {}), info.data.get("input"))

    def rules(self, recipes: Mapping[str, RecipeSchema]) -> Iterator[Rule]:
        yield self._source_is_there()
        yield self._tasks_are_declared()
        yield self._classes_are_declared()
        yield self._head_may_grow()
        yield self._dead_letters_are_apart()
        yield self._augments_images()
        yield self._model_fits_input()
        yield self._strategy_fits_input()
        yield self._codec_fits_input()
        for name in getattr(self, "strategy", ()):
            yield ((f"strategy.{name}", why) for why in recipes[name].conflicts(self, name))

    def _source_is_there(self) -> Rule:
        if self.source == "kafka" and self.kafka is None:
            yield "kafka", "stream.source is kafka, but there is no kafka section with bootstrap_servers"

    def _tasks_are_declared(self) -> Rule:
        spec = self.scenario
        if spec.kind == "domain" and not spec.tasks:
            if isinstance(self.classes, int):
                why = "the classes of each task in order, or classes as a list that all topics share"
                yield "scenario", f"scenario domain needs scenario.tasks: {why}"
            return
        topics = self.stream.topics
        if spec.kind == "domain" and (bare := [name for name in topics or () if name not in spec.tasks]):
            names = ", ".join(bare)
            why = f"scenario domain needs the classes of each task, and has none for topic {names}"
            yield "scenario.tasks", f"{why}; without scenario.tasks all topics share classes, a list"
        strange = [name for name in spec.tasks if topics is not None and name not in topics]
        if spec.kind in {"task", "domain"} and strange:
            yield "scenario.tasks", f"{', '.join(strange)}: not in stream.topics; accepted: {', '.join(topics or ())}"

    def _classes_are_declared(self) -> Rule:
        if isinstance(self.classes, list):
            declared = {label for labels in self.scenario.tasks.values() for label in labels}
            if unknown := sorted(map(repr, declared - set(self.classes))):
                mixed = any(label_of_other_type(label) in self.classes for label in declared - set(self.classes))
                hint = "; a number and text that is written the same are two classes" if mixed else ""
                why = f"scenario.tasks names classes that are not in classes: {', '.join(unknown)}"
                yield "scenario.tasks", why + hint

    def _head_may_grow(self) -> Rule:
        if self.grow_head and (isinstance(self.classes, list) or self.scenario.kind == "domain"):
            why = "grow_head needs classes as a number, and scenario class or task"
            if isinstance(self.classes, list):
                why += f"; a list of classes cannot grow: with classes: {len(self.classes)} labels take outputs as they appear"
            yield "grow_head", why

    def _dead_letters_are_apart(self) -> Rule:
        if self.dead_letter_topic in (self.stream.topics or ()):
            why = f"dead letters may not go to a task's topic, and {self.dead_letter_topic} is in stream.topics"
            yield "stream.dead_letter.topic", why

    def _augments_images(self) -> Rule:
        images = isinstance(self.input, InputConfig) and len(self.input.shape) in {2, 3}
        if self.learner.augment is not None and not images:
            text = "learner.augment needs images: input.shape [height, width] or [channels, height, width], not"
            yield "learner.augment", f"{text} {self.input.shape}"
        if self.learner.augment is not None and self.input.encoder is not None:
            yield (
                "learner.augment",
                "learner.augment distorts what the model sees, and with input.encoder that is no image",
            )

    def _model_fits_input(self) -> Rule:
        name, text = self.model.name, isinstance(self.input, TextInputConfig)
        if text and name in {"mlp", "resnet"}:
            yield "model", f"model {name} sees numbers, and input is text; accepted: memnet, package.module:function"
        if name == "memnet" and not text:
            yield "model", "model memnet sees text: it needs input with kind: text"

    def _strategy_fits_input(self) -> Rule:
        if isinstance(self.input, TextInputConfig) and "generative" in self.strategy:
            why = (
                "strategy generative replays what a VAE of numbers makes, and it cannot make the token ids of a text; "
            )
            yield "strategy", why + "er and joint replay stored samples of any kind"

    def _codec_fits_input(self) -> Rule:
        if isinstance(self.input, TextInputConfig) and self.stream.codec == "batch":
            yield "stream.codec", "stream.codec batch holds numbers, and input is text: use json or msgpack"

    @property
    def source(self) -> str:
        """`kafka` or `embedded`."""
        return self.stream.source or ("kafka" if self.kafka is not None else "embedded")

    @property
    def dead_letter_topic(self) -> str:
        """The topic that takes what cannot be used."""
        return self.stream.dead_letter.topic or f"{self.name}.dlq"

    @property
    def group_id(self) -> str:
        """The consumer group under whose name positions are reported."""
        return (self.kafka.group_id if self.kafka else None) or f"streamlearn.{self.name}"

    def warnings(self, recipes: Mapping[str, RecipeSchema]) -> list[str]:
        """Return what is allowed and probably not meant."""
        slots = {slot for name in self.strategy for slot in recipes[name].slots}
        found = []
        if slots == {"penalty"} and self.scenario.kind == "class":
            names = " + ".join(self.strategy)
            found.append(f"strategy {names}: importance alone does not protect class-incremental learning; add replay")
        named = {label for labels in self.scenario.tasks.values() for label in labels}
        named |= set() if isinstance(self.classes, int) else set(self.classes)
        if both := sorted(repr(label) for label in named if label_of_other_type(label) in named):
            found.append(f"classes {', '.join(both)}: a number and text that is written the same are two classes")
        topics = self.stream.topics or ()
        if len(topics) == 1 and self.stream.task_end.next_topic and "naive" not in self.strategy:
            found.append(
                f"strategy {' + '.join(self.strategy)}: protects nothing until a task has ended, and the only topic, "
                f"{topics[0]}, ends by a marker alone; stream.task_end records: N or idle: SECONDS would end it"
            )
        integers = self.input.dtype.startswith(("int", "uint")) and isinstance(self.input, InputConfig)
        if integers and self.input.scale == 1 and self.strategy.get("generative", {}).get("likelihood") == "bernoulli":
            found.append(
                f"input.scale is 1 for dtype {self.input.dtype}: generative replays values from 0 to 1 (likelihood bernoulli); "
                "give the largest value; where some are negative, with likelihood: gaussian"
            )
        accepted = ", ".join(BELONGS.get(self.model.name, ("options",)))
        # no error: what shapes a checkpoint may not be taken away
        ignored = f"is ignored: model {self.model.name} has no such parameter; it has {accepted}"
        found += [f"model.{key} {ignored}" for key in self.model.ignored()]
        for name, parameters in self.strategy.items():
            if isinstance(budget := parameters.get("budget"), int) and budget < len(topics):
                found.append(f"strategy.{name}.budget is {budget}: too few for a sample of each of {len(topics)} tasks")
        if self.kafka is not None and self.kafka.security_protocol == "SASL_PLAINTEXT":
            found.append("kafka.security_protocol SASL_PLAINTEXT: credentials travel without encryption")
        if self.kafka is not None and not self.kafka.ssl_check_hostname:
            found.append("kafka.ssl_check_hostname is off: any certificate of a trusted authority is accepted")
        url = self.kafka.sasl.token_url if self.kafka is not None and self.kafka.sasl is not None else None
        if url is not None and url.startswith("http:") and not LOOPBACK.fullmatch(url):
            found.append("kafka.sasl.token_url is http: the client's secret and the token travel without encryption")
        return found

    def unreadable_secret(self) -> str | None:
        """Return why the secret cannot be read here, or None: it may be where the daemon will run."""
        try:
            if self.kafka is not None and self.kafka.sasl is not None:
                self.kafka.sasl.secret()
        except StreamlearnError as error:
            return str(error)
        return None

    def effective(self) -> dict[str, Any]:
        """Return the values in force as a JSON tree, secrets redacted."""
        tree: dict[str, Any] = json.loads(self.model_dump_json())
        return _redact(tree)

    def digest(self) -> str:
        """Return the SHA-256 of the effective values."""
        import hashlib

        return hashlib.sha256(json.dumps(self.effective(), sort_keys=True).encode()).hexdigest()

    def shaping(self) -> dict[str, Any]:
        """Return, by dotted key, the values that shape the state: those a checkpoint must agree with."""
        tree = self.effective()
        keys = ("seed", "input", "classes", "grow_head", "scenario", "holdout", "model", "strategy")
        chosen = {key: tree[key] for key in keys}
        if (encoder := tree["input"].get("encoder")) is not None:  # where its files lie; what it is, the state knows
            chosen["input"] = {**tree["input"], "encoder": encoder["name"]}
        chosen["stream.source"] = self.source  # positions of one source mean nothing in another
        chosen["stream.codec"] = tree["stream"]["codec"]
        chosen["stream.batch_size"] = tree["stream"]["batch_size"]
        chosen["learner.optimizer.name"] = tree["learner"]["optimizer"]["name"]
        return dict(_flatten(chosen))


def _as_recipes(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        return {value: {}}
    if isinstance(value, list) and value and all(isinstance(name, str) for name in value):
        return {name: {} for name in value}
    if isinstance(value, dict) and value:
        return {str(name): {} if parameters is None else parameters for name, parameters in value.items()}
    raise PydanticCustomError("strategy", "expected a recipe's name, a list of names, or names with parameters")


def _check_input(value: dict[str, Any]) -> InputConfig | TextInputConfig:
    kinds: dict[Any, type[InputConfig | TextInputConfig]] = {"numbers": InputConfig, "text": TextInputConfig}
    kind = value.get("kind", "numbers")
    if not isinstance(kind, str) or kind not in kinds:
        message = PydanticCustomError("kind", "accepted: {kinds}", {"kinds": ", ".join(kinds)})
        raise ValidationError.from_exception_data("input", [{"type": message, "loc": ("kind",), "input": kind}])
    try:
        return kinds[kind].model_validate(value)
    except ValidationError as error:
        told = [_told(details, model_at(kinds[kind], details["loc"][:-1])) for details in error.errors()]
        raise ValidationError.from_exception_data("input", told) from error


def _told(details: ErrorDetails, model: type[BaseModel] | None = None) -> InitErrorDetails:
    """Return an error to raise again; of a model that its place in the file alone does not tell, with what it accepts."""
    kind = details["type"] if model is None or details["type"] == "missing" else "told"
    message = PydanticCustomError(kind, "{why}", {"why": expected(details, model)})
    return {"type": message, "loc": details["loc"], "input": details["input"]}


def _check_strategy(
    chosen: dict[str, Any], recipes: Mapping[str, RecipeSchema], spec: InputConfig | TextInputConfig | None
) -> dict[str, dict[str, Any]]:
    errors: list[InitErrorDetails] = []
    complete: dict[str, dict[str, Any]] = {}
    owner: dict[str, str] = {}
    for name, parameters in chosen.items():
        if name not in recipes:
            message = PydanticCustomError(
                "recipe", "no such recipe; accepted: {names}", {"names": ", ".join(sorted(recipes))}
            )
            errors.append({"type": message, "loc": (name,), "input": name})
            continue
        for slot in recipes[name].slots:
            if slot in owner:
                text = "slot {slot} is already filled by {other}; a strategy takes one recipe for each slot"
                message = PydanticCustomError("slot", text, {"slot": slot, "other": owner[slot]})
                errors.append({"type": message, "loc": (name,), "input": name})
            owner[slot] = name
        try:
            implied = recipes[name].defaults_for(spec) if spec is not None and isinstance(parameters, dict) else {}
            given = {**implied, **parameters} if implied else parameters
            complete[name] = recipes[name].parameters.model_validate(given).model_dump()
        except ValidationError as error:
            told = [_told(details, recipes[name].parameters) for details in error.errors()]
            errors += [{**details, "loc": (name, *details["loc"])} for details in told]
    if errors:
        raise ValidationError.from_exception_data("strategy", errors)
    return complete


def _has_possible_port(url: str) -> bool:
    try:
        return urlsplit(url).port != 0
    except ValueError:
        return False


def expected(details: ErrorDetails, model: type[BaseModel] | None) -> str:
    """Return what would be accepted where an error is, in a model that may not be known."""
    if details["type"] in {"model_type", "model_attributes_type"}:
        return "expected a section: keys and values"
    if details["type"] == "extra_forbidden" and model is not None:
        import difflib

        accepted = sorted(model.model_fields)
        close = difflib.get_close_matches(str(details["loc"][-1]), accepted, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        return f"no such key{hint}; accepted: {', '.join(accepted)}"
    return details["msg"]


def model_at(model: type[BaseModel], key: Sequence[Any]) -> type[BaseModel] | None:
    """Return the section at a key below a model, or None where there is none."""
    for part in key:
        info = model.model_fields.get(str(part))
        if info is None:
            return None
        kinds = get_args(info.annotation) if get_origin(info.annotation) is types.UnionType else (info.annotation,)
        found = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not found:
            return None
        model = found[0]
    return model


def _value_at(section: Section, key: Sequence[str]) -> Any:
    """Return what is below a section, or an empty tree, which is not shown, where there is nothing."""
    found: Any = section
    for part in key:
        found = found.get(part) if isinstance(found, dict) else getattr(found, part, None)
    return {} if found is None else found


def _redact(tree: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _redact(value)
        if isinstance(value, dict)
        else (
            REDACTED
            if ("password" in key or "secret" in key) and not key.endswith("_file") and value is not None
            else value
        )
        for key, value in tree.items()
    }


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat += _flatten(value, f"{prefix}{key}.")
        else:
            flat.append((f"{prefix}{key}", value))
    return flat
