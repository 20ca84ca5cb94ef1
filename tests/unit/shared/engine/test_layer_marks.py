"""What a mark says is in the pages: at that moment, and bit by bit as it is in the end."""

from dataclasses import dataclass

import pytest
import torch

from shared.blocks import pages_for, token_ids
from shared.engine.batch import BatchRow
from shared.engine.layer_marks import LayerEvents, LayerMarks
from shared.engine.torch_runner import TorchRunner
from shared.engine.triton_runner import TritonRunner
from shared.engine.weights import load_checkpoint
from shared.kv.progress import MAX_MARKS
from tests.engine_driver import greedy
from tests.reference_layers import use_reference_layers
from tests.tiny_checkpoints import TinyCheckpoint

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")  # of Triton's interpreter

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NUM_LAYERS = 3


@dataclass
class Point:
    passed: bool = False
    num_records: int = 0

    def record(self):
        self.num_records += 1

    def query(self):
        return self.passed


def test_a_batch_is_as_far_as_the_points_in_a_row_that_were_passed():
    marks, points = LayerMarks(10), [Point() for _ in range(3)]
    assert marks.num_done() == 0
    for number, point in enumerate(points):
        marks.recorded(3 * (number + 1), point)
    points[1].passed = True
    assert marks.num_done() == 0
    points[0].passed = True
    assert marks.num_done() == 6
    points[2].passed = True
    assert marks.num_done() == 9
    marks.done()
    assert marks.num_done() == 10


def test_it_never_goes_back_when_its_points_are_recorded_again():
    marks, (first, second) = LayerMarks(4), (Point(passed=True), Point())
    marks.recorded(2, first)
    marks.recorded(4, second)
    assert marks.num_done() == 2
    first.passed = False
    assert marks.num_done() == 2
    marks.done()
    assert marks.num_done() == 4


@pytest.mark.parametrize(
    ("num_layers", "expected"),
    [(1, [1]), (8, [1, 2, 3, 4, 5, 6, 7, 8]), (30, [4, 8, 12, 16, 20, 24, 28, 30]), (80, list(range(10, 81, 10)))],
)
def test_a_gpu_has_few_marks_and_one_behind_the_last_layer(monkeypatch, num_layers, expected):
    made = []
    monkeypatch.setattr("shared.engine.layer_marks.new_event", lambda _: made.append(Point()) or made[-1])
    events = LayerEvents(num_layers, 2, torch.device("cuda"))
    assert len(made) == 2 * len(expected) <= 2 * MAX_MARKS
    batches = [LayerMarks(num_layers) for _ in range(2)]
    stored = [events.marking(marks) for marks in batches]
    for number, marks in enumerate(batches):
        seen = []
        for layer in range(num_layers):
            stored[number](layer)
            for point in made:
                point.passed = point.num_records > 0
            seen.append(marks.num_done())
        assert sorted({0, *seen} - {0}) == expected
        assert all(num_done <= layer + 1 for layer, num_done in enumerate(seen))
    assert [point.num_records for point in made] == [1] * len(made)


class Observed(LayerMarks):
    """Copies, at each mark, what it says is there; on a GPU as soon as the mark is passed, on another stream."""

    def __init__(self, cache, pages):
        super().__init__(NUM_LAYERS)
        self._layers_of = lambda num_layers: torch.stack([cache.pages[page, :num_layers] for page in pages])
        self._stream = torch.cuda.Stream() if DEVICE.type == "cuda" else None
        self.seen = []

    def recorded(self, num_layers, point):
        super().recorded(num_layers, point)
        if self._stream is None:
            assert self.num_done() == num_layers
        else:
            self._stream.wait_event(point)
        with torch.cuda.stream(self._stream):
            self.seen.append((num_layers, self._layers_of(num_layers)))

    def end(self):
        if self._stream is not None:
            self._stream.synchronize()


def chunk(ids, start, end, pages):
    return BatchRow(
        key="k",
        sequence=1,
        seat=0,
        ids=ids,
        start=start,
        end=end,
        pages=pages,
        prompt_len=len(ids),
        sample=end == len(ids),
        sampling=greedy(9),
        choice=0,
        forbid_end=False,
    )


def torch_runner(checkpoint):
    return TorchRunner(checkpoint, 8)


def triton_runner(checkpoint):
    return TritonRunner(checkpoint, 8, max_running=2, max_batch_tokens=128, max_context=256)


@pytest.mark.parametrize("make_runner", [torch_runner, triton_runner])
def test_the_kv_of_layers_that_are_done_is_what_it_is_in_the_end(monkeypatch, tiny_checkpoints, make_runner):
    tiny = TinyCheckpoint(overrides=(("head_dim", 64), ("num_hidden_layers", NUM_LAYERS)))
    if DEVICE.type == "cpu":
        use_reference_layers(monkeypatch)
    runner = make_runner(load_checkpoint(tiny_checkpoints.get(tiny), "float32", DEVICE))
    ids, pages = token_ids(range(3, 103)), (5, 2)
    assert len(pages) == pages_for(len(ids))
    runner.cache.pages.fill_(-7)
    for start, end in ((0, 70), (70, 100)):
        marks = Observed(runner.cache, pages)
        runner.launch((chunk(ids, start, end, pages),), marks).wait()
        marks.end()
        assert [num_done for num_done, _ in marks.seen] == [1, 2, 3]
        valid = [(page, slice(0, min(64, end - 64 * index))) for index, page in enumerate(pages) if end > 64 * index]
        for num_done, copied in marks.seen:
            for index, (page, tokens) in enumerate(valid):
                now = runner.cache.pages[page, :num_done, :, tokens]
                assert torch.equal(copied[index, :, :, tokens], now)
                assert not (now == -7).all(dim=-1).any(), "marked before it was stored"
