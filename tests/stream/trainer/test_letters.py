"""A version waits for every dead letter that was handed in before it, whichever thread it came from."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

from stream.records.dead_letter import DeadLetter
from stream.trainer.letters import LetterBox
from tests.stream.trainer.factory import metrics

LETTER = DeadLetter("wrong_type", "", "", "examples", 0, 0, None, None)


async def test_letters_of_examples_set_aside_are_waited_for_as_well():
    """Handed in behind letters of runs that no position has reached, so counting the first ones would not do."""
    box = LetterBox(SimpleNamespace(), "dead-letters", 1, SimpleNamespace(), print)
    box.put([LETTER] * 3)  # of runs that are decoded and not trained yet
    box.put([LETTER])  # set aside
    waiting = asyncio.ensure_future(box.written_up_to(1))

    async def write(count):
        async with box._progress:
            box.written = count
            box._progress.notify_all()
        await asyncio.sleep(0.01)
        return waiting.done()

    assert not await write(1)
    assert not await write(3)
    assert await write(4)


async def test_a_track_that_does_not_serve_counts_its_letters_and_sends_none():
    """The trainer of the track that serves has written a letter for the same record. Versions wait for nothing."""
    figures = metrics()
    box = LetterBox(SimpleNamespace(), "dead-letters", 1, figures, print, wanted=lambda: False)
    sending = asyncio.ensure_future(box._send_all())
    box.put([LETTER] * 3)
    await asyncio.wait_for(box.written_up_to(3), 5)
    assert box.written == 3 and figures.dead_letters.labels("wrong_type")._value.get() == 3
    sending.cancel()
