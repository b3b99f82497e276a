"""Faults on purpose: a join over the real Kafka is hurt in every way there is, then its topics are held against the ledger.

    make faults RUNS=305 SEED=1 JOBS=3        # appends to .headrace/faults.jsonl; goes on where it stopped
    .venv/bin/python -m tests.faults --list

`kinds/` what can happen; `stream.py` the records that come in meanwhile, and what each is meant to be; `sender.py` sends them;
`worker.py` a join worker that dies at a named step; `nursery.py` forks workers; `network.py` a link that can be cut and that
loses answers; `clusters.py` the brokers, and clocks that jump; `admin.py` what the brokers are asked; `logs.py` reads the
topics; `ledger.py` the check; `run.py` one run; `code.py` which code a result is of; `report.py` the table in the page.
"""
