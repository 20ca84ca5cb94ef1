"""Whatever happens to either worker, at whatever moment of a hand-over: answers are the lone engine's, nothing leaks,
nothing hangs.

Real processes, roles and UCX; the test stands for the log. A trial runs some hand-overs at once and strikes one
worker, or the cable between the two, while one of them is at a chosen point; its board says where all of them were.
Trial number n is the same each time, as far as processes let it; BATON_FAULT_TRIALS sets how many there are.
"""

import asyncio
import itertools
import os
import random
import sys
from collections import Counter
from dataclasses import dataclass

from shared.wire.wire_format import WireFormat
from tests.faults.board import Phase
from tests.faults.team import STATES, Team, Template
from tests.tiny_checkpoints import TinyCheckpoint, write_tiny_checkpoint

NUM_TRIALS = int(os.environ.get("BATON_FAULT_TRIALS", "40"))
FIRST_TRIAL = int(os.environ.get("BATON_FAULT_FIRST", "0"))
NUM_TEAMS = 4

DEADLINE_S = 30.0
"""In which answers must be there, and then all that a worker had be free, whatever was struck. By the settings of
`tests.faults.worker` it takes 6 s at the most, on a machine that is not busy."""

REQUEST_S = 60.0
SHORT_STOP_S = (0.05, 0.6)
TICKET_DELAYS_S = (0.0, 0.0, 0.05, 0.3)
LONG_STOP_S = 2.5
"""Longer than the time in which any peer has to show progress."""

CHECKPOINT = TinyCheckpoint(
    overrides=(("num_hidden_layers", 4), ("num_key_value_heads", 4), ("head_dim", 64), ("hidden_size", 64))
)
"""512 KiB of KV a page: large enough for messages that take UCX several steps."""

FAULTS = (
    "kill prefill",
    "kill decode",
    "stop prefill for a moment",
    "stop decode for a moment",
    "stop prefill for long",
    "stop decode for long",
    "cut the cable",
    "freeze the cable for a moment",
    "freeze the cable for long",
    "withdraw",
    "cancel",
)

POINTS = {
    "before the offer": (("prefill", Phase.WAITING),),
    "offered, first chunk": (("prefill", Phase.OFFERED),),
    "a later chunk": (("prefill", Phase.LATER_CHUNK),),
    "let in": (("prefill", Phase.LET_IN), ("decode", Phase.ASKED)),
    "announced": (("prefill", Phase.ANNOUNCED),),
    "in flight": (("prefill", Phase.SENDING), ("decode", Phase.RECEIVING)),
    "arrived": (("decode", Phase.ARRIVED),),
    "confirmed": (("decode", Phase.CONFIRMING), ("prefill", Phase.CONFIRMED), ("prefill", Phase.RELEASED)),
    "any time": (),
}
SEVERAL_TIMES = (Phase.LATER_CHUNK, Phase.ANNOUNCED, Phase.SENDING, Phase.RECEIVING)
"""A hand-over is there more than once."""


@dataclass(frozen=True)
class Trial:
    """Trial `number`. The numbers of points and faults have no common divisor: each point meets each fault."""

    number: int

    @property
    def point(self):
        return list(POINTS)[self.number % len(POINTS)]

    @property
    def fault(self):
        return FAULTS[self.number % len(FAULTS)]

    def __str__(self):
        return f"trial {self.number} ({self.fault}; {self.point})"


class Run:
    """All trials, by some teams at once."""

    def __init__(self, template):
        self.template = template
        self.states = Counter()
        self.faults = Counter()
        self.pulls = Counter()
        self.num_answered = 0
        self.num_excused = 0
        self.num_repeated = 0

    def summary(self):
        return (
            f"{self.faults.total()} strikes, {self.num_repeated} trials repeated, over before theirs; hand-overs: "
            f"{self.num_answered} answered, {self.num_excused} excused; pulls: {dict(self.pulls)}; "
            f"states struck: {dict(self.states)}; faults: {dict(self.faults)}"
        )

    async def work(self, name, queue, *, hurries):
        """One team's share."""
        if not queue:
            return
        team = Team(self.template, name, hurries=hurries)
        await team.start()
        try:
            while queue:
                trial = queue.pop(0)
                try:
                    attempts = itertools.count()
                    while not await self._run(team, trial, next(attempts)):
                        self.num_repeated += 1
                except Exception as error:
                    error.add_note(f"{trial}; alone: BATON_FAULT_FIRST={trial.number} BATON_FAULT_TRIALS=1")
                    raise
        finally:
            await team.end()

    async def _run(self, team, trial, attempt):
        """False: all was over before the strike."""
        rng = random.Random(1000 * trial.number + attempt)
        team.begin()
        for process in team.processes:
            process.tell(do="pace", layer_s=rng.choice((0.0, 0.004, 0.01)))
        if rng.random() < 0.7:
            await self._connect(team)
        num_hand_overs = rng.randrange(1, 4)
        role, phase = rng.choice(POINTS[trial.point] or ((None, None),))
        armed = {"prefill": team.prefill, "decode": team.decode}.get(role)
        if armed is not None:
            armed.arm(phase, rng.randrange(3 if phase in SEVERAL_TIMES else num_hand_overs))
        hand_overs = self._begin(team, f"{trial.number}-{attempt}", num_hand_overs, rng)
        key = await self._moment(team, armed, hand_overs, rng)
        if key is not None:
            self.faults[trial.fault] += 1
            self.states.update(team.state(over.key) for over in hand_overs)
            await self._strike(team, trial, key, armed, rng)
        elif armed is not None:
            armed.disarm()
        await self._settle(team, hand_overs)
        await team.replace_dead()
        await self._prove(team, f"{trial.number}-{attempt}", rng)
        return key is not None

    async def _connect(self, team):
        """A measured link; the one before may just be breaking."""
        async with asyncio.timeout(DEADLINE_S):
            while await team.decode.ask(
                "connected", do="connect", address=team.cable.address, incarnation=team.prefill.spec.incarnation
            ):
                await asyncio.sleep(0.02)

    def _prompt(self, rng):
        return rng.choice(sorted(self.template.answers.items()))

    def _begin(self, team, name, num_hand_overs, rng):
        hand_overs = []
        for slot in range(num_hand_overs):
            ids, answer = self._prompt(rng)
            hand_overs.append(
                team.hand_over(
                    f"{name}.{slot}",
                    ids,
                    answer,
                    max_loss=rng.choice((WireFormat.NATIVE, WireFormat.INT8)),
                    salt=rng.choice(("", f"{name}.{slot}", f"{name}.{slot}")),
                    deadline_s=REQUEST_S,
                    ticket_delay_s=rng.choice(TICKET_DELAYS_S),
                )
            )
        return hand_overs

    async def _moment(self, team, armed, hand_overs, rng):
        """When to strike: the key of the hand-over at its point, or None if all is over before one is."""
        if armed is None:
            await asyncio.sleep(rng.random() * 0.5)
            return rng.choice(hand_overs).key

        def is_over():
            return armed.at_point.done() or all(over.is_done for over in hand_overs)

        armed.at_point.add_done_callback(lambda _: team.changed.set())
        await team.until(is_over, DEADLINE_S, lambda: f"point nor answers: {hand_overs}")
        if not armed.at_point.done():
            return None
        slot = armed.at_point.result()
        return next(over.key for over in hand_overs if over.key.endswith(f".{slot}"))

    async def _strike(self, team, trial, key, armed, rng):
        fault = trial.fault
        victim = team.prefill if "prefill" in fault else team.decode
        let_go = armed.go if armed is not None else lambda: None
        if fault.startswith("kill"):
            victim.kill()
            self._excuse_lost(team, victim)
            let_go()
        elif fault.startswith("stop"):
            victim.stop()
            let_go()
            await self._pass(team, fault, rng, lambda: self._held_up(team, victim))
            victim.resume()
        elif fault == "cut the cable":
            team.cable.cut()
            let_go()
        elif fault.startswith("freeze"):
            team.cable.freeze()
            let_go()
            await self._pass(team, fault, rng, lambda: None)
            team.cable.thaw()
        else:
            team.stop(team.prefill if fault == "withdraw" else team.decode, key)
            self._excuse_stopped(team, key, fault)
            let_go()

    def _excuse_stopped(self, team, key, fault):
        over = team.hand_overs[key]
        # A prefill that has handed on only takes its offer back: decode goes on by itself.
        over.is_excused = fault == "cancel" or not over.told_token

    async def _pass(self, team, fault, rng, hold_up):
        """The time of a stop. During a long one the other side must come to rest by itself."""
        if fault.endswith("for a moment"):
            await asyncio.sleep(rng.uniform(*SHORT_STOP_S))
            return
        await asyncio.sleep(LONG_STOP_S)
        hold_up()
        others = [process for process in team.processes if not process.is_stopped]
        hand_overs = list(team.hand_overs.values())

        def have_ended():
            return all(over.is_done or team.decode.is_stopped for over in hand_overs)

        await team.until(have_ended, DEADLINE_S, lambda: f"while one side stands still: {hand_overs}")
        for process in others:
            await team.quiet(process, DEADLINE_S)

    def _held_up(self, team, victim):
        """What only the stopped worker has is placed again by its owner, who tells decode to forget it."""
        if victim is team.prefill:
            for over in team.hand_overs.values():
                if not over.told_token:
                    over.is_excused = True
                    team.stop(team.decode, over.key)

    def _excuse_lost(self, team, victim):
        for over in team.hand_overs.values():
            if victim is team.decode:
                over.is_excused = True
            elif not over.told_token:
                over.is_excused = True
                team.spawn(self._stop_after_its_pull(team, over))

    async def _stop_after_its_pull(self, team, over):
        """As above; but a pull from a worker that was killed ends by itself."""
        await asyncio.sleep(2 * max(TICKET_DELAYS_S))
        await team.until(lambda: over.pull or not over.has_ticket, DEADLINE_S, lambda: f"the pull of {over}")
        team.stop(team.decode, over.key)

    async def _settle(self, team, hand_overs):
        await team.until(lambda: all(over.is_done for over in hand_overs), DEADLINE_S, lambda: f"answers: {hand_overs}")
        for process in team.processes:
            if not process.is_dead:
                await team.quiet(process, DEADLINE_S)
        if team.broken is not None:
            raise team.broken
        for over in hand_overs:
            self.num_answered += over.is_answered
            self.num_excused += not over.is_answered
            self.pulls["failed" if over.pull and over.format is None else over.format or "none"] += 1

    async def _prove(self, team, name, rng):
        """After it all, the two that are there now hand over as ever."""
        for process in team.processes:
            process.tell(do="pace", layer_s=0.0)
        for attempt in range(8, 16):
            ids, answer = self._prompt(rng)
            over = team.hand_over(f"{name}.{attempt}", ids, answer, salt=f"{name}.{attempt}", deadline_s=REQUEST_S)
            await self._settle(team, [over])
            if over.format is not None:
                return
        raise AssertionError(f"no pull succeeds any more: {over.pull}")


async def test_no_fault_corrupts_leaks_or_hangs(tmp_path, capsys):
    template = Template(tmp_path)
    checkpoint = write_tiny_checkpoint(tmp_path / "checkpoint", CHECKPOINT)
    async with template.running(checkpoint):
        run = Run(template)
        queues = ([], [])  # of workers that hurry, and of others
        for number in range(FIRST_TRIAL, FIRST_TRIAL + NUM_TRIALS):
            queues[number % 2].append(Trial(number))
        async with asyncio.TaskGroup() as teams:
            for number in range(NUM_TEAMS):
                hurries = number % 2 == 0
                teams.create_task(run.work(f"team{number}", queues[number % 2], hurries=hurries))
    with capsys.disabled():
        sys.stdout.write(f"\n{run.summary()}\n")
    if NUM_TRIALS >= 40:
        assert set(STATES) <= set(run.states)
        assert set(run.faults) == set(FAULTS)
        assert run.pulls[WireFormat.NATIVE] > 0
        assert run.pulls[WireFormat.INT8] > 0
        assert run.pulls["failed"] > 0
