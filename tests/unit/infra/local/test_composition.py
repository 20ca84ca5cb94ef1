from infra.local.composition import SERVICES, Composition, service_spec


def test_a_service_is_told_everything_by_its_environment():
    composition = Composition(
        counts={"edge": 1}, model="/models/m", model_name="m-chat", dtype="float32", num_pages=9, env={"BATON_X": "1"}
    )
    edge = next(service for service in SERVICES if service.name == "edge")
    spec = service_spec(edge, 2, composition, kafka_address="h:1", redis_url="redis://h:2/0", http_port=8002)
    assert spec.name == "edge-2"
    assert spec.address == "http://127.0.0.1:8002"
    assert spec.command[1:] == ("-m", "services.stream_out")
    assert spec.env == {
        "BATON_KAFKA": "h:1",
        "BATON_REDIS": "redis://h:2/0",
        "BATON_MODEL": "/models/m",
        "BATON_MODEL_NAME": "m-chat",
        "BATON_DEVICE": "cpu",
        "BATON_DTYPE": "float32",
        "BATON_NUM_PAGES": "9",
        "BATON_HTTP_HOST": "127.0.0.1",
        "BATON_HTTP_PORT": "8002",
        "BATON_X": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "UCX_WARN_UNUSED_ENV_VARS": "n",
    }


def test_each_worker_sees_one_gpu_of_its_service_in_turn():
    composition = Composition(counts={}, model="/m", gpus={"decode": "1,2"})

    def visible(service, index):
        spec = service_spec(service, index, composition, kafka_address="", redis_url="", http_port=1)
        return spec.env.get("CUDA_VISIBLE_DEVICES")

    by_name = {service.name: service for service in SERVICES}
    assert [visible(by_name["decode"], index) for index in range(3)] == ["1", "2", "1"]
    assert visible(by_name["prefill"], 0) is None


def memory(composition, name, index):
    service = next(service for service in SERVICES if service.name == name)
    env = service_spec(service, index, composition, kafka_address="", redis_url="", http_port=1).env
    return env.get("BATON_NUM_PAGES"), env.get("BATON_GPU_MEMORY_SHARE")


def test_workers_on_one_gpu_share_its_memory():
    apart = Composition(counts={"prefill": 1, "decode": 3}, model="/m", device="cuda", gpus={"decode": "1,2"})
    assert memory(apart, "prefill", 0) == (None, "0.900")
    assert [memory(apart, "decode", index)[1] for index in range(3)] == ["0.450", "0.900", "0.450"]
    together = Composition(counts={"prefill": 1, "decode": 2}, model="/m", device="cuda")
    assert memory(together, "prefill", 0) == (None, "0.300")


def test_pages_are_counted_where_no_gpu_tells_how_many_fit():
    assert memory(Composition(counts={}, model="/m"), "decode", 0) == ("512", None)
    assert memory(Composition(counts={}, model="/m", device="cuda", num_pages=7), "decode", 0) == ("7", None)
