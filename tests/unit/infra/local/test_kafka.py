"""What brokers are told: alone, as one of three, with more ways in than one."""

import pytest

from infra.local import kafka
from infra.local.kafka import Listener, kafka_spec, kafka_specs


@pytest.fixture(autouse=True)
def nothing_is_run(monkeypatch, tmp_path):
    monkeypatch.setattr(kafka, "java_program", lambda: "java")
    monkeypatch.setattr(kafka, "kafka_jars", lambda: tmp_path)
    monkeypatch.setattr(kafka, "_format", lambda *_: None)


def told(folder):
    lines = (folder / "server.properties").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def test_one_broker_is_its_own_controller_and_keeps_the_only_copy(tmp_path):
    (spec,) = kafka_specs(tmp_path, [9092], [9093])
    settings = told(tmp_path)
    assert (spec.name, spec.address) == ("kafka", "127.0.0.1:9092")
    assert settings["controller.quorum.voters"] == "1@127.0.0.1:9093"
    assert (settings["offsets.topic.replication.factor"], settings["min.insync.replicas"]) == ("1", "1")
    assert "-Xmx512m" in spec.command


def test_each_of_three_knows_all_and_one_may_be_missing(tmp_path):
    specs = kafka_specs(tmp_path, [1, 2, 3], [11, 12, 13])
    settings = [told(tmp_path / f"{node_id}") for node_id in (1, 2, 3)]
    assert [spec.name for spec in specs] == ["kafka-1", "kafka-2", "kafka-3"]
    assert [each["node.id"] for each in settings] == ["1", "2", "3"]
    assert {each["controller.quorum.voters"] for each in settings} == {"1@127.0.0.1:11,2@127.0.0.1:12,3@127.0.0.1:13"}
    assert {(each["offsets.topic.replication.factor"], each["min.insync.replicas"]) for each in settings} == {
        ("3", "2")
    }
    assert all("-Xmx256m" in spec.command for spec in specs)


def test_who_asks_on_a_further_listener_is_sent_to_its_advertised_port(tmp_path):
    kafka_spec(tmp_path, 9092, 9093, listeners=[Listener("EDGE0", 7001, 7002)])
    settings = told(tmp_path)
    assert "EDGE0://127.0.0.1:7001" in settings["listeners"]
    assert settings["advertised.listeners"] == "PLAINTEXT://127.0.0.1:9092,EDGE0://127.0.0.1:7002"
