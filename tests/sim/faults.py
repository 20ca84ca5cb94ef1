"""What can befall a host, the log or the store; each fault heals by itself, by the latest when calm comes."""

import asyncio
import math
from collections.abc import Callable
from contextvars import Context
from dataclasses import dataclass

from shared.bus.memory import no_faults
from tests.sim.world import EDGE, INGEST, Host, World

HUNG_STEP_S = 4.0

VERDICT_S = 3.0
"""A verdict that a worker deserved may come so long after what kept it from its beats has healed."""


@dataclass(frozen=True)
class Strike:
    """One fault that happens now.

    Attributes:
        lasts_s: until it heals, where it is one that heals.
    """

    world: World
    host: Host
    lasts_s: float

    def heal(self, action: Callable[[], object]) -> None:
        outside(action, self.lasts_s)

    def kill(self) -> None:
        self.world.kill(self.host)

    def zombie(self) -> None:
        """Killed, and part of what it was sending lands later."""
        self.world.kill(self.host, zombie_after_s=self.lasts_s)

    def terminate(self) -> None:
        self.host.leave.set()

    def stop(self) -> None:
        self._deserves_a_verdict(self.host, self.lasts_s)
        self.host.process.stop()
        self.heal(self.host.process.go_on)

    def cut_log(self) -> None:
        self._deserves_a_verdict(self.host, self.lasts_s)
        self.host.bus.can_send = self.host.bus.can_read = False
        self.heal(lambda: _reach_log(self.host))

    def cut_store(self) -> None:
        self._deserves_a_verdict(self.host, self.lasts_s)
        self.host.state.cut_off = True
        self.heal(lambda: setattr(self.host.state, "cut_off", False))

    def cut_peers(self) -> None:
        if self.host.transfer is not None:
            network, address = self.world.network, self.host.transfer.address
            network.cut_away(address)
            self.heal(lambda: network.cut_off.discard(address))

    def hang(self) -> None:
        """The next step of its engine takes longer than any may."""
        self._deserves_a_verdict(self.host, math.inf)
        self.host.slow_steps.append(HUNG_STEP_S)

    def flush(self) -> None:
        self.world.store.flush()

    def store_away(self) -> None:
        self.world.store.away = True
        self.heal(lambda: setattr(self.world.store, "away", False))

    def log_away(self) -> None:
        for host in self.world.running():
            self._deserves_a_verdict(host, self.lasts_s)
        self.world.log.away = True
        self.heal(lambda: setattr(self.world.log, "away", False))

    def kill_edge(self) -> None:
        self._kill_any(EDGE)

    def kill_ingest(self) -> None:
        self._kill_any(INGEST)

    def _kill_any(self, kind: str) -> None:
        host = self.world.any(kind)
        if host is not None:
            self.world.kill(host)

    def _deserves_a_verdict(self, host: Host, lasts_s: float) -> None:
        now_s = self.world.clock_s()
        host.silences.append((now_s, now_s + lasts_s + VERDICT_S))


def calm_down(world: World) -> None:
    """Heal all."""
    world.log.fate, world.store.way_s = no_faults, lambda: (0.0, 0.0)
    world.log.away = world.store.away = False
    world.network.cut_off.clear()
    for host in world.running():
        _reach_log(host)
        host.state.cut_off = False
        host.slow_steps.clear()
        host.process.go_on()


def outside(action: Callable[[], object], delay_s: float) -> None:
    """Do something later, in no process."""
    asyncio.get_running_loop().call_later(delay_s, action, context=Context())


def _reach_log(host: Host) -> None:
    host.bus.can_send = host.bus.can_read = True


Fault = Callable[[Strike], None]

FAULTS: tuple[Fault, ...] = (
    *(Strike.kill,) * 5,
    *(Strike.zombie,) * 2,
    *(Strike.stop,) * 4,
    *(Strike.terminate,) * 2,
    *(Strike.cut_store,) * 2,
    Strike.cut_log,
    Strike.cut_peers,
    Strike.hang,
    Strike.flush,
    Strike.store_away,
    Strike.log_away,
)

SENDER_FAULTS: tuple[Fault, ...] = (Strike.kill, Strike.kill, Strike.kill, Strike.zombie, Strike.stop, Strike.cut_log)
"""What befalls a process in the moment in which it sends something..."""

FURTHER_FAULTS: tuple[Fault, ...] = (Strike.flush, Strike.flush, Strike.flush, Strike.kill_edge, Strike.kill_ingest)
"""...and what may happen beside it."""

LINK_FAULTS: tuple[Fault, ...] = (Strike.kill, Strike.kill, Strike.stop, Strike.terminate, Strike.cut_peers)
"""What befalls one of two workers between whom KV travels."""
