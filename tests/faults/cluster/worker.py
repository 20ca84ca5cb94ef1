"""A salted worker whose peers reach it through a proxy, so that they can be cut from it, and whose engine can hang."""

import os
import signal
import time

import torch

from shared.engine.fake import Pace
from shared.transfer.ucx import UcxTransfer
from tests.faults import salted_worker

ROLE = "BATON_FAULTS_ROLE"
PEERS_REACH_IT_AT = "BATON_FAULTS_TRANSFER_ADDRESS"
"""host:port of the proxy before BATON_TRANSFER_PORT: what stands in its card and in its tickets."""

HANG = signal.SIGUSR1
"""From now on the engine's steps have no end."""

torch.set_num_threads(1)


class HangingPace(Pace):
    """The time of a device that hangs once it is told to."""

    hangs = False

    def wait_until(self, done_s):
        while self.hangs:
            time.sleep(1.0)
        super().wait_until(done_s)


def hang(*_):
    HangingPace.hangs = True


def main():
    # torch makes its thread pool anew after a fork, and not safely if two threads ask for it at the same time.
    torch.set_num_threads(1)
    address = os.environ[PEERS_REACH_IT_AT]
    UcxTransfer.address = property(lambda _: address)
    salted_worker.Pace = HangingPace
    signal.signal(HANG, hang)
    salted_worker.work(os.environ[ROLE])
