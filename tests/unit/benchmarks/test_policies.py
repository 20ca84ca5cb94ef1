import json
from dataclasses import asdict

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from benchmarks.policies import Asked, Bench, main
from benchmarks.policy_cases import LOOSE, OWN_SPLIT, TIGHT, Case, Split, cases_of, scaled, workloads_of
from benchmarks.policy_report import LOADS, Borne, problems_of, table_of
from benchmarks.policy_runs import Run, Runs, Simulator, Threads
from loadgen.simulator.hardware import Hardware
from shared.errors import StartupError

MADE_BY = {"commit": "c", "traces": "60"}


@pytest.fixture
def threads():
    threads = Threads(2)
    yield Asked(threads, 0)
    threads.end()


class Here:
    """Runs of this process."""

    def __init__(self, simulator):
        self.simulator = simulator
        self.done = []

    def outcome(self, run):
        self.done.append(run)
        return self.simulator.outcome(run)


def simulator_of(*streams):
    return Simulator(workloads_of(streams, None), Hardware.read("h200-8b"))


def test_a_case_is_searched_and_looked_at_and_told(threads):
    case = Case("mooncake", LOOSE, 4)
    simulator = simulator_of(case.stream(40))
    runs = Here(simulator)
    rows = ["least-loaded", "prefix-affinity", "ours", OWN_SPLIT, "no-fetch"]
    report = Bench(simulator, runs, 0.9, 40).report(case, Split(2, 1), rows, range(2), threads)
    prefill = {name: row["num_prefill"] for name, row in report["policies"].items()}
    assert prefill == {"least-loaded": 2, "prefix-affinity": 2, "ours": 2, OWN_SPLIT: 1, "no-fetch": 1}
    assert report["best_simple"] in rows[:2]
    assert [len(report["policies"][name]["seeds"]) for name in rows] == [2, 2, 2, 2, 2]
    assert all(row["goodput_per_gpu_s"]["mean"] > 0 for row in report["policies"].values())
    assert report["policies"][OWN_SPLIT]["to_own_split"] == {"mean": 1, "half": 0}
    assert set(report["policies"]["ours"]["loads"]) == set(map(str, LOADS))
    assert not report["policies"]["no-fetch"]["loads"], "parts taken away are searched alone"
    random_or_not = {run.policy for run in runs.done}
    assert random_or_not == {"least-loaded", "prefix-affinity", "ours", "no-fetch"}
    console = Console(width=190, record=True)
    console.print(table_of(report, None))
    console.print(table_of(report, LOADS[0]))
    assert "no-fetch" in console.export_text()


def test_the_split_is_the_one_at_which_the_better_simple_policy_bears_most(threads):
    class Known(Bench):
        def search(self, case, stream, num_prefill, row, seed, first_speed):
            best = {"least-loaded": 3, "prefix-affinity": 5, "ours": 2}[row]
            return Borne(1.0, 10 - abs(num_prefill - best) + (best == 5), True, 1, None)

    split = Known(None, None, 0.9, None).find_split(Case("conv", TIGHT, 8), threads)
    assert (split, scaled(split, 16), scaled(split, 4)) == (Split(5, 2), Split(10, 4), Split(2, 1))


A_CASE = Case("code", LOOSE, 2, "25 Gbit/s")
A_RUN = Run(A_CASE.stream(20), 2.0, 0.1, 3.1e9, 1, 1, "least-loaded", 0, 1.0)


# Whoever else has threads left in this process.
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_run_that_the_file_has_is_not_done_again(tmp_path):
    path = tmp_path / "runs"
    simulator = simulator_of(A_RUN.stream)
    first = Runs(simulator, 1, path, MADE_BY)
    outcome = first.outcome(A_RUN)
    first.end()
    assert outcome == simulator.outcome(A_RUN)
    path.write_text(path.read_text() + '[["cut sho')  # by a kill
    again = Runs(Simulator({}, simulator.hardware), 1, path, MADE_BY)
    assert again.outcome(A_RUN) == outcome
    with pytest.raises(RuntimeError, match="KeyError"):
        again.outcome(A_RUN._replace(seed=1))
    again.end()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        MADE_BY,
        [[list(A_RUN.stream), *A_RUN[1:]], json.loads(json.dumps(asdict(outcome)))],
    ]
    with pytest.raises(StartupError, match="was made by"):
        Runs(simulator, 1, path, MADE_BY | {"commit": "d"})


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
    assert cases_of(["code", "conv"], [8, 4], "Gbit") == [Case("code", LOOSE, 8, "25 Gbit/s")]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--only", "Gbit", "--sizes", "4"], "--only Gbit: no case has it in its name"),
        (["--only", "("], "--only (: missing )"),
        (["--sizes", "8,x"], "--sizes 8,x: it must be some whole numbers from 1 on"),
        (["--prefill", "6"], "--prefill 6: it must be 2 whole numbers from 1 on"),
        (["--policies", "best"], "--policy best: it is one of round-robin"),
        (["--profile", "none"], "--profile none: neither a profile"),
    ],
)
def test_wrong_options_are_refused_by_name(options, complaint, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    app = typer.Typer()
    app.command()(main)
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 2
    assert complaint in result.stderr
