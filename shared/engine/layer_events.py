"""When a layer's KV is in the pool of a device that computes behind the program's back.

On CUDA a forward pass returns from a layer when it has been asked for, not when it is done. So an event is recorded
behind each layer, and a thread that waits for the events announces the layers, in order: a peer's transfer may read
what has been announced at once, on another stream.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Protocol


class Event(Protocol):
    """torch.cuda.Event."""

    def synchronize(self) -> object: ...


class LayerEvents:
    """`record()` makes an event behind what the calling thread has asked the device for so far."""

    def __init__(self, record: Callable[[], Event]) -> None:
        self._record = record
        self._queue: queue.SimpleQueue[tuple[Event, Callable[[], object]] | None] = queue.SimpleQueue()
        self._lock = threading.Condition()
        self._num_waiting = 0
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="layer-events", daemon=True)
        self._thread.start()

    def announce(self, call: Callable[[], object]) -> None:
        """Call it once the device has done what it has been asked for so far."""
        with self._lock:
            self._num_waiting += 1
        self._queue.put((self._record(), call))

    def wait(self) -> None:
        """Until every call has been made. Raises what one of them raised."""
        with self._lock:
            self._lock.wait_for(lambda: self._num_waiting == 0)
            failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (entry := self._queue.get()) is not None:
            event, call = entry
            try:
                event.synchronize()
                call()
            except BaseException as error:  # `wait` raises it in the forward thread
                self._failure = error
            with self._lock:
                self._num_waiting -= 1
                self._lock.notify_all()
