"""Settings of everything that touches Kafka."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

__all__ = [
    "HttpSettings",
    "JoinSettings",
    "KafkaSettings",
    "SchemaRegistrySettings",
    "ScorerSettings",
    "TopicSettings",
    "TrainerSettings",
]


DEVICES = r"^(auto|cpu|cuda(:\d+)?)$"  # what torch calls them


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class KafkaSettings(_Frozen):
    """How every client reaches Kafka.

    ```toml
    [kafka]
    bootstrap_servers = "broker-1:9092,broker-2:9092"
    security_protocol = "SASL_SSL"
    sasl_username = "headrace"
    ```
    """

    bootstrap_servers: str = Field(default="127.0.0.1:9092", description="host:port, several separated by commas.")
    client_id: str = Field(default="headrace", description="Shown in the broker's logs and quotas.")
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = "PLAIN"
    sasl_username: str | None = None
    sasl_password: SecretStr | None = None
    ssl_cafile: Path | None = Field(default=None, description="PEM file of the authorities to trust.")
    ssl_certfile: Path | None = Field(default=None, description="PEM file of this client's certificate.")
    ssl_keyfile: Path | None = Field(default=None, description="PEM file of this client's key.")
    ssl_keyfile_password: SecretStr | None = None
    connect_timeout_ms: int = Field(
        default=10_000,
        ge=100,
        le=3_600_000,
        description="How long a command, or a worker that starts, tries to reach a broker before it gives up with exit code 1.",
    )
    request_timeout_ms: int = Field(
        default=40_000, ge=1_000, le=3_600_000, description="Longest wait for an answer of a broker."
    )


class TopicSettings(_Frozen):
    """Names, partitions and limits of the eight topics.

    ```toml
    [topics]
    prefix = "shop-"      # every topic's name begins with this
    partitions = 8        # impressions, clicks and examples: always the same count
    replication_factor = 3
    ```
    """

    prefix: str = Field(default="", pattern=r"^[A-Za-z0-9._-]*$", description="Stands before every topic's name.")
    partitions: int = Field(
        default=4, ge=1, le=10_000, description="Of impressions, clicks, examples and dead-letters, equal by contract."
    )
    request_partitions: int = Field(default=4, ge=1, le=10_000, description="Of score-requests and scores.")
    replication_factor: int = Field(default=1, ge=1, description="Copies of each partition on different brokers.")
    min_insync_replicas: int = Field(default=1, ge=1)
    retention_ms: int = Field(
        default=7 * 86_400_000,
        ge=60_000,
        description="By arrival; at least window + 2 × dedupe horizon + lateness + skew of the join, and its longest downtime.",
    )
    max_message_bytes: int = Field(
        default=1_048_588, ge=1_024, description="Of one input record; examples and dead-letters get 64 KiB more."
    )


class SchemaRegistrySettings(_Frozen):
    """Where schemas are, when producers of impressions and clicks use Schema Registry serializers.

    ```toml
    [schema_registry]
    url = "https://registry.example:8081"    # Apicurio: …/apis/ccompat/v7
    username = "headrace"                    # HEADRACE_SCHEMA_REGISTRY__PASSWORD in the environment
    ```
    """

    url: str | None = Field(
        default=None,
        description="Of a registry with Confluent's interface; several, separated by commas, are tried in their order. Frames "
        "in impressions and clicks are decoded where it is set, and are dead letters `framed` where it isn't.",
    )
    username: str | None = Field(default=None, description="For basic authentication, with `password`.")
    password: SecretStr | None = None
    token: SecretStr | None = Field(default=None, description="Sent as a bearer token, in the place of a user name.")
    ssl_cafile: Path | None = Field(default=None, description="PEM file of the authorities to trust; the system's when unset.")
    request_timeout_ms: int = Field(
        default=10_000, ge=100, le=3_600_000, description="Longest wait for one answer; it is asked again."
    )

    @field_validator("url")
    @classmethod
    def _http(cls, url: str | None) -> str | None:
        for each in (url or "http://unset").split(","):
            if "@" in each:
                raise ValueError("expected no user in the address, found one; addresses are logged. Set username and password")
            parts = urlsplit(each.strip())
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError(f"expected http:// or https:// and a host, found {each!r}. Write it as http://host:8081")
        return url

    @model_validator(mode="after")
    def _one_login(self) -> Self:
        if self.token is not None and self.username is not None:
            raise ValueError("expected username or token, found both. Remove one")
        if self.password is not None and self.username is None:
            raise ValueError("password is set: expected username too, found none")
        return self


class JoinSettings(_Frozen):
    """How impressions and clicks become labelled examples.

    ```toml
    [join]
    window_ms = 1_800_000   # a click counts when 0 <= t_click - t_impression <= window
    hold_ms = 10_000        # labels leave 10 s after their impressions; later clicks correct them
    lateness_ms = 60_000    # how far out of order events may come
    dedupe_horizon_ms = 3_600_000
    negative_rate = 0.1     # one negative in ten goes out; scores are corrected for it
    ```
    """

    group: str = Field(default="headrace-join", description="Consumer group; also the root of the transactional ids.")
    window_ms: int = Field(default=60_000, ge=1, description="Attribution window, event time.")
    lateness_ms: int = Field(
        default=5_000,
        ge=0,
        description="How far out of order events may come: the watermark stays this far behind the front of both "
        "sources, and labels are later by as much.",
    )
    negative_skew_ms: int = Field(default=0, ge=0, description="How far a click's time may lie before its impression's.")
    hold_ms: int = Field(
        default=10_000,
        ge=0,
        description="An impression's label leaves this long after it, event time (at most the window): positive if its click "
        "is there by then, else negative. A later click leaves as a correction.",
    )
    negative_rate: float = Field(
        default=1.0,
        ge=1e-4,  # a negative weighs up to its inverse in the trainer, which takes no smaller rate
        le=1,
        description="Share of negatives that go out, by a hash of the id; scores are corrected for it.",
    )
    dedupe_horizon_ms: int = Field(
        default=600_000, ge=0, description="An id is remembered this long after its window; older impressions are late."
    )
    max_future_ms: int = Field(
        default=3_600_000, ge=0, description="An event may be this far ahead of its arrival at the broker; beyond is refused."
    )
    idle_timeout_ms: int = Field(
        default=5_000, ge=100, description="Wall clock at the end of the log after which a source stops holding the watermark."
    )
    max_ahead_ms: int = Field(
        default=600_000, ge=0, description="A source this far ahead of the other in event time is paused until it catches up."
    )
    step_ms: int = Field(default=100, ge=1, description="Longest time one transaction gathers records.")
    max_outputs: int = Field(default=20_000, ge=1, description="Most records in one transaction.")
    transaction_timeout_ms: int = Field(
        default=15_000, ge=1_000, description="A killed worker holds back read_committed readers at most this long."
    )
    session_timeout_ms: int = Field(default=10_000, ge=1_000, description="A worker silent this long loses its partitions.")
    instance_id: str | None = Field(
        default=None,
        description="Stable name of this worker in its group (a pod's): back within the session timeout, it goes on at once.",
    )
    cache_mb: int = Field(default=64, ge=8, description="Block cache that all partitions of a worker share.")
    write_buffers_mb: int = Field(
        default=256, ge=16, description="What all partitions of a worker hold in memory before it is written to their folders."
    )

    envelope: Literal["none", "connect", "debezium"] = Field(
        default="none",
        description="What stands around the events: `connect` takes the payload of Kafka Connect's JsonConverter, `debezium` "
        "the row after the change, also inside Connect's payload. Events without an envelope are taken as well.",
    )
    accept_partitions: int | None = Field(
        default=None,
        ge=1,
        description="Number of partitions to go on with after it was changed under records that are still pending, whose "
        "clicks may be in other partitions now.",
    )

    @model_validator(mode="before")
    @classmethod
    def _without_policies(cls, values: Any) -> Any:
        if isinstance(values, dict) and "label_policy" in values:
            raise ValueError(
                "label_policy was replaced by hold_ms. In the place of `wait` set hold_ms to window_ms (labels are never taken "
                "back), in the place of `fnw` set it to 0 (negatives at once); most need only the default. Remove label_policy."
            )
        return values

    @property
    def held_ms(self) -> int:
        """The hold in force: no label waits for longer than the window."""
        return min(self.hold_ms, self.window_ms)

    @property
    def reaches_back_ms(self) -> int:
        """How far behind the events a join reads that has lost its disk: it remembers ids until W - window - 2 × horizon."""
        return self.window_ms + 2 * self.dedupe_horizon_ms + self.lateness_ms + self.negative_skew_ms

    @property
    def max_watermark_future_ms(self) -> int:
        """How far ahead of its arrival a watermark record is believed: what settles the last event that may come by then."""
        return self.max_future_ms + self.window_ms + self.lateness_ms


class TrainerSettings(_Frozen):
    """How examples are gathered for the model.

    ```toml
    [trainer]
    max_batch_age_ms = 500   # an update waits at most this long for its batch to fill
    device = "auto"          # auto | cpu | cuda
    ```
    """

    group: str = "headrace-trainer"
    device: str = Field(default="auto", pattern=DEVICES, description="auto takes cuda when there is one, else cpu.")
    max_batch_age_ms: int = Field(default=500, ge=1)
    threads: int = Field(default=0, ge=0, description="Threads of torch; 0 lets it choose.")
    metrics_window: int = Field(default=20_000, ge=100, description="Examples in the windowed metrics.")
    evaluation_from_ms: int | None = Field(
        default=None,
        ge=0,
        description="Event time from which examples also count in the metrics of scope `evaluation`; none when unset.",
    )
    lost_examples: Literal["stop", "skip"] = Field(
        default="stop", description="What to do when retention has deleted examples before they were trained."
    )


class ScorerSettings(_Frozen):
    """How score requests are answered.

    ```toml
    [scorer]
    max_candidates = 2000    # a request with more gets an error answer
    lease_ms = 10_000        # without news from the registry for this long, answers say `stale`
    ```
    """

    group: str = "headrace-scorer"
    device: str = Field(default="auto", pattern=DEVICES)
    threads: int = Field(
        default=1, ge=0, description="Threads of torch; 0 lets it choose. One request is too little work to share."
    )
    max_candidates: int = Field(default=2_000, ge=1, description="Of one request; more get an error answer.")
    no_model_after_ms: int = Field(
        default=500,
        ge=0,
        description="While no scorer has a version, a request waits so long for one and is then answered `no_model`; one with "
        "an earlier `deadline_ms` is answered shortly before that.",
    )
    heartbeat_ms: int = Field(default=1_000, ge=100)
    lease_ms: int = Field(
        default=10_000, ge=500, le=86_400_000, description="Without the registry's end for this long, answers say `stale`."
    )
    instance_id: str | None = Field(
        default=None,
        description="Stable name of this worker (a pod's name), in the group and in heartbeats; drawn at start when unset.",
    )


class HttpSettings(_Frozen):
    """Where a worker answers `/metrics`, `/healthz` and `/readyz`.

    ```toml
    [http]
    host = "127.0.0.1"
    port = 0                 # 0 takes a free one and logs it
    ```
    """

    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=0, ge=0, le=65_535, description="0 takes a free port, which the log names.")
