from pathlib import Path

from benchmarks.lengths import Answer, read, score

DATA = Path(__file__).parents[3] / "loadgen" / "data"


def test_what_is_always_the_same_is_covered_once_it_is_known():
    answers = [Answer(float(at_s), "t", 100, 30) for at_s in range(200)]
    summary = score(answers)["t"]
    assert summary["num"] == 200
    assert summary["covered"]["0.99"] == 1.0
    assert summary["covered_0.9_by_prompt_tokens"] == {"64": {"num": 200, "covered": 1.0}}
    assert 0 < summary["mean_error"] < 1, "the first ones were guessed"


def test_traces_are_tenants():
    answers = read(DATA / "azure_conv_60.csv") + read(DATA / "mooncake_conversation_60.jsonl")
    scores = score(sorted(answers))
    assert {name: summary["num"] for name, summary in scores.items()} == {
        "azure_conv_60": 60,
        "mooncake_conversation_60": 60,
    }
