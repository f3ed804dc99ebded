"""Rows to turns, turns to tokens: where the image stands, what carries a label, what is cut."""

import pytest
from tiny_language import TEMPLATE, tiny_tokenizer

from modeling_ehm.training.conversations import (
    IGNORED,
    IMAGE_PLACEHOLDER,
    VICUNA_TEMPLATE,
    ConversationError,
    Renderer,
    Turn,
    as_messages,
    end_of_answers,
    processor_template,
    turns_of_messages,
    turns_of_questions,
)

LLAVA = [
    {"from": "human", "value": "<image>\nwhat colour is it?"},
    {"from": "gpt", "value": "red"},
    {"from": "human", "value": "is there a shape?"},
    {"from": "gpt", "value": "yes"},
]
TWO = [
    Turn("user", "what colour is it?", image=True),
    Turn("assistant", "red"),
    Turn("user", "is there a shape?"),
    Turn("assistant", "yes"),
]


def renderer_of(template=TEMPLATE, num_image_tokens=3, plain=False, **changes) -> Renderer:
    tokenizer = tiny_tokenizer(chat_template=template, **changes)
    tokenizer.add_tokens([IMAGE_PLACEHOLDER], special_tokens=True)
    template = None if template is None else processor_template(template, IMAGE_PLACEHOLDER)
    return Renderer(tokenizer, template, IMAGE_PLACEHOLDER, num_image_tokens, plain)


def labelled_texts(renderer, encoded) -> list[str]:
    """Runs of labelled tokens as text."""
    runs, previous = [], IGNORED
    for label in encoded.labels:
        if label != IGNORED:
            runs = [*runs, []] if previous == IGNORED else runs
            runs[-1].append(label)
        previous = label
    return [renderer.tokenizer.decode(run) for run in runs]


# Turns


def test_llava_and_chat_messages_are_the_same_turns():
    chat = [{"role": {"human": "user", "gpt": "assistant"}[m["from"]], "content": m["value"]} for m in LLAVA]
    assert turns_of_messages(LLAVA, True) == turns_of_messages(chat, True) == TWO


def test_a_text_alone_is_a_conversation_without_an_image():
    turns = turns_of_messages(LLAVA[2:], has_image=False)
    assert not any(turn.image for turn in turns) and as_messages(turns)[0]["content"] == [
        {"type": "text", "text": "is there a shape?"}
    ]


def test_questions_and_answers_are_turns_with_the_image_first():
    assert turns_of_questions(["what colour is it?", "is there a shape?"], ["red", "yes"], True) == TWO


@pytest.mark.parametrize(
    "messages, has_image, message",
    [
        ([], True, "0 times <image> in the conversation, but 1 image"),
        (LLAVA, False, "1 times <image> in the conversation, but 0 image"),
        ([LLAVA[0] | {"value": "<image><image> hm"}, LLAVA[1]], True, "2 times <image>"),
        (LLAVA[2:], True, "0 times <image>"),
        ([LLAVA[1], LLAVA[0]], True, "turn 0 is the assistant's"),
        ([LLAVA[0], LLAVA[2], LLAVA[1]], True, "turn 1 is the user's"),
        ([LLAVA[0], LLAVA[1] | {"value": " \n"}], True, "turn 1, the assistant's, is empty"),
        ([LLAVA[0]], True, "ends with a question"),
        ([LLAVA[0], LLAVA[1] | {"value": "see <image>"}], True, "only users show images"),
        ([*LLAVA[2:], *LLAVA[:2]], True, "message 2 holds <image>; it must stand in the first question"),
        ([LLAVA[0], {"from": "robot", "value": "red"}], True, r"message 1 is .*one of human, gpt"),
        ([LLAVA[0], {"from": "gpt", "value": None}], True, "message 1 is"),
    ],
)
def test_conversations_that_cannot_be_are_refused(messages, has_image, message):
    with pytest.raises(ConversationError, match=message):
        turns_of_messages(messages, has_image)


def test_unequal_and_empty_questions_are_refused():
    with pytest.raises(ConversationError, match="2 questions, but 1 answers"):
        turns_of_questions(["a", "b"], ["c"], True)
    with pytest.raises(ConversationError, match="turn 1, the assistant's, is empty"):
        turns_of_questions(["a"], [""], True)
    with pytest.raises(ConversationError, match="turn 0, the user's, is empty"):
        turns_of_questions([""], ["c"], has_image=False)


# Tokens


def test_answers_and_their_ends_carry_the_labels():
    """By hand: of two turns the texts between <|assistant|> and the next turn, end tokens included."""
    renderer = renderer_of()
    encoded = renderer.encode(TWO, 128)
    expected = "<|user|><image><image><image>\nwhat colour is it?<|end|><|assistant|>red<|end|>"
    expected += "<|user|>is there a shape?<|end|><|assistant|>yes<|end|>"
    assert renderer.tokenizer.decode(encoded.input_ids) == expected and encoded.cut is None
    assert labelled_texts(renderer, encoded) == ["red<|end|>", "yes<|end|>"]
    assert all(label in (IGNORED, token) for token, label in zip(encoded.input_ids, encoded.labels, strict=True))


def test_a_prompt_is_what_training_saw_before_the_answer():
    for template in (TEMPLATE, VICUNA_TEMPLATE):
        renderer = renderer_of(template)
        encoded = renderer.encode(TWO, 128)
        for number in (1, 3):
            prompt = renderer.encode_prompt(TWO[:number])
            assert encoded.input_ids[: len(prompt)] == prompt
            assert encoded.labels[len(prompt)] == encoded.input_ids[len(prompt)] != IGNORED
            assert encoded.labels[len(prompt) - 1] == IGNORED


def test_vicuna_writes_what_llava_was_trained_with():
    text = renderer_of(VICUNA_TEMPLATE, num_image_tokens=1).render(TWO[:2])
    assert text == "USER: <image>\nwhat colour is it? ASSISTANT: red<|end|>"


def test_a_begin_token_is_not_doubled():
    """Whether the template writes it or the tokenizer adds it."""
    renderer = renderer_of("{{ bos_token }}" + TEMPLATE, bos_token="<|system|>")
    ids = renderer.encode(TWO, 128).input_ids
    assert ids.count(renderer.tokenizer.bos_token_id) == 1


def test_plain_captions_have_no_template():
    """Image, new line, caption, end; the caption and its end are learned, the prompt is what stands before."""
    renderer = renderer_of(None, plain=True)
    turns = turns_of_questions([""], ["red"], True)
    encoded = renderer.encode(turns, 128)
    assert renderer.tokenizer.decode(encoded.input_ids) == "<image><image><image>\nred<|end|>"
    assert labelled_texts(renderer, encoded) == ["red<|end|>"]
    prompt = renderer.encode_prompt(turns[:1])
    assert encoded.input_ids[: len(prompt)] == prompt
    with pytest.raises(ConversationError, match="data.plain=True writes an image and one text"):
        renderer.encode(TWO, 128)


def test_whole_turns_are_cut_first_and_never_the_image():
    renderer = renderer_of()
    whole, one = len(renderer.encode(TWO, 128).input_ids), len(renderer.encode(TWO[:2], 128).input_ids)
    encoded = renderer.encode(TWO, whole - 1)
    assert len(encoded.input_ids) == one and encoded.cut == "turns from 2 on, of 4"
    encoded = renderer.encode(TWO, one - 1)
    assert encoded.cut == "the last 1 tokens of the first answer, and turns from 2 on, of 4"
    assert len(encoded.input_ids) == len(encoded.labels) == one - 1
    image = renderer.tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER)
    assert encoded.input_ids.count(image) == 3 and encoded.labels[-1] != IGNORED
    prompt = len(renderer.encode_prompt(TWO[:1]))
    with pytest.raises(ConversationError, match=rf"have {prompt} tokens or more, .*\(3 are the image's\)"):
        renderer.encode(TWO, prompt)


def test_what_stands_behind_the_last_answer_may_go():
    """Templates like Qwen's write a new line behind each end token: it has no label, and losing it loses nothing."""
    renderer = renderer_of(TEMPLATE.replace("'<|end|>'", "'<|end|>\\n'"))
    whole = renderer.encode(TWO, 128)
    assert labelled_texts(renderer, whole) == ["red<|end|>", "yes<|end|>"] and whole.labels[-1] == IGNORED
    shorter = renderer.encode(TWO, len(whole.input_ids) - 1)
    assert shorter.cut is None and shorter.input_ids == whole.input_ids[:-1]


def test_long_conversations_are_cut_in_one_go():
    """Sixty questions, of which what fits is kept: as many as fit if one counts."""
    renderer = renderer_of()
    turns = [*TWO[:2], *TWO[2:] * 60]
    lengths = [len(renderer.encode(turns[: 2 * n], 10_000).input_ids) for n in range(1, 20)]
    encoded = renderer.encode(turns, 100)
    fitting = max(length for length in lengths if length <= 100)
    assert len(encoded.input_ids) == fitting
    assert encoded.cut == f"turns from {2 * (lengths.index(fitting) + 1)} on, of {len(turns)}"


SEVERAL = [*TWO, *TWO[2:] * 3]
THOUGHTS = """\
{%- for message in messages -%}
{%- set text = message.content -%}
{%- if not loop.last and '</think>' in text %}{%- set text = text.split('</think>')[1] %}{%- endif -%}
{{ '<|' + message.role + '|>' + text + '<|end|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}
"""


@pytest.mark.parametrize("template", [TEMPLATE, TEMPLATE.replace("'<|end|>'", "'<|end|>\\n'"), VICUNA_TEMPLATE])
@pytest.mark.parametrize("turns", [TWO, SEVERAL, [Turn("user", "a shape?"), *SEVERAL[1:]]])
def test_answers_are_found_without_rendering_all_that_precedes_them(template, turns, monkeypatch):
    """One rendering a conversation, however long, and the same spans as by rendering every part of it."""
    renderer = renderer_of(template)
    end_of_answers(renderer)  # makes what is kept for all conversations
    whole = renderer.render(turns)
    expected = renderer._render_prefixes(turns, whole)
    rendered = []
    monkeypatch.setattr(renderer, "render", lambda turns: rendered.append(turns) or whole)
    _, spans = renderer.answer_spans(turns)
    grown = len(renderer.expand(whole)) - len(whole)
    assert rendered == [turns]
    assert [start - grown for start, _ in spans] == [start for start, _ in expected]
    assert all(whole[:end].rstrip().endswith("<|end|>") for _, end in expected) and len(spans) == len(turns) // 2


def test_what_a_template_changes_is_found_by_rendering():
    """Texts that are not written as they are: joined pieces would not be the template's text, so they are not used."""
    renderer = renderer_of(TEMPLATE.replace("message.content", "message.content | upper"))
    encoded = renderer.encode([Turn("system", "see"), *SEVERAL], 256)
    assert labelled_texts(renderer, encoded) == ["RED<|end|>", *["YES<|end|>"] * 4]


def test_a_template_that_drops_earlier_thoughts_is_refused_where_there_are_some():
    renderer = renderer_of(THOUGHTS)
    assert labelled_texts(renderer, renderer.encode(TWO, 128)) == ["red<|end|>", "yes<|end|>"]
    thinking = [TWO[0], Turn("assistant", "<think>hm</think>red"), *TWO[2:]]
    with pytest.raises(ConversationError, match="writes the first 2 turns differently when more follow"):
        renderer.encode(thinking, 128)


def test_the_end_of_answers_is_found():
    """The special token behind the answer, whether or not it is the tokenizer's end token."""
    assert end_of_answers(renderer_of()) == "<|end|>"
    assert end_of_answers(renderer_of(VICUNA_TEMPLATE)) == "<|end|>"
    assert end_of_answers(renderer_of(eos_token="<pad>")) == "<|end|>"


@pytest.mark.parametrize(
    "template, message",
    [
        (TEMPLATE.replace("<|end|>", "."), "ends an answer with '.', which is no special token"),
        (TEMPLATE.replace("message.content", "'<think></think>' + message.content"), "the answer does not follow"),
        ("{{ messages | length }}" + TEMPLATE, "differently when more follow|does not follow the prompt"),
        ("{{ raise_exception('no') }}", "the chat template refuses the conversation: no"),
    ],
)
def test_templates_that_cannot_be_learned_from_are_refused(template, message):
    with pytest.raises(ConversationError, match=message):
        end_of_answers(renderer_of(template))


def test_no_template_writes_the_day():
    """Texts must be the same on the day a run is resumed."""
    template = "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif -%}"
    assert renderer_of(template + "{{ date_string }}" + TEMPLATE).render(TWO[:1]).startswith("26 Jul 2024")


def test_a_system_message_stays_when_turns_are_cut():
    renderer = renderer_of()
    turns = [Turn("system", "describe"), *TWO]
    encoded = renderer.encode(turns, len(renderer.encode(turns, 128).input_ids) - 1)
    assert encoded.cut == "turns from 3 on, of 5"
    assert renderer.tokenizer.decode(encoded.input_ids).startswith("<|system|>describe<|end|><|user|><image>")


def test_a_template_that_rewrites_earlier_turns_is_refused():
    template = "{{ messages | length }}" + TEMPLATE
    with pytest.raises(ConversationError, match="writes the first 2 turns differently when more follow"):
        renderer_of(template).encode(TWO, 128)


def test_a_text_with_the_image_token_is_refused():
    """It would be taken for an image; conversations in LLaVA's form have it taken out where the image stands."""
    with pytest.raises(ConversationError, match="the user's text holds '<image>'"):
        renderer_of().encode([Turn("user", "what is <image>?", image=True), Turn("assistant", "red")], 128)
