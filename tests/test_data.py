"""Sources, tokenizers, preparation and records, on files made here and on the standard library."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import zstandard

from slimmoe_jax.config import DataConfig, InputError, ModelConfig
from slimmoe_jax.data import prepare, records, sources, tokenizers

TEXTS = [f"Document {n}: " + " ".join(f"word{(n * 7 + i) % 50}" for i in range(20 + n % 40)) + "\n\ttail  " for n in range(400)]


def data_config(source, **fields):
    return DataConfig(**({"source": str(source), "context": 32, "validation_fraction": 0.1} | fields))


def write_jsonl(path, texts=TEXTS):
    body = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    opener = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get(path.suffix, lambda b: b)
    path.write_bytes(opener(body))
    return path


def documents_of(directory):
    """The documents that the records hold, cut at end tokens; the last of a split may be cut short."""
    found = records.open_records(directory)
    tokenizer = found.tokenizer()
    texts = []
    for name in ("train", "validation"):
        ids = found.split(name).read(np.arange(len(found.split(name)))).ravel()
        ends = np.flatnonzero(ids == found.end_token)
        texts += [tokenizer.decode(ids[a:b]) for a, b in zip([0, *(ends + 1)], ends, strict=False)]
    return texts


def test_gpt2_tokenizer_is_the_published_one():
    tokenizer = tokenizers.load("gpt2")
    assert tokenizer.vocab_size == 50_257 and tokenizer.encode("Hello world") == [15496, 995]
    text = "tabs\tand  spaces\n\n漢字 <|endoftext|>"
    assert tokenizer.end_token not in tokenizer.encode(text) and tokenizer.decode(tokenizer.encode(text)) == text


def test_sentencepiece_is_lossless_and_keeps_its_end_token_to_itself(tmp_path):
    tokenizers.train_sentencepiece(TEXTS, 300, tmp_path / "t.model")
    tokenizer = tokenizers.load(str(tmp_path / "t.model"))
    text = "  def f(x):\n\treturn  x\n\n   ünï 漢字 </s> "
    assert tokenizer.vocab_size == 300 and tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.end_token not in tokenizer.encode(text)


def test_saved_tokenizer_is_refused_when_its_file_changed(tmp_path):
    tokenizers.train_sentencepiece(TEXTS, 300, tmp_path / "a.model")
    tokenizers.train_sentencepiece(TEXTS, 301, tmp_path / "b.model")
    tokenizers.save(tokenizers.load(str(tmp_path / "a.model")), tmp_path / "run")
    (tmp_path / "run" / "tokenizer.model").write_bytes((tmp_path / "b.model").read_bytes())
    with pytest.raises(InputError, match="not the one recorded"):
        tokenizers.saved(tmp_path / "run")


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_every_document_is_in_the_records_once(tmp_path, suffix):
    path = tmp_path / f"text{suffix}"
    if suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet

        pa.parquet.write_table(pa.table({"text": TEXTS}), path, row_group_size=50)
    else:
        write_jsonl(path)
    manifest = prepare.prepare(data_config(path), tmp_path / "out", workers=1)
    found = documents_of(tmp_path / "out")
    assert sorted(found) == sorted(set(found) & set(TEXTS)) and len(found) >= len(TEXTS) - 2  # a split's last may be cut
    assert sum(split["documents"] for split in manifest["splits"].values()) == len(TEXTS)
    assert sum(split["bytes"] for split in manifest["splits"].values()) == sum(len(t.encode()) for t in TEXTS)
    for split in manifest["splits"].values():  # every token is in a record or counted as left over
        assert split["tokens"] == split["records"] * 33 + split["leftover_tokens"] and split["leftover_tokens"] < 33


def test_rows_that_are_no_documents_are_counted_and_named(tmp_path):
    rows = [json.dumps({"text": text}) for text in TEXTS] + ["{broken", '{"other": 1}', '{"text": 5}', '{"text": " . "}']
    rows += ['{"text": "lone surrogate \\ud800 here"}']
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    manifest = prepare.prepare(data_config(tmp_path / "a.jsonl"), tmp_path / "out", workers=1)
    assert manifest["skipped"] == {"near_empty": 1, "invalid": 4, "too_long": 0}
    assert manifest["skipped_examples"][0] == "a.jsonl row 401: invalid (no text under 'text')"


def test_records_do_not_depend_on_workers_or_a_kill(tmp_path, monkeypatch):
    """Many small units; one run with one process, one with two that is killed with SIGKILL in the middle and started again."""
    source = tmp_path / "many"
    source.mkdir()
    for n in range(24):
        write_jsonl(source / f"{n:02}.jsonl", [f"{n} {text}" * 8 for text in TEXTS])
    reference = prepare.prepare(data_config(source), tmp_path / "one", workers=1)
    command = [sys.executable, "-m", "slimmoe_jax.data.prepare", "--source", str(source), "--out", str(tmp_path / "two")]
    command += ["--data.context", "32", "--data.validation-fraction", "0.1", "--workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    partial = tmp_path / "two.partial"
    while process.poll() is None and len(list(partial.glob("unit-??????.json"))) < 3:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert partial.exists() and not (tmp_path / "two").exists(), "killed too late to prove anything"
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "two" / "manifest.json").read_text())["splits"] == reference["splits"]
    records.open_records(tmp_path / "two").verify()


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet"])
@pytest.mark.parametrize("fault", ["truncated", "flipped"])
def test_damaged_files_are_named_and_nothing_is_left(tmp_path, suffix, fault):
    path = tmp_path / f"text{suffix}"
    if suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet

        pa.parquet.write_table(pa.table({"text": TEXTS}), path)
    else:
        write_jsonl(path)
    body = path.read_bytes()
    middle = len(body) // 2
    damaged = body[:middle] if fault == "truncated" else body[:middle] + bytes([x ^ 0xFF for x in body[middle:]])
    path.write_bytes(damaged)
    with pytest.raises(InputError, match="damaged"):
        prepare.prepare(data_config(path), tmp_path / "out", workers=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "absent.jsonl", "does not exist"),
        (lambda p: p, "holds no text"),
        (lambda p: write_jsonl(p / "a.csv"), "holds no text"),
        (lambda p: write_jsonl(p / "a.jsonl", []), "holds no document"),
        (lambda p: write_jsonl(p / "a.jsonl", ["", "  "]), "holds no document"),
        (lambda p: write_jsonl(p / "a.jsonl", TEXTS[:1]), "less than one record"),
    ],
)
def test_useless_sources_are_refused(tmp_path, make, message):
    with pytest.raises(InputError, match=message):
        prepare.prepare(data_config(make(tmp_path)), tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_parquet_without_the_column_names_the_columns(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    pa.parquet.write_table(pa.table({"content": TEXTS}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="set data.text_field to one of content"):
        prepare.prepare(data_config(tmp_path / "a.parquet"), tmp_path / "out", workers=1)


@pytest.mark.parametrize(
    ("texts", "fields", "message"),
    [
        (
            ["ab"] * 90 + TEXTS[:1],
            {},
            "of 91 documents, 90 shorter than data.min_characters = 8.*: lower data.min_characters, lower data.validation_fraction",
        ),
        (
            ["ab"] * 9,
            {},
            "holds no document .*of 9 documents, 9 shorter than .*a.jsonl row 1: near empty.*: lower data.min_characters$",
        ),
        (
            [5] * 9,
            {},
            "of 9 documents, 9 invalid; .*no text under 'text', but int.*: check data.source, data.format and data.text_f",
        ),
        ([], {}, r"holds no document .*\(it is empty\): check data.source$"),
        (
            TEXTS[:9],
            {"context": 9_999, "validation_fraction": 0.5},
            "less than one record of 10000: .*, lower data.context, or give",
        ),
    ],
)
def test_too_little_text_is_told_by_what_it_is_lost_to(tmp_path, texts, fields, message):
    with pytest.raises(InputError, match=message):
        prepare.prepare(data_config(write_jsonl(tmp_path / "a.jsonl", texts), **fields), tmp_path / "out", workers=1)
    assert not list(tmp_path.glob("out*"))


def test_files_of_other_splits_are_named_in_the_summary(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl")
    write_jsonl(folder / "test.jsonl", TEXTS[:200])
    manifest = prepare.prepare(data_config(folder), tmp_path / "out", workers=1)
    assert sum(split["documents"] for split in manifest["splits"].values()) == len(TEXTS)
    line = "left out: 1 file outside the train split (test.jsonl); --data.split NAME reads another"
    assert line in prepare.summary_lines(manifest, tmp_path / "out")
    del manifest["remarks"]  # as in records of an earlier version
    assert line not in prepare.summary_lines(manifest, tmp_path / "out")


def test_text_that_has_changed_at_the_same_size_is_not_taken_for_the_old(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl")
    prepare.prepare(data_config(path), tmp_path / "out", workers=1)
    write_jsonl(path, [text.replace("word1", "word2") for text in TEXTS])
    with pytest.raises(InputError, match="the source has changed since"):
        prepare.prepare(data_config(path), tmp_path / "out", workers=1)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    prepare.prepare(data_config(write_jsonl(folder / "a.jsonl")), folder / "out", workers=1)
    return folder / "out"


def test_records_that_do_not_fit_are_refused(prepared, tmp_path):
    with pytest.raises(InputError, match="data.context = 32, not 64"):
        records.open_records(prepared, context=64)
    with pytest.raises(InputError, match="model.vocab_size = 100"):
        records.open_records(prepared, model=ModelConfig(vocab_size=100))
    with pytest.raises(InputError, match="holds no records"):
        records.open_records(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 2}')
    with pytest.raises(InputError, match="damaged"):
        records.open_records(tmp_path)


def test_a_truncated_record_file_is_refused(prepared, tmp_path):
    for file in prepared.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    victim = tmp_path / "train-000000.npy"
    victim.write_bytes(victim.read_bytes()[:-10])
    with pytest.raises(InputError, match="train-000000.npy is damaged"):
        records.open_records(tmp_path)


def take(iterator, count):
    return [next(iterator)["records"].tolist() for _ in range(count)]


def test_batches_are_the_same_for_any_number_of_workers_and_processes(prepared):
    split = records.open_records(prepared).split("train")
    one = take(records.batches(split, 8, seed=3), 12)
    assert one == take(records.batches(split, 8, seed=3, workers=2), 12)
    halves = [take(records.batches(split, 8, seed=3, process=p, processes=2), 12) for p in range(2)]
    assert one == [a + b for a, b in zip(*halves, strict=True)]
    assert one != take(records.batches(split, 8, seed=4), 12)


def test_each_epoch_is_another_permutation(prepared):
    split = records.open_records(prepared).split("train")
    flat = sum(take(records.batches(split, 1, seed=0), 2 * len(split)), [])
    first, second = flat[: len(split)], flat[len(split) :]
    assert sorted(first) == sorted(second) == list(range(len(split))) and first != second


def test_iterator_state_is_json_and_continues_exactly(prepared):
    split = records.open_records(prepared).split("train")
    iterator = records.batches(split, 4, seed=1)
    take(iterator, 5)
    state = json.loads(json.dumps(iterator.get_state()))
    fresh = records.batches(split, 4, seed=1)
    fresh.set_state(state)
    assert take(iterator, 6) == take(fresh, 6)


def test_evaluation_batches_cover_the_split_once(prepared):
    split = records.open_records(prepared).split("validation")
    got = list(records.evaluation_batches(split, 7))
    rows = np.concatenate([b["tokens"][b["weight"] > 0] for b in got])
    np.testing.assert_array_equal(rows, split.read(np.arange(len(split))))
    assert {len(b["tokens"]) for b in got} == {7}


def test_the_standard_library_is_a_source():
    unit = next(sources.open_source("stdlib:sources", "text").units())
    assert len(unit.rows) > 300 and any("def " in text for text in unit.rows)


def test_real_corpus_opens(tmp_path):
    folder = os.environ.get("SLIMMOE_DATA")
    if not folder:
        pytest.skip("SLIMMOE_DATA is not set")
    config = DataConfig(source=f"{folder}/corpus_val.jsonl.zst", context=256, validation_fraction=0.1)
    manifest = prepare.prepare(config, tmp_path / "out", workers=1)
    assert 300 < sum(split["documents"] for split in manifest["splits"].values()) <= 333
