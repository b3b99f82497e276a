"""The trainer: labelled examples in, a learned model and its snapshots out.

| module | what it does |
| --- | --- |
| `worker` | the Faust side: membership, positions, runs in |
| `pipeline` | a decoding thread and a training thread, so that the event loop never waits for either |
| `examples` | a run of `examples` → columns and dead letters |
| `batching` | columns → batches, and how far the log is trained |
| `training` | learn batch after batch; what a snapshot holds |
| `scores` | how good the scores are: progressive, served, over a stretch of event time |
| `kept` | what travels with the versions beside the model |
| `letters` | dead letters, written before a version relies on them |
| `skew` | served scores computed again from the impressions' features |
| `snapshots` | when and how versions are written and announced |
| `judge` | which examples the gate compares, with what; `anchors`: the version compared with; `sanity`: weights alone |
| `prepare` | everything that is checked before an epoch ends the trainer that runs |
| `start` | which version to go on from, and where in the log |
"""
