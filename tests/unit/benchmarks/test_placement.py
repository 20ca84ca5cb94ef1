from random import Random

from benchmarks.placement import Announcer, measure, spread
from shared.blocks import BlockHash
from shared.request import Incarnation


def test_all_figures_are_measured():
    result = measure(num_workers=4, num_blocks=256, num_prompts=20, num_tokens=200, rng=Random(1))
    assert result["blocks"] == 256
    assert result["prompts"] == 20
    assert 0 < result["place_us"]["p50"] <= result["place_us"]["p99"]
    assert result["placements_per_s"] > 0


def test_what_was_announced_is_held():
    names = [Incarnation("a"), Incarnation("b")]
    announcer = Announcer(names, Random(1))
    blocks = [BlockHash(bytes([n]) * 16) for n in range(3)]
    announcer.announce(blocks)
    assert [held for _, held in announcer.holders.matches(blocks).values()] == [3]


def test_the_middle_and_the_99th():
    assert spread([float(n) for n in range(1, 100)]) == {"p50": 50.0, "p99": 99.0}
