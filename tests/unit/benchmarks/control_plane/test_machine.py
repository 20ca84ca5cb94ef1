from benchmarks.control_plane.machine import CpuTimes, cpu_shares


def test_shares_of_a_process_are_split_by_thread():
    before = {"decode-0": CpuTimes(7, 10.0, {7: 4.0, 8: 5.0, 9: 1.0}), "edge-0": CpuTimes(5, 0.0, {5: 0.0})}
    after = {
        "decode-0": CpuTimes(7, 13.0, {7: 4.5, 8: 7.0, 9: 1.1, 10: 0.4}),
        "edge-0": CpuTimes(6, 1.0, {6: 1.0}),
        "client-0": CpuTimes(11, 1.0, {11: 1.0}),
    }
    assert cpu_shares(before, after, 10.0) == {
        "decode-0": {"total": 30.0, "loop": 5.0, "busiest_other": 20.0, "rest": 5.0}
    }, "a process that began in between, or anew, is left out"
