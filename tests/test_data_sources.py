"""Sources: what comes out is what was put in, whatever the container, and damage is never taken for the end."""

import gzip
import json
import sys
import types

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from slimmoe_jax.config import InputError
from slimmoe_jax.data import sources

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
    monkeypatch.setattr(sources, "_BLOCK", block)
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
    monkeypatch.setattr(sources, "UNIT_BYTES", 300)  # now all row groups but the last, of one row, are too large for a unit
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
