"""What happens inside a pull, and when: the transfer's own methods, watched from outside while some pulls run.

Both processes are on one machine, whose monotonic clock they share: their events lie on one line of time.
"""

import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from shared.transfer.link import Link
from shared.transfer.staging import Staging
from shared.wire.codec import type_name


@dataclass(frozen=True, slots=True)
class Event:
    """Something that one end did. `name`: pack, unpack, send, receive, or post and read with the kind of message."""

    end: str
    name: str
    began_s: float
    ended_s: float


class Trace:
    """The events of one process since `watch` was entered."""

    def __init__(self, end: str, clock_s: Callable[[], float] = time.perf_counter) -> None:
        self._end = end
        self._clock_s = clock_s
        self.events: list[Event] = []

    def as_json(self) -> list[dict[str, object]]:
        return [asdict(event) for event in self.events]

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Record what `Staging` and `Link` do, all of them in this process."""
        watched: list[tuple[type, str, Any]] = [
            (Staging, "pack", self._timed("pack", Staging.pack)),
            (Staging, "unpack", self._timed("unpack", Staging.unpack)),
            (Link, "send", self._timed("send", Link.send)),
            (Link, "receive", self._timed("receive", Link.receive)),
            (Link, "post", self._posting(Link.post)),
            (Link, "read", self._reading(Link.read)),
        ]
        originals = [(owner, name, getattr(owner, name)) for owner, name, _ in watched]
        try:
            for owner, name, replacement in watched:
                setattr(owner, name, replacement)
            yield
        finally:
            for owner, name, original in originals:
                setattr(owner, name, original)

    def _note(self, name: str, began_s: float) -> None:
        self.events.append(Event(self._end, name, began_s, self._clock_s()))

    def _timed(self, name: str, method: Any) -> Any:
        @functools.wraps(method)
        async def timed(*args: Any, **kwargs: Any) -> Any:
            began_s = self._clock_s()
            try:
                return await method(*args, **kwargs)
            finally:
                self._note(name, began_s)

        return timed

    def _posting(self, method: Any) -> Any:
        @functools.wraps(method)
        def post(link: Link, message: object) -> None:
            began_s = self._clock_s()
            method(link, message)
            self._note(f"post {type_name(type(message))}", began_s)

        return post

    def _reading(self, method: Any) -> Any:
        @functools.wraps(method)
        async def read(link: Link) -> bytes:
            began_s = self._clock_s()
            body: bytes = await method(link)
            self._note(f"read {json.loads(body).get('type')}", began_s)
            return body

        return read


AFTERWARDS_S = 1e-3
"""How long after a pull the source may still note what belongs to it."""


def phases_ms(events: Sequence[Event], began_s: float, ended_s: float) -> dict[str, float]:
    """How long the parts of the one pull that ran from `began_s` to `ended_s` took.

    Those of one kind may overlap with those of another, and with each other: `wire` is from the first receive posted
    to the last arrival, and `receives` their sum. `tail` is the unpacking that the last arrival leaves to be done.
    """
    mine = [event for event in events if began_s <= event.ended_s <= ended_s + AFTERWARDS_S]

    def of(name: str) -> list[Event]:
        return [event for event in mine if event.name == name]

    def total_s(name: str) -> float:
        return sum(event.ended_s - event.began_s for event in of(name))

    found = {"pull": ended_s - began_s}
    announced, receives, unpacks = of("read part"), of("receive"), of("unpack")
    if announced:
        found["to first part"] = announced[0].ended_s - began_s
    if receives:
        arrived_s = max(event.ended_s for event in receives)
        found |= {"wire": arrived_s - min(event.began_s for event in receives), "receives": total_s("receive")}
        if unpacks:
            found["tail"] = max(0.0, max(event.ended_s for event in unpacks) - arrived_s)
    found |= {"packs": total_s("pack"), "sends": total_s("send"), "unpacks": total_s("unpack")}
    confirms, releases = of("post confirm"), of("read released")
    if confirms and releases:
        found["confirm"] = releases[-1].ended_s - confirms[-1].began_s
    return {name: 1e3 * seconds for name, seconds in found.items()} | {"parts": len(receives)}


def summary(pulls: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median of each phase."""
    names = dict.fromkeys(name for pull in pulls for name in pull)
    return {name: round(median(pull[name] for pull in pulls if name in pull), 3) for name in names}


def timeline(events: Sequence[Event], began_s: float, ended_s: float) -> list[str]:
    """The events of one pull as lines, in the order of their ends; microseconds since its start.

    The begin of a `read` says nothing: somebody always reads.
    """
    mine = sorted(
        (event for event in events if began_s <= event.ended_s <= ended_s + AFTERWARDS_S), key=lambda e: e.ended_s
    )
    lines: list[str] = []
    for event in mine:
        since = "" if event.name.startswith(("read", "post")) else f"{1e6 * (event.began_s - began_s):.0f}"
        lines.append(f"{since:>7} {1e6 * (event.ended_s - began_s):7.0f}  {event.end:6}  {event.name}")
    return lines
