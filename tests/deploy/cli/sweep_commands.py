"""Every command of the command line, the least that it takes, and how it ends where there is no Kafka."""

from __future__ import annotations

__all__ = ["ARGUMENTS", "OFFLINE", "REPORTS", "WITHOUT_SETTINGS"]

# The least that each command takes; a command that isn't here fails the first test. Files lie in the case's folder.
ARGUMENTS = {
    "bootstrap": "jsonl --path events.jsonl",
    "config check": "",
    "config show": "",
    "data fetch": "kuairand",  # not there, and not to be fetched by a program
    "data list": "",
    "data schema": "simulation",
    "dead-letters list": "",
    "dead-letters replay": "--all --yes",
    "dead-letters show": "0/0 --raw",
    "demo": "--dataset kuairand",
    "doctor": "",
    "evaluate": "jsonl --path events.jsonl",
    "kafka reset": "--yes",
    "kafka start": "",  # with a Java that isn't there
    "kafka status": "",
    "kafka stop": "",
    "model compare": "",
    "model promote": "wide --reason r --yes",
    "model shadow": "wide --share 5%",
    "model stats": "1",
    "replay": "jsonl --path events.jsonl",
    "run join": "",
    "run scorer": "",
    "run trainer": "",
    "scores tail": "--limit 1",
    "simulate": "--count 5 --max --truth truth.jsonl",
    "snapshot alias list": "",
    "snapshot alias rm": "b --reason x",
    "snapshot alias set": "b 1 --reason x --unchecked",
    "snapshot canary": "1 --share 5% --yes --unchecked",
    "snapshot diff": "1 2",
    "snapshot export": "1 --onnx model.onnx",
    "snapshot gate": "",
    "snapshot gc": "--yes",
    "snapshot history": "",
    "snapshot hold": "--reason x",
    "snapshot list": "",
    "snapshot promote": "1 --reason x --unchecked",
    "snapshot reindex": "",
    "snapshot release": "--reason x",
    "snapshot resume": "",
    "snapshot rollback": "--yes",
    "snapshot shadow": "1 --share 5% --yes --unchecked",
    "snapshot show": "1",
    "snapshot tag": "1 x=y",
    "snapshot verify": "1",
    "snapshot watch": "--timeout 1ms",
    "topics check": "",
    "topics create": "",
    "watermarks": "--limit 1",
}
# Exit codes where there is no Kafka, of the commands that don't ask it anything.
OFFLINE = {
    "config check": 0,
    "config show": 0,
    "data fetch": 1,
    "data list": 0,
    "data schema": 0,
    "demo": 1,
    "evaluate": 1,  # one impression is too few to judge
    "kafka reset": 0,
    "kafka start": 1,
    "kafka status": 1,
    "kafka stop": 0,
    "model stats": 1,
    "snapshot diff": 1,
    "snapshot export": 1,
    "snapshot verify": 1,
}
# They report what they found instead of an error, with exit code 1.
REPORTS = {"config check", "kafka status"}
# They read no settings.
WITHOUT_SETTINGS = {"data fetch", "data list", "data schema"}
