"""Transactional producers that are thrown away after a failure."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aiokafka import AIOKafkaProducer

__all__ = ["dropped", "is_fencing", "retrieve"]

# How long to wait for a producer to stop while its broker doesn't answer.
CLOSE_TIMEOUT_S = 5.0


def is_fencing(error: BaseException) -> bool:
    """Whether another producer with the same transactional id has been started since."""
    from aiokafka import errors

    return isinstance(error, errors.ProducerFenced | errors.InvalidProducerEpoch | errors.InvalidTxnState)


async def dropped(producer: AIOKafkaProducer) -> None:
    """Stop a producer. An open transaction is aborted, since it would hold back every reader until it times out."""
    # A producer that is fenced or cut off fails here. The next producer to start ends its transaction.
    await _within(producer.abort_transaction())
    if not await _within(producer.stop()):
        # It waits for what it has sent. Left alone, it would go on trying for as long as Kafka is away, and one more after each
        # attempt of its owner.
        await _within(producer.client.close())
        await _within(producer._sender.close())
    _quieten(producer)


async def _within(step: Coroutine[Any, Any, object]) -> bool:
    """Await a step for CLOSE_TIMEOUT_S. Returns whether it came to an end in time, whatever that end was."""
    try:
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await step
    except TimeoutError:
        return False
    except Exception:
        return True
    return True


def _quieten(producer: AIOKafkaProducer) -> None:
    """Retrieve the errors that a fenced producer leaves in futures of its own: asyncio would print each of them."""
    batches = [batch for queue in producer._message_accumulator._batches.values() for batch in queue]
    for future in (producer._txn_manager._transaction_waiter, *(batch._drain_waiter for batch in batches)):
        if future is not None and future.done():
            retrieve(future)


def retrieve(future: asyncio.Future[Any]) -> None:
    """Retrieve a future's error; asyncio would otherwise report that nobody did."""
    if not future.cancelled():
        future.exception()
