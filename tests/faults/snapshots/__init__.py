"""Faults of versions, deltas and replicas: they happen to the product's trainer, store, registry, log and scorers on a real
Kafka, and afterwards every scorer must have the weights that a replay of the log and the store has.

    make faults FAMILY=snapshots RUNS=500 SEED=1 JOBS=2  # appends to .headrace/faults-snapshots.jsonl, goes on where it stopped
    .venv/bin/python -m tests.faults.snapshots --list

| module | contents |
| --- | --- |
| `kinds/` | the kinds of faults |
| `run.py` | one run: a trainer, scorers, a fault, and the checks |
| `play.py` | plays a run of a kind |
| `trainer.py` | the product's trainer, step by step, with hooks to hurt what it writes |
| `scorer.py` | the product's scorer, asked all the time |
| `child.py` | a trainer in a process of its own, which kills itself at a named step |
| `replay.py`, `weights.py` | the independent replay: another Kafka client, parsers of its own, dictionaries |
| `where.py` | topics and folder of a run, examples and requests |
| `broker.py` | the broker that all runs use |
| `report.py` | the table in docs/reliability.md |
"""
