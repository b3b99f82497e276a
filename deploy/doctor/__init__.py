"""`headrace doctor`: what is wrong with a running system, and what mends it.

| module | what it does |
| --- | --- |
| `readings` | what is looked at: plain data |
| `kafka_readings` | reads it from Kafka and from the snapshot store; never writes |
| `examination` | all checks over one reading; `finding`: what comes out |
| `topic_checks`, `event_checks`, `progress_checks`, `model_checks` | the checks: readings in, findings out |
"""
