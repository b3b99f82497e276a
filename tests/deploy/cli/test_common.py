"""What the commands share."""

from __future__ import annotations

import asyncio
from typing import get_args

import click
import pytest
from aiokafka.errors import KafkaError
from click.testing import CliRunner
from kafka.errors import KafkaError as AdminError

from deploy.cli.common import ask_kafka, model_option, with_model
from deploy.settings import Settings
from model.settings import ModelName
from stream.errors import StreamError, TopicError
from stream.settings import KafkaSettings


@pytest.fixture(autouse=True)
def _reached(monkeypatch: pytest.MonkeyPatch) -> None:
    async def reach(kafka: KafkaSettings) -> None:
        await asyncio.sleep(0)

    monkeypatch.setattr("stream.kafka.reach.reach", reach)


@pytest.mark.parametrize("error", [KafkaError("no"), AdminError("no"), ConnectionRefusedError("no"), TopicError("no")])
def test_an_error_of_kafka_becomes_one_message(error: Exception) -> None:
    async def ask() -> None:
        await asyncio.sleep(0)
        raise error

    with pytest.raises(StreamError) as told:
        ask_kafka(Settings(), ask(), "the weather")
    shown = f"{type(error).__name__}: no"
    if isinstance(error, StreamError):
        assert told.value is error
    else:
        assert str(told.value).startswith(
            f"Kafka at 127.0.0.1:9092 (PLAINTEXT): expected an answer about the weather, found {shown}. "
        )


def test_an_answer() -> None:
    async def answer() -> int:
        return 7

    assert ask_kafka(Settings(), answer(), "the weather") == 7


@click.command()
@model_option
def learns(model: str | None) -> None:
    """A command that makes a model."""
    click.echo(with_model(Settings(), model).model.name)


def test_a_model_by_name() -> None:
    for name in get_args(ModelName):
        assert CliRunner().invoke(learns, ["--model", name]).output == f"{name}\n"
    assert CliRunner().invoke(learns).output == f"{Settings().model.name}\n"
    refused = CliRunner().invoke(learns, ["--model", "xdeepfm"])
    assert refused.exit_code == 2
    assert "expected one of deepfm, lr, fm, fnn, ipnn, opnn, pnn, wide_deep, found 'xdeepfm'." in " ".join(
        refused.output.split()
    )
    shown = CliRunner().invoke(learns, ["--help"]).output.replace(",", " ").split()
    assert all(name in shown or f"{name}." in shown for name in get_args(ModelName))
