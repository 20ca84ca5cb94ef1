"""One HTML page about one run, which needs nothing but itself: no network, no script."""

from collections.abc import Mapping
from importlib.resources import files

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from loadgen.measure import Record, attainment
from loadgen.page import charts
from loadgen.page.latency import DEFINITIONS, Distribution, distributions_of, hand_off_of
from loadgen.page.overview import LIMIT_NAMES, cards_of, facts_of, failures_of, findings_of, limits_text
from loadgen.page.slo import slo_grid_of
from loadgen.page.stages import KINDS, StageKind, stages_page_of
from loadgen.page.timeline import flow_of, timeline_of
from loadgen.page.wording import counted, percent_text, seconds_text
from loadgen.report import TITLES
from loadgen.saved import SavedResult

TEMPLATE = "page.html.jinja"

CURVES = {"ttft": "c-ttft", "tpot": "c-tpot", "itl": "c-itl", "e2el": "c-e2el", "handoff": "c-handoff"}

KIND_NAMES = {
    StageKind.LATE: "client late",
    StageKind.HOP: "between services",
    StageKind.QUEUE: "waits for prefill",
    StageKind.PREFILL: "prefill",
    StageKind.HANDING_ON: "token handed on",
    StageKind.TRANSFER: "KV still to come",
    StageKind.DECODE: "decode",
    StageKind.UNKNOWN_WAIT: "until the first token",
    StageKind.UNKNOWN_STREAM: "tokens come",
}


def render_page(saved: SavedResult) -> bytes:
    """The page in UTF-8."""
    records = saved.records()
    found = distributions_of(records, saved.slo)
    hand_off = hand_off_of(records)
    stages = stages_page_of(records, saved.started_unix)
    timeline = timeline_of(records, saved.duration)
    grid = slo_grid_of(records, saved.slo)
    page = (
        _environment()
        .get_template(TEMPLATE)
        .render(
            saved=saved,
            num_requests=len(records),
            num_completed=sum(record.completed for record in records),
            facts=facts_of(saved),
            findings=findings_of(saved, records, found, hand_off, stages),
            cards=cards_of(saved, records, found),
            timeline=timeline,
            timeline_chart=charts.timeline_chart(timeline),
            flow_chart=charts.flow_chart(flow_of(records, timeline.end_s), timeline.end_s),
            distributions=found,
            tail_charts=_tail_charts(found),
            titles={**TITLES, "lateness": "send lateness (all sends)"},
            definitions=DEFINITIONS,
            hand_off=hand_off,
            hand_off_chart=charts.hand_off_chart(hand_off),
            gap_places_chart=charts.gap_places_chart(hand_off),
            stages=stages,
            kinds=_kinds(records),
            waterfall_charts={
                "TTFT": charts.waterfall_chart(stages.by_ttft, "The slowest requests by TTFT"),
                "E2E": charts.waterfall_chart(stages.by_e2el, "The slowest requests by E2E"),
            },
            limits=limits_text(saved.slo),
            limit_names=LIMIT_NAMES,
            attained=attainment(records, saved.slo),
            slo_chart=None if grid is None else charts.slo_chart(grid),
            failures=failures_of(records),
        )
    )
    return page.encode()


def _tail_charts(found: Mapping[str, Distribution]) -> dict[str, Markup]:
    return {name: charts.tail_chart(found[name], style) for name, style in CURVES.items() if found[name].points}


def _kinds(records: list[Record]) -> list[tuple[StageKind, str]]:
    """The legend of stages: with stamps all that they tell apart, without them the client's own two."""
    by_stamps = any(record.stamps for record in records if record.completed)
    stamped = list(dict.fromkeys(kind for kind, _ in KINDS.values() if kind is not StageKind.UNKNOWN_STREAM))
    unstamped = [StageKind.LATE, StageKind.UNKNOWN_WAIT, StageKind.UNKNOWN_STREAM]
    return [(kind, KIND_NAMES[kind]) for kind in (stamped if by_stamps else unstamped)]


def _environment() -> Environment:
    environment = Environment(
        loader=FunctionLoader(_source),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(seconds=seconds_text, percent=percent_text, counted=counted)
    return environment


def _source(name: str) -> str:
    return files("loadgen.page").joinpath(name).read_text(encoding="utf-8")
