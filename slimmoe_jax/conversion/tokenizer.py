"""Tokenizer files of a Hugging Face folder, made from ours without a network, and ours again from such a folder."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

from slimmoe_jax import files
from slimmoe_jax.config import InputError
from slimmoe_jax.data import tokenizers
from slimmoe_jax.data.tokenizers import GPT2, SentencePiece, Tokenizer

_SPACE = "\u2581"  # SentencePiece's


def write(tokenizer: Tokenizer, context: int, directory: Path) -> None:
    """Writes `tokenizer.json`, `tokenizer_config.json`, and the SentencePiece model where there is one.

    Raises:
      InputError: the tokenizer cannot be expressed there.
    """
    if isinstance(tokenizer, GPT2):
        fast = _gpt2(tokenizer)
    elif isinstance(tokenizer, SentencePiece):
        fast = _sentencepiece(tokenizer)
    else:
        raise InputError(
            f"transformers has no form of the tokenizer {tokenizer.name}: convert those with GPT-2's or SentencePiece's"
        )
    fast.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": fast.id_to_token(tokenizer.end_token),
        "pad_token": fast.id_to_token(pad_token(tokenizer)),
        "model_max_length": context,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
    }
    files.write_json(directory / "tokenizer_config.json", settings)
    if tokenizer.path:
        shutil.copyfile(tokenizer.path, directory / "tokenizer.model")


def pad_token(tokenizer: Tokenizer) -> int:
    """The token that pads batches: SentencePiece's `<unk>`, which byte fallback keeps out of every text.

    GPT-2's vocabulary has no such token: the end token pads there, and only the attention mask tells the two apart.
    """
    if not isinstance(tokenizer, SentencePiece):
        return tokenizer.end_token
    import sentencepiece

    return int(sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path)).unk_id())


def read(directory: Path) -> Tokenizer:
    """Our tokenizer of a folder that `write` filled.

    Raises:
      InputError: it holds another.
    """
    if (directory / "tokenizer.model").is_file():
        return tokenizers.load(str(directory / "tokenizer.model"))
    try:
        kept = files.read_json(directory / "tokenizer.json")["model"]
        vocabulary, merges = kept.get("vocab"), kept.get("merges")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{directory} has no readable tokenizer.json: copy it from where the model came from") from error
    if (vocabulary, merges) != _gpt2_model():
        raise InputError(
            f"{directory}/tokenizer.json is neither GPT-2's nor beside a SentencePiece tokenizer.model: none other exists here"
        )
    return GPT2()


@functools.cache
def _gpt2_model() -> tuple[dict[str, int], list[list[str]]]:
    """GPT-2's vocabulary and merges as tokenizer.json has them."""
    model = json.loads(_gpt2(GPT2()).to_str())["model"]
    return model["vocab"], model["merges"]


def _gpt2(tokenizer: GPT2) -> Any:
    """Byte-level BPE with the merges that the ranks imply."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Fast

    ranks = tokenizer.ranks
    characters = _byte_characters()
    vocabulary = {_written(token, characters): rank for token, rank in ranks.items()}
    merges = [(_written(left, characters), _written(right, characters)) for left, right in _merges(ranks)]
    fast = Fast(models.BPE(vocab=vocabulary, merges=merges))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    return fast


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pair that each token of two bytes or more was merged from: what is left of it when all earlier merges are done."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:], strict=False)]
            first = min(range(len(pairs)), key=pairs.__getitem__)
            parts[first : first + 2] = [parts[first] + parts[first + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def _byte_characters() -> list[str]:
    """The printable character that byte-level BPE writes for each byte: itself where it has one, else from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("\u00a1"), ord("\u00ac") + 1), *range(ord("\u00ae"), ord("\u00ff") + 1)}
    others = iter(range(256))
    return [chr(byte) if byte in printable else chr(256 + next(others)) for byte in range(256)]


def _written(token: bytes, characters: list[str]) -> str:
    """A token as byte-level BPE spells it, a character for each byte."""
    return "".join(characters[byte] for byte in token)


def _sentencepiece(tokenizer: SentencePiece) -> Any:
    """SentencePiece's BPE, for models that leave the text as it is, as `train_sentencepiece` makes them."""
    from sentencepiece import sentencepiece_model_pb2  # its classes are made as it is imported
    from tokenizers import AddedToken, decoders, models, normalizers
    from tokenizers import Tokenizer as Fast

    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    model.ParseFromString(tokenizer.path.read_bytes())
    trained, normalizer = model.trainer_spec, model.normalizer_spec
    kept = not (normalizer.add_dummy_prefix or normalizer.remove_extra_whitespaces) and normalizer.name == "identity"
    if trained.model_type != trained.BPE or not trained.byte_fallback or not kept:
        raise InputError(
            f"{tokenizer.path} is no BPE model that keeps text as it is (byte fallback, identity normalisation, no dummy prefix):"
            " only such can be exported; `data.prepare --train-tokenizer N` trains one"
        )
    kinds = model.SentencePiece
    vocabulary = {piece.piece: number for number, piece in enumerate(model.pieces)}
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == kinds.NORMAL}
    splits = [(piece[:cut], piece[cut:]) for piece in scores for cut in range(1, len(piece))]
    merges = [pair for pair in splits if all(part in scores for part in pair)]
    merges.sort(key=lambda pair: (-scores["".join(pair)], vocabulary[pair[0]], vocabulary[pair[1]]))
    unknown = next(piece.piece for piece in model.pieces if piece.type == kinds.UNKNOWN)
    fast = Fast(models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, byte_fallback=True, fuse_unk=True))
    fast.normalizer = normalizers.Replace(" ", _SPACE)
    fast.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    special = [piece.piece for piece in model.pieces if piece.type in (kinds.CONTROL, kinds.UNKNOWN)]
    fast.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    symbols = [piece.piece for piece in model.pieces if piece.type == kinds.USER_DEFINED]
    fast.add_tokens([AddedToken(piece, special=False, normalized=False) for piece in symbols])
    return fast
