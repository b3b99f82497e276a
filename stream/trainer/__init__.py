"""The trainer: learns from labelled examples, and writes snapshots of the model.

| module | what it does |
| --- | --- |
| `worker` | the process: membership, positions, runs |
| `pipeline` | a decoding thread and a training thread, so that the event loop never waits for either |
| `examples` | a run of `examples` → columns and dead letters |
| `batching` | columns → batches, and how far the log is trained |
| `training` | learn batch after batch; what a snapshot holds |
| `evaluation` | how good the scores are: progressive, served, over a stretch of event time |
| `bookkeeping` | what travels with the versions beside the model |
| `letters` | dead letters, written before a version relies on them |
| `skew` | served scores computed again from the impressions' features |
| `snapshots` | when and how versions are written and announced |
| `judge` | which examples the gate compares, with what; `anchors`: the version compared with; `sanity`: weights alone |
| `prepare` | everything that is checked before an epoch ends the trainer that runs |
| `start` | which version to go on from, and where in the log |
"""
