"""What docker-compose.yml, docker-compose.gpu.yml, .env and the Dockerfile promise, read without a docker engine."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.ingest.settings import IngestProcessSettings
from services.stream_out.settings import Settings as EdgeSettings
from shared.worker.settings import WorkerSettings

ROOT = Path(__file__).parents[4]
DOCKERFILE = (ROOT / "infra/docker/Dockerfile").read_text()
COMPOSE_TEXT = (ROOT / "docker-compose.yml").read_text()
COMPOSE = yaml.safe_load(COMPOSE_TEXT)
GPU_TEXT = (ROOT / "docker-compose.gpu.yml").read_text()
GPU = yaml.safe_load(GPU_TEXT)
KAFKA_TEXT = (ROOT / "docker-compose.kafka.yml").read_text()
KAFKA = yaml.safe_load(KAFKA_TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
BATON_SERVICES = ("ingest", "edge", "prefill", "decode")
ONE_SHOT = ("secrets", "topics", "model")

SETTING = re.compile(r"(#?)([A-Z][A-Z0-9_]*)=(.*)")
ENV_LINES = (ROOT / ".env").read_text().splitlines()
ENV = {match[2]: match[3] for line in ENV_LINES if (match := SETTING.fullmatch(line))}
ACTIVE = {match[2] for line in ENV_LINES if (match := SETTING.fullmatch(line)) and not match[1]}

FIELDS = {
    f"BATON_{name.upper()}": field
    for settings in (IngestProcessSettings, EdgeSettings, WorkerSettings)
    for name, field in settings.model_fields.items()
}


def baton_variables(text: str) -> set[str]:
    return set(re.findall(r"\bBATON_[A-Z_]+", text))


def test_env_file_lists_every_setting_of_the_services():
    assert FIELDS.keys() == baton_variables("\n".join(ENV))


def test_no_setting_stands_in_the_env_file_twice():
    """The last one would count, and people change the first that they find."""
    names = [match[2] for line in ENV_LINES if (match := SETTING.fullmatch(line))]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize(
    "text", [COMPOSE_TEXT, GPU_TEXT, KAFKA_TEXT, *(p.read_text() for p in ROOT.glob("infra/docker/worker.sh"))]
)
def test_variables_of_the_composition_are_settings_of_a_service(text: str):
    assert baton_variables(text) <= FIELDS.keys()


def test_every_setting_is_explained():
    explained = False
    for line in ENV_LINES:
        if SETTING.fullmatch(line):
            assert explained, f"no comment above {line}"
        else:
            explained = line.startswith("# ") and not line.startswith("# ---")


@pytest.mark.parametrize("name", sorted(FIELDS.keys() - ACTIVE))
def test_a_default_that_is_shown_is_the_one_of_the_service(name: str):
    shown, field = ENV[name], FIELDS[name]
    if shown == "":
        assert field.default in ("", None)
    else:
        # An edge answers on a port of its own where nothing is set; the others take a free one.
        fields = [s.model_fields[name.removeprefix("BATON_").lower()] for s in owners(name)]
        assert {str(each.get_default(call_default_factory=True)) for each in fields} >= {shown}


def owners(name: str) -> list[Any]:
    field = name.removeprefix("BATON_").lower()
    return [s for s in (IngestProcessSettings, EdgeSettings, WorkerSettings) if field in s.model_fields]


def test_active_settings_are_accepted(monkeypatch: pytest.MonkeyPatch):
    for name in FIELDS:
        monkeypatch.delenv(name, raising=False)
    for name in ACTIVE & FIELDS.keys():
        monkeypatch.setenv(name, ENV[name])
    for settings in (IngestProcessSettings, EdgeSettings, WorkerSettings):
        assert str(settings.read().model) == ENV["BATON_MODEL"]


def test_variables_that_the_files_interpolate_are_in_the_env_file_with_the_same_default():
    for name, default in re.findall(r"\$\{([A-Z_]+)(?::-([^}]*))?\}", COMPOSE_TEXT + GPU_TEXT + KAFKA_TEXT):
        assert ENV[name] == default
        assert name in ACTIVE


def test_images_have_a_tag():
    images = {name: service["image"] for name, service in SERVICES.items()}
    images |= {f"FROM {image}": image for image in re.findall(r"^FROM (\S+:\S+|\S+/\S+)", DOCKERFILE, re.MULTILINE)}
    for name, image in images.items():
        tag = image.partition(":")[2]
        assert re.match(r"v?\d+\.\d+\.\d+", tag), f"{name}: {image}"


def test_images_of_baton_have_its_version_and_a_target():
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    stages = set(re.findall(r"^FROM \S+ AS (\S+)", DOCKERFILE, re.MULTILINE))
    assert version is not None
    for name in (*BATON_SERVICES, *ONE_SHOT):
        assert SERVICES[name]["image"].endswith(f":{version[1]}")
        assert SERVICES[name]["build"]["target"] in stages


def test_kafka_is_the_version_of_the_locked_jars():
    assert f"<version>{SERVICES['kafka']['image'].partition(':')[2]}</version>" in (
        (ROOT / "infra/kafka/pom.xml").read_text()
    )


def test_ports_are_published_on_the_loopback_address_by_default():
    services = [*SERVICES.values(), *KAFKA["services"].values()]
    ports = [port for service in services for port in service.get("ports", [])]
    assert ports
    for port in ports:
        assert port.startswith("${PUBLISH_ADDRESS:-127.0.0.1}:")
    assert ENV["PUBLISH_ADDRESS"] == "127.0.0.1"


def test_only_what_people_look_at_is_published_unless_it_is_asked_for():
    assert {name for name in SERVICES if "ports" in SERVICES[name]} == {"edge", "prometheus", "grafana"}
    assert list(KAFKA["services"]) == ["kafka"]


def test_nobody_but_the_broker_speaks_to_its_controller():
    for services in (SERVICES, KAFKA["services"]):
        assert "CONTROLLER://127.0.0.1:9093" in services["kafka"]["environment"]["KAFKA_LISTENERS"]


def test_redis_lets_in_who_has_the_password_that_was_made_for_it():
    redis = SERVICES["redis"]
    assert "--aclfile /secrets/users.acl" in redis["command"]
    for name in ("redis", *BATON_SERVICES):
        assert "${SECRETS:-secrets}:/secrets:ro" in SERVICES[name]["volumes"]
        assert SERVICES[name]["depends_on"]["secrets"] == {"condition": "service_completed_successfully"}
    for name in BATON_SERVICES:
        assert SERVICES[name]["environment"]["BATON_REDIS_USER"] == "baton"
        assert SERVICES[name]["environment"]["BATON_REDIS_PASSWORD_FILE"] == "/secrets/redis-password"
    assert "install --directory --owner baton --group baton /models /secrets" in DOCKERFILE
    assert SERVICES["secrets"]["network_mode"] == "none"


def test_no_secret_stands_in_the_files():
    for text in (COMPOSE_TEXT, GPU_TEXT, KAFKA_TEXT, "\n".join(ENV_LINES)):
        for name, value in re.findall(r"^ *(\w*(?:PASSWORD|SECRET|API_KEY)\w*)[=:] ?(.+)", text, re.MULTILINE):
            assert name.endswith("_FILE") or (name, value) == ("SECRETS", "secrets"), name


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_no_service_can_take_the_whole_host(name: str):
    service = SERVICES[name]
    assert service["pids_limit"] == 1024
    # How much the model takes is its owner's to know.
    assert ("mem_limit" in service) is (name not in {"prefill", "decode", *ONE_SHOT})


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_file_systems_are_read_only_where_the_image_allows_it(name: str):
    assert SERVICES[name].get("read_only", False) is (name not in {"kafka", "grafana"})


@pytest.mark.parametrize("service", ["prefill", "decode", "ingest"])
def test_nothing_keeps_a_service_from_being_scaled(service: str):
    assert not SERVICES[service].keys() & {"container_name", "hostname", "ports"}


def test_nothing_runs_as_root():
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:]
    users = {stage.split()[2]: re.findall(r"^USER (\S+)", stage, re.MULTILINE)[-1:] for stage in stages}
    for name in (*BATON_SERVICES, *ONE_SHOT):
        assert users[SERVICES[name]["build"]["target"]] == ["baton"]
    # Redis' image starts as root; those of Kafka, Prometheus and Grafana name a user themselves.
    assert SERVICES["redis"]["user"] == "redis"
    for name, service in SERVICES.items():
        assert service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"], name


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_services_are_watched_and_started_again(name: str):
    service = SERVICES[name]
    if name in ONE_SHOT:
        assert service["restart"] == "no"
    else:
        assert service["restart"] == "unless-stopped"
        assert service["healthcheck"]["test"][0] == "CMD"


def test_a_stopped_worker_may_drain_to_its_end():
    grace_s = int(ENV["WORKER_STOP_GRACE"].removesuffix("s"))
    assert grace_s >= WorkerSettings.model_fields["drain_s"].default + 10
    for name in ("prefill", "decode", "edge"):
        assert SERVICES[name]["stop_grace_period"] == f"${{WORKER_STOP_GRACE:-{grace_s}s}}"


@pytest.mark.parametrize("name", BATON_SERVICES)
def test_kafka_and_redis_stop_after_those_who_drain_into_them(name: str):
    # A composition stops in the order of direct dependencies; that on the topics does not count, they have ended.
    assert {"kafka", "redis"} <= SERVICES[name]["depends_on"].keys()


def test_what_must_outlive_a_container_lies_in_a_volume():
    mounts = {name: [str(volume).split(":") for volume in SERVICES[name].get("volumes", [])] for name in SERVICES}
    assert ["kafka", "/var/lib/kafka/data"] in mounts["kafka"]
    assert ["redis", "/data"] in mounts["redis"]
    assert {"kafka", "redis", "models"} <= COMPOSE["volumes"].keys()


def test_mounted_files_exist():
    for service in SERVICES.values():
        for volume in service.get("volumes", []):
            if volume.startswith("./"):
                assert (ROOT / volume.split(":")[0]).exists(), volume


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_workers_on_gpus_can_share_memory_by_cuda_ipc(role: str):
    worker = GPU["services"][role]
    assert (worker["ipc"], worker["pid"]) == ("host", "host")
    assert worker["ulimits"]["memlock"] == {"soft": -1, "hard": -1}
    (devices,) = worker["deploy"]["resources"]["reservations"]["devices"]
    assert devices["count"] == -1  # all of them; the variable masks
    assert worker["environment"]["BATON_DEVICE"] == "cuda"
    assert worker["environment"]["CUDA_VISIBLE_DEVICES"].startswith(f"${{{role.upper()}_GPU")


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_kernels_that_a_worker_compiles_outlive_its_container(role: str):
    folder = GPU["services"][role]["environment"]["TRITON_CACHE_DIR"]
    assert f"kernels:{folder}" in GPU["services"][role]["volumes"]
    assert "kernels" in GPU["volumes"]
    (worker,) = re.findall(r"^FROM \S+ AS worker$(.*?)^USER baton", DOCKERFILE, re.MULTILINE | re.DOTALL)
    assert re.search(r"apt-get install .* gcc libc6-dev", worker)  # Triton calls a C compiler
    # A new volume takes the owner of the image's folder.
    assert f"install --directory --owner baton --group baton {folder}" in worker


def test_no_key_at_the_top_is_one_that_docker_compose_1_29_refuses():
    for file in (COMPOSE, GPU, KAFKA):
        assert {key for key in file if not key.startswith("x-")} <= {"services", "volumes"}
