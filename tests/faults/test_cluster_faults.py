"""A short run of what `make faults` does at length: real Kafka, Redis, services and clients, and faults by seeds."""

import pytest

from tests.faults.cluster.run import Options, fault_run

FAULTS = 25
MINUTES = 0.7


# aiokafka leaves a socket when the broker that it connects to is killed in that moment.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("seed", [7])
async def test_no_promise_breaks_under_random_faults(seed):
    told = []
    options = Options(faults=FAULTS, minutes=MINUTES, seed=seed, timeout_s=60.0, lone_kills=0)
    outcome = await fault_run(options, told.append)
    assert outcome.report["faults"] == FAULTS
    assert outcome.report["tokens"] > 0
    assert outcome.broken == [], told
