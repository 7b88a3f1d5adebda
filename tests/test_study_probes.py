"""Probes: tasks that only the context answers, judged by models that are plain Python, and routing measures against loops."""

import io
import math
import unicodedata

import numpy as np
import pytest
import sentencepiece
from exports import make_pieces

from slimmoe_jax.data import tokenizers
from slimmoe_jax.study import probes
from slimmoe_jax.study.probes import KEY, MOST_SCORED, VALUE

VOCABULARY = np.arange(1_000, 3_000)  # so many that no key comes twice by chance
NEEDLE = KEY + VALUE


def make_text(rows=5, length=400, seed=0):
    """Text that has no token of the vocabulary in it."""
    return np.random.default_rng(seed).integers(0, 1_000, (rows, length)).astype(np.int32)


def judged(task, foretell):
    """`answer` for a model in Python: foretell(tokens before) -> the token, or None where it would take all to be alike."""
    guesses = np.array([[foretell(row[:place].tolist()) for place in range(1, len(row))] for row in task.tokens], object)
    nll = np.where(guesses == task.tokens[:, 1:], 0.0, math.log(len(VOCABULARY))).astype(float)
    return probes.answer(task, nll, guesses == task.tokens[:, 1:])


def recall(before):
    """What followed when the last KEY tokens stood there before, for the last time; nothing where they did not."""
    for place in range(len(before) - KEY - 1, -1, -1):
        if before[place : place + KEY] == before[-KEY:]:
            return before[place + KEY]
    return None


# --- copying ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", [5, 20, KEY + MOST_SCORED, 150])
def test_a_copy_is_its_first_half_again(distance):
    """Tokens of the vocabulary alone, each row its own; each scored token stands `distance` after the same one."""
    (task,) = probes.copying(VOCABULARY, [distance], rows=3, seed=0)
    assert (task.kind, task.length) == ("copy", distance)
    assert task.tokens.shape == (3, 2 * distance) and task.tokens.dtype == np.int32
    np.testing.assert_array_equal(task.tokens[:, :distance], task.tokens[:, distance:])
    assert np.isin(task.tokens, VOCABULARY).all()
    assert len({tuple(row) for row in task.tokens.tolist()}) == 3
    np.testing.assert_array_equal(task.tokens[:, task.scored], task.tokens[:, task.before])
    np.testing.assert_array_equal(task.scored - task.before, distance)


@pytest.mark.parametrize(("distance", "last"), [(5, 5), (20, 20), (150, 68)])
def test_scored_are_the_tokens_after_the_key(distance, last):
    """From the fifth of the copy on, at most 64, and the same ones of the first half."""
    (task,) = probes.copying(VOCABULARY, [distance], rows=1, seed=0)
    assert task.before.tolist() == list(range(4, last))
    assert task.scored.tolist() == [distance + place for place in range(4, last)]


def test_copies_of_every_distance_come_in_order_and_again():
    """The same seed draws the same, another seed something else."""
    first, again, other = (probes.copying(VOCABULARY, [30, 7, 12], rows=2, seed=seed) for seed in (3, 3, 4))
    assert [task.length for task in first] == [30, 7, 12]
    for task, same, different in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(task.tokens, same.tokens)
        assert (task.tokens != different.tokens).any()


@pytest.mark.parametrize("distance", [6, 40, 90])
def test_a_model_that_copies_is_right_and_one_that_guesses_is_not(distance):
    """Copying by distance, and by recalling the last KEY tokens: all right, at 0 nats. Guessing: log V nats, in both halves."""
    (task,) = probes.copying(VOCABULARY, [distance], rows=2, seed=0)
    guess = pytest.approx(math.log(2_000))
    for foretell in (recall, lambda before: before[-distance] if len(before) >= distance else None):
        assert judged(task, foretell) == {
            "kind": "copy", "length": distance, "depth": 0.0, "nats": 0.0, "accuracy": 1.0, "nats_before": guess
        }  # fmt: skip
    found = judged(task, lambda before: None)
    assert (found["nats"], found["accuracy"], found["nats_before"]) == (guess, 0.0, guess)


# --- needles ---------------------------------------------------------------------------------------------------------


def make_needles(lengths=(64, 161), rows=4):
    text = make_text()
    return text, probes.needles(text, VOCABULARY, lengths, rows, seed=0)


def test_needles_are_asked_at_every_depth_and_length():
    """For each length the needle at three depths, and once its absence, in the middle; each row exactly that long."""
    _, tasks = make_needles()
    assert len({task.title for task in tasks}) == len(tasks), "progress lines tell them apart"
    kinds = [("needle", 0.0), ("needle", 0.5), ("needle", 1.0), ("needle_absent", 0.5)]
    assert [(task.length, task.kind, task.depth) for task in tasks] == [(n, *kind) for n in (64, 161) for kind in kinds]
    for task in tasks:
        assert task.tokens.shape == (4, task.length) and task.tokens.dtype == np.int32
        assert task.scored.tolist() == [task.length - 4, task.length - 3, task.length - 2, task.length - 1]
        assert task.before is None


def test_a_needle_is_in_its_place_and_the_text_is_kept():
    """At the start, the middle (of 145 tokens: the 72nd) or the end of the text; question and answer after it are the needle."""
    text, tasks = make_needles()
    for task in (task for task in tasks if task.kind == "needle"):
        filler = task.length - 2 * NEEDLE
        at = {0.0: 0, 0.5: filler // 2, 1.0: filler}[task.depth]
        inside, asked = task.tokens[:, at : at + NEEDLE], task.tokens[:, -NEEDLE:]
        np.testing.assert_array_equal(inside, asked)
        np.testing.assert_array_equal(task.tokens[:, task.scored], inside[:, KEY:], err_msg="what is asked for is the value")
        np.testing.assert_array_equal(np.delete(task.tokens[:, :-NEEDLE], np.s_[at : at + NEEDLE], axis=1), text[:4, :filler])
        assert np.isin(inside, VOCABULARY).all()


def test_every_task_asks_for_the_same_values():
    """So that lengths, depths and absence differ in nothing else; rows differ."""
    _, tasks = make_needles()
    for task in tasks:
        np.testing.assert_array_equal(task.tokens[:, -NEEDLE:], tasks[0].tokens[:, -NEEDLE:])
    assert len({tuple(row) for row in tasks[0].tokens[:, -NEEDLE:].tolist()}) == 4


def test_an_absent_needle_is_nowhere_but_at_the_end():
    """The middle of the text holds as many other tokens of the vocabulary, and neither key nor value."""
    text, tasks = make_needles()
    absent = [task for task in tasks if task.kind == "needle_absent"]
    assert len(absent) == 2
    for task in absent:
        body, asked = task.tokens[:, :-NEEDLE], task.tokens[:, -NEEDLE:]
        at = (task.length - 2 * NEEDLE) // 2
        assert np.isin(body[:, at : at + NEEDLE], VOCABULARY).all()
        np.testing.assert_array_equal(np.delete(body, np.s_[at : at + NEEDLE], axis=1), text[:4, : task.length - 2 * NEEDLE])
        for row, wanted in zip(body.tolist(), asked.tolist(), strict=True):
            windows = [row[place : place + 4] for place in range(len(row))]
            assert wanted[:KEY] not in windows and wanted[KEY:] not in windows


def test_a_model_that_recalls_finds_needles_and_not_absent_ones():
    _, tasks = make_needles()
    for task in tasks:
        found = judged(task, recall)
        there = task.kind == "needle"
        assert found["accuracy"] == (1 if there else 0)
        assert found["nats"] == pytest.approx(0 if there else math.log(2_000))
        assert "nats_before" not in found


def test_answer_reads_the_entry_before_each_token():
    """Entry s is about the token at s + 1: where it holds that token's own place, the mean is that of the scored places."""
    tokens = np.zeros((2, 20), np.int32)
    task = probes.Task("copy", 10, 0.25, tokens, np.array([13, 14, 19]), np.array([3, 4, 9]))
    places = np.tile(np.arange(1.0, 20.0), (2, 1))
    right = np.isin(places, [13, 19]) & np.array([[True], [False]])
    assert probes.answer(task, places, right) == {
        "kind": "copy", "length": 10, "depth": 0.25, "nats": pytest.approx(46 / 3), "accuracy": pytest.approx(2 / 6),
        "nats_before": pytest.approx(16 / 3),
    }  # fmt: skip


# --- tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 1.0])
def test_frequent_tokens_are_the_fewest_that_make_up_the_share(share):
    rng = np.random.default_rng(0)
    counts = rng.permutation(np.append(rng.integers(1, 1_000, 200) ** 2, [0] * 20))
    found = probes.frequent_tokens(counts, share)
    assert counts[found].sum() >= share * counts.sum() > counts[found[:-1]].sum()
    assert (np.diff(counts[found]) <= 0).all() and len(set(found.tolist())) == len(found)
    assert counts[found].min() >= np.delete(counts, found).max(), "nothing more frequent is left out"
    assert counts[found].min() > 0, "a token that the model never saw is not asked for"


def test_frequent_tokens_of_a_text():
    """Of 10 tokens: 6 + 3 make up nine tenths; equals go by their number."""
    assert probes.frequent_tokens(np.array([1, 0, 6, 3]), 0.9).tolist() == [2, 3]
    assert probes.frequent_tokens(np.array([5, 5, 5, 5]), 0.5).tolist() == [0, 1]


def zipf(number=2_000, unseen=0):
    """How often tokens come, shuffled: few often, many seldom."""
    counts = np.concatenate([1_000_000 // np.arange(10, number + 10), np.zeros(unseen, np.int64)])
    return np.random.default_rng(0).permutation(counts)


@pytest.mark.parametrize("unseen", [0, 500])
@pytest.mark.parametrize("bins", [2, 8])
def test_frequency_bins_are_of_equal_mass(bins, unseen):
    """Each token in one bin; each bin's share of the text is its due, give or take half a token at either end."""
    counts = zipf(unseen=unseen)
    frequencies, bin_of = probes.frequency_bins(counts, bins)
    assert bin_of.shape == counts.shape and sorted(set(bin_of.tolist())) == list(range(bins)) and len(frequencies) == bins
    mass = [counts[bin_of == n].sum() / counts.sum() for n in range(bins)]
    np.testing.assert_allclose(mass, 1 / bins, atol=counts.max() / counts.sum())
    for n in range(bins - 1):
        assert counts[bin_of == n].min() >= counts[bin_of == n + 1].max(), "rarest last"
    for n, frequency in enumerate(frequencies):
        members = sorted(int(c) for c, b in zip(counts, bin_of, strict=True) if b == n and c)
        middle = (members[(len(members) - 1) // 2] + members[len(members) // 2]) / 2
        assert frequency == pytest.approx(middle / counts.sum())


def test_a_bin_of_unseen_tokens_alone_has_a_place_on_a_logarithmic_axis():
    """Half of an occurrence, so that it stands below all that was seen."""
    frequencies, bin_of = probes.frequency_bins(np.array([10, 0, 0]), 8)
    assert bin_of.tolist() == [0, 1, 1] and frequencies == [1.0, 0.05]


def test_a_token_of_many_bins_leaves_none_empty():
    """One token is 70% of the text: it has the first bin to itself, and the bins are numbered without a gap."""
    counts = np.array([10, 700, *[2] * 145])
    frequencies, bin_of = probes.frequency_bins(counts, 8)
    assert np.flatnonzero(bin_of == bin_of[1]).tolist() == [1]
    assert frequencies[bin_of[1]] == pytest.approx(0.7)
    assert set(bin_of.tolist()) == set(range(len(frequencies)))
    assert len(frequencies) < 8 and bin_of[1] == 0


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    return make_pieces(tmp_path_factory.mktemp("pieces") / "t.model")


@pytest.fixture(scope="module", params=["gpt2", "sentencepiece"])
def tokenizer(request):
    return tokenizers.load("gpt2") if request.param == "gpt2" else request.getfixturevalue("pieces")


WRITTEN = {
    " the": "word", " a": "word", "ing": "word's end or middle", "e": "word's end or middle", "T": "word's end or middle",
    "7": "number", ",": "punctuation", "(": "punctuation", "_": "punctuation", "\n": "space", " ": "space",
}  # fmt: skip
OF_GPT2 = {
    " word": "word", " Collider": "word", "ominated": "word's end or middle", "é": "word's end or middle", " 2019": "number",
    "2019": "number", " 7": "number", "!!!!!": "punctuation", " (": "punctuation", "\n\n": "space", "\xa0": "space",
    "'s": "other", "<|endoftext|>": "other",
}  # fmt: skip


def class_of(tokenizer):
    """A function from the text of a token to its class."""
    names, found = probes.token_classes(tokenizer)
    assert found.shape == (tokenizer.vocab_size,) and set(found.tolist()) <= set(range(len(names)))

    def of(text):
        (token,) = [tokenizer.end_token] if text == "<|endoftext|>" else tokenizer.encode(text)  # which is never made of text
        return names[found[token]]

    return of


def test_known_tokens_have_their_class(tokenizer):
    of = class_of(tokenizer)
    assert {text: of(text) for text in WRITTEN} == WRITTEN


def test_known_tokens_of_gpt2_have_their_class():
    of = class_of(tokenizers.load("gpt2"))
    assert {text: of(text) for text in OF_GPT2} == OF_GPT2


def test_every_token_of_gpt2_has_the_class_of_its_bytes():
    """By Unicode's categories of the bytes in the vocabulary's own file: letters, numbers, or neither, whole or broken."""
    tokenizer = tokenizers.load("gpt2")
    names, found = probes.token_classes(tokenizer)
    for written, token in tokenizer.ranks.items():
        text = written.decode(errors="replace")
        kinds = {unicodedata.category(c)[0] for c in text.strip()}
        if not kinds:
            expected = "space"
        elif kinds == {"L"}:
            expected = "word" if text[0].isspace() else "word's end or middle"
        elif kinds == {"N"}:
            expected = "number"
        elif kinds & {"L", "N"} or "\ufffd" in text:
            expected = "other"
        else:
            expected = "punctuation"
        assert names[found[token]] == expected, (token, written)


def test_the_end_of_a_document_and_broken_bytes_are_other(pieces):
    """They are no text: </s> decodes to nothing, a byte of a longer character to a replacement, piece 0 to the sign for <unk>."""
    names, found = probes.token_classes(pieces)
    first_byte = pieces.encode("漢")[0]
    assert [names[found[token]] for token in (pieces.end_token, first_byte, 0)] == ["other"] * 3


def test_a_word_is_told_from_its_end_where_the_tokenizer_drops_a_leading_space(tmp_path):
    """SentencePiece's own default adds a space before a text and drops it again: its pieces still differ behind another."""
    model = io.BytesIO()
    lines = ["the heathen weather other there that hat"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=30, num_threads=1, minloglevel=2
    )
    (tmp_path / "t.model").write_bytes(model.getvalue())
    tokenizer = tokenizers.SentencePiece(tmp_path / "t.model")  # which `load` would refuse
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    names, found = probes.token_classes(tokenizer)
    whole, part = (processor.piece_to_id(piece) for piece in ("\u2581the", "the"))
    assert processor.unk_id() not in (whole, part), "the text should make both pieces"
    assert tokenizer.decode([whole]) == tokenizer.decode([part]) == "the"
    assert (names[found[whole]], names[found[part]]) == ("word", "word's end or middle")


# --- routing ---------------------------------------------------------------------------------------------------------

N, T, E, C = 3, 300, 4, 3


def make_choices(seed=0):
    """Choices of 0 to E experts, which lean on the token's class, the more the deeper the layer; and the classes."""
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, C, T)
    leaning = np.arange(N)[:, None, None] * 0.3 * (classes[:, None] == np.arange(E))
    return rng.uniform(size=(N, T, E)) < 0.3 + leaning, classes


def counted(chosen, classes):
    """[N][class][expert] choices, one by one."""
    joint = np.zeros((N, C, E))
    for layer, token, expert in zip(*np.nonzero(chosen), strict=True):
        joint[layer, classes[token], expert] += 1
    return joint


def test_specialisation_equals_the_definition():
    """Entropy of classes less their entropy where the expert is known, over the entropy, from choices counted one by one."""
    chosen, classes = make_choices()

    def entropy(counts):
        return -sum(n / sum(counts) * math.log(n / sum(counts)) for n in counts if n)

    expected = []
    for joint in counted(chosen, classes):
        of_class = entropy(joint.sum(axis=1))
        known = sum(joint[:, e].sum() / joint.sum() * entropy(joint[:, e]) for e in range(E))
        expected.append((of_class - known) / of_class)
    found = probes.specialisation(chosen, classes, C)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert found[0] < 0.02 < found[1] < found[2], "the deeper layers should lean on the class"


def test_experts_that_take_all_classes_alike_have_no_specialisation():
    """Each class's tokens fall on the experts in the same proportion, whatever the sizes of the classes."""
    classes = np.repeat([0, 1, 2], [10, 20, 40])
    chosen = np.zeros((2, 70, E), bool)
    chosen[0, np.arange(70), np.arange(70) % 2] = True  # half and half of each class
    chosen[1] = True  # all experts for all
    np.testing.assert_allclose(probes.specialisation(chosen, classes, C), 0, atol=1e-12)


@pytest.mark.parametrize("experts_of", [[[0], [1], [2]], [[0, 1], [2], [3]], [[3], [0], [1, 2]]])
def test_an_expert_for_each_class_is_full_specialisation(experts_of):
    """Classes of any size, and one with two experts: who is chosen gives the class away."""
    classes = np.repeat([0, 1, 2], [10, 20, 40])
    chosen = np.zeros((1, 70, E), bool)
    for token, of_token in enumerate(classes):
        chosen[0, token, experts_of[of_token]] = True
    np.testing.assert_allclose(probes.specialisation(chosen, classes, C), 1, rtol=1e-12)


def test_a_class_without_a_token_and_a_text_of_one_class_divide_by_no_zero():
    chosen, classes = make_choices()
    np.testing.assert_allclose(probes.specialisation(chosen, classes, C), probes.specialisation(chosen, classes, C + 2))
    alone = probes.specialisation(chosen, np.full(T, 1), C)
    with np.errstate(all="raise"):  # a ReLU router may choose no expert at all in a layer
        assert probes.specialisation(np.zeros_like(chosen), classes, C).tolist() == [0.0] * N
    np.testing.assert_allclose(alone, 0, atol=1e-3)  # rounding of the order of 1e-16, over an entropy taken to be 1e-12


def test_shares_by_class_equal_counting():
    """Of each class's choices, not tokens; a class that no token has is NaN, quietly."""
    chosen, classes = make_choices()
    joint = counted(chosen, classes)
    found = probes.shares_by_class(chosen, classes, C + 1)
    assert found.shape == (N, C + 1, E)
    np.testing.assert_allclose(found[:, :C], joint / joint.sum(axis=2, keepdims=True))
    np.testing.assert_allclose(found[:, :C].sum(axis=2), 1)
    assert np.isnan(found[:, C]).all()


def test_saturation_at_its_extremes():
    """By layer: all of the final choices made already, none, half; more choices than the final ones are no gain."""
    final = np.zeros((5, 6, E), bool)
    final[:, :, 0] = True
    final[4, :, 1] = True
    chosen = np.zeros_like(final)
    chosen[0] = final[0]
    chosen[1, :, 1] = True
    chosen[2, :3, 0] = chosen[2, 3:, 2] = True
    chosen[3] = True
    chosen[4, :, 0] = True
    np.testing.assert_array_equal(probes.saturation(chosen, final), [1, 0, 0.5, 1, 0.5])


def test_saturation_equals_counting():
    (chosen, _), (final, _) = make_choices(0), make_choices(1)
    found = probes.saturation(chosen, final)
    for layer in range(N):
        pairs = list(zip(chosen[layer].ravel().tolist(), final[layer].ravel().tolist(), strict=True))
        assert found[layer] == pytest.approx(sum(a and b for a, b in pairs) / sum(b for _, b in pairs))


def test_saturation_of_a_layer_that_chose_nothing_is_finite():
    """A ReLU router may leave every gate shut."""
    nothing = np.zeros((1, 5, E), bool)
    assert probes.saturation(~nothing, nothing).tolist() == [0.0]
