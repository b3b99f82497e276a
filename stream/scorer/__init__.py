"""The scorer: answers score requests with the champion of the moment, or with a replica that follows the champion's chain.

| module | what it does |
| --- | --- |
| `run` | puts a scorer together |
| `worker` | the process: membership, positions, heartbeats |
| `waiting` | what becomes of requests while no scorer has a version |
| `answering` | the way of requests from runs to acknowledged answers |
| `intake` | runs of requests → batches for one forward pass |
| `answers` | a batch of requests → one record each in `scores` |
| `outbox` | sends the answers |
| `serving` | weights that are ready to answer |
| `swap` | which weights answer: follows what the registry names |
| `chain_follower` | keeps a replica at the newest delta of the champion's chain |
| `replica` | weights that deltas are put into |
| `delta_log` | the log of deltas, as the follower reads it |
| `scrub` | checks the weights in memory |
| `following_metrics` | what a scorer reports about following |
| `start` | the positions to go on from |
| `metrics` | what a scorer reports |
"""
