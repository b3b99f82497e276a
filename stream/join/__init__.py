"""The join: reads impressions and clicks, writes labelled examples, each exactly once.

| module | what it does |
| --- | --- |
| `events`, `wrong_fields` | the records of a run → event times and ids; what can't be read becomes a dead letter |
| `logic`, `first_labels` | the decisions, without Kafka: a state and the events of a step → labels and changes of the state |
| `plan`, `outgoing` | what one step decided, and the records that it writes to `examples` |
| `memory` | the part of the state that is kept in memory |
| `sampling` | which negatives go out |
| `source_clock`, `idle` | how far a source has come, and whether it still holds the watermark back |
| `settings_history` | the settings that records were decided under |
| `commit_metadata` | what the committed offsets' metadata carries |
| `partition` | one partition: decide, commit one transaction, apply |
| `takeover` | what happens when a partition is assigned; `committed` and `local_state` are two of its steps |
| `rebuild` | reads the log again up to the committed offsets: `rebuild_labels` and `rebuild_state` decide and write |
| `rebuild_progress`, `retention`, `metrics` | what a worker reports |
| `checks`, `partition_count`, `file_limit` | what is checked before a worker joins its group |
| `worker` | the process: it takes over the partitions that it is assigned, and closes those that it loses |
"""
