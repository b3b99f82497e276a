"""Learning from history: a data set is learned by the trainer's own code, and published as a version.

    reader (a process of its own) ── columns ──▶ learning ──▶ checkpoints (a local folder)
                                                    │
                                                    └──▶ publishing: store, registry

| module | what it does |
| --- | --- |
| `source` | what is read, and the fingerprint by which a resumed run finds that it is the same |
| `reader` | reads and decodes the data set in a process of its own, so that the training thread has a core for itself |
| `learning` | trains, with checkpoints from which a run goes on bit for bit after kill -9 |
| `publishing` | takes an epoch, writes the version and announces it |
"""
