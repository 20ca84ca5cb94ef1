from dataclasses import asdict
from io import StringIO

from rich.console import Console

from benchmarks.control_plane.loads import Load
from benchmarks.control_plane.report import print_report
from benchmarks.control_plane.samples import Sample, added, distribution_ms, hops, served_itl_mean_ms, summary

LOAD = Load(name="16", streams=16, rate_per_s=2.5, lead_s=1.0, seconds=4.0, trail_s=1.0, pause_s=0.0, first_index=0)
FULL = Load(name="full", streams=32, rate_per_s=None, lead_s=1.0, seconds=4.0, trail_s=1.0, pause_s=0.0, first_index=0)


def printed(result) -> str:
    console = Console(file=StringIO(), width=200)
    print_report(console, result)
    return console.file.getvalue()


def result(*, of_path=(LOAD,)):
    stamps = {"sent": 10.0, "accepted": 10.003, "decoding": 10.1, "finished": 10.4}
    bare = summary([Sample(1.0, 1.0, 1.010, (0.2, 0.1), 3)], LOAD)
    samples = [Sample(1.0, 1.0, 1.014, (0.2, 0.13), 3, stamps=stamps)]
    path = summary(samples, LOAD) | {
        "failures": {"timeout": 2},
        "itl_mean_by_servers_ms": served_itl_mean_ms(samples, LOAD),
        "hops_ms": hops(samples, LOAD),
        "frame_age_ms": {"edge-0": {"count": 3, "mean": 1.0, "p50": 1.25, "p99": None}},
        "workers": {"decode-0": {"steps": 9, "step_mean_ms": 7.5, "token_rows_mean": 14.25}},
        "cpu_percent": {"decode-0": {"total": 90.0, "loop": 31.0, "busiest_other": 58.0, "rest": 1.0}},
        "log_per_output_token": {"all": {"records": 3, "records_per_token": 0.25, "bytes_per_token": 321.0}},
    }
    return {
        "bare": {
            "loads": [asdict(LOAD), asdict(FULL)],
            "results": {"16": bare | {"cpu_percent": 99.0, "decode_step": {"step_ms": distribution_ms([0.12])}}},
        },
        "path": {
            "results": {load.name: path for load in of_path},
            "log_hop": {"append_to_read_ms": distribution_ms([0.002]), "append_to_ack_ms": distribution_ms([0.001])},
        },
        "added": {"16": added(path, bare, 120.0)},
        "share_of_saturation": {"16": 0.4, "full": None},
    }


def test_what_was_measured_stands_in_the_tables():
    text = printed(result())
    rows = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in text.splitlines() if "│" in line}
    assert rows["requests a second"] == "2.500"
    assert rows["TTFT ms p50 added"] == "4.00"
    assert rows["ITL ms mean, bare"] == "150.00"
    assert rows["ITL, % more than bare"] == "10.00"
    assert rows["ITL, % more than decode steps alone"] == "37.50"
    assert rows["step ms mean (rows), decode workers"] == "7.50 (14.25)"
    assert rows["frame age ms p50 / p99"] == "1.25 / -"
    assert rows["failures"] == "2"
    assert rows["sent → accepted"] == "3.00 / 3.00"
    assert rows["decode-0"] == "90 (loop 31, busiest other 58)"
    assert rows["all"] == "0.250 / 321"
    assert "append to read 2.00 / 2.00" in text


def test_a_run_whose_path_failed_is_printed_as_far_as_it_went():
    broken = result(of_path=())
    broken["path"]["log_hop"] = None
    assert "control plane" in printed(broken)
