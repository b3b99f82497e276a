"""The join: reads impressions and clicks, writes labelled examples, each exactly once.

| module | what it does |
| --- | --- |
| `events` | the records of a run → event times and ids; what can't be read becomes a dead letter |
| `logic` | the decisions, as pure functions: a state and the events of a step → labels and changes of the state |
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
| `worker` | the process: partitions that are assigned, taken over, and given up |
"""
