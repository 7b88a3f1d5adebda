"""Sources: what comes out is what was put in, whatever the container, and damage is never taken for the end."""

import datetime
import gzip
import json
import os
import struct
import sys
import types

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from slimmoe_jax.config import InputError
from slimmoe_jax.data import folders, reading, sources, stdlib

TEXTS = [f"Text {n}: line one\nline two\t{'x' * (n % 37)}é\u2028end " for n in range(300)]


def texts_of(spec, field="text"):
    return [text for unit in sources.open_source(str(spec), field).units() for _, text in sources.documents(unit, field)]


def jsonl(texts=TEXTS, end="\n"):
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + end for text in texts).encode()


def in_two(body, pack):
    """Two compressed parts in one file, cut in the middle of a line, as tools that append leave them."""
    return pack(body[:5_001]) + pack(body[5_001:])


def zstd_stream(body):
    """A frame that does not know its size, as a pipe writes it."""
    compressor = zstandard.ZstdCompressor().compressobj()
    return compressor.compress(body) + compressor.flush()


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("a.jsonl", jsonl()),
        ("a.jsonl", jsonl(end="\r\n")),
        ("a.jsonl", jsonl().removesuffix(b"\n")),
        ("a.jsonl", b"\xef\xbb\xbf" + jsonl()),
        ("a.jsonl.gz", gzip.compress(jsonl())),
        ("a.jsonl.gz", in_two(jsonl(), gzip.compress)),
        ("a.jsonl.zst", zstd_stream(jsonl())),
        ("a.jsonl.zst", in_two(jsonl(), zstd_stream)),
    ],
)
@pytest.mark.parametrize("block", [7, 2**20])
def test_lines_come_back_from_every_container(tmp_path, monkeypatch, name, body, block):
    monkeypatch.setattr(reading, "BLOCK", block)
    monkeypatch.setattr(reading, "_ZSTD_INPUT", block)
    (tmp_path / name).write_bytes(body)
    assert texts_of(tmp_path / name) == TEXTS


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize("missing", [1, 4, 9, 100])
def test_a_stream_that_ends_early_is_damaged(tmp_path, suffix, missing):
    pack = {"gz": gzip.compress, "zst": lambda body: in_two(body, zstd_stream)}[suffix]
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(pack(jsonl())[:-missing])
    with pytest.raises(InputError, match="is damaged"):
        texts_of(path)


def test_parquet_row_groups_small_and_large(tmp_path, monkeypatch):
    rows = [*TEXTS[:150], None, *TEXTS[150:]]
    pq.write_table(pa.table({"id": range(len(rows)), "text": rows}), tmp_path / "a.parquet", row_group_size=100)
    whole = list(sources.open_source(str(tmp_path / "a.parquet"), "text").units())
    assert all(unit.row_groups for unit in whole) and texts_of(tmp_path / "a.parquet") == rows
    monkeypatch.setattr(reading, "UNIT_BYTES", 300)  # now all row groups but the last, of one row, are too large for a unit
    units = list(sources.open_source(str(tmp_path / "a.parquet"), "text").units())
    assert len(units) > 10 and not any(unit.row_groups for unit in units[:-1])
    found = [(row, text) for unit in units for row, text in sources.documents(unit, "text")]
    assert found == list(enumerate(rows, start=1))


def test_a_directory_of_the_hubs_layout(tmp_path):
    """Parquet files below sample/10BT with FineWeb-Edu's columns; a download's cache and other files are no text."""
    folder = tmp_path / "sample" / "10BT"
    folder.mkdir(parents=True)
    for n in range(3):
        part = TEXTS[n * 100 : n * 100 + 100]
        table = pa.table({"text": part, "id": [f"<urn:uuid:{i}>" for i in range(100)], "score": [3.5] * 100})
        pq.write_table(table, folder / f"00{n}_00000.parquet")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "old.jsonl").write_bytes(jsonl())
    (tmp_path / "README.md").write_text("# dataset card")
    assert texts_of(tmp_path) == TEXTS
    source = sources.open_source(str(tmp_path), "text")
    assert source.ignored == ("README.md",)
    assert sum(unit.size for unit in source.units()) == pytest.approx(source.total_bytes, abs=3)


def test_text_files_are_kept_byte_for_byte(tmp_path):
    bodies = ["one\r\ntwo\n\n", "no line end", "\n\nblank lines first\t\n"]
    for n, body in enumerate(bodies):
        (tmp_path / f"{n}.txt").write_bytes(body.encode())
    assert texts_of(tmp_path) == bodies  # each file of a directory is a document
    one = "".join(f"paragraph {n}\n" + f"line {n}\n" * 40 + "\n" for n in range(400))
    (tmp_path / "0.txt").write_text(one)
    parts = texts_of(tmp_path / "0.txt")  # a single file is cut at blank lines
    assert len(parts) > 5 and "".join(parts) == one and all(part.startswith("\nparagraph") for part in parts[1:])


def test_a_text_file_that_is_not_utf8_names_the_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"fine\nalso fine\nbad \xff\n")
    with pytest.raises(InputError, match="not UTF-8 .* line 3"):
        texts_of(tmp_path / "a.txt")


def test_rows_that_are_no_documents(tmp_path):
    lines = [b'{"text": "good"}', b"", b"[1]", b'{"text": null}', b'{"text": "\\ud800"}', b'{"text": "\xff"}', b'"text"', b"9"]
    lines += [b"[" * 100_000, b'{"text": "last"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    assert texts_of(tmp_path / "a.jsonl") == ["good", "", *[None] * 7, "last"]


def test_the_standard_library_is_the_same_each_time_and_has_no_text_twice():
    for spec in ("stdlib", "stdlib:sources"):
        texts = texts_of(spec)
        assert texts == texts_of(spec) and len(set(texts)) == len(texts)
    assert not any("Autogenerated by Sphinx" in text[:200] for text in texts)  # the topics are there one by one


def test_opening_the_standard_library_does_not_read_it(monkeypatch):
    def refuse(*args):
        raise AssertionError("read")

    for name in ("texts", "conversations", "questions"):
        monkeypatch.setattr(stdlib, name, refuse)
    sources._stdlib_rows.cache_clear()
    kinds = [("stdlib", "text"), ("stdlib:sources", "text"), ("stdlib", "chat"), ("stdlib", "multiple_choice")]
    prints = {sources.open_source(spec, "text", form=form).fingerprint for spec, form in kinds}
    assert len(prints) == 4
    monkeypatch.setattr(stdlib, "VERSION", stdlib.VERSION + 1)
    assert not prints & {sources.open_source(spec, "text", form=form).fingerprint for spec, form in kinds}


class FakeHub(types.ModuleType):
    """Stands for the package `datasets`; its stream breaks off after so many rows."""

    def __init__(self, rows, breaks_after=None):
        super().__init__("datasets")
        self.rows, self.breaks_after, self.asked = rows, breaks_after, None

    def load_dataset(self, *args, **kwargs):
        self.asked = (args, kwargs)
        for n, row in enumerate(self.rows):
            if n == self.breaks_after:
                raise RuntimeError("Server disconnected\nlong story")
            yield row


def test_hub_rows_are_streamed(monkeypatch):
    hub = FakeHub([{"text": text, "id": n} for n, text in enumerate(TEXTS)])
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert texts_of("hub:HuggingFaceFW/fineweb-edu:sample-10BT") == TEXTS
    assert hub.asked == (("HuggingFaceFW/fineweb-edu", "sample-10BT"), {"split": "train", "streaming": True})
    with pytest.raises(InputError, match="no column 'body': set data.text_field to one of text, id"):
        texts_of("hub:x", "body")


def test_hub_failures_say_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", FakeHub([{"text": "x"}] * 9, breaks_after=5))
    with pytest.raises(sources.Interrupted, match="Server disconnected.*local mirror") as caught:
        texts_of("hub:x")
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "datasets", None)  # not installed
    with pytest.raises(InputError, match="pip install datasets"):
        texts_of("hub:x")
    for spec in ("hub:", "hub:a:b:c"):
        with pytest.raises(InputError, match="hub:NAME"):
            sources.open_source(spec, "text")


# --- the fingerprint -------------------------------------------------------------------------------------------------


def fingerprint(path):
    return sources.open_source(str(path), "text").fingerprint


@pytest.mark.parametrize("least", [2**30, 0], ids=["whole", "sampled"])
def test_the_fingerprint_changes_with_the_text(tmp_path, monkeypatch, least):
    """One letter at the start, in the middle or at the end, at the same size and time; and a name; and nothing else."""
    monkeypatch.setattr(folders, "FINGERPRINT_BYTES", least)
    monkeypatch.setattr(folders, "_SAMPLE", 64)
    path, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    body = jsonl()
    path.write_bytes(body)
    other.write_bytes(jsonl(["other"]))
    status, first = os.stat(path), fingerprint(tmp_path)
    found = {first}
    for place in (12, len(body) // 2, len(body) - 5):
        path.write_bytes(body[:place] + bytes([body[place] ^ 1]) + body[place + 1 :])
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        found.add(fingerprint(tmp_path))
    path.write_bytes(body)
    other.rename(tmp_path / "c.jsonl")
    found.add(fingerprint(tmp_path))
    assert len(found) == 5
    (tmp_path / "c.jsonl").rename(other)
    (tmp_path / "notes.md").write_text("no part of the text")
    assert fingerprint(tmp_path) == first


def test_the_fingerprint_is_of_the_names_below_the_folder(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    (tmp_path / "one" / "a.jsonl").write_bytes(jsonl())
    (tmp_path / "two" / "a.jsonl").symlink_to(tmp_path / "one" / "a.jsonl")
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "two")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl())
    source = sources.open_source(str(tmp_path), "text")
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(InputError, match="a.jsonl cannot be read"):
        source.fingerprint  # noqa: B018


# --- splits ----------------------------------------------------------------------------------------------------------

HUB = ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "test-00000-of-00001.parquet"]
CHATS = ["data/train_sft-00000-of-00001-a09b74.parquet", "data/train_gen-00000-of-00001.parquet"]
CHATS += ["data/test_sft-00000-of-00001.parquet"]
MMLU = ["all/auxiliary_train-00000-of-00001.parquet", "all/test-00000-of-00001.parquet"]
MMLU += ["auxiliary_train/train-00000-of-00001.parquet", "anatomy/test-00000-of-00001.parquet"]


def make(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.lower().endswith(".parquet"):
            pq.write_table(pa.table({"text": [name]}), folder / name)
        else:
            (folder / name).write_text(json.dumps({"text": name}))


def read(folder, split=""):
    source = sources.open_source(str(folder), "text", split)
    return [text for unit in source.units() for _, text in sources.documents(unit, "text")], source


@pytest.mark.parametrize(
    ("split", "taken", "others"),
    [
        ("train", HUB[:2], HUB[2:]),
        ("test", HUB[2:], HUB[:2]),
        ("train", ["train.jsonl"], ["train_sft.jsonl", "test.jsonl"]),
        ("train_sft", ["train_sft.jsonl"], ["train.jsonl", "test_sft.jsonl"]),
        ("train", ["train_00.jsonl", "train_01.jsonl"], ["train_sft_00.jsonl"]),
        ("train", ["train.00.jsonl", "train.v2.jsonl", "train0.jsonl"], ["trainer.jsonl"]),
        ("train", ["train/0000.jsonl", "train/0001.jsonl"], ["test/0000.jsonl"]),
        ("train_sft", ["default/train_sft/0000.jsonl"], ["default/test_sft/0000.jsonl"]),
        ("test", ["test/a.jsonl"], ["train/test-results.jsonl"]),
        ("train", ["data/train-a.jsonl", "data/train-b.jsonl"], ["data/test-a.jsonl"]),
        ("test", ["my-test-0.jsonl"], ["my-train-0.jsonl", "my-test_more-0.jsonl"]),
        ("train_sft", CHATS[:1], CHATS[1:]),
        ("test_sft", CHATS[2:], CHATS[:2]),
        ("auxiliary_train", MMLU[:1], MMLU[1:]),
        ("gsm", ["gsm-0.jsonl", "gsm-1.jsonl"], ["code-0.jsonl"]),
    ],
)
def test_a_split_is_found_by_the_names_of_files_and_folders(tmp_path, split, taken, others):
    make(tmp_path, taken + others)
    assert sorted(read(tmp_path, split)[0]) == sorted(taken)


@pytest.mark.parametrize(
    ("names", "split", "message"),
    [
        (["test.jsonl", "train.jsonl"], "trian", "data.split = trian is not in .*, which has test, train: set data.split"),
        (CHATS, "train", "which has test_sft, train_gen, train_sft"),
        (["train.jsonl", "test.jsonl"], "train_sft", "which has test, train"),
        (["a.jsonl", "b.jsonl"], "train", r"whose files \(a.jsonl, b.jsonl\) name no split"),
        (CHATS, "", "has the splits train_gen, train_sft and others: set data.split to one of them"),
    ],
)
def test_a_split_that_is_not_there_is_refused(tmp_path, names, split, message):
    make(tmp_path, names)
    with pytest.raises(InputError, match=message):
        read(tmp_path, split)


@pytest.mark.parametrize(
    ("names", "taken", "remark"),
    [
        (HUB, HUB[:2], "left out: 1 file outside the train split (test-00000-of-00001.parquet)"),
        (
            ["train.jsonl", "dev.jsonl", "x.jsonl"],
            ["train.jsonl"],
            "left out: 2 files outside the train split (dev.jsonl, x.jsonl)",
        ),
        (["a/train/0.jsonl", "a/validation/0.jsonl"], ["a/train/0.jsonl"], "left out: 1 file outside the train split ("),
        (
            ["train_sft.jsonl", "test_sft.jsonl"],
            ["train_sft.jsonl"],
            "left out: 1 file outside the train_sft split (test_sft.jsonl)",
        ),
        (["Train.jsonl", "EVAL.jsonl"], ["Train.jsonl"], "left out: 1 file outside the Train split (EVAL.jsonl)"),
        (MMLU, MMLU[2:3], "left out: 3 files outside the train split ("),
        (
            ["chat.jsonl", "chat_val.jsonl"],
            ["chat.jsonl", "chat_val.jsonl"],
            "also read: 1 file named like other splits (chat_val.jsonl)",
        ),
        (["train.jsonl", "train_more.jsonl"], ["train.jsonl", "train_more.jsonl"], None),
        (["test.jsonl", "test-2.jsonl"], ["test.jsonl", "test-2.jsonl"], None),
        (["contest.jsonl", "trainer.jsonl", "a-test-b.jsonl"], ["contest.jsonl", "trainer.jsonl", "a-test-b.jsonl"], None),
    ],
)
def test_without_a_split_a_folder_of_splits_gives_its_train_split(tmp_path, names, taken, remark):
    make(tmp_path, names)
    texts, source = read(tmp_path)
    assert sorted(texts) == sorted(taken)
    assert len(source.remarks) == (remark is not None) and all(line.startswith(remark) for line in source.remarks)


# --- links and names -------------------------------------------------------------------------------------------------


def test_links_are_followed_and_no_file_is_read_twice(tmp_path):
    corpus, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    make(corpus, ["a.jsonl"])
    make(elsewhere, ["more.jsonl", "deep/most.jsonl"])
    (corpus / "part2").symlink_to("../elsewhere")
    (corpus / "again").symlink_to("../elsewhere")
    (corpus / "b.jsonl").symlink_to("a.jsonl")
    assert sorted(read(corpus)[0]) == ["a.jsonl", "deep/most.jsonl", "more.jsonl"]


def test_links_in_a_circle_come_to_an_end(tmp_path):
    make(tmp_path, ["a/a.jsonl", "b/b.jsonl", "c/c.jsonl"])
    (tmp_path / "a" / "up").symlink_to("..")
    (tmp_path / "self").symlink_to(".")
    for first in "abc":
        for second in "abc":
            (tmp_path / first / f"to-{second}").symlink_to(f"../{second}")
    assert sorted(read(tmp_path)[0]) == ["a/a.jsonl", "b/b.jsonl", "c/c.jsonl"]


def test_many_folders_linked_to_each_other_are_read_in_little_time(tmp_path):
    """Followed under every name they would be 12! folders."""
    names = [f"{n:02}" for n in range(12)]
    make(tmp_path, [f"{name}/x.jsonl" for name in names])
    for first in names:
        for second in names:
            (tmp_path / first / f"to-{second}").symlink_to(f"../{second}")
    assert len(read(tmp_path)[0]) == 12


@pytest.mark.parametrize("name", ["shard3.jsonl", "part2", "loop"])
def test_a_link_to_nothing_is_refused(tmp_path, name):
    make(tmp_path, ["a.jsonl"])
    (tmp_path / name).symlink_to("loop" if name == "loop" else "/nowhere/x")
    with pytest.raises(InputError, match=f"{name} is a link to (/nowhere/x|loop), which is not there"):
        read(tmp_path)


def test_hidden_links_are_no_part_of_the_text(tmp_path):
    make(tmp_path, ["a.jsonl"])
    (tmp_path / ".#a.jsonl").symlink_to("somebody@somewhere.123")  # an editor's lock
    assert read(tmp_path)[0] == ["a.jsonl"]


def test_a_file_is_of_the_kind_that_its_last_suffixes_name(tmp_path):
    line, table = json.dumps({"text": "a line"}).encode(), pa.table({"text": ["a row"]})
    bodies = {
        "a.txt.jsonl": (line, "a line"),
        "b.jsonl.txt": (line, line.decode()),
        "c.parquet.jsonl.gz": (gzip.compress(line), "a line"),
        "d.JSONL": (line, "a line"),
        "e.Jsonl.GZ": (gzip.compress(line), "a line"),
        "f.jsonl/g.txt": (b"plain", "plain"),
        "h.jsonl/i.Parquet": (None, "a row"),
        "j.TXT.ZST": (zstd_stream(b"packed"), "packed"),
    }
    for name, (body, _) in bodies.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / name) if body is None else (tmp_path / name).write_bytes(body)
    (tmp_path / "k.jsonl.bak").write_bytes(line)
    (tmp_path / "l.CSV").write_bytes(line)
    texts, source = read(tmp_path)
    assert texts == [text for _, text in bodies.values()] and source.ignored == ("k.jsonl.bak", "l.CSV")
    assert texts_of(tmp_path / "d.JSONL") == ["a line"] and texts_of(tmp_path / "f.jsonl") == ["plain"]
    with pytest.raises(InputError, match="b.jsonl.txt is plain text"):
        sources.open_source(str(tmp_path / "b.jsonl.txt"), "messages", form="chat")
    assert sources.open_source(str(tmp_path / "a.txt.jsonl"), "messages", form="chat").total_bytes == len(line)


# --- compressed streams ----------------------------------------------------------------------------------------------


def long_window(body):
    """A frame as `zstd --long=31` writes it: a window of 2 GiB, here with one block that is stored as it is."""
    return struct.pack("<IBB", 0xFD2FB528, 0, (31 - 10) << 3) + (len(body) << 3 | 1).to_bytes(3, "little") + body


def skippable(body):
    return struct.pack("<II", 0x184D2A5E, len(body)) + body


LINE = b'{"text": "x"}\n'


@pytest.mark.parametrize(
    ("name", "body", "count"),
    [
        ("a.jsonl.zst", long_window(LINE), 1),
        ("a.jsonl.zst", skippable(b"meta") + zstd_stream(LINE) + skippable(b""), 1),
        ("a.jsonl.zst", zstd_stream(b"") + zstd_stream(LINE) + zstd_stream(b"") + long_window(LINE), 2),
        ("a.jsonl.zst", zstd_stream(b""), 0),
        ("a.jsonl.zst", skippable(b"meta"), 0),
        ("a.jsonl.gz", gzip.compress(LINE) + gzip.compress(b"") + gzip.compress(LINE) + bytes(700), 2),
        ("a.jsonl.gz", gzip.compress(b""), 0),
    ],
)
@pytest.mark.parametrize("block", [3, 2**12])
def test_every_valid_stream_is_read(tmp_path, monkeypatch, name, body, count, block):
    monkeypatch.setattr(reading, "_ZSTD_INPUT", block)
    (tmp_path / name).write_bytes(body)
    assert texts_of(tmp_path / name) == ["x"] * count


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("a.jsonl.zst", b""),  # `zstd -t` and `gzip -t` refuse these two as well
        ("a.jsonl.gz", b""),
        ("a.jsonl.zst", skippable(b"meta")[:-1]),
        ("a.jsonl.zst", long_window(LINE)[:-1]),
        ("a.jsonl.zst", zstd_stream(LINE) + b"\0"),
        ("a.jsonl.zst", b"plain text"),
        ("a.jsonl.gz", gzip.compress(LINE) + b"\1"),
        ("a.jsonl.gz", LINE),
    ],
)
def test_a_stream_that_is_none_is_damaged(tmp_path, name, body):
    (tmp_path / name).write_bytes(body)
    with pytest.raises(InputError, match="is damaged"):
        texts_of(tmp_path / name)


def test_what_is_compressed_with_a_dictionary_is_not_called_damaged(tmp_path):
    words = zstandard.train_dictionary(1_000, [b"hello %d world" % n * 10 for n in range(1_000)])
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor(dict_data=words).compress(LINE * 9))
    with pytest.raises(InputError, match="a.jsonl.zst is compressed with a dictionary"):
        texts_of(tmp_path / "a.jsonl.zst")


def test_little_input_makes_no_giant_block(tmp_path):
    """10 kB of zstd that hold 320 MB."""
    (tmp_path / "a.txt.zst").write_bytes(zstandard.ZstdCompressor().compress(bytes(320_000_000)))
    sizes = [len(block) for block, _ in reading._blocks(tmp_path / "a.txt.zst", "zst")]
    assert sum(sizes) == 320_000_000 and max(sizes) < 2**28


# --- tables ----------------------------------------------------------------------------------------------------------


def table_rows(path, field):
    return [value for unit in sources.open_source(str(path), field).units() for _, value in sources.rows(unit, field)]


WORDS = ["one", None, "thrée"]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(WORDS, pa.large_string()),
        pa.array(WORDS, pa.string_view()),
        pa.array(WORDS).dictionary_encode(),
        pa.array(WORDS, pa.large_string()).dictionary_encode(),
        pa.ExtensionArray.from_storage(pa.json_(), pa.array(WORDS)),
    ],
    ids=lambda column: str(column.type),
)
@pytest.mark.parametrize("unit_bytes", [2**24, 1], ids=["by row groups", "by rows"])
def test_text_of_every_type_is_text(tmp_path, monkeypatch, column, unit_bytes):
    monkeypatch.setattr(reading, "UNIT_BYTES", unit_bytes)
    pq.write_table(pa.table({"a.b": column, "text": column}), tmp_path / "a.parquet")
    for field in ("text", "a.b"):  # the second is no field `b` of a column `a`
        assert texts_of(tmp_path / "a.parquet", field) == WORDS


@pytest.mark.parametrize("unit_bytes", [2**24, 1], ids=["by row groups", "by rows"])
def test_bytes_are_no_text(tmp_path, monkeypatch, unit_bytes):
    """Not even such as would be JSON."""
    monkeypatch.setattr(reading, "UNIT_BYTES", unit_bytes)
    pq.write_table(pa.table({"text": pa.array([b'{"text": "x"}', None], pa.binary())}), tmp_path / "a.parquet")
    assert texts_of(tmp_path / "a.parquet") == [None, None]
    assert table_rows(tmp_path / "a.parquet", "text") == [b'{"text": "x"}', None]


def write_twice(path):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"]), pa.array([1])], names=["text", "text", "id"])
    pq.write_table(table, path)


def write_encrypted(path):
    """With a key that nobody gives to the reader."""
    import pyarrow.parquet.encryption as encryption

    class Keys(encryption.KmsClient):
        def __init__(self, config):
            super().__init__()

        def wrap_key(self, key, name):
            return key.hex()

    factory = encryption.CryptoFactory(Keys)
    settings = encryption.EncryptionConfiguration(footer_key="f", column_keys={"c": ["text"]})
    properties = factory.file_encryption_properties(encryption.KmsConnectionConfig(), settings)
    with pq.ParquetWriter(path, pa.schema({"text": pa.string()}), encryption_properties=properties) as writer:
        writer.write_table(pa.table({"text": ["secret"]}))


FAR = pa.array([2**61], pa.timestamp("ms"))  # in no year that Python's datetime knows
CASES = {
    "twice": (write_twice, "text", "several columns named 'text'"),
    "twice, rows": (write_twice, None, "several columns named 'text'"),
    "no columns": (lambda p: pq.write_table(pa.table({}), p), "text", "no column 'text': it has no columns at all"),
    "a field within": (lambda p: pq.write_table(pa.table({"a": [{"b": "x"}]}), p), "a.b", "no column 'a.b': set .* to one of a$"),
    "far": (lambda p: pq.write_table(pa.table({"text": FAR}), p), "text", r"column 'text' of type timestamp\[.*cannot be read"),
    "far, rows": (lambda p: pq.write_table(pa.table({"when": FAR, "q": ["x"]}), p), None, "column 'when' of type timestamp"),
    "not UTF-8": (
        lambda p: pq.write_table(pa.table({"text": pa.array([b"\xff"]).view(pa.string())}), p),
        "text",
        "column 'text' of type string, holds values that cannot be read",
    ),
    "encrypted": (write_encrypted, "text", "is encrypted"),
    "empty": (lambda p: p.write_bytes(b""), "text", "is damaged"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("unit_bytes", [2**24, 1], ids=["by row groups", "by rows"])
def test_tables_that_cannot_be_read_are_named(tmp_path, monkeypatch, case, unit_bytes):
    monkeypatch.setattr(reading, "UNIT_BYTES", unit_bytes)
    write, field, message = CASES[case]
    write(tmp_path / "a.parquet")
    with pytest.raises(InputError, match=message) as caught:
        table_rows(tmp_path / "a.parquet", field)
    assert "a.parquet" in str(caught.value) and "\n" not in str(caught.value)


def test_a_name_that_stands_for_two_columns_harms_no_other(tmp_path):
    write_twice(tmp_path / "a.parquet")
    assert table_rows(tmp_path / "a.parquet", "id") == [1]


def test_tables_without_rows_have_none(tmp_path):
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    with pq.ParquetWriter(tmp_path / "b.parquet", pa.schema({"text": pa.string()})):
        pass
    assert texts_of(tmp_path) == []


hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies
TYPES = st.recursive(
    st.sampled_from(
        [pa.null(), pa.bool_(), pa.int8(), pa.uint64(), pa.float16(), pa.float64(), pa.string(), pa.large_string(), pa.binary()]
        + [pa.string_view(), pa.binary(3), pa.date32(), pa.date64(), pa.time64("ns"), pa.timestamp("ns"), pa.duration("s")]
        + [pa.timestamp("ms", "Europe/Berlin"), pa.timestamp("s", "Nowhere/At-all"), pa.decimal128(38, 3), pa.uuid(), pa.json_()]
        + [pa.dictionary(pa.int8(), pa.string())]
    ),
    lambda inner: (
        st.builds(pa.list_, inner)
        | st.builds(lambda a, b: pa.struct([("x", a), ("y", b)]), inner, inner)
        | st.builds(lambda a: pa.struct([("x", a), ("x", a)]), inner)
        | st.builds(pa.map_, st.just(pa.string()), inner)
    ),
    max_leaves=3,
)


def random_array(kind, rng, length):
    """Any bytes that fit the type, or nulls where pyarrow makes no such array."""
    try:
        if pa.types.is_primitive(kind):
            width = kind.bit_width * length // 8 + 1
            return pa.Array.from_buffers(kind, length, [None, pa.py_buffer(rng.randbytes(width))])
        if pa.types.is_string(kind) or pa.types.is_binary(kind):
            return pa.array([rng.randbytes(4) for _ in range(length)]).view(kind)
        if pa.types.is_struct(kind):
            return pa.StructArray.from_arrays([random_array(f.type, rng, length) for f in kind], fields=list(kind))
        if pa.types.is_list(kind):
            return pa.ListArray.from_arrays(list(range(length + 1)), random_array(kind.value_type, rng, length), type=kind)
        if pa.types.is_map(kind):
            keys = pa.array(["k"] * 2 * length)
            return pa.MapArray.from_arrays([2 * n for n in range(length + 1)], keys, random_array(kind.item_type, rng, 2 * length))
    except (pa.ArrowException, TypeError):
        pass
    return pa.nulls(length, kind)


@hypothesis.settings(
    max_examples=200, deadline=datetime.timedelta(seconds=20), derandomize=True, database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)  # fmt: skip
@hypothesis.given(
    kinds=st.lists(TYPES, max_size=3), names=st.lists(st.sampled_from(["text", "a.b", "a", ""]), min_size=3, max_size=3),
    rng=st.randoms(use_true_random=False), length=st.integers(0, 3), whole=st.booleans(), small=st.booleans(),
)  # fmt: skip
def test_any_table_gives_rows_or_one_line(tmp_path_factory, kinds, names, rng, length, whole, small):
    path = tmp_path_factory.getbasetemp() / "any.parquet"
    try:
        arrays = [random_array(kind, rng, length) for kind in kinds]
        pq.write_table(pa.Table.from_arrays(arrays, names=names[: len(kinds)]), path, row_group_size=2)
    except (pa.ArrowException, TypeError):
        hypothesis.reject()  # nothing that pyarrow would write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "UNIT_BYTES", 1 if small else 2**24)
        try:
            rows = table_rows(path, None if whole else "text")
        except InputError as error:
            assert "any.parquet" in str(error) and "\n" not in str(error)
        else:
            assert len(rows) == (length if kinds else 0)


# --- the columns of chats --------------------------------------------------------------------------------------------

CHAT = ("messages", "conversations")


def write_chats(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ""], ids=["jsonl", "parquet", "hub"])
def test_the_second_column_is_read_where_the_first_is_missing(tmp_path, monkeypatch, capsys, suffix):
    """As OpenHermes-2.5 was first published, with more columns."""
    talk = [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hello."}]
    rows = [{"id": n, "conversations": talk, "source": "x"} for n in range(3)]
    spec = "hub:x" if not suffix else str(tmp_path / f"a{suffix}")
    monkeypatch.setitem(sys.modules, "datasets", FakeHub(rows))
    if suffix:
        write_chats(tmp_path / f"a{suffix}", rows)
    reading.say_once.cache_clear()
    source = sources.open_source(spec, CHAT, form="chat")
    for _ in range(2):
        assert [value for unit in source.units() for _, value in sources.rows(unit, CHAT)] == [talk] * 3
    assert capsys.readouterr().err == "no column 'messages': reading 'conversations' instead\n"
    given = sources.open_source(spec, "messages", form="chat")
    if suffix == ".jsonl":
        assert [value for unit in given.units() for _, value in sources.rows(unit, "messages")] == [None] * 3
    else:
        with pytest.raises(InputError, match="no column 'messages': set data.text_field to one of"):
            list(given.units())


def test_the_first_column_counts_where_there_are_both(tmp_path, capsys):
    rows = [{"conversations": "second", "messages": "first"}, {"conversations": "other"}]
    write_chats(tmp_path / "a.jsonl", rows[:1] * 2 + rows[1:])
    write_chats(tmp_path / "b.parquet", rows[:1] * 2)
    reading.say_once.cache_clear()
    assert table_rows(tmp_path / "b.parquet", CHAT) == ["first"] * 2 and not capsys.readouterr().err
    assert table_rows(tmp_path / "a.jsonl", CHAT) == ["first", "first", "other"] and capsys.readouterr().err


def test_a_split_of_what_has_none_is_remarked_on(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl())
    for spec, what in ((str(tmp_path / "a.jsonl"), "a single file"), ("stdlib", "the standard library")):
        (remark,) = sources.open_source(spec, "text", "train_sft").remarks
        assert remark == f"data.split = train_sft: {what} has no splits, all of it is read"
        assert not sources.open_source(spec, "text").remarks
