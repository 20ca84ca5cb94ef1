"""Real compilation, in a process where no kernel was ever interpreted: that leaves triton.language changed."""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
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


def start_hopper(cache_folder):
    os.environ["TRITON_CACHE_DIR"] = str(cache_folder)
    gpu = Hopper()
    driver._active = gpu
    return gpu


@pytest.fixture(scope="module")
def compiling_process():
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as process:
        with pytest.MonkeyPatch.context() as environment:
            environment.delenv("TRITON_INTERPRET", raising=False)
            process.submit(os.getpid).result()  # has started with this environment
        yield process


def compile_twice_and_launch(cache_folder):
    gpu = start_hopper(cache_folder)
    kernels = [JITFunction(fill), JITFunction(add)]
    places = torch.zeros(64)

    def work():
        for block in (32, 64, 32):
            for kernel in kernels:
                kernel[(1,)](places, 1.0, block=block)

    first = compile_launches(work), sorted(gpu.loaded), list(gpu.launched)
    second = compile_launches(work), list(gpu.launched)
    work()
    return first, second, gpu.launched, len(gpu.loaded)


def test_launched_kernels_are_compiled_and_loaded_once_each_and_do_not_run(compiling_process, tmp_path):
    first, second, launched, num_loaded = compiling_process.submit(compile_twice_and_launch, tmp_path).result()
    assert first == (4, ["add", "add", "fill", "fill"], [])
    assert second == (0, [])
    assert launched == ["fill", "add"] * 3
    assert num_loaded == 4


def fail_and_launch(cache_folder, *blocks, error=None):
    """What was raised by work that launches with these block sizes and then raises `error`, and what ran after it."""
    gpu = start_hopper(cache_folder)
    kernel = JITFunction(fill)
    places = torch.zeros(64)

    def work():
        for block in blocks:
            kernel[(1,)](places, 1.0, block=block)
        if error is not None:
            raise error

    with pytest.raises(Exception) as raised:
        compile_launches(work)
    kernel[(1,)](places, 1.0, block=32)
    num_compiled = compile_launches(lambda: kernel[(1,)](places, 1.0, block=64))
    return repr(raised.value), gpu.launched, num_compiled


def test_launches_run_again_after_a_failure(compiling_process, tmp_path):
    raised, launched, num_compiled = compiling_process.submit(
        fail_and_launch, tmp_path, error=ZeroDivisionError()
    ).result()
    assert raised == "ZeroDivisionError()"
    assert launched == ["fill"]
    assert num_compiled == 1


def test_a_kernel_that_does_not_compile_is_reported_and_others_compile_after_it(compiling_process, tmp_path):
    raised, launched, num_compiled = compiling_process.submit(fail_and_launch, tmp_path, 48).result()
    assert "power of 2" in raised
    assert launched == ["fill"]
    assert num_compiled == 1


def test_a_failure_of_the_work_is_not_hidden_by_a_kernel_that_does_not_compile(compiling_process, tmp_path):
    raised, launched, num_compiled = compiling_process.submit(
        fail_and_launch, tmp_path, 48, error=ZeroDivisionError()
    ).result()
    assert raised == "ZeroDivisionError()"
    assert launched == ["fill"]
    assert num_compiled == 1
