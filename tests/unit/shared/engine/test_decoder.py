import pytest
import torch
from transformers import AutoModelForCausalLM

from shared.engine.attention.sdpa import PagedSdpa, Run
from shared.engine.layers.kernels import TORCH_KERNELS, triton_kernels
from shared.engine.models.config import read_config
from shared.engine.models.rope import rope_frequencies
from shared.engine.weights import load_checkpoint
from shared.kv.paged_cache import PagedCache
from tests.tiny_checkpoints import FAMILIES, ROPES, TinyCheckpoint

CPU = torch.device("cpu")

VARIANTS = [
    *[TinyCheckpoint(family, rope) for family in FAMILIES for rope in ROPES],
    TinyCheckpoint("llama", biases=True, tied=True),
    TinyCheckpoint("qwen3", biases=True, sharded=True),
    TinyCheckpoint("llama", overrides=(("num_key_value_heads", 4),)),
    TinyCheckpoint("llama", overrides=(("num_key_value_heads", 1), ("head_dim", 24))),
]


def name_of(tiny):
    parts = [tiny.family, tiny.rope, *(name for name in ("tied", "biases", "sharded") if getattr(tiny, name))]
    return "-".join([*parts, *(f"{name}={value}" for name, value in tiny.overrides)])


@torch.inference_mode()
def all_logits(checkpoint, ids, kernels=TORCH_KERNELS):
    """Logits `[T, vocab]` after each of `ids`, computed in one go over scattered pages."""
    cache = PagedCache(checkpoint.layout, 8, checkpoint.decoder.device)
    decoder = checkpoint.decoder
    attention = PagedSdpa(cache, [Run(0, len(ids), (6, 2, 5))], decoder.config, decoder.rotary_embedding())
    return decoder.logits(decoder.forward(ids, attention, kernels), kernels)


@pytest.mark.parametrize("tiny", VARIANTS, ids=name_of)
def test_logits_equal_those_of_transformers(tiny_checkpoints, tiny):
    folder = tiny_checkpoints.get(tiny)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(3, 300, (150,), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        expected = reference(ids[None]).logits[0]
    logits = all_logits(load_checkpoint(folder, "float32", CPU), ids)
    assert expected.std() > 1  # a flat distribution would prove nothing
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_logits_stay_near_float32(tiny_checkpoints):
    folder = tiny_checkpoints.get(TinyCheckpoint("qwen3"))
    ids = torch.randint(3, 300, (70,), generator=torch.Generator().manual_seed(5))
    exact = all_logits(load_checkpoint(folder, "float32", CPU), ids)
    rounded = all_logits(load_checkpoint(folder, "bfloat16", CPU), ids)
    assert rounded.dtype is torch.bfloat16
    error = (rounded.float() - exact).square().mean().sqrt() / exact.std()
    assert error < 0.05


def test_triton_kernels_give_the_logits_of_torch(tiny_checkpoints):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    checkpoint = load_checkpoint(tiny_checkpoints.get(TinyCheckpoint("llama", biases=True)), "float32", device)
    ids = torch.randint(3, 300, (9,), generator=torch.Generator().manual_seed(5)).to(device)
    torch.testing.assert_close(all_logits(checkpoint, ids, triton_kernels(4, device)), all_logits(checkpoint, ids))


@pytest.mark.parametrize("rope", ROPES)
def test_rope_variants_have_frequencies_of_their_own(tiny_checkpoints, rope):
    """Otherwise the comparison above could pass with a variant that is read as another."""
    frequencies = {
        name: rope_frequencies(read_config(tiny_checkpoints.get(TinyCheckpoint(rope=name))).rope, 16) for name in ROPES
    }
    others = [values for name, values in frequencies.items() if name != rope]
    assert not any(torch.allclose(frequencies[rope], values) for values in others)


def test_the_last_layer_for_wanted_rows_alone_is_that_of_all(tiny_checkpoints):
    checkpoint = load_checkpoint(tiny_checkpoints.get(TinyCheckpoint("qwen3")), "float32", CPU)
    decoder, ids = checkpoint.decoder, torch.randint(3, 300, (70,), generator=torch.Generator().manual_seed(5))

    @torch.inference_mode()
    def hidden(wanted):
        cache = PagedCache(checkpoint.layout, 8, decoder.device)
        attention = PagedSdpa(cache, [Run(0, len(ids), (6, 2))], decoder.config, decoder.rotary_embedding())
        return decoder.forward(ids, attention, TORCH_KERNELS, wanted), cache.pages

    wanted = torch.tensor([69, 3, 3])
    (some, stored), (every, expected) = hidden(wanted), hidden(None)
    torch.testing.assert_close(some, every[wanted])
    assert torch.equal(stored, expected)
    assert hidden(wanted[:0])[0].shape == (0, decoder.config.hidden_size)
