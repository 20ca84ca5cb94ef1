"""Prometheus finds every process of the stack, and its alerts are about metrics that exist."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from infra.local.composition import SERVICES
from tests.exported_metrics import asked_for, exported, families

FOLDER = Path(__file__).parents[4] / "infra" / "prometheus"
CONFIG = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
RULES = yaml.safe_load((FOLDER / "rules.yml").read_text())["groups"][0]["rules"]
TESTS = yaml.safe_load((FOLDER / "rules_test.yml").read_text())["tests"]

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool, of the package prometheus, is not installed"
)


def promtool(*arguments):
    done = subprocess.run(["promtool", *arguments], cwd=FOLDER, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_the_config_and_the_rules_are_ones_that_prometheus_takes():
    promtool("check", "config", "prometheus.yml")


@needs_promtool
def test_each_alert_comes_when_it_should_and_not_before():
    promtool("test", "rules", "rules_test.yml")


def test_every_service_is_scraped_however_many_processes_it_has():
    (found,) = CONFIG["scrape_configs"][0]["dns_sd_configs"]
    assert sorted(found["names"]) == sorted(service.name for service in SERVICES)
    services = yaml.safe_load((FOLDER.parents[1] / "docker-compose.yml").read_text())["services"]
    assert {services[name]["environment"]["BATON_HTTP_PORT"] for name in found["names"]} == {found["port"]}


def test_no_label_is_one_that_prometheus_sets_itself():
    """It would be renamed on its way in, and whoever asks by it would get the scraped process's."""
    taken = {"job", "instance"} | {rule["target_label"] for rule in CONFIG["scrape_configs"][0]["relabel_configs"]}
    labels = {(family.name, label) for family in families() for sample in family.samples for label in sample.labels}
    assert ("baton_placements_lost", "lost") in labels
    assert not {(name, label) for name, label in labels if label in taken}


def test_alerts_ask_for_what_is_exported():
    asked = {name for rule in RULES for name in asked_for(rule["expr"])}
    assert asked
    assert not asked - exported().keys() - {"up"}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_says_what_to_do_and_has_both_examples(rule):
    assert rule["annotations"].keys() == {"summary", "description"}
    examples = [
        bool(example.get("exp_alerts"))
        for test in TESTS
        for example in test["alert_rule_test"]
        if example["alertname"] == rule["alert"]
    ]
    assert set(examples) == {True, False}


def test_series_of_the_examples_have_names_that_exist():
    names = {re.match(r"[\w:]+", series["series"])[0] for test in TESTS for series in test["input_series"]}
    assert not names - exported().keys() - {"up"}
