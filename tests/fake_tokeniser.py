"""A tokeniser for the fake model: every id has a text."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from shared.text.chat_template import ChatTemplate
from shared.text.tokeniser import Tokeniser

EOS_TOKEN_ID = 2
VOCAB_SIZE = 1000
CHAT_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def fake_tokeniser() -> Tokeniser:
    """Ids 0-2 are special, then come the 256 bytes, and each further id n is written " n"."""
    return Tokeniser(_fake_tokenizer(), eos_ids=(EOS_TOKEN_ID,), chat_template=ChatTemplate(CHAT_TEMPLATE, {}))


def write_fake_model(folder: Path, *, max_context: int = 4096) -> Path:
    """The same tokeniser as a model's folder, with all of a config that services read beside an engine of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    _fake_tokenizer().save(str(folder / "tokenizer.json"))
    tokenizer_config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    config = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": max_context, "eos_token_id": EOS_TOKEN_ID}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _fake_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<s>": 1, "</s>": EOS_TOKEN_ID}
    vocab |= {symbol: 3 + index for index, symbol in enumerate(alphabet)}
    vocab |= {f"Ġ{number}": number for number in range(3 + len(alphabet), VOCAB_SIZE)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
    return tokenizer
