"""How long a client can be used: from its construction until it is closed, and only in the process that made it.

A fork copies the memory of a client but not its threads, which do the sending. Records sent by the child would wait for ever.
"""

from __future__ import annotations

import os

from headrace.errors import UnusableClient

__all__ = ["Lifetime"]


class Lifetime:
    """Whether an object may be used now, in this process.

    Args:
        what: the object's name in messages ("client").
        again: what to do instead ("Make a new Client").
    """

    def __init__(self, what: str, again: str) -> None:
        self._what = what
        self._again = again
        self._pid = os.getpid()
        self.closed = False

    @property
    def forked(self) -> bool:
        """Whether this process was forked after the object was made."""
        return os.getpid() != self._pid

    def check(self) -> None:
        """Raise UnusableClient when the object was closed, or was made before a fork."""
        self.check_process()
        if self.closed:
            raise UnusableClient(f"{self._what}: expected it open, found it closed. {self._again}.")

    def check_process(self) -> None:
        """Raise UnusableClient when the object was made before a fork."""
        if self.forked:
            raise UnusableClient(
                f"{self._what}: expected the process that made it ({self._pid}), found process {os.getpid()}, which was forked "
                f"later and has none of its threads. {self._again} after the fork, one in each process."
            )

    def refuse_to_travel(self) -> UnusableClient:
        """The error for pickling or copying the object, as for an argument of a process that `multiprocessing` spawns."""
        return UnusableClient(
            f"{self._what}: expected it to stay in the process that made it, found it being pickled or copied. Pass its "
            f"address and options in its place. {self._again} in each process."
        )
