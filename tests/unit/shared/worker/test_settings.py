import pytest

from services.decode.settings import DecodeSettings
from shared.errors import StartupError
from shared.worker.peers import LinkFloor
from shared.worker.settings import WorkerSettings


@pytest.fixture
def read(monkeypatch):
    for name in {*WorkerSettings.model_fields}:
        monkeypatch.delenv(f"BATON_{name.upper()}", raising=False)

    def read(kind=WorkerSettings, **variables):
        monkeypatch.setenv("BATON_MODEL", "/models/m")
        for name, value in variables.items():
            monkeypatch.setenv(f"BATON_{name.upper()}", value)
        return kind.read()

    return read


def test_a_cpu_gets_small_steps_and_plain_kernels(read):
    settings = read()
    assert (settings.kernels, settings.num_pages) == ("torch", 256)
    assert (settings.max_running, settings.max_batch_tokens) == (32, 512)


def test_a_gpu_gets_large_steps_and_the_pages_that_fit(read):
    settings = read(device="cuda")
    assert (settings.kernels, settings.num_pages) == ("triton", None)
    assert (settings.max_running, settings.max_batch_tokens) == (256, 8192)


def test_a_decode_worker_on_a_gpu_gets_shorter_steps(read):
    settings = read(DecodeSettings, device="cuda")
    assert (settings.max_running, settings.max_batch_tokens) == (256, 2048)
    assert (
        read(DecodeSettings, device="cpu").max_batch_tokens == WorkerSettings.model_fields["max_batch_tokens"].default
    )


def test_what_the_environment_says_counts_on_every_device(read):
    settings = read(device="cuda", kernels="torch", num_pages="9", max_batch_tokens="1024")
    assert (settings.kernels, settings.num_pages, settings.max_batch_tokens) == ("torch", 9, 1024)
    assert settings.max_running == 256


def test_an_empty_variable_counts_as_not_set(read):
    settings = read(device="cuda", max_batch_tokens="", num_pages="", dtype="")
    assert (settings.max_batch_tokens, settings.num_pages, settings.dtype) == (8192, None, None)


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"device": "cuda:1"}, "BATON_DEVICE"),
        ({"kernels": "fast"}, "BATON_KERNELS"),
        ({"kernels": "triton"}, "BATON_KERNELS is triton.*BATON_DEVICE"),
        ({"gpu_memory_share": "1.5"}, "BATON_GPU_MEMORY_SHARE"),
        ({"max_running": "600"}, "BATON_MAX_BATCH_TOKENS, 512.*BATON_MAX_RUNNING, 600"),
        ({"num_pages": "1"}, "BATON_NUM_PAGES"),
        ({"host_cache_gb": "-1"}, "BATON_HOST_CACHE_GB"),
        ({"transfer_floor_gb_per_s": "0"}, "BATON_TRANSFER_FLOOR_GB_PER_S"),
        ({"transfer_floor_action": "warn"}, "BATON_TRANSFER_FLOOR_ACTION"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(read, variables, named):
    with pytest.raises(StartupError, match=named):
        read(**variables)


def test_a_floor_for_links_is_none_unless_asked_for(read):
    assert read().link_floor is None
    assert read(transfer_floor_gb_per_s="0.5").link_floor == LinkFloor(0.5, refuse=False)
    assert read(transfer_floor_gb_per_s="20", transfer_floor_action="refuse").link_floor == LinkFloor(20, refuse=True)
