from rich.console import Console

from benchmarks.policies import (
    BASE_WORKERS,
    LOADS,
    LOOSE,
    OWN_SPLIT,
    TIGHT,
    Bench,
    Case,
    Look,
    Search,
    Split,
    cases_of,
    find_splits,
    problems_of,
    run_cases,
    table_of,
    workloads_of,
)
from loadgen.simulator.hardware import Hardware


class OneProcess:
    """A crew of this process."""

    def __init__(self, bench):
        self.bench = bench
        self.tasks = []

    def run(self, tasks):
        self.tasks += tasks
        return {task: self.bench.run(task) for task in tasks}


def bench_of(cases, num_rows):
    return Bench(workloads_of(cases, None, num_rows), Hardware.read("h200-8b"), 0.9)


def test_a_case_is_searched_and_looked_at_and_told():
    case = Case("mooncake", LOOSE, 4)
    bench = bench_of([case], 40)
    policies = ["least-loaded", "prefix-affinity", "ours", OWN_SPLIT, "no-fetch"]
    crew = OneProcess(bench)
    (report,) = run_cases([case], {case: policies}, range(2), bench, crew, {case: Split(2, 1)})
    assert (report["num_prefill"], report["policies"][OWN_SPLIT]["num_prefill"]) == (2, 1)
    assert report["best_simple"] in policies[:2]
    assert [len(report["policies"][name]["seeds"]) for name in policies] == [2, 2, 2, 2, 2]
    assert all(row["goodput_per_gpu_s"]["mean"] > 0 for row in report["policies"].values())
    assert set(report["policies"]["ours"]["loads"]) == set(map(str, LOADS))
    assert not report["policies"]["no-fetch"]["loads"], "parts taken away are searched alone"
    looks = [task for task in crew.tasks if isinstance(task, Look)]
    assert len({task.speed for task in looks}) == len(LOADS), "all policies at the same loads"
    console = Console(width=170, record=True)
    console.print(table_of(report, None))
    console.print(table_of(report, LOADS[0]))
    assert "no-fetch" in console.export_text()


def test_the_split_is_the_one_at_which_the_better_simple_policy_bears_most():
    case, other = Case("conv", TIGHT, 16), Case("conv", LOOSE, 4)

    class Crew(OneProcess):
        def run(self, tasks):
            assert {task.case.num_workers for task in tasks} == {BASE_WORKERS}
            results = {}
            for task in tasks:
                assert isinstance(task, Search)
                best = {"least-loaded": 3, "prefix-affinity": 5, "ours": 2}[task.row]
                results[task] = [Borne(10 - abs(task.num_prefill - best) + (best == 5))]
            return results

    class Borne:
        def __init__(self, per_gpu_s):
            self.per_gpu_s = per_gpu_s

    bench = bench_of([case._replace(num_workers=8), other._replace(num_workers=8)], 40)
    assert find_splits([case, other], bench, Crew(bench)) == {case: Split(10, 4), other: Split(2, 1)}


def report_of(ours, other, *, hit=0.2, attainments=(0.9, 0.9)):
    def row(ratio, attainment):
        return {
            "to_best_simple": {"mean": ratio[0], "half": ratio[1]},
            "hit_rate": {"mean": hit, "half": 0.0},
            "loads": {"0.7": [{"attainment": attainment}, {"attainment": attainment + 0.001}]},
        }

    policies = {"random": row(other, attainments[1]), "ours": row(ours, attainments[0])}
    return {"case": "x", "best_simple": "random", "lru_hit_rate": 0.2, "policies": policies}


def test_ours_is_behind_only_beyond_the_interval():
    assert problems_of(report_of((0.99, 0.02), (1.0, 0.0))) == []
    assert problems_of(report_of((0.97, 0.02), (1.0, 0.0))) == ["x: goodput 0.97±0.02 of random's"]
    assert problems_of(report_of((1.2, 0.0), (1.0, 0.0), hit=0.18)) == ["x: hit rate 18.0%, one LRU 20.0%"]
    assert problems_of(report_of((1.2, 0.0), (1.0, 0.0), attainments=(0.8, 0.9))) == [
        "x: at load 0.7 10.00% fewer keep the goals than with random"
    ]


def test_cases_are_chosen_by_name():
    assert [case.name for case in cases_of(["code", "conv"], [4, 8], "conv 0.5s.* 8 w")] == ["conv 0.5s/30ms 8 workers"]
