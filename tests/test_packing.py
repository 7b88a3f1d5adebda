"""Packing: everything is placed once, records are full, and an example in company has the loss that it has alone."""

import dataclasses
import itertools
import json
import os
import random

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slimmoe_jax import losses, model, routing, step
from slimmoe_jax.config import DataConfig, InputError, ModelConfig, RouterConfig, TrainConfig
from slimmoe_jax.data import packing, prepare, records
from slimmoe_jax.data.chat import Encoded


def test_every_example_is_placed_once_and_no_bin_overflows():
    rng = random.Random(0)
    for capacity in (1, 7, 64, 2_049):
        lengths = [rng.randint(1, capacity) for _ in range(500)]
        bins = packing.best_fit(lengths, capacity)
        assert sorted(itertools.chain(*bins)) == list(range(500))
        assert all(sum(lengths[i] for i in members) <= capacity for members in bins)


def test_best_fit_takes_the_fullest_bin_with_room():
    """6, 5, 4, 3 and 2 into bins of 10: 6 + 4, 5 + 3 + 2. Written out, longest first, by a search through all bins."""
    assert packing.best_fit([2, 3, 4, 5, 6], 10) == [[4, 2], [3, 1, 0]]
    rng = random.Random(1)
    lengths = [rng.randint(1, 50) for _ in range(300)]
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [n for n, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda n: rooms[n])] -= length
        else:
            rooms.append(50 - length)
    assert len(packing.best_fit(lengths, 50)) == len(rooms)


def examples(count, longest, seed=0):
    """Random tokens above 0, of which a run at the end is to be predicted."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        length = int(rng.integers(2, longest + 1))
        targets = np.arange(length) >= rng.integers(1, length)
        made.append(Encoded(rng.integers(1, 50, length), targets, 0))
    return made


def test_packed_records_hold_the_examples():
    made = examples(40, 30)
    packed = packing.pack(made, 64, "uint16")
    found = []
    for tokens, segments, targets in packed:
        assert (np.diff(segments.astype(int)[segments > 0]) >= 0).all() and not tokens[segments == 0].any()
        for segment in range(1, segments.max() + 1):
            found.append((tokens[segments == segment].tolist(), targets[segments == segment].tolist()))
    assert sorted(found) == sorted((e.tokens.tolist(), e.targets.astype(int).tolist()) for e in made)


@pytest.mark.parametrize(
    "router",
    [RouterConfig(), RouterConfig(kind="top_k", renormalize=True), RouterConfig(kind="relu")],
    ids=lambda router: router.kind,
)
def test_an_example_in_company_has_the_loss_that_it_has_alone(router):
    """Alone: its own tokens from position 0, no segments, the plain formula over its targets. 1e-5 nats a token."""
    config = ModelConfig(
        vocab_size=50, layers=2, width=32, heads=4, head_dim=8, kv_heads=(2, 1), rotary=(1.0, 0.0), expert_hidden=24,
        dropout=0.0, init_std=0.2, router=router,
    )  # fmt: skip
    network, state = model.SlimMoE(config), routing.RouterState.initial(config)
    params = nn.unbox(model.init(network, jax.random.key(0)))
    made = examples(9, 30)
    packed = packing.pack(made, 64, "uint16").astype(np.int32)

    @jax.jit
    def in_company(batch):
        inputs = step.inputs_of(batch, None)
        out = network.apply(
            {"params": params}, inputs["tokens"], state, positions=inputs["positions"], segments=inputs["segments"],
            valid=inputs["valid"],
        )  # fmt: skip
        return losses.token_nll(out.hidden, out.head, inputs["targets"]) * inputs["weights"], out.stats.tokens

    nll, counted = in_company({name: packed[:, n] for n, name in enumerate(packing.CHANNELS)})
    assert (np.asarray(counted) == (packed[:, 1, :-1] > 0).sum()).all(), "padding is not among what the routers balance"

    @jax.jit
    def alone(tokens):
        log_probabilities = jax.nn.log_softmax(network.apply({"params": params}, tokens[:, :-1], state).logits())
        return -jnp.take_along_axis(log_probabilities, tokens[:, 1:, None], axis=-1)[0, :, 0]

    bins = packing.best_fit([len(e.tokens) for e in made], 64)
    for record, members in enumerate(bins):
        for segment, member in enumerate(members, start=1):
            example = made[member]
            # Padded on the right, which causal attention does not see, so that all lengths share a program.
            tokens = np.pad(example.tokens, (0, 30 - len(example.tokens)))[None]
            expected = np.asarray(alone(tokens))[: len(example.tokens) - 1][example.targets[1:]].sum()
            actual = np.asarray(nll)[record][packed[record, 1, 1:] == segment].sum()
            np.testing.assert_allclose(actual / example.targets.sum(), expected / example.targets.sum(), atol=1e-5)


# --- from rows to batches --------------------------------------------------------------------------------------------


def write_rows(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def conversation(n):
    words = " ".join(f"word{(n * 7 + i) % 50}" for i in range(3 + n % 9))
    return {"messages": [{"role": "user", "content": f"Question {n}?"}, {"role": "assistant", "content": f"Because {words}."}]}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Records of conversations and of text, GPT-2 vocabulary, context 64."""
    folder = tmp_path_factory.mktemp("packed")
    rows = [conversation(n) for n in range(200)] + [{"messages": []}, {"other": 1}]
    rows += [{"messages": [{"role": "user", "content": "?"}]}]
    rows += [{"messages": [{"role": "user", "content": "long " * 90}, {"role": "assistant", "content": "x"}]}]
    chats = DataConfig(source=write_rows(folder / "chat.jsonl", rows), format="chat", context=64, validation_fraction=0.1)
    text = DataConfig(
        source=write_rows(folder / "text.jsonl", [{"text": f"Text {n} " * 9} for n in range(90)]),
        context=64,
        validation_fraction=0.1,
    )
    for name, data in (("chat", chats), ("text", text)):
        prepare.prepare(data, folder / name, workers=1)
    return folder


def test_every_conversation_is_in_the_records_or_counted(prepared):
    found = records.open_records(prepared / "chat")
    manifest = found.manifest
    assert manifest["skipped"] == {"near_empty": 0, "invalid": 3, "too_long": 1}
    tokenizer, questions = found.tokenizer(), set()
    for name in ("train", "validation"):
        batch = found.split(name).batch(np.arange(len(found.split(name))))
        for tokens, segments in zip(batch["tokens"], batch["segments"], strict=True):
            for segment in range(1, segments.max() + 1):
                text = tokenizer.decode(tokens[segments == segment])
                assert text.startswith("<|user|>\nQuestion ") and text.endswith(".<|endoftext|>")
                questions.add(int(text.split("?")[0].split()[-1]))
    assert questions == set(range(200))


def test_records_do_not_depend_on_workers(prepared, tmp_path):
    data = DataConfig(source=str(prepared / "chat.jsonl"), format="chat", context=64, validation_fraction=0.1)
    again = prepare.prepare(data, tmp_path / "again", workers=2)
    assert again["splits"] == records.open_records(prepared / "chat").manifest["splits"]


def mixture(folder, weights):
    return records.Mixture([records.open_records(folder / name).split("train") for name in ("chat", "text")], weights)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def test_mixtures_follow_their_weights_and_give_text_as_one_segment(prepared):
    mixed = mixture(prepared, [1.0, 0.25])
    taken = take(records.batches(mixed, 8, seed=0), 100)
    numbers = np.concatenate([batch["records"] for batch in taken])
    assert abs((numbers >= mixed.first[1]).mean() - 0.2) < 0.01
    for batch in taken:
        text = batch["records"] >= mixed.first[1]
        assert (batch["segments"][text] == 1).all() and (batch["targets"][text] == 1).all()
        assert batch["tokens"].shape == batch["segments"].shape == (8, 65)


def test_documents_of_a_text_record_are_segments_in_a_mixture_as_they_are_alone(prepared):
    """What the step makes of a text record does not depend on the company: segments, positions and weights to the number."""
    text = records.open_records(prepared / "text")
    mixed = mixture(prepared, [1.0, 1.0])
    numbers = np.arange(4)
    alone = step.inputs_of(text.split("train").batch(numbers), text.end_token)
    assert (np.asarray(alone["segments"]).max(axis=1) > 0).all(), "each record holds the end of a document"
    batch = mixed.batch(np.concatenate([mixed.first[1] + numbers, numbers]))
    together = step.inputs_of(batch, text.end_token)
    np.testing.assert_array_equal(together["segments"][:4], alone["segments"] + 1)  # 0 is padding among packed records
    for name in ("positions", "weights", "tokens", "targets", "valid"):
        np.testing.assert_array_equal(together[name][:4], alone[name], err_msg=name)
    unmasked = step.inputs_of(batch, None)
    assert (np.asarray(unmasked["segments"][:4]) == 1).all()
    for name, values in unmasked.items():  # a conversation holds end tokens that close turns, no segment
        np.testing.assert_array_equal(together[name][4:], values[4:], err_msg=name)


def test_a_document_mask_needs_text():
    from slimmoe_jax import validation
    from slimmoe_jax.config import override

    chats = override(TrainConfig(), {"data.format": "chat", "data.document_mask": True})
    with pytest.raises(InputError, match="data.document_mask is for records of text"):
        validation.validate(chats)
    validation.validate(override(chats, {"data.mix": ("0.5:text:stdlib",)}))


def test_mixtures_go_on_exactly_and_do_not_depend_on_processes(prepared):
    mixed = mixture(prepared, [1.0, 0.5])
    whole = [batch["records"].tolist() for batch in take(records.batches(mixed, 4, seed=1), 80)]
    first = records.batches(mixed, 4, seed=1)
    take(first, 17)
    second = records.batches(mixed, 4, seed=1, workers=1)
    second.set_state(json.loads(json.dumps(first.get_state())))
    assert [batch["records"].tolist() for batch in take(second, 63)] == whole[17:]
    halves = [take(records.batches(mixed, 4, seed=1, process=p, processes=2), 80) for p in range(2)]
    assert [a["records"].tolist() + b["records"].tolist() for a, b in zip(*halves, strict=True)] == whole
    own = [n for batch in whole for n in batch if n < mixed.first[1]]
    assert sorted(own[: mixed.first[1]]) == list(range(mixed.first[1])), "each source goes through epochs of its own"


@pytest.mark.parametrize("entry", ["stdlib", "0:stdlib", "-1:stdlib", "nan:stdlib", "1:", "x:stdlib"])
def test_mixtures_that_cannot_be_read_are_refused(entry):
    from slimmoe_jax import validation
    from slimmoe_jax.config import override

    with pytest.raises(InputError, match="write WEIGHT:SOURCE"):
        validation.validate(override(TrainConfig(), {"data.mix": (entry,)}))


def test_mixed_sources_may_have_another_format():
    from slimmoe_jax import config as config_lib

    data = DataConfig(source="a.jsonl", format="chat", mix=("0.5:text:hub:b:c", "2:d.jsonl", "1:stdlib:sources"))
    parts = [(weight, part.format, part.source, part.field) for weight, part in config_lib.mixed(data)]
    assert parts == [
        (0.5, "text", "hub:b:c", "text"),
        (2.0, "chat", "d.jsonl", "messages"),
        (1.0, "chat", "stdlib:sources", "messages"),
    ]


def test_plain_text_holds_no_conversations(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(InputError, match="set data.format to text"):
        prepare.open_source(DataConfig(source=str(tmp_path / "a.txt"), format="chat"))


def test_text_where_conversations_should_be_is_named(tmp_path):
    source = write_rows(tmp_path / "a.jsonl", [{"text": "hello"}])
    with pytest.raises(
        InputError,
        match="holds no conversation of at most 65 tokens under 'messages' or 'conversations'.*of 1 conversations, 1 invalid.*"
        "nothing under 'messages' or 'conversations'.*check data.source, data.format and data.text_field",
    ):
        prepare.prepare(DataConfig(source=source, format="chat", context=64), tmp_path / "out", workers=1)


def talk(words):
    return {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "so " * words}]}


@pytest.mark.parametrize(
    ("short", "long", "broken", "message"),
    [
        (
            0,
            20,
            0,
            r"holds no conversation.*of 20 conversations, 20 longer than data.context \+ 1 = 65 tokens.*: raise data.context$",
        ),
        (0, 12, 8, "of 20 conversations, 8 invalid, 12 longer than.*: raise data.context$"),
        (0, 8, 12, "of 20 conversations, 12 invalid, 8 longer than.*: check data.source, data.format and data.text_field$"),
        (
            12,
            108,
            0,
            r"the validation split has 0 tokens.*\(of 120 conversations, 108 longer than data.context \+ 1 = 65 tokens\)"
            ": raise data.context, raise data.validation_fraction.*, or give more text$",
        ),
        (12, 1, 0, "of 13 conversations, 1 longer than.*: raise data.context, raise data.validation_fraction"),
        (12, 0, 108, "of 120 conversations, 108 invalid.*: check data.source, data.format and data.text_field, raise data.valid"),
        (12, 0, 0, "has 0 tokens, less than one record of 65: raise data.validation_fraction.*, lower data.context, or give more"),
    ],
)
def test_too_few_conversations_are_told_by_what_they_are_lost_to(tmp_path, short, long, broken, message):
    """Where conversations are too long, no advice is to lower the context."""
    rows = [talk(5)] * short + [talk(99)] * long + [{"messages": []}] * broken
    data = DataConfig(source=write_rows(tmp_path / "a.jsonl", rows), format="chat", context=64, validation_fraction=1e-6)
    with pytest.raises(InputError, match=message) as caught:
        prepare.prepare(data, tmp_path / "out", workers=1)
    assert not long or "lower data.context" not in str(caught.value)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("workers", [1, 2])
def test_sharegpts_conversations_make_the_same_records(tmp_path, suffix, workers):
    import pyarrow as pa
    import pyarrow.parquet

    names = {"user": "human", "assistant": "gpt"}
    rows = [conversation(n) for n in range(100)]
    shared = [[{"from": names[turn["role"]], "value": turn["content"]} for turn in row["messages"]] for row in rows]
    shared = [{"source": "x", "conversations": turns} for turns in shared]
    if suffix == ".parquet":
        pa.parquet.write_table(pa.Table.from_pylist(shared), tmp_path / "b.parquet", row_group_size=9)
    else:
        write_rows(tmp_path / "b.jsonl", shared)
    made = []
    for source in (write_rows(tmp_path / "a.jsonl", rows), str(tmp_path / f"b{suffix}")):
        data = DataConfig(source=source, format="chat", context=64, validation_fraction=0.1)
        made.append(prepare.prepare(data, tmp_path / f"out{len(made)}", workers)["splits"])
    assert made[0] == made[1]
    with pytest.raises(InputError, match="'messages'"):
        prepare.prepare(dataclasses.replace(data, text_field="messages"), tmp_path / "out", workers)
    named = dataclasses.replace(data, text_field="conversations")
    assert prepare.prepare(named, tmp_path / "named", workers)["splits"] == made[0]


def test_a_directory_gives_only_the_files_of_the_split(tmp_path):
    for name in ("train_sft-00000.jsonl", "train_sft-00001.jsonl", "test_sft-00000.jsonl", "train.jsonl"):
        write_rows(tmp_path / name, [conversation(hash(name) % 100)])
    for split, count in (("train_sft", 2), ("test_sft", 1), ("train", 1), ("", 1)):
        units = prepare.open_source(DataConfig(source=str(tmp_path), format="chat", split=split)).units()
        assert len({unit.file for unit in units}) == count, split
    with pytest.raises(InputError, match="data.split = absent is not in .*, which has test_sft, train, train_sft"):
        prepare.open_source(DataConfig(source=str(tmp_path), format="chat", split="absent"))


@pytest.mark.parametrize("layout", ["flat", "one struct column", "letters"])
def test_every_layout_of_mmlu_in_parquet_makes_the_same_records(tmp_path, layout):
    """The data set's configuration `all` is flat; `auxiliary_train` has one struct column, `train`."""
    import pyarrow as pa
    import pyarrow.parquet

    rows = [
        {"question": f"What is {n} + {n}?", "subject": "sums", "choices": [f"{n}", f"{2 * n}", f"{n + 1000}"], "answer": 1}
        for n in range(60)
    ]
    made = {"flat": rows, "one struct column": [{"train": row} for row in rows], "letters": [row | {"answer": "B"} for row in rows]}
    digests = []
    for name in ("flat", layout):
        folder = tmp_path / name.replace(" ", "-") / "auxiliary_train"
        folder.mkdir(parents=True, exist_ok=True)
        pa.parquet.write_table(pa.Table.from_pylist(made[name]), folder / "train-00000-of-00001.parquet")
        data = DataConfig(
            source=str(folder), split="train", format="multiple_choice", context=64, validation_fraction=0.2, choice_style="letters"
        )
        manifest = prepare.prepare(data, tmp_path / f"records-{len(digests)}", workers=1)
        assert sum(split["documents"] for split in manifest["splits"].values()) == 60
        digests.append([file["sha256"] for split in manifest["splits"].values() for file in split["files"]])
    assert digests[0] == digests[1]


@pytest.mark.parametrize("form", ["chat", "multiple_choice"])
def test_the_standard_library_holds_conversations_and_questions(tmp_path, form):
    data = DataConfig(source="stdlib", format=form, context=256, validation_fraction=0.05)
    manifest = prepare.prepare(data, tmp_path / "out", workers=1)
    assert manifest["splits"]["train"]["documents"] > 2_000 and manifest["skipped"]["invalid"] == 0


@pytest.mark.parametrize(("name", "form"), [("chat", "chat"), ("mcq", "multiple_choice")])
def test_real_rows_fill_their_records(tmp_path, name, form):
    folder = os.environ.get("SLIMMOE_DATA")
    if not folder:
        pytest.skip("SLIMMOE_DATA is not set")
    data = DataConfig(source=f"{folder}/{name}.jsonl.zst", format=form, context=2_048, validation_fraction=0.05)
    train = prepare.prepare(data, tmp_path / "out", workers=1)["splits"]["train"]
    assert train["tokens"] / (train["records"] * 2_049) > 0.95
