"""A version waits for every dead letter that was handed in before it, whichever thread it came from."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

from stream.records.dead_letter import DeadLetter
from stream.trainer.letters import LetterBox

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
