"""Small files that would take all memory, or all of Python's stack: refused or counted, in one line and in flat memory."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from slimmoe_jax import config as config_lib
from slimmoe_jax import files, tasks
from slimmoe_jax.config import DataConfig, InputError
from slimmoe_jax.data import prepare

ROOT = Path(__file__).parent.parent
MB = 2**20


def compressed(path, megabytes, start=b"", byte=b"a"):
    """A file of one row of so many megabytes."""
    if path.suffix == ".gz":
        opened = gzip.open(path, "wb", compresslevel=1)
    elif path.suffix == ".zst":
        opened = pytest.importorskip("zstandard").open(path, "wb")
    else:
        opened = path.open("wb")
    with opened as file:
        file.write(start)
        for _ in range(megabytes):
            file.write(byte * MB)
        file.write(b'"}\n' if start else b"\n")
    return path


def settings(path, **changes):
    data = DataConfig(source=str(path), tokenizer="gpt2", context=32, validation_fraction=0.1)
    return config_lib.override(data, changes)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.jsonl.zst", "text.txt", "text.txt.gz"])
def test_a_row_beyond_the_limit_is_refused_by_file_and_line(tmp_path, name):
    path = compressed(tmp_path / name, 6, b'{"text": "' if "jsonl" in name else b"")
    data = settings(path, max_row_bytes=4 * MB)
    message = rf"{name}, line 1, is longer than 4,194,304 bytes: .*--data.max-row-bytes"
    with pytest.raises(InputError, match=message):
        prepare.prepare(data, tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_a_table_whose_values_expand_is_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"text": pyarrow.array(["a" * 6 * MB] * 3).dictionary_encode()})
    parquet.write_table(table, tmp_path / "rows.parquet", compression="zstd")
    assert (tmp_path / "rows.parquet").stat().st_size < MB
    with pytest.raises(InputError, match=r"rows.parquet.*longer than 4,194,304 bytes"):
        prepare.prepare(settings(tmp_path / "rows.parquet", max_row_bytes=4 * MB), tmp_path / "out", workers=1)


def test_the_limit_is_no_part_of_what_the_records_are(tmp_path):
    tiny.write(tmp_path, tiny.source())
    data = settings(tmp_path / "text.jsonl")
    assert config_lib.records_dir(data) == config_lib.records_dir(config_lib.override(data, {"max_row_bytes": MB}))
    first = prepare.prepare(data, tmp_path / "out", workers=1)
    assert prepare.prepare(config_lib.override(data, {"max_row_bytes": MB}), tmp_path / "out", workers=1) == first


@pytest.mark.parametrize(
    "row", ['{"text": ' + "[" * 100_000, '{"text": ' + "[" * 5_000 + "]" * 5_000 + "}", '{"text": ' + "9" * 5_000 + "}"]
)
def test_rows_that_python_cannot_follow_are_counted_as_invalid(tmp_path, row):
    good = [json.dumps({"text": f"some text that is long enough for several records, number {n}"}) for n in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join([*good, row]))
    manifest = prepare.prepare(settings(tmp_path / "rows.jsonl"), tmp_path / "out", workers=1)
    assert manifest["skipped"]["invalid"] == 1 and "row 61" in manifest["skipped_examples"][0]


def test_questions_have_a_limit_too(tmp_path):
    path = compressed(tmp_path / "questions.jsonl.gz", 200, b'{"query": "')
    with pytest.raises(InputError, match="line 1, is longer than 134,217,728 bytes"):
        tasks.read(str(path))


def test_json_of_this_packages_own_files_has_a_depth(tmp_path):
    for text in ("[" * 100_000, "[" * 5_000 + "]" * 5_000):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match="nested too deep"):
            files.read_json(tmp_path / "config.json")
        with pytest.raises(InputError, match=r"config.json.*nested too deep"):
            config_lib.load(tmp_path / "config.json")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("name", ["rows.jsonl.zst", "text.txt.gz"])
def test_memory_stays_flat(tmp_path, name):
    """Rows of 3 GiB, at the default limit of 128 MiB."""
    tiny.write(tmp_path, tiny.source())
    path = compressed(tmp_path / name, 3 * 1024, b'{"text": "' if "jsonl" in name else b"")
    program = "import re, sys\nfrom slimmoe_jax.data import prepare\ntry: prepare.main(sys.argv[1:])\n"
    program += "finally: print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])"
    words = [sys.executable, "-c", program, "--config", "tiny.py", "--source", str(path), "--out", "out"]
    done = subprocess.run(words, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert "is longer than 134,217,728 bytes" in done.stderr.splitlines()[-1]
    assert int(done.stdout) < 800_000, "kB of memory at the peak"
    print(path.stat().st_size, done.stdout)
