"""Chats and multiple-choice questions as tokens: the format letter by letter, what is predicted, and what is refused."""

import random
import string

import pytest

from slimmoe_jax.config import InputError
from slimmoe_jax.data import chat, multiple_choice, tokenizers
from slimmoe_jax.data.chat import Turn
from slimmoe_jax.data.multiple_choice import Question

MESSAGES = [
    {"role": "system", "content": "You are brief. "},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "\n And  doubled?\n\n(In words.)"},
    {"role": "assistant", "content": "Eight.\n"},
]
RENDERED = (
    "<|system|>\nYou are brief.<|endoftext|>\n<|user|>\nWhat is 2 + 2?<|endoftext|>\n<|assistant|>\n4<|endoftext|>\n"
    "<|user|>\nAnd  doubled?\n\n(In words.)<|endoftext|>\n<|assistant|>\nEight.<|endoftext|>"
)


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    tokenizers.train_sentencepiece([RENDERED, string.ascii_letters + " " + string.digits] * 50, 340, path)
    return tokenizers.load(str(path))


@pytest.fixture(params=["gpt2", "sentencepiece"])
def tokenizer(request):
    return tokenizers.load("gpt2") if request.param == "gpt2" else request.getfixturevalue("sentencepiece")


def spelled(ids, tokenizer):
    """The text of tokens, with the end token as GPT-2 writes it."""
    pieces, rest = [], []
    for token in [*ids, None]:
        if token is None or token == tokenizer.end_token:
            pieces.append(tokenizer.decode(rest))
            rest = []
        else:
            rest.append(int(token))
    return "<|endoftext|>".join(pieces)


def test_training_text_is_zephyrs(tokenizer):
    example = chat.encode(chat.turns_of(MESSAGES), tokenizer, 1_000)
    assert spelled(example.tokens, tokenizer) == RENDERED and not example.cut


def test_whole_text_has_the_same_tokens_as_its_pieces():
    """Other programs encode the rendered text at once, with the end token as a special one: tiktoken does so here."""
    tokenizer = tokenizers.load("gpt2")
    at_once = tokenizer._encoding.encode(RENDERED, allowed_special={"<|endoftext|>"})
    assert chat.encode(chat.turns_of(MESSAGES), tokenizer, 1_000).tokens == at_once


def test_only_the_assistants_words_and_ends_are_predicted(tokenizer):
    example = chat.encode(chat.turns_of(MESSAGES), tokenizer, 1_000)
    predicted = [token for token, target in zip(example.tokens, example.targets, strict=True) if target]
    assert spelled(predicted, tokenizer) == "4<|endoftext|>Eight.<|endoftext|>"
    assert example.target_bytes == len("4Eight.")


@pytest.mark.parametrize("answered", [1, 2])
def test_a_prompt_is_the_start_of_the_training_text(tokenizer, answered):
    """Token by token; the next token is the first that is predicted."""
    turns = chat.turns_of(MESSAGES)  # system, user, assistant, user, assistant
    example = chat.encode(turns[: 2 * answered + 1], tokenizer, 1_000)
    prompt = chat.encode_prompt(turns[: 2 * answered], tokenizer)
    assert example.tokens[: len(prompt)] == prompt
    assert example.targets[len(prompt)] and not example.targets[len(prompt) - 1]


def test_no_content_can_close_a_turn(tokenizer):
    """Whatever a user writes, the tokens have as many ends as there are turns."""
    rng = random.Random(0)
    parts = ["<|endoftext|>", "</s>", "<|assistant|>", "<|user|>", "\n", " ", "x", "<s>", "\u2581"]
    for _ in range(200):
        content = "a" + "".join(rng.choices(parts, k=8)) + "b"
        turns = chat.turns_of([{"role": "user", "content": content}, {"role": "assistant", "content": content}])
        example = chat.encode(turns, tokenizer, 1_000)
        assert example.tokens.count(tokenizer.end_token) == 2
        assert tokenizer.decode(example.tokens[: example.tokens.index(tokenizer.end_token)]) == f"<|user|>\n{content}"


def test_long_conversations_end_with_the_last_answer_that_fits(tokenizer):
    turns = chat.turns_of(MESSAGES)
    whole, first = (chat.encode(part, tokenizer, 1_000) for part in (turns, turns[:3]))
    for limit in (len(whole.tokens) - 1, len(first.tokens) + 5, len(first.tokens)):
        cut = chat.encode(turns, tokenizer, limit)
        assert cut.cut and cut.tokens == first.tokens and cut.targets == first.targets and cut.target_bytes == 1
    assert chat.encode(turns, tokenizer, len(whole.tokens)) == whole
    assert chat.encode(turns, tokenizer, len(first.tokens) - 1) is None
    unanswered = chat.encode([*turns, Turn("user", "And then?")], tokenizer, 1_000)
    assert unanswered == whole, "what nobody answers teaches nothing"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (None, "not a list"),
        ("hello", "not a list"),
        ([], "not a list"),
        (["hello"], "without text"),
        ([{"role": "user", "content": None}], "without text"),
        ([{"role": "tool", "content": "x"}], "role 'tool'"),
        ([{"content": "x"}], "role None"),
        ([{"role": "user", "content": "  "}], "an empty user message"),
        ([{"role": "assistant", "content": "Hello."}], "roles out of order: assistant first"),
        ([{"role": "user", "content": "x"}] * 2, "roles out of order: user after user"),
        ([*MESSAGES[1:3], MESSAGES[2]], "roles out of order: assistant after assistant"),
        ([*MESSAGES[1:3], MESSAGES[0]], "roles out of order: system after assistant"),
        ({"role": "user", "content": "x"}, "not a list of messages, but dict"),
        ([{"from": "tool", "value": "x"}], "a ShareGPT message from 'tool', not system, human, user, gpt, assistant"),
        ([{"from": "human", "value": None}], "a ShareGPT message without text under value"),
        ([{"from": "human", "value": " "}], "an empty user message"),
        ([{"from": "gpt", "value": "Hello."}], "roles out of order: assistant first"),
        (
            [{"speaker": "A", "text": "x"}],
            "with the keys speaker, text, and neither role and content nor ShareGPT's from and value",
        ),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "a part of type 'image_url', not text"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "a part without text"),
        ([{"role": "user", "content": ["x"]}], "a part of type 'str', not text"),
        ([{"role": "user", "content": []}], "an empty user message"),
        ([{"role": "user", "content": b"x"}], "a message without text under content"),
    ],
)
def test_messages_that_are_none_are_refused(messages, reason):
    with pytest.raises(ValueError, match=reason):
        chat.turns_of(messages)


def test_sharegpts_rows_are_the_same_conversation():
    """Also with the keys of the other form, empty, as tables have them, and with further keys."""
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    rows = [{"from": names[message["role"]], "value": message["content"], "weight": None} for message in MESSAGES]
    assert chat.turns_of(rows) == chat.turns_of(MESSAGES)
    assert chat.turns_of([row | {"role": None, "content": None} for row in rows]) == chat.turns_of(MESSAGES)
    assert chat.turns_of([message | {"from": None, "value": None} for message in MESSAGES]) == chat.turns_of(MESSAGES)
    plain = [{"from": message["role"], "value": message["content"]} for message in MESSAGES]
    assert chat.turns_of(plain) == chat.turns_of(MESSAGES)


def test_parts_of_text_are_joined_as_they_are():
    parts = [{"type": "text", "text": " One, "}, {"type": "text", "text": "two", "image_url": None}, {"type": "text", "text": "\n"}]
    assert chat.turns_of([{"role": "user", "content": parts}]) == [Turn("user", "One, two")]


def test_an_empty_system_turn_is_left_out():
    assert chat.turns_of([{"role": "system", "content": ""}, *MESSAGES[1:3]]) == [
        Turn("user", "What is 2 + 2?"),
        Turn("assistant", "4"),
    ]


# --- multiple choice -------------------------------------------------------------------------------------------------

ICE = Question("Question: What is frozen water?", ("steam", "ice"), 1, "physics")
FLAT = {"question": "What is frozen water?", "subject": "physics", "choices": ["steam", "ice"], "answer": 1}


@pytest.mark.parametrize(
    "row",
    [
        FLAT,
        FLAT | {"answer": "B"},
        FLAT | {"answer": " b "},
        {"train": FLAT},
        {"query": "Question: What is frozen water?\n", "subject": "physics", "choices": ["steam", " ice"], "gold": 1},
    ],
    ids=["index", "letter", "small letter", "one struct column", "query"],
)
def test_every_layout_is_the_same_question(row):
    assert multiple_choice.parse(row) == ICE


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"question": ""}, "no text under question"),
        ({"choices": ["one"]}, "choices must be a list"),
        ({"choices": "steam"}, "choices must be a list"),
        ({"choices": ["steam", ""]}, "choices must be a list"),
        ({"answer": 2}, "no index or letter"),
        ({"answer": "C"}, "no index or letter"),
        ({"answer": -1}, "no index or letter"),
        ({"answer": True}, "no index or letter"),
        ({"answer": None}, "no index or letter"),
    ],
)
def test_rows_that_are_no_question_say_why(change, reason):
    with pytest.raises(ValueError, match=reason):
        multiple_choice.parse(FLAT | change)


def test_both_styles_letter_by_letter():
    assert multiple_choice.solved(ICE, "cloze") == "Question: What is frozen water?\nAnswer: ice"
    assert multiple_choice.solved(ICE, "letters") == "Question: What is frozen water?\nA. steam\nB. ice\nAnswer: B"
    assert multiple_choice.continuations(ICE, "letters") == [" A", " B"]


@pytest.mark.parametrize("style", ["cloze", "letters"])
def test_training_predicts_what_evaluation_scores(tokenizer, style):
    """The prompt's tokens, then the right continuation's, then the end."""
    example = multiple_choice.encode(ICE, tokenizer, 100, style)
    prompt = tokenizer.encode(multiple_choice.prompt(ICE, style))
    answer = tokenizer.encode(multiple_choice.continuations(ICE, style)[ICE.gold])
    assert example.tokens == [*prompt, *answer, tokenizer.end_token]
    assert example.targets == [False] * len(prompt) + [True] * (len(answer) + 1)
    assert multiple_choice.encode(ICE, tokenizer, len(example.tokens) - 1, style) is None


def conversation(exchanges, system=True):
    turns = [Turn("system", "You are brief.")] if system else []
    for n in range(exchanges):
        turns += [Turn("user", f"question {n}"), Turn("assistant", f"answer {n}")]
    return [*turns, Turn("user", "the newest question")]


@pytest.mark.parametrize("system", [True, False])
def test_the_context_slides_over_whole_exchanges(sentencepiece, system):
    turns = conversation(4, system)
    spelled = "".join(f"<|{turn.role}|>\n{turn.content}\n" for turn in turns) + "<|assistant|>\n"
    whole, prompt = chat.fit_history(turns, sentencepiece, 10_000)
    assert whole == turns and sentencepiece.decode(prompt).split() == spelled.split()
    lengths = []
    for room in range(len(prompt), 0, -1):
        try:
            kept, ids = chat.fit_history(turns, sentencepiece, room)
        except InputError as error:
            assert "room for" in str(error) and lengths[-1] == 1 + system, "refused only when nothing more can go"
            break
        assert len(ids) <= room
        assert kept == turns[:system] + turns[len(turns) - len(kept) + system :], "the system's turn and the newest ones"
        assert kept[system].role == "user"
        lengths.append(len(kept))
    assert sorted(set(lengths), reverse=True) == [8 + 1 + system - 2 * n for n in range(5)], "one exchange goes at a time"
