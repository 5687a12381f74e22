"""The configuration: a frozen pydantic model for each section, and the rules that involve several keys."""

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

    Violations = Iterator[tuple[str, str]]  # a dotted key, and why its value is not accepted

# pydantic looks for plugins in the metadata of every installed package; that takes time, and these models need none
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")

REDACTED = "***"
TOKEN_URL = re.compile(r"https?://[^\s/@?#]+(/[^\s@#]*)?")
LOOPBACK = re.compile(r"http://(localhost|127\.0\.0\.1|\[::1\])[:/].*")
MAX_SAMPLE_SIZE = 1 << 28  # numbers in one sample
MAX_CLASSES = 1_000_000


def _check_options(value: dict[str, Any]) -> dict[str, Any]:
    """Refuse what JSON cannot represent: options are written into checkpoints."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise PydanticCustomError(
            "options", "expected values that JSON can represent: {why}", {"why": str(error)}
        ) from error
    return value


def _check_directory(value: Any) -> Any:
    """Refuse an empty path: it would be the working directory."""
    if value == "":
        raise PydanticCustomError("directory", "expected a directory")
    return value


def _check_topic(value: str) -> str:
    """Refuse a topic name that Kafka refuses."""
    if not TOPIC_NAME.fullmatch(value):
        why = "a topic name has 1 to 249 letters, digits, dots, hyphens and underscores, and is not . or .."
        raise PydanticCustomError("topic", why)
    return value


def _check_label(value: str) -> str:
    """Refuse a label that is too long: every record with it would be rejected."""
    if len(value.encode(errors="surrogatepass")) > MAX_LABEL_BYTES:
        raise PydanticCustomError("label", "a label has at most {n} bytes", {"n": MAX_LABEL_BYTES})
    return value


# Upper bounds are far above every useful value, and small enough for torch, clocks and memory.
Int = Annotated[int, Strict()]  # strict, because otherwise `true` would be accepted as 1
Int32 = Annotated[Int, Field(le=(1 << 31) - 1)]
NumBytes = Annotated[Int, Field(ge=1, le=1 << 53)]
Seconds = Annotated[float, Field(gt=0, le=1e9)]
Label = Int | Annotated[str, AfterValidator(_check_label)]
Topic = Annotated[str, AfterValidator(_check_topic)]
Width = Annotated[Int, Field(ge=1, le=1 << 20)]  # units of a layer
FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
SERVER = re.compile(r"([A-Za-z_]+://)?(\[[^\s\[\]]+\]|[^\s:/\[\]]+)(:[0-9]{1,5})?|[0-9a-fA-F:.]+(%\w+)?")
Options = Annotated[dict[str, Any], AfterValidator(_check_options)]


class RecipeSchema(Protocol):
    """What the configuration needs to know about a recipe: its slots, its parameters, and its limits."""

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the slots that the recipe fills."""

    @property
    def parameters(self) -> type[BaseModel]:
        """A pydantic model made from the recipe's signature."""

    def defaults_for(self, spec: InputConfig | TextInputConfig) -> dict[str, Any]:
        """Return the parameters whose defaults depend on the input, with their values."""

    def conflicts(self, config: Config, name: str) -> Iterator[str]:
        """Yield the reasons why this recipe cannot work with the rest of the configuration."""


class Section(BaseModel):
    """A section of the file. It is frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, validate_default=True)

    def rules(self, recipes: Mapping[str, RecipeSchema]) -> Iterator[Violations]:
        """Yield the rules that involve several keys, each as an iterator over its violations.

        Each rule is checked separately, and skipped when one of the keys that it reads is already invalid.
        """
        del recipes
        yield from ()

    @field_validator("*", mode="wrap")
    @classmethod
    def _check_rules(cls, value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        """Check the rules after the last field, because pydantic skips a model's own validators when a field is invalid."""
        if info.field_name != next(reversed(cls.model_fields)):
            return handler(value)
        valid, errors = dict(info.data), list[InitErrorDetails]()
        try:
            valid[info.field_name] = value = handler(value)
        except ValidationError as error:
            errors = [_to_init_error(details) for details in error.errors()]
        partial = cls.model_construct(**valid)
        invalid = cls.model_fields.keys() - valid.keys()
        for name in invalid:  # so that a rule that reads it raises AttributeError
            vars(partial).pop(name, None)
        violations: list[tuple[str, str]] = []
        for rule in partial.rules((info.context or {}).get("recipes", {})):
            try:
                violations += rule
            except AttributeError:
                if not invalid:
                    raise
        for key, why in violations:
            message = PydanticCustomError("rule", "{why}", {"why": why})
            loc = tuple(filter(None, key.split(".")))
            errors.append({"type": message, "loc": loc, "input": _value_at(partial, loc)})
        if errors:
            raise ValidationError.from_exception_data(cls.__name__, errors)
        return value

    @model_validator(mode="wrap")
    @classmethod
    def _locate_violations(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Remove the last field's name from the location of each violation: pydantic added it, but the key is another one."""
        try:
            return handler(value)
        except ValidationError as error:
            errors = error.errors()
            for details in errors:
                if details["type"] == "rule":
                    details.update({"type": "described", "loc": details["loc"][1:]})
            raise ValidationError.from_exception_data(
                cls.__name__, [_to_init_error(details) for details in errors]
            ) from error


class SaslConfig(Section):
    """Credentials. A password or client secret comes from the environment or from a file, never from the YAML file."""

    mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"] = Field(
        "SCRAM-SHA-512", description="SASL mechanism: how the client authenticates"
    )
    username: str | None = Field(None, description="user name; not accepted with OAUTHBEARER")
    password: SecretStr | None = Field(
        None,
        min_length=1,
        description="password of the user: set STREAMLEARN__KAFKA__SASL__PASSWORD in the environment, never in this file",
    )
    password_file: Path | None = Field(None, description="file that contains the password")
    token_url: str | None = Field(None, description="OAUTHBEARER: URL that issues tokens for client credentials")
    client_id: str | None = Field(None, min_length=1, description="OAUTHBEARER: id of the client that asks for tokens")
    client_secret: SecretStr | None = Field(
        None,
        min_length=1,
        description="OAUTHBEARER: secret of the client: set STREAMLEARN__KAFKA__SASL__CLIENT_SECRET in the environment",
    )
    client_secret_file: Path | None = Field(None, description="OAUTHBEARER: file that contains the client secret")
    scope: str | None = Field(
        None, min_length=1, description="OAUTHBEARER: scope of the tokens; default: the server decides"
    )

    @field_validator("token_url")
    @classmethod
    def _is_url(cls, value: str | None) -> str | None:
        if value is not None and not (TOKEN_URL.fullmatch(value) and _has_valid_port(value)):
            raise PydanticCustomError(
                "url", "expected https://HOST/PATH or http://HOST/PATH, without credentials in it"
            )
        return value

    def rules(self, recipes: Mapping[str, RecipeSchema]) -> Iterator[Violations]:
        del recipes
        yield self._has_password()
        yield self._has_client()

    def _has_password(self) -> Violations:
        if self.mechanism == "OAUTHBEARER":
            yield from self._not_accepted("username", "password", "password_file")
            return
        if self.username is None:
            yield "username", f"mechanism {self.mechanism} needs a username"
        if self.password is None and self.password_file is None:
            yield "", "no password: set STREAMLEARN__KAFKA__SASL__PASSWORD in the environment, or password_file"

    def _has_client(self) -> Violations:
        if self.mechanism != "OAUTHBEARER":
            yield from self._not_accepted("token_url", "client_id", "client_secret", "client_secret_file", "scope")
            return
        for key in ("token_url", "client_id"):
            if getattr(self, key) is None:
                yield key, f"mechanism OAUTHBEARER needs a {key}"
        if self.client_secret is None and self.client_secret_file is None:
            name = "STREAMLEARN__KAFKA__SASL__CLIENT_SECRET"
            yield "", f"no client secret: set {name} in the environment, or client_secret_file"

    def _not_accepted(self, *keys: str) -> Violations:
        for key in keys:
            if getattr(self, key) is not None:
                yield key, f"not accepted with mechanism {self.mechanism}"

    def secret(self) -> str:
        """Return the password or the client secret. Raises `StreamlearnError` (77) if its file is empty or cannot be read."""
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
    """How to connect to the brokers. The security keys have the names that kafka-python gives them."""

    bootstrap_servers: list[str] = Field(
        min_length=1,
        description="HOST:PORT of one or more brokers, as a list or as text with commas; these name all other brokers",
    )
    client_id: str = Field("streamlearn", description="name of this client in the brokers' logs and quotas")
    group_id: str | None = Field(
        None, description="group to which positions are reported, for lag graphs only; default: streamlearn.<name>"
    )
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT",
        description="whether the connection is encrypted (SSL), and whether the client authenticates (SASL)",
    )
    ssl_cafile: Path | None = Field(
        None, description="PEM file of the certificate authorities to trust; default: the system's authorities"
    )
    ssl_certfile: Path | None = Field(
        None, description="PEM file of this client's certificate, if the brokers ask for one"
    )
    ssl_keyfile: Path | None = Field(None, description="PEM file of the private key of ssl_certfile")
    ssl_password: SecretStr | None = Field(
        None,
        min_length=1,
        description="password of ssl_keyfile: set STREAMLEARN__KAFKA__SSL_PASSWORD in the environment, never in this file",
    )
    ssl_check_hostname: bool = Field(default=True, description="refuse a broker whose certificate names another host")
    sasl: SaslConfig | None = None
    isolation_level: Literal["read_committed", "read_uncommitted"] = Field(
        "read_committed",
        description="transactions: read only committed records, or read all records at once, even if they are aborted later",
    )
    metadata_refresh_seconds: Seconds = Field(
        10.0, description="seconds between two searches for new topics and partitions"
    )
    replication_factor: Int = Field(
        -1,
        ge=-1,
        le=32767,
        description="replication factor of the dead-letter topic if it is created here; -1: the broker's default",
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

    def rules(self, recipes: Mapping[str, RecipeSchema]) -> Iterator[Violations]:
        del recipes
        yield self._has_sasl()

    def _has_sasl(self) -> Violations:
        authenticates = self.security_protocol.startswith("SASL")
        if authenticates and self.sasl is None:
            yield "sasl", f"security_protocol {self.security_protocol} needs a sasl section"
        if not authenticates and self.sasl is not None:
            yield (
                "sasl",
                f"a sasl section needs security_protocol SASL_SSL or SASL_PLAINTEXT, not {self.security_protocol}",
            )


class EmbeddedConfig(Section):
    """Topics in one SQLite file, for trying streamlearn without a Kafka broker."""

    path: Path = Field(
        Path("state/topics.sqlite"),
        description="SQLite file that contains the topics; it is created if it does not exist",
    )


class QueueConfig(Section):
    """Limits on the samples that are read but not yet learned."""

    samples: Int32 = Field(
        20_000,
        ge=1,
        description="largest number of waiting samples; the reader then pauses until half of them are learned",
    )
    megabytes: float = Field(256.0, gt=0, description="largest size of the waiting samples, in megabytes (10^6 bytes)")


class TaskEndConfig(Section):
    """The rule that ends a task when no marker does: exactly one of these keys."""

    next_topic: bool = Field(
        default=False,
        description="end the task when a later topic has its first record: at the end that its own topic has then",
    )
    records: Int32 | None = Field(
        None, ge=1, description="number of samples after which the task ends; probe samples count too"
    )
    idle: Seconds | None = Field(
        None, description="seconds without a new record after which the task ends, once all records are read"
    )

    def rules(self, recipes: Mapping[str, RecipeSchema]) -> Iterator[Violations]:
        del recipes
        yield self._is_one()

    def _is_one(self) -> Violations:
        if (self.records is not None) + (self.idle is not None) + self.next_topic != 1:
            yield "", "exactly one of next_topic, records: N, idle: SECONDS is accepted"


class DeadLetterConfig(Section):
    """Where rejected samples are sent, and what happens if there are many of them."""

    topic: Topic | None = Field(None, description="topic to which rejected samples are sent; default: <name>.dlq")
    burst: Int32 | None = Field(
        1000,
        ge=1,
        description="number of consecutive rejected samples that is treated as a changed schema; null: no limit",
    )
    on_burst: Literal["stop", "continue", "exit"] = Field(
        "stop",
        description="stop: read nothing until `streamlearn resume` or a restart; continue: log it; exit: end with code 65",
    )


class StreamConfig(Section):
    """Which topics are tasks, in which order, and when a task ends."""

    source: Literal["kafka", "embedded"] | None = Field(
        None, description="where the topics are; default: kafka if there is a kafka section"
    )
    topics: list[Topic] | None = Field(
        None, min_length=1, description="topics that are the tasks, in the order in which they are learned"
    )
    pattern: str | None = Field(
        None, description="regular expression that matches the whole names of the topics that are tasks"
    )
    order: Literal["name", "first_record"] = Field(
        "name",
        description="pattern: sort topics by name (digits are compared as numbers) or by the time of their first record",
    )
    task_end: TaskEndConfig = TaskEndConfig(next_topic=True)
    on_finished: Literal["wait", "exit"] = Field(
        "wait", description="after the last task: wait for more records, or end the daemon with exit code 0"
    )
    codec: Literal["json", "msgpack", "batch"] = Field(
        "json", description="codec of records without a content-type header"
    )
    batch_size: Int32 = Field(100, ge=1, description="number of samples in a batch")
    merge: Literal["arrival", "fixed"] = Field(
        "arrival",
        description="several partitions: learn records as they arrive, or in a repeatable order that waits for the slowest",
    )
    late: Literal["count", "dead_letter"] = Field(
        "count",
        description="a sample that arrives after its task's end: only count it, or also send it to the dead-letter topic",
    )
    linger: Seconds | None = Field(
        None, description="seconds after which a batch is learned although it is not full; null: never"
    )
    max_record_bytes: NumBytes = Field(
        16 << 20, description="largest size of a record's value, in bytes; a larger record is rejected as oversize"
    )
    on_offset_out_of_range: Literal["stop", "earliest", "latest", "exit"] = Field(
        "stop",
        description="if unread records are deleted: stop reading, continue at the earliest or latest record, or end the daemon",
    )
    startup_timeout: Seconds | None = Field(
        None, description="seconds to wait for a broker at the start; null: no limit"
    )
    queue: QueueConfig = QueueConfig()
    dead_letter: DeadLetterConfig = DeadLetterConfig()

    @field_validator("task_end", mode="before")
    @classmethod
    def _expand_word(cls, value: Any) -> Any:
        return {"next_topic": True} if value == "next_topic" else value

    @field_validator("pattern")
    @classmethod
    def _check_pattern(cls, value: str | None) -> str | None:
        if value is not None and (why := patterns.syntax_error(value)) is not None:
            raise PydanticCustomError("pattern", "not a regular expression: {why}", {"why": why})
        return value

    def reads(self, topic: str) -> bool:
        """Return whether a topic is a task. A pattern never matches internal topics (`__*`) or dead letters (`*.dlq`)."""
        if self.topics is not None:
            return topic in self.topics
        return not topic.startswith("__") and not topic.endswith(".dlq") and patterns.matches(self.pattern or "", topic)

    def rules(self, recipes: Mapping[str, RecipeSchema]) -> Iterator[Violations]:
        del recipes
        yield self._topics_or_pattern()
        yield self._topics_differ()

    def _topics_or_pattern(self) -> Violations:
        if (self.topics is None) == (self.pattern is None):
            yield "", "exactly one of topics (a list) and pattern (a regular expression) is needed"

    def _topics_differ(self) -> Violations:
        if self.topics is not None and len(set(self.topics)) != len(self.topics):
            yield "topics", "a topic is listed twice"


class EncoderConfig(Section):
    """A frozen module of your own in front of the model. The model and the strategies see only its features."""

    name: str = Field(description="package.module:function, which is called with input.shape and the options")
    options: Options = Field(default_factory=dict, description="keyword arguments for the function")

    @field_validator("name")
    @classmethod
    def _is_function(cls, value: str) -> str:
        if not FUNCTION.fullmatch(value):
            raise PydanticCustomError("encoder", "expected package.module:function")
        return value


class InputConfig(Section):
    """What `x` is: its shape and dtype in the records, and the number by which it is divided for the model."""

    kind: Literal["numbers"] = Field("numbers", description="numbers (default) or text")
    shape: list[Int32] = Field(min_length=1, description="shape of one sample, for example [28, 28]")
    dtype: Literal["uint8", "int16", "int32", "int64", "float16", "float32", "float64"] = Field(
        "float32", description="dtype of the numbers in the records"
    )
    scale: float = Field(1.0, ge=1e-30, le=1e30, description="the model (or the encoder) sees x / scale")
    encoder: EncoderConfig | None = Field(None, description="frozen module in front of the model")

    @field_validator("encoder", mode="before")
    @classmethod
    def _expand_name(cls, value: Any) -> Any:
        if value is not None and not isinstance(value, (str, dict)):
            raise PydanticCustomError("encoder", "expected package.module:function, or a section with name and options")
        return {"name": value} if isinstance(value, str) else value

    @field_validator("shape")
    @classmethod
    def _check_shape(cls, value: list[int]) -> list[int]:
        if any(size < 1 for size in value):
            raise PydanticCustomError("shape", "every dimension must be at least 1")
        if math.prod(value) > MAX_SAMPLE_SIZE:
            raise PydanticCustomError("shape", "a sample may have {n} numbers at most", {"n": MAX_SAMPLE_SIZE})
        return value


class TextInputConfig(Section):
    """A story, a question about it, and the answer as the label. The model sees token ids of shape `[1 + sentences, words]`."""

    kind: Literal["text"] = Field(description="numbers (default) or text")
    sentences: Int = Field(ge=1, le=10_000, description="number of newest sentences of a story that the model sees")
    words: Int = Field(
        ge=1,
        le=10_000,
        description="largest number of words in a sentence; a sample with a longer sentence is rejected",
    )
    vocabulary: Int = Field(
        ge=1,
        le=10_000_000,
        description="largest number of different words; each gets an id in order of first appearance",
    )

    @property
    def encoder(self) -> None:
        """None: an encoder needs numbers, and token ids only name words."""

    @property
    def shape(self) -> list[int]:
        """`[1 + sentences, words]`: a row for the question, then a row for each sentence of the story."""
        return [1 + self.sentences, self.words]

    @property
    def dtype(self) -> str:
        """The dtype of token ids."""
        return "int32"

    @property
    def scale(self) -> float:
        """1.0, because token ids are never divided."""
        return 1.0


class ScenarioConfig(Section):
    """Which outputs compete for a sample: those of its task, one set for all tasks, or those of all classes seen so far."""

    kind: Literal["task", "domain", "class"] = Field(
        "class",
        description="outputs that compete: those of the task (task), one set for all tasks (domain), or all classes (class)",
    )
    active: Literal["seen", "all"] = Field(
        "seen", description="class: only the classes seen so far compete, or all classes from the start"
    )
    tasks: dict[str, list[Label]] = Field(default_factory=dict, description="classes of each task, by topic")


class HoldoutConfig(Section):
    """Which samples are kept for the probes and never trained on."""

    by: Literal["value", "key"] = Field(
        "value",
        description="input of the hash: a sample's x and y, or its record's key (all samples of a key are held out, or none)",
    )
    fraction: float = Field(
        0.1, ge=0, lt=1, description="share of the samples that is held out: 0 (none) or more, below 1"
    )
    max: Int32 | None = Field(1000, ge=1, description="largest number of samples in a task's probe; null: no limit")


class OptimizerConfig(Section):
    """The model's optimizer. It always uses torch's fused implementation."""

    name: Literal["adam", "sgd", "adamw"] = Field("adam", description="optimizer algorithm")
    lr: float = Field(1e-3, gt=0, allow_inf_nan=False, description="learning rate")
    momentum: float = Field(0.0, ge=0, lt=1, description="sgd: momentum factor")
    weight_decay: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="weight decay: decoupled for adamw, added to the gradient for adam and sgd",
    )


class AugmentConfig(Section):
    """Largest random distortions of images before the model sees them, both new and replayed images."""

    shift: float = Field(0.0, ge=0, allow_inf_nan=False, description="largest shift in each direction, in pixels")
    rotate: float = Field(0.0, ge=0, le=180, description="largest rotation in either direction, in degrees")
    zoom: float = Field(0.0, ge=0, lt=1, description="largest relative change of size, drawn for each axis separately")


class LearnerConfig(Section):
    """How a batch is learned."""

    updates_per_batch: Int32 = Field(10, ge=1, description="number of gradient steps on each batch")
    optimizer: OptimizerConfig = OptimizerConfig()
    average: float | None = Field(
        0.998, gt=0, lt=1, description="decay of the exponential moving average of the weights; null: no average"
    )
    max_norm: float | None = Field(
        None, gt=0, description="largest norm of a gradient, a larger one is clipped; null: no limit"
    )
    augment: AugmentConfig | None = Field(
        None, description="images only: random distortions, drawn again for every update"
    )


MODEL_KEYS = {"mlp": ("hidden",), "resnet": ("width",), "memnet": ("embedding", "hops", "heads")}


class ModelConfig(Section):
    """`mlp`, `resnet`, `memnet` (for text), or a model of your own (`package.module:function`) with its `options`."""

    name: str = Field("mlp", description="mlp, resnet, memnet (for text), or package.module:function of your own")
    hidden: list[Width] = Field([400, 400], min_length=1, description="mlp: widths of the hidden layers")
    width: Width = Field(16, description="resnet: channels of the first stage")
    embedding: Int32 = Field(48, ge=1, description="memnet: size of a word's embedding")
    hops: Int32 = Field(3, ge=1, description="memnet: number of passes over the story")
    heads: Int32 = Field(4, ge=1, description="memnet: attention heads in each hop")
    options: Options = Field(default_factory=dict, description="keyword arguments for a model of your own")

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: str) -> str:
        if value not in MODEL_KEYS and not FUNCTION.fullmatch(value):
            raise PydanticCustomError("model", "accepted: mlp, resnet, memnet, package.module:function")
        return value

    def unused_keys(self) -> Iterator[str]:
        """Yield the keys that are set but belong to another model."""
        for key, default in ModelConfig.model_fields.items():
            own = ("name", *MODEL_KEYS.get(self.name, ("options",)))
            if key not in own and getattr(self, key) != default.get_default(call_default_factory=True):
                yield key


class MemoryConfig(Section):
    """A limit on stored samples, for each store: the current task's reservoir, the past tasks' memory, each probe."""

    max_bytes: NumBytes = Field(2 << 30, description="largest size of each store of samples, in bytes")


class ProbesConfig(Section):
    """When the probes (held-out samples) are evaluated."""

    every: Int32 = Field(20, ge=1, description="number of batches between two evaluations")
    every_seconds: Seconds | None = Field(
        60.0, description="seconds after which newly learned batches are evaluated although they are few; null: never"
    )
    minimum: Int32 = Field(
        20, ge=1, description="number of samples that the open task's probe needs before its accuracy is reported"
    )


class CheckpointConfig(Section):
    """When the state is saved, in addition to every task's end and the stop, and which checkpoints are kept."""

    every_batches: Int32 | None = Field(
        None, ge=1, description="number of batches between two checkpoints; null: only every_seconds counts"
    )
    every_seconds: Seconds | None = Field(
        30.0, description="seconds between two checkpoints; null: only every_batches counts"
    )
    keep: Int32 = Field(
        3, ge=1, description="number of newest checkpoints to keep; several of the same step count as one"
    )
    hourly: Int32 = Field(24, ge=0, description="number of older checkpoints to keep, one for each hour")
    task_ends: Annotated[Int32, Field(ge=0)] | Literal["all"] = Field(
        5, description="keep a checkpoint from the end of each of the last N tasks, or of all tasks"
    )


class DivergenceConfig(Section):
    """What to do if many updates are not finite, or past tasks suddenly lose accuracy. One such update is only dropped."""

    after: Int32 = Field(10, ge=1, description="number of consecutive batches without a finite update")
    then: Literal["rollback", "stop", "skip"] = Field(
        "rollback", description="return to the newest checkpoint, stop the daemon, or continue without these updates"
    )
    slow_down: float = Field(
        0.5, gt=0, lt=1, description="rollback: factor by which each rollback multiplies the learning rate"
    )
    attempts: Int32 = Field(3, ge=1, description="number of consecutive rollbacks after which the daemon stops")
    drop: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="largest accepted fall of the mean accuracy on past tasks' probes between two evaluations; null: no limit",
    )


class ServiceConfig(Section):
    """The read-only HTTP listener."""

    host: str = Field(
        "127.0.0.1", description="address to listen on; everyone who can reach it can read metrics and status"
    )
    port: Int = Field(9464, ge=0, le=65535, description="port to listen on; 0: any free port, which status names")
    liveness_timeout: Seconds = Field(
        60.0, description="seconds without a turn of the loop after which /healthz answers 503"
    )


class LogConfig(Section):
    """What is logged, and in which format."""

    level: Literal["debug", "info", "warning", "error"] = Field("info", description="lowest level that is logged")
    format: Literal["auto", "json", "console"] = Field(
        "auto",
        description="json: one object a line; console: plain text; auto: plain text on a terminal, otherwise json",
    )


class Config(Section):
    """The whole configuration file."""

    name: str = Field(
        "streamlearn",
        pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$",
        description="name of the job, used in metrics, in the default group id and in the default dead-letter topic",
    )
    state_dir: Annotated[Path, BeforeValidator(_check_directory)] = Field(
        Path("state/streamlearn"),
        description="directory of checkpoints, lock and control socket; each job needs its own",
    )
    seed: Int = Field(
        0,
        ge=0,
        le=1 << 53,
        description="seed of every random draw; the same seed, stream and machine give bit-equal weights",
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda|cuda:[0-9]+)$",
        description="cpu, cuda, cuda:N, or auto (a GPU if there is one)",
    )
    threads: Int = Field(
        1, ge=1, le=1024, description="CPU threads of torch; another number changes the last bits of the results"
    )
    shutdown_grace: Seconds = Field(
        25.0, description="seconds to finish the batch and to save after a stop; after that the process ends with 1"
    )
    input: InputConfig | TextInputConfig
    classes: list[Label] | Int = Field(description="the labels as a list, or the largest number of different labels")
    grow_head: bool = Field(
        default=False,
        description="add an output for a label beyond the number of classes, instead of rejecting the label",
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
    def _choose_input(cls, value: Any) -> Any:
        if isinstance(value, (InputConfig, TextInputConfig)):
            return value
        if not isinstance(value, dict):
            raise PydanticCustomError("input", "expected keys and values: shape and others, or kind: text and others")
        return _check_input(value)

    @field_validator("model", mode="before")
    @classmethod
    def _expand_model_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("scenario", mode="before")
    @classmethod
    def _expand_scenario_kind(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @field_validator("classes")
    @classmethod
    def _check_classes(cls, value: list[Label] | int) -> list[Label] | int:
        if isinstance(value, int) and not 1 <= value <= MAX_CLASSES:
            raise PydanticCustomError("classes", "a number of classes must be between 1 and {n}", {"n": MAX_CLASSES})
        if isinstance(value, list) and (not value or len(set(value)) != len(value)):
            raise PydanticCustomError("classes", "a list of classes must name at least one class, and each class once")
        return value

    @field_validator("strategy", mode="before")
    @classmethod
    def _complete_strategy(cls, value: Any, info: ValidationInfo) -> dict[str, dict[str, Any]]:
        return _check_recipes(_as_recipes(value), (info.context or {}).get("recipes", {}), info.data.get("input"))

    def rules(self, recipes: Mapping[str, RecipeSchema]) -> Iterator[Violations]:
        yield self._source_is_configured()
        yield self._tasks_are_declared()
        yield self._classes_are_declared()
        yield self._head_may_grow()
        yield self._dead_letter_topic_is_no_task()
        yield self._augments_images()
        yield self._model_fits_input()
        yield self._strategy_fits_input()
        yield self._codec_fits_input()
        for name in getattr(self, "strategy", ()):
            yield ((f"strategy.{name}", why) for why in recipes[name].conflicts(self, name))

    def _source_is_configured(self) -> Violations:
        if self.source == "kafka" and self.kafka is None:
            yield "kafka", "stream.source is kafka, but there is no kafka section with bootstrap_servers"

    def _tasks_are_declared(self) -> Violations:
        spec = self.scenario
        if spec.kind == "domain" and not spec.tasks:
            if isinstance(self.classes, int):
                why = "the classes of each topic in order; or set classes to a list that all topics share"
                yield "scenario", f"scenario domain needs scenario.tasks: {why}"
            return
        topics = self.stream.topics
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

    def _classes_are_declared(self) -> Violations:
        if isinstance(self.classes, list):
            declared = {label for labels in self.scenario.tasks.values() for label in labels}
            if unknown := sorted(map(repr, declared - set(self.classes))):
                similar = any(label_of_other_type(label) in self.classes for label in declared - set(self.classes))
                hint = "; a number and a string that look the same are two classes" if similar else ""
                why = f"scenario.tasks names classes that are not in classes: {', '.join(unknown)}"
                yield "scenario.tasks", why + hint

    def _head_may_grow(self) -> Violations:
        if self.grow_head and (isinstance(self.classes, list) or self.scenario.kind == "domain"):
            why = "grow_head needs a number of classes, and scenario class or task"
            if isinstance(self.classes, list):
                why += f"; a list of classes cannot grow; with classes: {len(self.classes)} labels get outputs as they appear"
            yield "grow_head", why

    def _dead_letter_topic_is_no_task(self) -> Violations:
        if self.dead_letter_topic in (self.stream.topics or ()):
            why = f"the dead-letter topic cannot be a task, but {self.dead_letter_topic} is in stream.topics"
            yield "stream.dead_letter.topic", why

    def _augments_images(self) -> Violations:
        images = isinstance(self.input, InputConfig) and len(self.input.shape) in {2, 3}
        if self.learner.augment is not None and not images:
            text = "learner.augment needs images: input.shape [height, width] or [channels, height, width], not"
            yield "learner.augment", f"{text} {self.input.shape}"
        if self.learner.augment is not None and self.input.encoder is not None:
            yield "learner.augment", "learner.augment needs images, but with input.encoder the model sees features"

    def _model_fits_input(self) -> Violations:
        name, text = self.model.name, isinstance(self.input, TextInputConfig)
        if text and name in {"mlp", "resnet"}:
            yield "model", f"model {name} needs numbers, but input is text; accepted: memnet, package.module:function"
        if name == "memnet" and not text:
            yield "model", "model memnet needs text: set input.kind to text"

    def _strategy_fits_input(self) -> Violations:
        if isinstance(self.input, TextInputConfig) and "generative" in self.strategy:
            why = "strategy generative cannot replay text, because its VAE generates numbers and not token ids; "
            yield "strategy", why + "er and joint replay stored samples of any kind"

    def _codec_fits_input(self) -> Violations:
        if isinstance(self.input, TextInputConfig) and self.stream.codec == "batch":
            yield "stream.codec", "stream.codec batch contains numbers, but input is text; accepted: json, msgpack"

    @property
    def source(self) -> str:
        """Where the topics are: `kafka` or `embedded`."""
        return self.stream.source or ("kafka" if self.kafka is not None else "embedded")

    @property
    def dead_letter_topic(self) -> str:
        """The topic to which rejected samples are sent."""
        return self.stream.dead_letter.topic or f"{self.name}.dlq"

    @property
    def group_id(self) -> str:
        """The consumer group to which positions are reported."""
        return (self.kafka.group_id if self.kafka else None) or f"streamlearn.{self.name}"

    def warnings(self, recipes: Mapping[str, RecipeSchema]) -> list[str]:
        """Return warnings about values that are allowed but probably a mistake."""
        slots = {slot for name in self.strategy for slot in recipes[name].slots}
        warnings = []
        if slots == {"penalty"} and self.scenario.kind == "class":
            names = " + ".join(self.strategy)
            warnings.append(
                f"strategy {names}: importance alone does not protect class-incremental learning; add replay"
            )
        named = {label for labels in self.scenario.tasks.values() for label in labels}
        named |= set() if isinstance(self.classes, int) else set(self.classes)
        if both := sorted(repr(label) for label in named if label_of_other_type(label) in named):
            warnings.append(f"classes {', '.join(both)}: a number and a string that look the same are two classes")
        topics = self.stream.topics or ()
        if len(topics) == 1 and self.stream.task_end.next_topic and "naive" not in self.strategy:
            warnings.append(
                f"strategy {' + '.join(self.strategy)}: protects nothing until a task has ended, and only a marker ends "
                f"the only topic, {topics[0]}; set stream.task_end to records: N or idle: SECONDS"
            )
        integers = self.input.dtype.startswith(("int", "uint")) and isinstance(self.input, InputConfig)
        if integers and self.input.scale == 1 and self.strategy.get("generative", {}).get("likelihood") == "bernoulli":
            warnings.append(
                f"input.scale is 1 for dtype {self.input.dtype}, but generative replays values from 0 to 1 (bernoulli); "
                "set input.scale to the largest value; if some values are negative, also likelihood: gaussian"
            )
        accepted = ", ".join(MODEL_KEYS.get(self.model.name, ("options",)))
        # only a warning, because a job with an old checkpoint cannot remove the key
        ignored = f"is ignored: model {self.model.name} does not use it; it uses {accepted}"
        warnings += [f"model.{key} {ignored}" for key in self.model.unused_keys()]
        for name, parameters in self.strategy.items():
            if isinstance(budget := parameters.get("budget"), int) and budget < len(topics):
                warnings.append(
                    f"strategy.{name}.budget is {budget}: too few for a sample of each of {len(topics)} tasks"
                )
        if self.kafka is not None and self.kafka.security_protocol == "SASL_PLAINTEXT":
            warnings.append("kafka.security_protocol SASL_PLAINTEXT: credentials are sent unencrypted")
        if self.kafka is not None and not self.kafka.ssl_check_hostname:
            warnings.append("kafka.ssl_check_hostname is off: any certificate of a trusted authority is accepted")
        url = self.kafka.sasl.token_url if self.kafka is not None and self.kafka.sasl is not None else None
        if url is not None and url.startswith("http:") and not LOOPBACK.fullmatch(url):
            warnings.append("kafka.sasl.token_url is http: the client secret and the token are sent unencrypted")
        return warnings

    def unreadable_secret(self) -> str | None:
        """Return why the secret cannot be read here, or None. The daemon may run on another machine, so this is no error."""
        try:
            if self.kafka is not None and self.kafka.sasl is not None:
                self.kafka.sasl.secret()
        except StreamlearnError as error:
            return str(error)
        return None

    def effective(self) -> dict[str, Any]:
        """Return the effective values, defaults included, as a JSON tree; secrets are redacted."""
        tree: dict[str, Any] = json.loads(self.model_dump_json())
        return _redact(tree)

    def digest(self) -> str:
        """Return the SHA-256 of the effective values."""
        import hashlib

        return hashlib.sha256(json.dumps(self.effective(), sort_keys=True).encode()).hexdigest()

    def shaping(self) -> dict[str, Any]:
        """Return the values that shape the learned state, by dotted key. A checkpoint must have the same values."""
        tree = self.effective()
        keys = ("seed", "input", "classes", "grow_head", "scenario", "holdout", "model", "strategy")
        chosen = {key: tree[key] for key in keys}
        if (encoder := tree["input"].get("encoder")) is not None:
            # without its options: files may move, and the checkpoint contains the encoder's weights
            chosen["input"] = {**tree["input"], "encoder": encoder["name"]}
        chosen["stream.source"] = self.source  # positions in one source mean nothing in another one
        chosen["stream.codec"] = tree["stream"]["codec"]
        chosen["stream.batch_size"] = tree["stream"]["batch_size"]
        chosen["learner.optimizer.name"] = tree["learner"]["optimizer"]["name"]
        return dict(_flatten(chosen))


def _as_recipes(value: Any) -> dict[str, Any]:
    """Return the parameters by recipe; a name, or a list of names, is the short form without parameters."""
    if isinstance(value, str):
        return {value: {}}
    if isinstance(value, list) and value and all(isinstance(name, str) for name in value):
        return {name: {} for name in value}
    if isinstance(value, dict) and value:
        return {str(name): {} if parameters is None else parameters for name, parameters in value.items()}
    raise PydanticCustomError("strategy", "expected a recipe's name, a list of names, or names with parameters")


def _check_input(value: dict[str, Any]) -> InputConfig | TextInputConfig:
    """Validate `input` as the section that `kind` names, so that errors concern that section alone."""
    kinds: dict[Any, type[InputConfig | TextInputConfig]] = {"numbers": InputConfig, "text": TextInputConfig}
    kind = value.get("kind", "numbers")
    if not isinstance(kind, str) or kind not in kinds:
        message = PydanticCustomError("kind", "accepted: {kinds}", {"kinds": ", ".join(kinds)})
        raise ValidationError.from_exception_data("input", [{"type": message, "loc": ("kind",), "input": kind}])
    try:
        return kinds[kind].model_validate(value)
    except ValidationError as error:
        described = [
            _to_init_error(details, section_at(kinds[kind], details["loc"][:-1])) for details in error.errors()
        ]
        raise ValidationError.from_exception_data("input", described) from error


def _to_init_error(details: ErrorDetails, model: type[BaseModel] | None = None) -> InitErrorDetails:
    """Return a validation error in the form that raises it again.

    `model`: the section where the error is, if the key alone does not determine it; the message then says what it accepts.
    """
    kind = details["type"] if model is None or details["type"] == "missing" else "described"
    message = PydanticCustomError(kind, "{why}", {"why": describe_accepted(details, model)})
    return {"type": message, "loc": details["loc"], "input": details["input"]}


def _check_recipes(
    chosen: dict[str, Any], recipes: Mapping[str, RecipeSchema], spec: InputConfig | TextInputConfig | None
) -> dict[str, dict[str, Any]]:
    """Return all parameters of each chosen recipe, with defaults. Reports all errors at once.

    `spec`: the input, on which some defaults depend; None if it is invalid.
    """
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
            described = [_to_init_error(details, recipes[name].parameters) for details in error.errors()]
            errors += [{**details, "loc": (name, *details["loc"])} for details in described]
    if errors:
        raise ValidationError.from_exception_data("strategy", errors)
    return complete


def _has_valid_port(url: str) -> bool:
    try:
        return urlsplit(url).port != 0
    except ValueError:
        return False


def describe_accepted(details: ErrorDetails, model: type[BaseModel] | None) -> str:
    """Return the part of an error message that says what is accepted. `model`: the section of the invalid key, if known."""
    if details["type"] in {"model_type", "model_attributes_type"}:
        return "expected a section: keys and values"
    if details["type"] == "extra_forbidden" and model is not None:
        import difflib

        accepted = sorted(model.model_fields)
        similar = difflib.get_close_matches(str(details["loc"][-1]), accepted, n=1)
        hint = f" (did you mean {similar[0]}?)" if similar else ""
        return f"no such key{hint}; accepted: {', '.join(accepted)}"
    return details["msg"]


def section_at(model: type[BaseModel], key: Sequence[Any]) -> type[BaseModel] | None:
    """Return the class of the section at a key below `model`, or None if the key has no section."""
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
    """Return the value at a key below a section. If there is none, return {}, which error messages do not print."""
    found: Any = section
    for part in key:
        found = found.get(part) if isinstance(found, dict) else getattr(found, part, None)
    return {} if found is None else found


def _redact(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the tree with `***` in place of every password and secret; names of files stay."""
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
    """Return the values of a tree with their dotted keys; an empty section counts as a value."""
    flat: list[tuple[str, Any]] = []
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat += _flatten(value, f"{prefix}{key}.")
        else:
            flat.append((f"{prefix}{key}", value))
    return flat
