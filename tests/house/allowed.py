"""Allow-lists: names that no code of ours uses, each with the reason why it stays."""

from __future__ import annotations

__all__ = ["EXPORTED", "UNUSED"]

EXPORTED: dict[str, str] = {
    "stream.records.answer.ANSWER_REASONS": "the table of reasons in docs/events.md is checked against it",
    "state.chain.REFUSALS": "the table of reasons in docs/scoring.md is checked against it",
    "model.features_reference.reference_row": "the definition that the keys of columns are tested against",
    **dict.fromkeys(
        ["model.metrics.log_loss"],
        "the definition that the metrics of a running total are tested against",
    ),
    "deploy.datasets.Chunk": "a new data set yields it",
}
"""`module.name` of names in `__all__` that no other module imports."""

UNUSED: dict[str, str] = {
    "_as_before": "pydantic calls a model's serializer",
    # The client's public methods.
    **dict.fromkeys(
        ["request_scores", "send_click", "send_impression", "send_raw", "send_watermark", "subscribe_scores"],
        "applications call it",
    ),
    "__getattr__": "Python calls it for a name that a module lacks",
    "trace": "a parameter of __exit__",
    # Read or called by libraries.
    **dict.fromkeys(["API_KEY", "FLEXIBLE_VERSION", "RESPONSE_TYPE", "SCHEMA"], "aiokafka reads it from a request's class"),
    **dict.fromkeys(["_build", "_set_producer_state"], "aiokafka calls it on a batch"),
    **dict.fromkeys(["_unpack_records", "getall"], "aiokafka's fetcher calls it"),
    **dict.fromkeys(
        ["_consumer_timeout", "_fetch_max_bytes", "_fetch_max_wait_ms", "_max_partition_fetch_bytes"],
        "aiokafka's fetcher reads it",
    ),
    "_sync_task": "aiokafka's client cancels it",
    **dict.fromkeys(
        ["_create_directories", "_new_consumer_thread", "_new_transport", "_to_message", "map_from_records", "perform_seek"],
        "Faust calls it",
    ),
    "records_iterator": "Faust calls it",
    **dict.fromkeys(["on_assignment", "on_partitions_assigned"], "aiokafka calls it when a group has chosen"),
    **dict.fromkeys(
        ["address_family", "allow_reuse_address", "block_on_close", "daemon_threads", "do_HEAD", "handle_error"],
        "http.server reads or calls it",
    ),
    **dict.fromkeys(
        ["request_queue_size", "server_version", "service_actions", "sys_version"], "http.server reads or calls it"
    ),
    **dict.fromkeys(
        ["dotenv_settings", "file_secret_settings", "model_config", "settings_customise_sources"], "pydantic's own name"
    ),
    "add_fields": "python-json-logger calls it",
    "_closed": "set on kafka-python's clients, which look at it before they wait for brokers",
    "disable_wal": "an option of RocksDB's writes",
    "checksum": "an attribute of aiokafka's records, which a substitute for one must have",
    "seen_end_at": "for the trainer, which reads deltas to their end",
    "frame": "a parameter of a signal handler",
}
"""Names that vulture finds unused."""
