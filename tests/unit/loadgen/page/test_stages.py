from dataclasses import replace
from random import Random

import pytest

from loadgen.page.stages import NUM_SLOWEST, StageKind, stages_page_of
from shared.request import Event
from tests.unit.loadgen.page.runs import STARTED_UNIX_S, answered, failed, mixed


def stages(records):
    return stages_page_of(records, STARTED_UNIX_S)


def test_the_slowest_stand_below_the_median_slowest_first():
    records = mixed(60)
    for waterfall, quantity in ((stages(records).by_ttft, "ttft_s"), (stages(records).by_e2el, "e2el_s")):
        median, *slowest = waterfall.lives
        values = sorted(getattr(each, quantity) for each in records if each.completed)
        assert median.is_median
        assert median.total_s == values[(len(values) - 1) // 2]
        assert [life.total_s for life in slowest] == values[: -NUM_SLOWEST - 1 : -1]


def test_segments_lie_end_to_end_and_add_up_to_what_is_ranked():
    for waterfall in (stages(mixed(60)).by_ttft, stages(mixed(60)).by_e2el):
        for life in waterfall.lives:
            assert life.segments[0].from_s == 0
            assert [segment.from_s for segment in life.segments[1:]] == [s.to_s for s in life.segments[:-1]]
            assert life.segments[-1].to_s == pytest.approx(life.total_s, abs=1e-5)


def test_one_request_is_the_median_and_stands_once():
    assert [life.is_median for life in stages([answered(0, rng=Random(1))]).by_ttft.lives] == [True]


def test_shares_are_of_the_whole_time():
    found = stages(mixed(60))
    assert sum(stage.share for stage in found.shares) == pytest.approx(1)
    assert sum(stage.share_of_slowest for stage in found.shares) == pytest.approx(1)
    assert found.num_slowest == 6
    kinds = {stage.name: stage.kind for stage in found.shares}
    assert next(iter(kinds)) == "intended → sent"
    assert kinds["placed → prefilling"] is StageKind.QUEUE
    assert kinds["first_token → transferring"] is StageKind.HANDING_ON


def test_without_stamps_there_are_the_clients_own_moments():
    found = stages(mixed(10, stamped=False))
    assert not found.has_stamps
    assert [stage.name for stage in found.shares] == ["intended → sent", "sent → first piece", "first piece → received"]


def test_clocks_that_differ_are_told_and_leave_no_negative_bar():
    one = answered(0, rng=Random(1))
    skewed = replace(one, stamps={**one.stamps, Event.PLACED: STARTED_UNIX_S - 1})
    found = stages([skewed])
    assert found.skewed == 1
    assert all(segment.to_s >= segment.from_s for segment in found.by_e2el.lives[0].segments)
    assert stages([one]).skewed == 0


def test_only_completed_requests_have_stages():
    found = stages([failed(0)])
    assert (found.by_ttft.lives, found.shares, found.num_slowest) == ((), (), 0)
