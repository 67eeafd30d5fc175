"""An engine that runs in a thread of its own, for a server whose threads only submit and listen."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from puna.decode.engine import Engine


class EngineThread:
    """Runs the engine's steps in the background while there is something to do.

    Also a context manager, which drains at its end.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._thread: threading.Thread | None = None
        self._stopping = False

    @property
    def running(self) -> bool:
        """Whether the thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Begin, or begin again after a stop."""
        if self.running:
            return
        self._stopping = False
        self.engine.open()
        self.engine.threaded = True
        self._thread = threading.Thread(target=self._run, name="puna engine", daemon=True)
        self._thread.start()

    def stop(self, drain: bool = True, timeout: float | None = None) -> bool:
        """Take no further requests and end: with ``drain`` once all have ended, else by cancelling them.

        What has not ended after ``timeout`` seconds is cancelled; returns whether all ended by themselves.
        """
        self.engine.close()
        thread = self._thread
        if thread is None:
            return True
        drained = drain
        self._stopping = True
        self.engine.woken.set()
        if drain:
            thread.join(timeout)
            drained = not thread.is_alive()
        if thread.is_alive():
            self.engine.cancel_all()
            thread.join()
        self._thread = None
        self.engine.threaded = False
        return drained

    def _run(self) -> None:
        while True:
            self.engine.woken.clear()
            try:
                busy = self.engine.step()
            except Exception as error:  # whatever it is, those who wait have to hear of it
                self.engine.abandon(error)
                busy = False
            if not busy:
                if self._stopping:
                    return
                self.engine.woken.wait()

    def __enter__(self) -> EngineThread:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop(drain=kind is None)
