"""Fault injection: faults of many kinds happen to a join on a real Kafka, and then the contents of its topics are checked.

    make faults RUNS=305 SEED=1 JOBS=3        # appends to .headrace/faults.jsonl; continues where it stopped
    .venv/bin/python -m tests.faults --list

| module | contents |
| --- | --- |
| `kinds/` | the kinds of faults |
| `run.py` | one run: a stream, a fault, and the check |
| `stream.py` | the records that are sent meanwhile, and what each must become |
| `sender.py` | sends them |
| `worker.py` | a join worker that dies at a named step |
| `nursery.py` | forks workers |
| `network.py` | a link to a broker that can be cut and can lose answers |
| `clusters.py` | the brokers, and clocks that jump |
| `admin.py` | requests to the brokers: quotas, coordinators, topics |
| `logs.py` | reads the topics |
| `ledger.py` | the check |
| `code.py` | which code a result belongs to |
| `report.py` | the table in docs/reliability.md |
"""
