"""Conversations about an image: columns of a row -> turns -> text and the spans of its answers -> tokens and labels.

Everything here is a pure function. The text is what the chat template of the language model writes, so that training
sees what `processor.apply_chat_template` gives at use; only answers, with the token that ends them, carry labels.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import jinja2
from transformers import PreTrainedTokenizerBase

IMAGE_PLACEHOLDER = "<image>"  # in the conversations of LLaVA's data
IGNORED = -100  # label of tokens without a loss
FIXED_DATE = "26 Jul 2024"  # for templates that write the date: texts must not change from day to day
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}

# Puts the parts of a message, images and texts, into one string, as the templates of language models expect; an image
# is its token and a new line, as in LLaVA's conversations.
FLATTEN_PARTS = """\
{%- set flat = namespace(messages=[], text="") -%}
{%- for message in messages -%}
{%- if message.content is string -%}
{%- set flat.text = message.content -%}
{%- else -%}
{%- set flat.text = "" -%}
{%- for part in message.content -%}
{%- if part.type == "image" -%}
{%- set flat.text = flat.text + "IMAGE_TOKEN\n" -%}
{%- else -%}
{%- set flat.text = flat.text + part.text -%}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- set flat.messages = flat.messages + [dict(message, content=flat.text)] -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""

# Vicuna's prompts, as LLaVA-1.5 has them (Liu et al. 2024); its system sentence is a message like any other.
VICUNA_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == "system" -%}
{{ message.content + " " }}
{%- elif message.role == "user" -%}
{{ "USER: " + message.content + " " }}
{%- else -%}
{{ "ASSISTANT: " + message.content + eos_token }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ "ASSISTANT:" }}
{%- endif -%}
"""


class ConversationError(ValueError):
    """A row that is no usable conversation; the message says why."""


@dataclass(frozen=True)
class Turn:
    """One message: `role` is "system", "user" or "assistant"; `image` says whether the image stands before the text."""

    role: str
    text: str
    image: bool = False


@dataclass(frozen=True)
class Encoded:
    """A conversation as tokens.

    Attributes:
        input_ids: Tokens, the image's included.
        labels: As long; `IGNORED` where no answer is.
        cut: What was left out to fit the context, for the record; None if nothing.
    """

    input_ids: list[int]
    labels: list[int]
    cut: str | None = None


# Turns


def turns_of_messages(messages: Sequence[dict], has_image: bool) -> list[Turn]:
    """Turns of a conversation in LLaVA's form (`from`, `value`) or that of chat templates (`role`, `content`).

    Args:
        messages: The column's value; `<image>` stands where the image is.
        has_image: Whether the row has an image.

    Raises:
        ConversationError: unknown roles, an order that is not user, assistant, user, ..., an empty question or answer,
            or more or fewer `<image>` than images.
    """
    turns, images = [], 0
    for number, message in enumerate(messages):
        name = message.get("from", message.get("role"))
        text = message.get("value", message.get("content"))
        if name not in ROLES or not isinstance(text, str):
            raise ConversationError(
                f"message {number} is {message}; `from` (one of {', '.join(ROLES)}) and a text `value` are expected"
            )
        count = text.count(IMAGE_PLACEHOLDER)
        if count and ROLES[name] != "user":
            raise ConversationError(f"message {number}, by {name!r}, holds {IMAGE_PLACEHOLDER}; only users show images")
        images += count
        if count and any(turn.role == "user" for turn in turns):
            raise ConversationError(f"message {number} holds {IMAGE_PLACEHOLDER}; it must stand in the first question")
        turns.append(Turn(ROLES[name], text.replace(IMAGE_PLACEHOLDER, "").strip(), image=count > 0))
    if images != int(has_image):
        raise ConversationError(
            f"{images} times {IMAGE_PLACEHOLDER} in the conversation, but {int(has_image)} image in the row; write"
            f" {IMAGE_PLACEHOLDER} once where the image is"
        )
    return check_turns(turns)


def turns_of_questions(questions: Sequence[str], answers: Sequence[str], has_image: bool) -> list[Turn]:
    """Questions and answers as turns; the image stands before the first question.

    Raises:
        ConversationError: as many questions as answers are needed, none of them empty.
    """
    if len(questions) != len(answers):
        raise ConversationError(f"{len(questions)} questions, but {len(answers)} answers")
    turns = []
    for question, answer in zip(questions, answers, strict=True):
        turns += [Turn("user", question or "", image=has_image and not turns), Turn("assistant", answer or "")]
    return check_turns(turns)


def check_turns(turns: list[Turn]) -> list[Turn]:
    """The turns themselves.

    Raises:
        ConversationError: no answer, an order that is not user, assistant, user, ..., or an empty text (a user who
            shows an image need not say anything).
    """
    spoken = turns[1:] if turns and turns[0].role == "system" else turns
    if not spoken:
        raise ConversationError("the conversation is empty")
    for number, turn in enumerate(spoken):
        expected = ("user", "assistant")[number % 2]
        if turn.role != expected:
            raise ConversationError(
                f"turn {number} is the {turn.role}'s, but user and assistant take turns, the user first"
            )
        if not turn.text.strip() and not turn.image:
            raise ConversationError(f"turn {number}, the {turn.role}'s, is empty")
    if len(spoken) % 2:
        raise ConversationError("the conversation ends with a question; an answer is missing")
    return turns


def as_messages(turns: Sequence[Turn]) -> list[dict]:
    """Messages as `processor.apply_chat_template` takes them."""
    messages = []
    for turn in turns:
        parts = [{"type": "image"}] if turn.image else []
        parts += [{"type": "text", "text": turn.text}] if turn.text else []
        messages.append({"role": turn.role, "content": parts})
    return messages


# Text


class Renderer:
    """Turns -> text of a language model's chat template, the image as `num_image_tokens` tokens.

    Args:
        tokenizer: Of the language model, with the image token added.
        chat_template: The processor's, which takes images; see `processor_template`. None if `plain`.
        image_token: How the image is written.
        num_image_tokens: N of the tower.
        plain: No template: image, new line, text, end token, as in LLaVA's first stage. For one answer; what the user
            says is left out.
        end_token: What ends an answer in the template, see `end_of_answers`; None takes the tokenizer's end token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None,
        image_token: str,
        num_image_tokens: int,
        plain: bool = False,
        end_token: str | None = None,
    ):
        self.tokenizer, self.chat_template, self.plain = tokenizer, chat_template, plain
        self.image_token, self.num_image_tokens = image_token, num_image_tokens
        self.end_token = end_token or tokenizer.eos_token

    def render(self, turns: Sequence[Turn], prompt: bool = False) -> str:
        """Text of turns, the image as one token; `prompt` adds what the assistant's answer begins with.

        Raises:
            ConversationError: a text holds the image token, or the template refuses the turns.
        """
        for turn in turns:
            if self.image_token in turn.text:
                raise ConversationError(
                    f"the {turn.role}'s text holds {self.image_token!r}, which stands for images alone; remove it"
                )
        if self.plain:
            if sum(turn.role == "assistant" for turn in turns) > 1:
                raise ConversationError("data.plain=True writes an image and one text, but the row has several answers")
            shown = "".join(self.image_token for turn in turns if turn.image)
            answers = "".join(turn.text + self.tokenizer.eos_token for turn in turns if turn.role == "assistant")
            return f"{self.tokenizer.bos_token or ''}{shown}\n{answers}"
        try:
            return self.tokenizer.apply_chat_template(
                as_messages(turns),
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=prompt,
                date_string=FIXED_DATE,
            )
        except jinja2.TemplateError as error:
            raise ConversationError(f"the chat template refuses the conversation: {error}") from None

    def expand(self, text: str) -> str:
        """The same text with all tokens of the image."""
        return text.replace(self.image_token, self.image_token * self.num_image_tokens)

    def answer_spans(self, turns: Sequence[Turn]) -> tuple[str, list[tuple[int, int]]]:
        """Expanded text, and (start, end) in characters of each answer with the token that ends it.

        Raises:
            ConversationError: the template writes earlier turns differently once later ones follow, so that answers
                cannot be found. (One that does so only after certain words is noticed where the whole shows it.)
        """
        whole = self.render(turns)
        ends = self._join_frame(turns, whole) or self._render_prefixes(turns, whole)
        grown = len(self.expand(whole)) - len(whole)  # the image stands in the first question, before all answers
        spans = []
        for start, end in ends:
            closing = whole.rfind(self.end_token, start, end)
            spans.append((start + grown, (end if closing < 0 else closing + len(self.end_token)) + grown))
        return self.expand(whole), spans

    def _render_prefixes(self, turns: Sequence[Turn], whole: str) -> list[tuple[int, int]]:
        """Where answers begin and their turns end in `whole`, by rendering what precedes them: for any template."""
        ends = []
        for number, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            before, after = self.render(turns[:number], prompt=True), self.render(turns[: number + 1])
            if not (after.startswith(before) and whole.startswith(after)):
                raise ConversationError(
                    f"the chat template writes the first {number + 1} turns differently when more follow, so answers"
                    " cannot be told from questions; give another template as head.chat_template"
                )
            ends.append((len(before), len(after)))
        return ends

    def _join_frame(self, turns: Sequence[Turn], whole: str) -> list[tuple[int, int]] | None:
        """The same by what the template puts around texts, in time linear in the turns; None unless that is `whole`."""
        if self._frame is None:
            return None
        opening, answering, before, behind, asking = self._frame
        joined, ends = opening, []
        for number, turn in enumerate(turns):
            if turn.role == "assistant":
                start = len(joined) + len(answering)
                joined += answering + before + turn.text + behind
                ends.append((start, len(joined)))
            else:
                shown = f"{self.image_token}\n" if turn.image else ""
                joined += (asking if number else "") + shown + turn.text
        return ends if joined == whole else None

    @cached_property
    def _frame(self) -> tuple[str, str, str, str, str] | None:
        """What the template puts around texts, None if that depends on more than who speaks: what opens the first
        question, asks for an answer, stands before and behind an answer, and opens the next question."""
        question, answer = "1st question", "1st answer"
        turns = [Turn("user", question), Turn("assistant", answer)] * 2
        try:
            asked, answered, again, whole = (
                self.render(turns[:count], prompt=count % 2 == 1) for count in range(1, len(turns) + 1)
            )
            opening, answering = asked.split(question)
            before, behind = answered.removeprefix(asked).split(answer)
            asking = again.removeprefix(answered).removesuffix(question + answering)
        except ValueError:
            return None
        said = before + answer + behind
        parts = [opening + question + answering, said, asking + question + answering, said]
        same = [*accumulate(parts)] == [asked, answered, again, whole]
        return (opening, answering, before, behind, asking) if same else None

    def tokenize(self, text: str):
        """Tokens with `offset_mapping`; a begin token is added where the tokenizer does so and the text has none."""
        begin = self.tokenizer.bos_token
        return self.tokenizer(
            text,
            add_special_tokens=not (begin and text.startswith(begin)),
            return_offsets_mapping=True,
            verbose=False,
        )

    def encode(self, turns: Sequence[Turn], max_length: int) -> Encoded:
        """Tokens and labels of a conversation; what exceeds `max_length` is cut from the end, never from the image.

        Whole turns go first, question and answer; of a first answer that is too long, its end.

        Raises:
            ConversationError: image and first question alone leave no room for an answer.
        """
        encoded, ends = self._encode_all(turns)
        if ends[-1] <= max_length:  # behind the last answer templates may write more, which nothing depends on
            return Encoded(encoded.input_ids[:max_length], encoded.labels[:max_length])
        first = 1 + (turns[0].role == "system")  # of the first answer
        for kept in range(max(1, sum(end <= max_length for end in ends)), 0, -1):
            encoded, kept_ends = self._encode_all(turns[: first + 2 * kept - 1])
            if kept_ends[-1] <= max_length:
                break
        cuts = [f"turns from {first + 2 * kept - 1} on, of {len(turns)}"] if kept < len(ends) else []
        if (lost := kept_ends[-1] - max_length) > 0:
            cuts = [f"the last {lost} tokens of the first answer", *cuts]
        ids, labels = encoded.input_ids[:max_length], encoded.labels[:max_length]
        if all(label == IGNORED for label in labels):
            raise ConversationError(
                f"image and question alone have {max_length} tokens or more, the limit of data.max_length"
                f" ({self.num_image_tokens} are the image's); shorten the question, or raise that"
                " where the model's context is longer"
            )
        return Encoded(ids, labels, ", and ".join(cuts))

    def _encode_all(self, turns: Sequence[Turn]) -> tuple[Encoded, list[int]]:
        """Tokens and labels without a limit, and how many tokens there are up to the end of each answer."""
        text, spans = self.answer_spans(turns)
        tokens = self.tokenize(text)
        input_ids, labels = list(tokens["input_ids"]), [IGNORED] * len(tokens["input_ids"])
        span_ends = [end for _, end in spans]
        for position, (start, end) in enumerate(tokens["offset_mapping"]):
            nearest = bisect_left(span_ends, start + 1)  # the first answer that ends behind the token's start
            if nearest < len(spans) and end > max(start, spans[nearest][0]):
                labels[position] = input_ids[position]
        starts = list(accumulate((start for start, _ in tokens["offset_mapping"]), max))
        return Encoded(input_ids, labels), [bisect_left(starts, end) for end in span_ends]

    def encode_prompt(self, turns: Sequence[Turn]) -> list[int]:
        """Tokens of turns that end with the user's, and of what an answer begins with."""
        return list(self.tokenize(self.expand(self.render(turns, prompt=True)))["input_ids"])


PROBE = "probe"


def end_of_answers(renderer: Renderer) -> str:
    """The special token that ends an answer in the template, found by a conversation of two questions.

    Raises:
        ConversationError: answers are ended by no special token, begin with something that nobody said, or are
            written differently once more follows.
    """
    turns = [Turn("user", PROBE), Turn("assistant", PROBE)] * 2
    before, after = renderer.render(turns[:1], prompt=True), renderer.render(turns[:2])
    if not after.startswith(before) or not after[len(before) :].strip().startswith(PROBE):
        raise ConversationError(
            f"the chat template asks with {before!r} but writes {after!r}: the answer does not follow the prompt; give"
            " another template as head.chat_template"
        )
    renderer.answer_spans(turns)
    tail = after[len(before) :].strip()[len(PROBE) :]
    special = set(renderer.tokenizer.all_special_tokens) | {
        str(token) for token in renderer.tokenizer.added_tokens_decoder.values() if token.special
    }
    found = [token for token in special if token in tail]
    if not found:
        raise ConversationError(
            f"the chat template ends an answer with {tail!r}, which is no special token, so that generation would not"
            " stop; give a template that writes eos_token, or another such token, as head.chat_template"
        )
    return min(found, key=tail.index)


def processor_template(chat_template: str, image_token: str) -> str:
    """Chat template of a processor, which takes messages of images and texts, from a language model's."""
    return FLATTEN_PARTS.replace("IMAGE_TOKEN", image_token) + chat_template
