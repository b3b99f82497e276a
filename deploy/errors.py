"""Errors of the room `deploy`.

DeployError
├── ConfigError        a setting is missing, unknown or wrong
├── LocalKafkaError    the local Kafka can't be downloaded, started or stopped
├── DataSetError       a data set is missing, or can't be read as its name says
├── EvaluationError    a data set can't be evaluated as it was asked for
├── FeedError          events could not be sent to Kafka
 └── BootstrapError     what was learned from history can't be published
"""

from __future__ import annotations

__all__ = [
    "BootstrapError",
    "ConfigError",
    "DataSetError",
    "DeployError",
    "EvaluationError",
    "FeedError",
    "LocalKafkaError",
]


class DeployError(Exception):
    """Root of the errors of `deploy`."""


class ConfigError(DeployError):
    """A setting is missing, unknown or of the wrong kind."""


class LocalKafkaError(DeployError):
    """The local Kafka can't be downloaded, started or stopped."""


class DataSetError(DeployError):
    """A data set is missing, or can't be read as its name says."""


class EvaluationError(DeployError):
    """A data set can't be evaluated as it was asked for."""


class FeedError(DeployError):
    """Events could not be sent to Kafka."""


class BootstrapError(DeployError):
    """What was learned from history can't be published."""
