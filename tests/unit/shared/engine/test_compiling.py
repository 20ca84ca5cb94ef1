from types import SimpleNamespace

import pytest
import torch
from triton import language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from shared.engine.compiling import compile_launches


def fill(places, value, block: tl.constexpr):
    tl.store(places + tl.arange(0, block), value)


def add(places, value, block: tl.constexpr):
    place = places + tl.arange(0, block)
    tl.store(place, tl.load(place) + value)


class Hopper:
    """Triton's view of a GPU that compiles and keeps a record of what is loaded and launched."""

    def __init__(self):
        self.loaded = []
        self.launched = []
        self.utils = SimpleNamespace(
            get_device_properties=lambda _device: {"max_shared_mem": 2**17},
            load_binary=self.load_binary,
        )

    def get_current_device(self):
        return 0

    def get_current_stream(self, _device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def load_binary(self, name, _code, _shared_bytes, _device):
        self.loaded.append(name)
        return 0, 0, 32, 0, 1024

    def launcher_cls(self, source, _metadata):
        return lambda *_args: self.launched.append(source.name)


@pytest.fixture
def hopper(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    gpu = Hopper()
    monkeypatch.setattr(driver, "_active", gpu)
    return gpu


def test_launched_kernels_are_compiled_and_loaded_once_each_and_do_not_run(hopper):
    kernels = [JITFunction(fill), JITFunction(add)]
    places = torch.zeros(64)

    def work():
        for block in (32, 64, 32):
            for kernel in kernels:
                kernel[(1,)](places, 1.0, block=block)

    assert compile_launches(work) == 4
    assert sorted(hopper.loaded) == ["add", "add", "fill", "fill"]
    assert hopper.launched == []
    assert compile_launches(work) == 0
    work()
    assert hopper.launched == ["fill", "add"] * 3
    assert len(hopper.loaded) == 4


def test_launches_run_again_after_a_failure(hopper):
    kernel = JITFunction(fill)
    with pytest.raises(ZeroDivisionError):
        compile_launches(lambda: 1 / 0)
    kernel[(1,)](torch.zeros(64), 1.0, block=32)
    assert hopper.launched == ["fill"]


def test_a_kernel_that_does_not_compile_is_reported(hopper):
    kernel = JITFunction(fill)
    with pytest.raises(Exception, match="power of 2"):
        compile_launches(lambda: kernel[(1,)](torch.zeros(64), 1.0, block=48))
