"""The trainer: learns from labelled examples, and writes snapshots of the model.

| module | what it does |
| --- | --- |
| `worker` | the process: membership, positions, runs |
| `pipeline` | a decoding thread and a training thread, so that the event loop never waits for either |
| `challenge` | served metrics of this trainer's track beside those of the one that serves |
| `examples` | a run of `examples` → columns and dead letters |
| `batching` | columns → batches, and how far the log is trained |
| `training` | learn batch after batch; what a snapshot holds |
| `evaluation` | metrics of two kinds of scores, progressive and served, in three scopes |
| `bookkeeping` | what is saved in the versions besides the model |
| `letters` | dead letters, written before a version that relies on them |
| `skew` | served scores computed again from the impressions' features |
| `snapshots` | when and how versions are written and announced |
| `judge` | which examples the gate compares, and with which version; `anchors` loads it; `sanity` checks weights alone |
| `prepare` | everything that is checked before the trainer takes an epoch, since that ends the trainer that is running |
| `start` | which version to go on from, and from which offsets |
"""
