"""An answer that may change its arm before its first token: who is dealt a failing canary still gets an answer.

What the arm did is counted as its failure all the same; what its caller sees is the stable version's answer, a little
later. After the first token nothing can be handed over: the answer belongs to the version that began it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from sihe.core.errors import UserError
from sihe.core.telemetry import logger
from sihe.serving.engine.stream import GenerationStream, Heard, wake_readers
from sihe.serving.engine.types import GenerationEvent
from sihe.serving.errors import DeadlineExceeded


class Handover:
    """Joins the stream of a try on an arm to `answer`, the caller's stream, and starts `otherwise` where it fails.

    `otherwise` starts the request on the stable version; it runs on a thread of its own, since tokenising has no place
    on an engine's.
    """

    def __init__(self, first: GenerationStream, otherwise: Callable[[], GenerationStream]) -> None:
        self.answer = GenerationStream(first.id, first.served_by, abort=self._leave)
        self.answer.arm = first.arm
        self._otherwise: Callable[[], GenerationStream] | None = otherwise
        self._lock = threading.Lock()
        self._current = first
        self._has_begun = False
        self._left = False

    def hear(self, heard: Heard) -> None:
        """Takes what the current try says."""
        if isinstance(heard, GenerationEvent):
            self._otherwise = None
            if not self._has_begun:
                self._has_begun = True
                with self._lock:
                    current = self._current
                self.answer.served_by = current.served_by  # it may have changed its replica meanwhile
            wake = self.answer.deliver(heard)
        elif heard is None:
            return  # closed from our side
        elif self._otherwise is not None and not isinstance(heard, UserError | DeadlineExceeded):
            otherwise, self._otherwise = self._otherwise, None
            threading.Thread(target=self._again, args=(otherwise, heard), name="handover", daemon=True).start()
            return
        else:
            wake = self.answer.fail(heard)
        if wake is not None:
            wake_readers([wake])

    def _again(self, otherwise: Callable[[], GenerationStream], reason: BaseException) -> None:
        logger("serving").warning("request_handed_over", arm=self.answer.arm, error=repr(reason))
        try:
            stream = otherwise()
        except Exception as error:  # noqa: BLE001 - the reader is to hear of it, whatever it is
            wake = self.answer.fail(error)
            if wake is not None:
                wake_readers([wake])
            return
        with self._lock:
            self._current = stream
            left = self._left
        self.answer.served_by, self.answer.arm = stream.served_by, stream.arm
        if left:
            stream.close()
        stream.watch(self.hear, instead=True)

    def _leave(self, _id: int) -> None:
        with self._lock:
            self._left = True
            current = self._current
        current.close()
