"""What every command imports, loaded once for the processes of `tests.deploy.cli.sweep`."""

import importlib

import faust  # noqa: F401
import pyarrow.parquet  # noqa: F401
import torch  # noqa: F401

from deploy.cli import COMMANDS

for _module in {target.split(":")[0] for target in COMMANDS.values()} | {
    "deploy.cli.snapshot_canary_view",
    "deploy.cli.snapshot_view",
    "deploy.cli.feeding",
    "deploy.config_report",
    "deploy.datasets",
    "deploy.demo.play",
    "deploy.demo.view",
    "deploy.doctor.kafka_readings",
    "deploy.local_kafka.cluster",
    "deploy.logs",
    "deploy.feeding.replay",
    "deploy.feeding.simulate",
    "deploy.feeding.watermarks",
    "headrace.__main__",
    "kafka.admin",
    "stream.join.worker",
    "stream.letters.replay",
    "stream.registry.operations",
    "stream.scorer.run",
    "stream.trainer.run",
}:
    importlib.import_module(_module)
