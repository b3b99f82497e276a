"""The scorer: answers score requests with the champion of the moment.

| module | what it does |
| --- | --- |
| `worker` | the process: membership, positions, heartbeats |
| `waiting` | what becomes of requests while no scorer has a version |
| `answering` | the way of requests from runs to acknowledged answers |
| `intake` | runs of requests → batches for one forward pass |
| `answers` | a batch of requests → one record each in `scores` |
| `outbox` | sends the answers |
| `serving` | one version, ready to answer |
| `swap` | which version answers: follows what the registry names |
| `start` | the positions to go on from |
| `metrics` | what a scorer reports |
"""
