"""The one watcher of the studio: it looks at the files of all runs, and every page hears of changes by one stream."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

from lorafit.errors import LorafitError
from lorafit.redact import line
from lorafit.studio.folder import Folder, signs

PERIOD = 0.4  # seconds between two looks
SCAN_EVERY = 5  # looks between two searches for new runs
BEAT_SECONDS = 15.0  # a comment after that long shows that the stream lives
MOST_STREAMS = 256
LIST = "list"  # the name of the list of runs and jobs, among the ids of runs


class Watcher:
    """Looks while anybody listens. `advance` is called at each look, and says whether a job has changed.

    The streams end where `is_ending`: the server waits for them.
    """

    def __init__(
        self, folder: Folder, advance: Callable[[], bool], is_ending: Callable[[], bool] = lambda: False
    ) -> None:
        self._folder, self._advance, self._is_ending = folder, advance, is_ending
        self._listeners: set[asyncio.Queue[list[str]]] = set()
        self._seen: dict[str, object] = {}
        self._is_new = False  # whether a page listens that has heard of no run yet

    async def run(self) -> None:
        """Look until cancelled. Without a listener only jobs advance."""
        looks = 0
        while True:
            is_new, self._is_new = self._is_new, False
            if is_new:
                self._seen = {}
            try:
                changed = await asyncio.to_thread(self._look, looks % SCAN_EVERY == 0)
            except (OSError, LorafitError) as error:  # such as a full disk: the next look may do better
                print(line(f"studio: {error}"), file=sys.stderr)
                changed = []
            if is_new:
                changed.append(LIST)
            if changed or self._is_ending():
                for queue in self._listeners:
                    with suppress(asyncio.QueueFull):  # a page that does not read gets the next one
                        queue.put_nowait(changed)
            looks += 1
            await asyncio.sleep(PERIOD)

    def _look(self, scans: bool) -> list[str]:
        changed = [LIST] if self._advance() else []
        if not self._listeners:
            return changed
        known = self._folder.known()
        now: dict[str, object] = dict.fromkeys(self._folder.scan() if scans else known)
        for name in now:
            run = self._folder.known().get(name)
            now[name] = signs(run) if run else None
        changed += [name for name, sign in now.items() if self._seen.get(name, ...) != sign]
        changed += [name for name in self._seen if name not in now]  # what is gone
        if changed or now.keys() != self._seen.keys():
            changed.append(LIST)
        self._seen = now
        return list(dict.fromkeys(changed))

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events: each the ids of what has changed, as a list of JSON. A new stream soon hears of all runs.

        What changed before it went to a stream that no page read any more.
        """
        if len(self._listeners) >= MOST_STREAMS:
            return
        queue: asyncio.Queue[list[str]] = asyncio.Queue(64)
        self._listeners.add(queue)
        self._is_new = True
        try:
            yield b"retry: 1000\n\n"
            while True:
                try:
                    changed = await asyncio.wait_for(queue.get(), BEAT_SECONDS)
                except TimeoutError:
                    yield b": beat\n\n"
                    continue
                if self._is_ending():
                    return
                while not queue.empty():
                    changed = [*changed, *queue.get_nowait()]
                yield f"data: {json.dumps(list(dict.fromkeys(changed)))}\n\n".encode()
        finally:
            self._listeners.discard(queue)
