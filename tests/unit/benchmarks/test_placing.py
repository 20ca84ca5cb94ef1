"""Two ingest processes that share four small workers."""

from benchmarks.placing.__main__ import measure


async def test_two_ingests_fill_the_workers_and_never_place_too_much():
    measured = await measure(
        ingests=2,
        workers=4,
        pages=200,
        running=4,
        stay_s=0.05,
        blocks=1000,
        rate=0.0,
        num_waiting=10,
        num_first=0,
        num_measured=30,
        num_tokens=200,
    )
    assert [each["placements"] for each in measured["ingests"]] == [30, 30]
    assert measured["looks"] > 0
    assert measured["fullest_worker"] > 0
    assert measured["overshoots"] == 0
