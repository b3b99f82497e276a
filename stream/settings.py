"""Settings of everything that touches Kafka: a class for each section of `headrace.toml`, from `kafka` to `http`.

The file is long because every setting has its description here, from which docs/settings.md is written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

__all__ = [
    "DEVICES",
    "HttpSettings",
    "JoinSettings",
    "KafkaSettings",
    "SchemaRegistrySettings",
    "ScorerSettings",
    "TopicSettings",
    "TrainerSettings",
]


DEVICES = r"^(auto|cpu|cuda(:\d+)?)$"  # torch's names of devices, and auto


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class KafkaSettings(_Frozen):
    """How every client reaches Kafka.

    ```toml
    [kafka]
    bootstrap_servers = "broker-1:9092,broker-2:9092"  # where to ask for the cluster's brokers
    security_protocol = "SASL_SSL"                     # encrypted, with a login
    sasl_username = "headrace"                         # password: HEADRACE_KAFKA__SASL_PASSWORD in the environment
    ```
    """

    bootstrap_servers: str = Field(
        default="127.0.0.1:9092", description="Brokers that a client asks first, each host:port, separated by commas."
    )
    client_id: str = Field(default="headrace", description="Name of the clients in the brokers' logs and quotas.")
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        default="PLAINTEXT",
        description="Encryption and login: SSL encrypts, SASL_PLAINTEXT logs in without encryption, SASL_SSL does both.",
    )
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = Field(
        default="PLAIN", description="How a client logs in, with the SASL protocols."
    )
    sasl_username: str | None = Field(default=None, description="User name. The SASL protocols require it.")
    sasl_password: SecretStr | None = Field(
        default=None,
        description="Password of that user. Keep it out of the settings file: set the environment variable instead.",
    )
    ssl_cafile: Path | None = Field(
        default=None, description="PEM file of the certificate authorities to trust; the system's when unset."
    )
    ssl_certfile: Path | None = Field(
        default=None, description="PEM file of the client's certificate, for brokers that ask for one."
    )
    ssl_keyfile: Path | None = Field(default=None, description="PEM file of the private key of that certificate.")
    ssl_keyfile_password: SecretStr | None = Field(
        default=None, description="Password of that key file, when the file is encrypted."
    )
    connect_timeout_ms: int = Field(
        default=10_000,
        ge=100,
        le=3_600_000,
        description="How long a command, or a worker that starts, tries to reach a broker before it ends with exit code 1.",
    )
    request_timeout_ms: int = Field(
        default=40_000, ge=1_000, le=3_600_000, description="Longest time that a client waits for a broker's answer."
    )


class TopicSettings(_Frozen):
    """Names, partitions and limits of the nine topics.

    ```toml
    [topics]
    prefix = "shop-"        # `impressions` is called `shop-impressions`, and so on
    partitions = 8          # of impressions, clicks, examples and dead-letters
    replication_factor = 3  # each partition is on three brokers
    ```
    """

    prefix: str = Field(
        default="",
        pattern=r"^[A-Za-z0-9._-]*$",
        description="Stands before the name of every topic and every consumer group. Installations that share a cluster need "
        "different prefixes.",
    )
    partitions: int = Field(
        default=4,
        ge=1,
        le=10_000,
        description="Number of partitions of `impressions`, `clicks`, `examples` and `dead-letters`, which all have the same "
        "number.",
    )
    request_partitions: int = Field(
        default=4, ge=1, le=10_000, description="Number of partitions of `score-requests` and `scores`."
    )
    replication_factor: int = Field(default=1, ge=1, description="Number of brokers that have a copy of each partition.")
    min_insync_replicas: int = Field(
        default=1,
        ge=1,
        description="Number of copies that must be in sync for a write to succeed (Kafka's `min.insync.replicas`). At most "
        "`topics.replication_factor`.",
    )
    retention_ms: int = Field(
        default=7 * 86_400_000,
        ge=60_000,
        description="How long a record is kept after its arrival. At least window + 2 × dedupe horizon + lateness + skew of "
        "the join, and at least as long as the join may be down. `snapshots` and `scorers` are compacted instead, and `deltas` "
        "has a retention of its own.",
    )
    max_message_bytes: int = Field(
        default=1_048_588,
        ge=1_024,
        description="Size of the largest record (Kafka's `max.message.bytes`). `examples` and `dead-letters` get 64 KiB "
        "more, since their records are input records with headers added. `deltas` has a limit of its own.",
    )
    deltas_retention_ms: int = Field(
        default=3_600_000,
        ge=60_000,
        description="How long a delta is kept in `deltas`. At least three times `snapshots.interval_ms`: a scorer that starts "
        "takes the newest version and reads the deltas after it.",
    )
    deltas_retention_bytes: int = Field(
        default=8 * 1024**3,
        ge=64 * 1024**2,
        description="Size of `deltas` at which its oldest deltas are deleted. It must hold several times what the trainer "
        "writes between two versions.",
    )
    deltas_max_message_bytes: int = Field(
        default=1_048_588,
        ge=65_536,
        description="Size of the largest record of `deltas` (Kafka's `max.message.bytes`). Larger deltas are cut into several "
        "records.",
    )


class SchemaRegistrySettings(_Frozen):
    """Where schemas are, when producers of impressions and clicks use Schema Registry serializers.

    ```toml
    [schema_registry]
    url = "https://registry.example:8081"  # with Confluent's interface; of Apicurio …/apis/ccompat/v7
    username = "headrace"                  # password: HEADRACE_SCHEMA_REGISTRY__PASSWORD in the environment
    request_timeout_ms = 5_000             # ask again when no answer came for 5 s
    ```
    """

    url: str | None = Field(
        default=None,
        description="Address of a schema registry with Confluent's interface. Several, separated by commas, are tried in their "
        "order. When set, Schema Registry frames in `impressions` and `clicks` are decoded; when unset, they become dead "
        "letters `framed`.",
    )
    username: str | None = Field(default=None, description="User name of basic authentication; needs `password` too.")
    password: SecretStr | None = Field(
        default=None,
        description="Password of that user. Keep it out of the settings file: set the environment variable instead.",
    )
    token: SecretStr | None = Field(default=None, description="Bearer token to send instead of a user name and a password.")
    ssl_cafile: Path | None = Field(
        default=None, description="PEM file of the certificate authorities to trust; the system's when unset."
    )
    request_timeout_ms: int = Field(
        default=10_000,
        ge=100,
        le=3_600_000,
        description="Longest time that the join waits for an answer. Then it asks again, for as long as it takes.",
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
    window_ms = 1_800_000          # a click counts when 0 <= t_click - t_impression <= 30 minutes
    hold_ms = 10_000               # labels leave 10 s after their impressions; later clicks correct them
    lateness_ms = 60_000           # events arrive up to a minute out of order; labels wait for as long
    dedupe_horizon_ms = 3_600_000  # an impression that is sent again within an hour is dropped
    negative_rate = 0.1            # one negative in ten goes out; scores are corrected for it
    ```
    """

    group: str = Field(
        default="headrace-join",
        description="Consumer group, and the beginning of the transactional ids. `topics.prefix` stands before it.",
    )
    window_ms: int = Field(
        default=60_000,
        ge=1,
        description="Attribution window, event time: a click counts for an impression that is at most this much older.",
    )
    lateness_ms: int = Field(
        default=5_000,
        ge=0,
        description="How far out of order events may arrive, event time. The watermark stays this far behind the newest events "
        "of both sources, so labels leave later by as much.",
    )
    negative_skew_ms: int = Field(
        default=0,
        ge=0,
        description="A click counts also when its event time is up to this much before its impression's, because their clocks "
        "differ.",
    )
    hold_ms: int = Field(
        default=10_000,
        ge=0,
        description="How long after its impression a label leaves, event time; at most the window. The label is positive if "
        "a click came within this time, else negative. A later click leaves as a correction.",
    )
    negative_rate: float = Field(
        default=1.0,
        ge=1e-4,  # a negative weighs up to its inverse in the trainer, which takes no smaller rate
        le=1,
        description="Fraction of the negatives that go out, by a hash of the impression id. Scores are corrected for it.",
    )
    dedupe_horizon_ms: int = Field(
        default=600_000,
        ge=0,
        description="An impression whose id was seen is a duplicate when it is at most this much newer than the first one, "
        "event time. An impression is late when it is more than the window and this behind the watermark.",
    )
    max_future_ms: int = Field(
        default=3_600_000,
        ge=0,
        description="How far an event's time may lie after its arrival at the broker. An event beyond that becomes a dead "
        "letter `future_timestamp`.",
    )
    idle_timeout_ms: int = Field(
        default=5_000,
        ge=100,
        description="A source whose log the join has read to the end for this long, by the clock, no longer holds the "
        "watermark back.",
    )
    max_ahead_ms: int = Field(
        default=600_000,
        ge=0,
        description="A source that is more than this ahead of the other in event time is paused until the other has caught up "
        "or is idle.",
    )
    step_ms: int = Field(
        default=100,
        ge=1,
        description="How long one transaction gathers records. Raise it to 1,000 for windows of many hours, to save memory.",
    )
    max_outputs: int = Field(
        default=20_000, ge=1, description="Number of labels that one transaction writes at most. More wait for the next one."
    )
    transaction_timeout_ms: int = Field(
        default=15_000,
        ge=1_000,
        description="After a worker was killed, its open transaction holds back read_committed readers at most this long.",
    )
    session_timeout_ms: int = Field(
        default=10_000,
        ge=1_000,
        description="A worker that has not been heard of for this long loses its partitions to the others of its group.",
    )
    instance_id: str | None = Field(
        default=None,
        description="Name of this worker in its group, such as a pod's (Kafka's `group.instance.id`), different for each "
        "worker. A worker that is back within the session timeout has its partitions again at once.",
    )
    cache_mb: int = Field(
        default=64, ge=8, description="Size of RocksDB's block cache, which all partitions of a worker share."
    )
    write_buffers_mb: int = Field(
        default=256,
        ge=16,
        description="Size of RocksDB's write buffers, which all partitions of a worker share. What is in them is not on the "
        "disk yet.",
    )

    envelope: Literal["none", "connect", "debezium"] = Field(
        default="none",
        description="What stands around the events. `connect`: the payload of Kafka Connect's JsonConverter is the event. "
        "`debezium`: the row after the change is the event, also inside Connect's payload. Events without an envelope are "
        "taken with every choice.",
    )
    accept_partitions: int | None = Field(
        default=None,
        ge=1,
        description="Number of partitions that the join goes on with although it changed while impressions were pending. "
        "Their clicks may be in other partitions now, so such impressions may be labelled wrong.",
    )

    @model_validator(mode="before")
    @classmethod
    def _without_policies(cls, values: Any) -> Any:
        if isinstance(values, dict) and "label_policy" in values:
            raise ValueError(
                "label_policy was replaced by hold_ms. Instead of `wait` set hold_ms to window_ms (no label is corrected), "
                "instead of `fnw` set it to 0 (negatives leave at once); most need only the default. Remove label_policy."
            )
        return values

    @property
    def held_ms(self) -> int:
        """The hold in force: `hold_ms`, and at most the window."""
        return min(self.hold_ms, self.window_ms)

    @property
    def reaches_back_ms(self) -> int:
        """How far behind the newest events a join that has lost its disk begins to read. Ids are remembered until they are
        older than watermark - window - 2 × horizon, and the watermark is `lateness_ms` behind the events."""
        return self.window_ms + 2 * self.dedupe_horizon_ms + self.lateness_ms + self.negative_skew_ms

    @property
    def max_watermark_future_ms(self) -> int:
        """How far after its arrival the time of a watermark record may lie. That is enough to label the last event that
        `max_future_ms` allows."""
        return self.max_future_ms + self.window_ms + self.lateness_ms


class TrainerSettings(_Frozen):
    """How the trainer reads examples and learns them.

    ```toml
    [trainer]
    device = "cuda"         # learn on the GPU; auto takes one where there is one
    max_batch_age_ms = 200  # an update waits at most 200 ms for its batch to fill
    threads = 4             # torch's threads, on a machine that others use too
    ```
    """

    group: str = Field(default="headrace-trainer", description="Consumer group. `topics.prefix` stands before it.")
    device: str = Field(
        default="auto",
        pattern=DEVICES,
        description="Where the model is learned: `auto`, `cpu`, `cuda`, or one GPU of several, such as `cuda:1`. `auto` takes "
        "cuda where there is one, else cpu.",
    )
    max_batch_age_ms: int = Field(
        default=500, ge=1, description="How long an update waits for its batch (`model.batch_rows`) to fill."
    )
    session_timeout_ms: int = Field(
        default=10_000,
        ge=1_000,
        description="Within this time after the trainer that leads was last heard of, a standby has taken over. The session "
        "timeout in Kafka is 0.7 of it, which must not be below the brokers' `group.min.session.timeout.ms` (6 s by default).",
    )
    threads: int = Field(default=0, ge=0, description="Number of threads that torch computes with; 0 lets torch choose.")
    metrics_window: int = Field(
        default=20_000, ge=100, description="Number of examples that metrics of the scope `window` are computed over."
    )
    evaluation_from_ms: int | None = Field(
        default=None,
        ge=0,
        description="Event time, in milliseconds since 1970-01-01 UTC, from which on examples count in the metrics of the "
        "scope `evaluation`. There are none when unset.",
    )
    settled_ms: int = Field(
        default=60_000,
        ge=0,
        description="How long after an impression its label counts as final in the calibration by decile and by value, event "
        "time. Set it to `join.window_ms`, so that late clicks have come.",
    )
    calibration_fields: tuple[str, ...] = Field(
        default=(),
        description="Fields whose ten most frequent values have a calibration of their own in the metrics.",
    )
    lost_examples: Literal["stop", "skip"] = Field(
        default="stop",
        description="What to do when retention has deleted examples before they were trained. `stop`: the trainer ends with an "
        "error. `skip`: it goes on without them.",
    )
    examples_from: str = Field(
        default="version",
        pattern=r"^(version|start|end|\d+:\d+(,\d+:\d+)*)$",
        description="Where to begin in `examples` when it is another topic than the newest version was trained on, as after a "
        "move to another cluster. `version`: the trainer ends with an error. `start`, `end`: of each partition. `0:120,1:95`: "
        "these offsets by partition. Without effect as soon as a version of the new topic is announced.",
    )


class ScorerSettings(_Frozen):
    """How score requests are answered.

    ```toml
    [scorer]
    max_candidates = 5_000    # a request with more is answered with the error `too_many_candidates`
    no_model_after_ms = 200   # without any model, requests are answered `no_model` after 200 ms
    lease_ms = 30_000         # answers say `stale` when the registry couldn't be read for 30 s
    ```
    """

    group: str = Field(default="headrace-scorer", description="Consumer group. `topics.prefix` stands before it.")
    device: str = Field(
        default="auto",
        pattern=DEVICES,
        description="Where scores are computed: `auto`, `cpu`, `cuda`, or one GPU of several, such as `cuda:1`. `auto` takes "
        "cuda where there is one, else cpu.",
    )
    threads: int = Field(
        default=1,
        ge=0,
        description="Number of threads that torch computes with; 0 lets torch choose. One request is too little work to share.",
    )
    max_candidates: int = Field(
        default=2_000,
        ge=1,
        description="Number of candidates in one request at most. A request with more is answered with the error "
        "`too_many_candidates`.",
    )
    no_model_after_ms: int = Field(
        default=500,
        ge=0,
        description="How long a request waits for a version while no scorer has one. Then it is answered `no_model`; one with "
        "an earlier `deadline_ms` is answered shortly before that.",
    )
    heartbeat_ms: int = Field(
        default=1_000,
        ge=100,
        description="Time between two heartbeats on the topic `scorers`. Rollbacks wait for them as confirmations.",
    )
    lease_ms: int = Field(
        default=10_000,
        ge=500,
        le=86_400_000,
        description="Answers say `stale` when the scorer hasn't read the registry to its end for this long. At least twice "
        "`scorer.heartbeat_ms`.",
    )
    spare_mb: int = Field(
        default=1_000,
        ge=0,
        description="Memory in MB for weights that don't answer: the version that a rollback would go to, while deltas are "
        "followed, the replica that follows them, while a version is pinned, and the candidate of a shadow or canary. Weights "
        "that need more are read from the store when they are wanted; a candidate that needs more takes no part.",
    )
    heal_jitter_ms: int = Field(
        default=2_000,
        ge=0,
        description="Longest random wait before a scorer whose deltas were refused reads a version from the store, so that not "
        "all scorers read at once.",
    )
    cache_dir: Path = Field(
        default=Path(".headrace/cache"),
        description="Folder for files of versions that were read from the store, so that scorers on this machine that start or "
        "heal needn't read them again. Scorers may share it. A relative path lies beside the settings file.",
    )
    cache_mb: int = Field(
        default=2_000,
        ge=0,
        description="Size of that folder in MB; 0 keeps nothing. A version that is larger is not kept. Nothing is kept either "
        "where `snapshots.url` is a folder of this machine.",
    )
    scrub_s: int = Field(
        default=600,
        ge=1,
        description="Time between two checks of the weights in memory against their digest, in s. A check takes a tenth of one "
        "core.",
    )
    instance_id: str | None = Field(
        default=None,
        description="Name of this worker in its group and in heartbeats, such as a pod's, different for each worker. When "
        "unset, heartbeats carry a name that is drawn at the start.",
    )


class HttpSettings(_Frozen):
    """Where a worker answers `/metrics`, `/healthz` and `/readyz`.

    ```toml
    [http]
    host = "0.0.0.0"  # answer other machines too, as in a container
    port = 9100       # a fixed port; 0 takes a free one and logs it
    ```
    """

    host: str = Field(
        default="127.0.0.1", description="Address to listen on. The default answers programs on the same machine only."
    )
    port: int = Field(default=0, ge=0, le=65_535, description="Port to listen on. 0 takes a free one, which the log names.")
