import pytest

from benchmarks.kv_transfer.pair import children

CHILD = """
import asyncio, json, os, sys
from benchmarks.kv_transfer.pair import obey

async def double(value):
    print("noise")
    os.write(1, b"noise of a library")
    return 2 * value

async def fail():
    raise ValueError("as asked")

async def mask():
    return [json.loads(sys.argv[1]), os.environ.get("CUDA_VISIBLE_DEVICES")]

asyncio.run(obey({"double": double, "fail": fail, "mask": mask}))
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "a_child.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return "a_child"


async def test_children_answer_each_for_itself_whatever_they_print(module):
    async with children(module, ["a", "b"], ["3", "5"]) as (first, second):
        assert await first.ask("double", value=4) == 8
        assert await second.ask("mask") == ["b", "5"]
        assert await first.ask("mask") == ["a", "3"]


async def test_children_without_gpus_are_not_masked(module):
    async with children(module, ["a"], None) as (child,):
        assert await child.ask("mask") == ["a", None]


async def test_a_child_that_fails_is_named_by_what_it_was_asked(module):
    async with children(module, ["a"], None) as (child,):
        with pytest.raises(RuntimeError, match="ended over 'fail'"):
            await child.ask("fail")
