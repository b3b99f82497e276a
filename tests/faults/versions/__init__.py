"""Rolling upgrades and downgrades: workers of two releases run together on one local Kafka, and are replaced one by one.

    make faults FAMILY=versions                      # from the last release without deltas to this one, and back
    .venv/bin/python -m tests.faults.versions --old 563747e --order downgrade

| module | contents |
| --- | --- |
| `system.py` | a release's files, its workers, and a client that sends events and asks for scores all the time |
| `__main__.py` | the orders, and what each step found |
| `move.py` | a move to another cluster |
"""
