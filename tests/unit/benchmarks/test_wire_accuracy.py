import json

import pytest
import torch

from benchmarks.wire_accuracy import TOPICS, Case, Text, bytes_ratio, main, measure, read_texts
from shared.blocks import PAGE_TOKENS
from shared.engine.weights import load_checkpoint
from shared.kv.layout import KvLayout
from shared.kv.wire_format import WireFormat
from tests.tiny_checkpoints import VOCAB_SIZE, TinyCheckpoint, TinyCheckpoints

SLOWEST_PAIR = 31


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return TinyCheckpoints(tmp_path_factory.mktemp("checkpoints")).get(TinyCheckpoint())


@pytest.fixture
def checkpoint(folder):
    return load_checkpoint(folder, "float32", torch.device("cpu"))


def some_ids(num_tokens):
    return torch.randint(VOCAB_SIZE, (num_tokens,), generator=torch.Generator().manual_seed(3)).tolist()


def test_native_pages_cost_nothing(checkpoint):
    (accuracy,) = measure(checkpoint, [some_ids(140)], 128, [Case(WireFormat.NATIVE, None)]).values()
    assert (accuracy.kl, accuracy.top_1, accuracy.perplexity_ratio) == (0, 1, 1)


def test_a_bias_without_quantisation_is_taken_away_again(checkpoint):
    with torch.inference_mode():
        text = Text(checkpoint, some_ids(140), 128)
        torch.testing.assert_close(text.received(Case(WireFormat.NATIVE, 3)), text.exact, rtol=0, atol=1e-3)


def test_the_exact_distributions_are_those_of_the_whole_text_at_once(checkpoint):
    ids = some_ids(140)
    with torch.inference_mode():
        late = Text(checkpoint, ids, 128).exact
        early = Text(checkpoint, ids, 64).exact
    torch.testing.assert_close(late, early[64:], rtol=0, atol=1e-4)


def test_ratios_count_the_first_page_of_int4_as_int8():
    layout = KvLayout("m", num_layers=2, num_kv_heads=1, head_dim=64, dtype="float32")
    assert bytes_ratio(layout, WireFormat.NATIVE, 4) == 2  # float32
    assert bytes_ratio(layout, WireFormat.INT8, 4) == 8576 / 16384
    assert bytes_ratio(layout, WireFormat.INT4, 4) == (8576 + 3 * 4608) / 4 / 16384


@pytest.mark.parametrize(("num_texts", "num_tokens"), [(len(TOPICS) + 1, 10), (1, 10**6)])
def test_texts_that_are_not_there_are_refused(smollm2, num_texts, num_tokens):
    with pytest.raises(ValueError):
        read_texts(smollm2, num_texts, num_tokens)


def test_lossy_formats_keep_what_a_real_model_says(smollm2):
    """The aims of the formats, on one text; `benchmarks/results/wire-accuracy-*` has more."""
    checkpoint = load_checkpoint(smollm2, "float32", torch.device("cpu"))
    cases = [Case(fmt, pair) for fmt in (WireFormat.INT8, WireFormat.INT4) for pair in (None, SLOWEST_PAIR)]
    measured = measure(checkpoint, read_texts(smollm2, 1, 16 * PAGE_TOKENS + 224), 16 * PAGE_TOKENS, cases)
    for case, accuracy in measured.items():
        max_kl, min_top_1, max_bytes = (1e-3, 0.99, 0.53) if case.fmt is WireFormat.INT8 else (2e-2, 0.95, 0.30)
        assert 0 < accuracy.kl < max_kl
        assert min_top_1 < accuracy.top_1 <= 1
        assert accuracy.bytes_ratio <= max_bytes


def test_the_result_is_printed_and_written(smollm2, tmp_path, capsys):
    out = tmp_path / "accuracy.json"
    main(model=smollm2, num_texts=1, prefix_tokens=64, next_tokens=4, out=str(out))
    result = json.loads(out.read_text())
    assert result["texts"] == [TOPICS[0]]
    assert [(case["fmt"], case["biased_pair"]) for case in result["cases"]] == [
        (fmt, pair) for fmt in ("int8", "int4") for pair in (None, 31, 15, 0)
    ]
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(result["cases"])
