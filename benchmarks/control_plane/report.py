"""The figures for people; the JSON file has them all."""

from typing import Any

from rich.console import Console
from rich.table import Table


def print_report(console: Console, result: dict[str, Any]) -> None:
    """The figures of every load side by side, then the hops and the processors' shares."""
    loads = list(result["path"]["results"])
    console.print(_comparison(result, loads))
    console.print(_by_load("hops, ms: p50 / p99", {name: _hops(result, name) for name in loads}))
    console.print(_by_load("percent of one core", {name: _cpu(result, name) for name in loads}))
    console.print(_by_load("log: records / bytes per output token", {name: _log(result, name) for name in loads}))
    hop = result["path"]["log_hop"]
    if hop is None:
        return
    console.print(
        f"the log's own hop, ms: append to read {_two(hop['append_to_read_ms'])}, "
        f"append to acknowledgement {_two(hop['append_to_ack_ms'])}"
    )


def _comparison(result: dict[str, Any], loads: list[str]) -> Table:
    table = Table("", *(f"load {name}" for name in loads), title="control plane")
    bare, path, added = result["bare"]["results"], result["path"]["results"], result["added"]
    for title, cells in {
        "requests a second": [_rate(load) for load in result["bare"]["loads"] if load["name"] in loads],
        "share of the saturating rate": [_number(result["share_of_saturation"][name]) for name in loads],
        "requests measured, bare / path": [f"{bare[n]['requests']} / {path[n]['requests']}" for n in loads],
        "streams in flight, bare / path": [f"{bare[n]['mean_streams']} / {path[n]['mean_streams']}" for n in loads],
        "TTFT ms p50 / p99, bare": [_two(bare[name]["ttft_ms"]) for name in loads],
        "TTFT ms p50 / p99, path": [_two(path[name]["ttft_ms"]) for name in loads],
        "TTFT ms p50 added": [_number(added[name]["ttft_p50_ms"]) for name in loads],
        "ITL ms mean, decode steps alone": [_number(bare[name]["decode_step"]["step_ms"]["mean"]) for name in loads],
        "ITL ms mean, bare": [_number(bare[name]["itl_mean_ms"]) for name in loads],
        "ITL ms mean, path at the client": [_number(path[name]["itl_mean_ms"]) for name in loads],
        "ITL ms mean, path by the servers": [_number(path[name]["itl_mean_by_servers_ms"]) for name in loads],
        "step ms mean (rows), decode workers": [_steps(path[name], "decode") for name in loads],
        "step ms mean (rows), prefill workers": [_steps(path[name], "prefill") for name in loads],
        "hand-off gap ms p50 / p99": [_two(path[name]["second_token_ms"]) for name in loads],
        "ITL, % more than decode steps alone": [
            _number(added[name]["itl_mean_percent_of_bare_decode"]) for name in loads
        ],
        "ITL, % more than bare": [_number(added[name]["itl_mean_percent_of_bare"]) for name in loads],
        "gap ms p50 / p99, bare": [_two(bare[name]["gap_ms"]) for name in loads],
        "gap ms p50 / p99, path": [_two(path[name]["gap_ms"]) for name in loads],
        "output tokens/s, bare / path": [
            f"{bare[n]['output_tokens_per_s']} / {path[n]['output_tokens_per_s']}" for n in loads
        ],
        "frame age ms p50 / p99": [_ages(path[name]) for name in loads],
        "send lateness ms p50 / p99": [_two(path[name]["send_lateness_ms"]) for name in loads],
        "failures": [str(sum(path[name]["failures"].values())) for name in loads],
    }.items():
        table.add_row(title, *cells)
    return table


def _by_load(title: str, columns: dict[str, dict[str, str]]) -> Table:
    table = Table("", *(f"load {name}" for name in columns), title=title)
    for row in dict.fromkeys(row for column in columns.values() for row in column):
        table.add_row(row, *(column.get(row, "") for column in columns.values()))
    return table


def _hops(result: dict[str, Any], load: str) -> dict[str, str]:
    return {name: _two(times) for name, times in result["path"]["results"][load]["hops_ms"].items()}


def _cpu(result: dict[str, Any], load: str) -> dict[str, str]:
    shares = result["path"]["results"][load]["cpu_percent"]
    cells = {
        name: f"{share['total']:.0f} (loop {share['loop']:.0f}, busiest other {share['busiest_other']:.0f})"
        for name, share in shares.items()
    }
    return {"bare": f"{result['bare']['results'][load]['cpu_percent']:.0f}", **cells}


def _log(result: dict[str, Any], load: str) -> dict[str, str]:
    topics = result["path"]["results"][load]["log_per_output_token"]
    return {name: f"{of['records_per_token']:.3f} / {of['bytes_per_token']:.0f}" for name, of in topics.items()}


def _ages(path: dict[str, Any]) -> str:
    return ", ".join(_two(age) for age in path.get("frame_age_ms", {}).values()) or "not told"


def _steps(path: dict[str, Any], role: str) -> str:
    workers = [worker for name, worker in path["workers"].items() if name.startswith(role)]
    return ", ".join(f"{_number(of['step_mean_ms'])} ({_number(of['token_rows_mean'])})" for of in workers)


def _rate(load: dict[str, Any]) -> str:
    return f"{load['rate_per_s']:.3f}" if load["rate_per_s"] else f"closed, {load['streams']}"


def _two(times: dict[str, Any] | None) -> str:
    return f"{_number(times['p50'])} / {_number(times['p99'])}" if times else "-"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
