"""A salted worker whose peers reach it through a proxy, so that they can be cut from it."""

import os

import torch

from shared.transfer.ucx import UcxTransfer
from tests.faults import salted_worker

ROLE = "BATON_FAULTS_ROLE"
PEERS_REACH_IT_AT = "BATON_FAULTS_TRANSFER_ADDRESS"
"""host:port of the proxy before BATON_TRANSFER_PORT: what stands in its card and in its tickets."""

torch.set_num_threads(1)


def main():
    # torch makes its thread pool anew after a fork, and not safely if two threads ask for it at the same time.
    torch.set_num_threads(1)
    address = os.environ[PEERS_REACH_IT_AT]
    UcxTransfer.address = property(lambda _: address)
    salted_worker.work(os.environ[ROLE])
