"""The dashboard asks for what is exported, and shows what is; each panel says what it is about."""

import json
import re
import shutil
import subprocess

import pytest
import yaml

from infra.grafana import dashboard
from infra.grafana.dashboard import GRID_COLUMNS, ROWS, Kind
from tests.exported_metrics import asked_for, exported

PANELS = [(row.title, panel) for row in ROWS for panel in row.panels]

NOT_SHOWN = {
    "baton_unknown_fields_total": "of interest to who writes a client, in the API's answer and ingest's log",
    "baton_edge_unknown_fields_total": "as above",
    "baton_answer_tokens_total": "the workers' count of generated tokens is shown, which moves before requests end",
    "baton_jobs_ended_before_total": "follows from an ingest's end or the log's absence, which are shown",
    "baton_late_compiles": "an alert tells of it; a panel of zeros would not be looked at",
    "baton_late_captures": "as above",
    "baton_late_allocations": "as above",
    "baton_edge_blind": "as above",
    "baton_edge_tenants_outdated": "as above",
}


def test_the_file_is_what_the_script_makes():
    assert dashboard.FILE.read_text(encoding="utf-8") == dashboard.text(), "run python -m infra.grafana.dashboard"


@pytest.mark.parametrize(("row", "panel"), PANELS, ids=lambda part: getattr(part, "title", part))
def test_a_panel_explains_itself_and_names_each_series(row, panel):
    assert panel.description.endswith(".")
    assert panel.queries
    assert all(query.legend for query in panel.queries)
    assert len({query.legend for query in panel.queries}) == len(panel.queries)


def test_all_that_is_asked_for_is_exported():
    asked = {name for _, panel in PANELS for query in panel.queries for name in asked_for(query.expr)}
    assert asked
    assert not asked - exported().keys() - {"up", "ALERTS"}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool, of the package prometheus, is not installed")
def test_prometheus_understands_all_that_it_is_asked(tmp_path):
    asked = [query.expr for _, panel in PANELS for query in panel.queries]
    known = [expr.replace("$__rate_interval", "1m").replace("$__range", "1m") for expr in asked]
    rules = [{"record": f"asked:{number}", "expr": expr} for number, expr in enumerate(known)]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    done = subprocess.run(
        ["promtool", "check", "rules", "rules.yml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_labels_that_legends_name_are_kept_by_the_query():
    for _, panel in PANELS:
        for query in panel.queries:
            kept = re.search(r"by \(([^)]*)\)", query.expr)
            named = set(re.findall(r"{{(\w+)}}", query.legend))
            if kept and panel.kind is not Kind.HEATMAP:
                assert named == set(kept[1].split(", ")) - {"le"}, query


def test_all_of_ours_that_is_exported_is_shown_or_left_out_on_purpose():
    asked = {name for _, panel in PANELS for query in panel.queries for name in asked_for(query.expr)}
    shown = {metric for name, metric in exported().items() if name in asked}
    ours = {metric for metric in exported().values() if not metric.startswith("process_")}
    assert ours - shown == NOT_SHOWN.keys()


def test_panels_lie_beside_and_below_one_another():
    taken = set()
    for panel in json.loads(dashboard.text())["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= GRID_COLUMNS
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


def test_grafana_is_given_the_source_that_the_dashboard_names():
    provisioned = yaml.safe_load((dashboard.FILE.parents[1] / "provisioning/datasources/prometheus.yml").read_text())
    (source,) = provisioned["datasources"]
    assert {"type": source["type"], "uid": source["uid"]} == dashboard.DATASOURCE


def test_the_dashboard_is_mounted_where_grafana_looks_for_it():
    infra = dashboard.FILE.parents[2]
    compose = yaml.safe_load((infra.parent / "docker-compose.yml").read_text())
    mounts = dict(volume.split(":")[:2] for volume in compose["services"]["grafana"]["volumes"])
    provisioned = yaml.safe_load((infra / "grafana/provisioning/dashboards/baton.yml").read_text())
    (provider,) = provisioned["providers"]
    assert mounts["./infra/grafana/dashboards"] == provider["options"]["path"]
