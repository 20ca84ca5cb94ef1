import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.engine.weights import checkpoint_fingerprint, load_checkpoint, weight_files
from shared.errors import StartupError, UnsupportedCheckpoint
from tests.tiny_checkpoints import TinyCheckpoint, edit_json

CPU = torch.device("cpu")


def copied(tmp_path, source):
    shutil.copytree(source, tmp_path / "copy")
    return tmp_path / "copy"


def edit_tensors(folder, **tensors):
    """Sets tensors of model.safetensors (dots of names written as __); None removes one."""
    path = folder / "model.safetensors"
    held = {name: tensor.clone() for name, tensor in load_file(path).items()}  # the file under them is rewritten
    for name, tensor in tensors.items():
        held.pop(name.replace("__", "."), None)
        if tensor is not None:
            held[name.replace("__", ".")] = tensor
    save_file(held, path, metadata={"format": "pt"})


def test_merged_projections_hold_their_parts_in_order(tiny_checkpoints):
    folder = tiny_checkpoints.get(TinyCheckpoint("qwen2"))
    checkpoint = load_checkpoint(folder, "float32", CPU)
    tensors = load_file(folder / "model.safetensors")
    layer = checkpoint.decoder.weights.layers[1]
    prefix = "model.layers.1."
    attention = [tensors[f"{prefix}self_attn.{part}_proj.weight"] for part in "qkv"]
    assert torch.equal(layer.qkv, torch.cat(attention))
    biases = [tensors[f"{prefix}self_attn.{part}_proj.bias"] for part in "qkv"]
    assert torch.equal(layer.qkv_bias, torch.cat(biases))
    mlp = [tensors[f"{prefix}mlp.{part}_proj.weight"] for part in ("gate", "up")]
    assert torch.equal(layer.gate_up, torch.cat(mlp))
    assert checkpoint.layout.page_shape == (2, 2, 64, 2, 16)
    assert checkpoint.layout.model_fingerprint == checkpoint.fingerprint


def test_sharded_and_single_files_give_the_same_weights(tiny_checkpoints):
    single = tiny_checkpoints.get(TinyCheckpoint("qwen3"))
    sharded = tiny_checkpoints.get(TinyCheckpoint("qwen3", sharded=True))
    assert len(weight_files(sharded)) > 2
    one, many = (load_checkpoint(folder, "float32", CPU).decoder.weights for folder in (single, sharded))
    assert torch.equal(one.head, many.head)
    for a, b in zip(one.layers, many.layers, strict=True):
        assert torch.equal(a.qkv, b.qkv)
        assert torch.equal(a.down, b.down)


def test_tied_embeddings_share_one_tensor(tiny_checkpoints):
    weights = load_checkpoint(tiny_checkpoints.get(TinyCheckpoint(tied=True)), "float32", CPU).decoder.weights
    assert weights.head is weights.embed


def test_a_tied_checkpoint_may_repeat_its_embedding_but_not_contradict_it(tmp_path, tiny_checkpoints):
    folder = copied(tmp_path, tiny_checkpoints.get(TinyCheckpoint(tied=True)))
    embed = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    edit_tensors(folder, lm_head__weight=embed.clone())
    load_checkpoint(folder, "float32", CPU)
    edit_tensors(folder, lm_head__weight=embed + 1)
    with pytest.raises(UnsupportedCheckpoint, match=r"lm_head\.weight.*differs"):
        load_checkpoint(folder, "float32", CPU)


def test_weights_are_converted_to_the_dtype_asked_for(tiny_checkpoints):
    folder = tiny_checkpoints.get(TinyCheckpoint())
    checkpoint = load_checkpoint(folder, "bfloat16", CPU)
    assert checkpoint.layout.dtype == "bfloat16"
    assert checkpoint.decoder.dtype is torch.bfloat16
    assert load_checkpoint(folder, None, CPU).layout.dtype == "float32"


@pytest.mark.parametrize("stated", ["float16", None])
def test_a_dtype_the_engine_does_not_compute_in_must_be_overridden(tmp_path, tiny_checkpoints, stated):
    folder = copied(tmp_path, tiny_checkpoints.get(TinyCheckpoint()))
    edit_json(folder / "config.json", dtype=stated)
    with pytest.raises(UnsupportedCheckpoint, match="dtype"):
        load_checkpoint(folder, None, CPU)
    load_checkpoint(folder, "float32", CPU)


@pytest.mark.parametrize(
    ("name", "tensor", "reason"),
    [
        ("model__norm__weight", None, "missing"),
        ("lm_head__weight", None, "missing"),
        ("model__layers__0__self_attn__k_proj__bias", torch.zeros(32), "no such tensor"),
        ("model__layers__2__mlp__up_proj__weight", torch.zeros(96, 64), "no such tensor"),
        ("model__layers__0__mlp__up_proj__weight", torch.zeros(95, 64), r"\[95, 64\] is not \[96, 64\]"),
        ("model__layers__0__mlp__up_proj__weight", torch.zeros(96, 64, dtype=torch.int8), "int8"),
    ],
)
def test_refuses_a_wrong_tensor_by_name(tmp_path, tiny_checkpoints, name, tensor, reason):
    folder = copied(tmp_path, tiny_checkpoints.get(TinyCheckpoint()))
    edit_tensors(folder, **{name: tensor})
    with pytest.raises(UnsupportedCheckpoint, match=reason) as refusal:
        load_checkpoint(folder, "float32", CPU)
    assert refusal.value.field == name.replace("__", ".")


def test_stored_rotary_frequencies_are_skipped(tmp_path, tiny_checkpoints):
    folder = copied(tmp_path, tiny_checkpoints.get(TinyCheckpoint()))
    edit_tensors(folder, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(8))
    load_checkpoint(folder, "float32", CPU)


def test_missing_and_broken_files_stop_the_start(tmp_path, tiny_checkpoints):
    folder = copied(tmp_path, tiny_checkpoints.get(TinyCheckpoint()))
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(StartupError, match="no safetensors file"):
        load_checkpoint(folder, "float32", CPU)
    (folder / "model.safetensors").unlink()
    with pytest.raises(StartupError, match="no weight file"):
        load_checkpoint(folder, "float32", CPU)


def test_the_fingerprint_names_config_and_weights(tmp_path, tiny_checkpoints):
    source = tiny_checkpoints.get(TinyCheckpoint())
    folder = copied(tmp_path, source)

    def fingerprint():
        return checkpoint_fingerprint(folder, weight_files(folder))

    original = fingerprint()
    assert original == checkpoint_fingerprint(source, weight_files(source))
    tensors = load_file(folder / "model.safetensors")
    edit_tensors(folder, model__norm__weight=tensors["model.norm.weight"] * 2)
    tuned = fingerprint()
    edit_json(folder / "config.json", rms_norm_eps=1e-4)
    assert len({original, tuned, fingerprint()}) == 3
