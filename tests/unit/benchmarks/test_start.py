import json

import pytest

from benchmarks.start import REPORT_INTERVAL_S, ReadingTimes, main, timeline
from tests.tiny_checkpoints import TinyCheckpoint, TinyCheckpoints

MOMENTS = ("imported_s", "opened_s", "loaded_s", "ready_s")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return TinyCheckpoints(tmp_path_factory.mktemp("checkpoints")).get(TinyCheckpoint())


def test_a_cold_start_is_measured_and_written(folder, tmp_path, capsys):
    out = tmp_path / "start.json"
    main(model=folder, device="cpu", max_batch_tokens=256, warm=False, out=str(out))
    result = json.loads(out.read_text())
    assert (result["model"], result["max_batch_tokens"]) == (folder.name, 256)
    assert result["machine"]["gpu"] is None
    (name, start), *others = result["starts"].items()
    assert (name, others) == ("cold", [])
    moments = [start[moment] for moment in MOMENTS]
    assert moments[0] > 0
    assert moments == sorted(moments)
    read_s, num_bytes = start["read"][-1]
    assert start["opened_s"] <= read_s <= start["loaded_s"]
    assert num_bytes == start["weight_bytes"]
    assert start["first_request_s"] > 0
    assert start["later_request_s"] > 0
    assert (start["memory"], start["late_in_the_end"]) == (None, None)
    assert capsys.readouterr().out == f"--- cold\n{timeline(start)}\n"


def test_a_warm_start_finds_what_the_cold_one_compiled(folder, monkeypatch, capsys):
    caches = []

    def found(*arguments):
        cache = arguments[-1]
        caches.append((cache, [path.name for path in cache.iterdir()]))
        (cache / "kernel").touch()
        return START

    monkeypatch.setattr("benchmarks.start.start_elsewhere", found)
    main(model=folder, device="cpu")
    (cold, in_cold), (warm, in_warm) = caches
    assert (in_cold, in_warm) == ([], ["kernel"])
    assert cold == warm
    assert not cold.exists()
    printed = capsys.readouterr().out
    assert printed.index("--- cold\n") < printed.index("--- warm\n")


def test_the_reading_has_its_first_and_last_point_and_one_a_second():
    now_s = 0.0
    reading = ReadingTimes(lambda: now_s)
    for num_read in range(6):
        reading(num_read, 5)
        now_s += REPORT_INTERVAL_S / 2
    assert [num_read for _, num_read in reading.points] == [0, 2, 4, 5]


def test_the_timeline_holds_the_first_request_against_the_later_ones():
    text = timeline(START)
    assert "   9.00 s  ready: kernels; 7 pages" in text
    assert "first request 60.0 ms, 1.50 times the later ones' 40.0 ms" in text
    assert "at ready, GB: total 3.00, free 1.00" in text


START = {
    "runs": "kernels",
    "num_pages": 7,
    "weight_bytes": 10**9,
    "kv_bytes": 10**9,
    "imported_s": 1.0,
    "opened_s": 2.0,
    "read": [[3.0, 0], [4.0, 10**9]],
    "loaded_s": 5.0,
    "ready_s": 9.0,
    "first_request_s": 0.06,
    "later_request_s": 0.04,
    "late_at_ready": None,
    "late_in_the_end": None,
    "memory": {"total": 3 * 10**9, "free": 10**9},
}
