"""`headrace doctor`: what is wrong with a running system, and how to fix it.

| module | what it does |
| --- | --- |
| `readings` | the data that is checked, as plain values |
| `kafka_readings` | reads that data from Kafka and from the snapshot store; never writes |
| `topic_checks`, `event_checks`, `progress_checks`, `model_checks` | the checks: readings in, findings out |
| `producers` | describes who sent the events that a check found wrong |
| `examination` | runs all checks over one reading |
| `finding` | what a check returns |
"""
