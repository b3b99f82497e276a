"""Faults on purpose: a join over the real Kafka is hurt in every way there is, then its topics are held against the ledger.

    make faults RUNS=200 SEED=1        # appends to .headrace/faults.jsonl; goes on where it stopped
    .venv/bin/python -m tests.faults --list

`kinds.py` what can happen; `worker.py` a join worker that dies at a named step; `network.py` a link that can be cut;
`ledger.py` the check; `run.py` one run; `code.py` which code a result is of; `report.py` the table in docs/reliability.md.
"""
