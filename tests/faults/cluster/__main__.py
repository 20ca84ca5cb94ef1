"""`python -m tests.faults.cluster --faults 500 --minutes 25 --seed 1 --brokers 1`: `make faults`.

Exit status 1 if a promise broke.
"""

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path

from shared.observe import log
from tests.faults.cluster.cluster import run_in_loop
from tests.faults.cluster.run import Options, fault_run

SHOWN_FINDINGS = 40


def read_options():
    usual = Options()
    parser = argparse.ArgumentParser(prog="make faults", description="Faults on real processes under load.")
    parser.add_argument("--faults", type=int, default=usual.faults)
    parser.add_argument("--minutes", type=float, default=usual.minutes, help="over which they are spread")
    parser.add_argument("--seed", type=int, default=usual.seed)
    parser.add_argument("--brokers", type=int, choices=(1, 3), default=usual.brokers)
    parser.add_argument("--rate", type=float, default=usual.rate_per_s, help="requests a second")
    parser.add_argument(
        "--protect", action="store_true", help="one process of each kind is never ended, and must not grow"
    )
    parser.add_argument("--out", type=Path, help="file for the whole report as JSON")
    given = parser.parse_args()
    options = Options(
        faults=given.faults,
        minutes=given.minutes,
        seed=given.seed,
        brokers=given.brokers,
        rate_per_s=given.rate,
        protect=given.protect,
    )
    return options, given.out


def table(report):
    """The report as lines."""
    yield f"faults       {report['faults']} in {report['load_s']:.0f} s"
    for name, count in sorted(report["faults_by_kind"].items()):
        yield f"             {count:5d}  {name}"
    late = report["expired_in_spite_of_time"]
    yield f"requests     {report['requests']}, failed {report['failed_share']:.2%} ({late} expired in spite of time)"
    for name, count in sorted(report["requests_by_end"].items()):
        yield f"             {count:5d}  {name}"
    yield f"clients      {report['clients_by_outcome']}, {report['resumes']} resumes"
    yield f"tokens       {report['tokens']}; choices by placements {report['choices_by_placements']}"
    yield f"dead letters {report['dead_letters']}; processes that gave up their lease {report['ends_by_itself']}"
    yield f"{'recovery, seconds':28s} {'met':>6s} {'p50':>7s} {'p99':>7s} {'max':>7s}   alone: met, p50, p99"
    for name, row in report["recovery"].items():
        alone = row["alone"]
        goal = f"   goal {row['within_goal']}, alone {alone['within_goal']}" if "within_goal" in row else ""
        yield (
            f"  {name:26s} {row['met']:6d} {_s(row['p50_s'])} {_s(row['p99_s'])} {_s(row['max_s'])}"
            f"   {alone['met']:5d} {_s(alone['p50_s'])} {_s(alone['p99_s'])}{goal}"
        )


def _s(value):
    return f"{value:7.2f}" if value is not None else "      –"


def main():
    options, out = read_options()
    log.configure("error")  # the harness's own connection to Kafka tells of each broker that it shoots

    def say(text):
        sys.stdout.write(f"{time.strftime('%H:%M:%S')} {text}\n")
        sys.stdout.flush()

    try:
        outcome = run_in_loop(fault_run(options, say))
    except (KeyboardInterrupt, asyncio.CancelledError):
        sys.exit("interrupted: nothing is left running")
    if out is not None:
        out.write_text(json.dumps(outcome.report, indent=1, default=str) + "\n")
    lines = [*table(outcome.report), *(f"BROKEN       {finding}" for finding in outcome.broken[:SHOWN_FINDINGS])]
    if outcome.broken:
        lines.append(f'{len(outcome.broken)} findings. Again: make faults ARGS="{" ".join(sys.argv[1:])}"')
    else:
        lines.append(f"all promises kept; seed {options.seed}")
    sys.stdout.write("\n".join(lines) + "\n")
    sys.exit(1 if outcome.broken else 0)


if __name__ == "__main__":
    main()
