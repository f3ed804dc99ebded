"""Conversations about an image: columns of a row -> turns -> text and the spans of its answers -> tokens and labels.

Everything here is a pure function. The text is what the chat template of the language model writes, so that training
sees what `processor.apply_chat_template` gives at use; only answers, with the token that ends them, carry labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

IMAGE_PLACEHOLDER = "<image>"  # in the conversations of LLaVA's data
IGNORED = -100  # label of tokens without a loss
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

# LLaVA-1.5's prompts (Liu et al. 2024), those of Vicuna.
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
        tokenizer: With `chat_template`, unless `plain`.
        chat_template: The processor's, which takes images; see `processor_template`.
        image_token: How the image is written.
        num_image_tokens: N of the tower.
        plain: No template: image, text, end token, as in LLaVA's first stage. For one turn with one answer; what the
            user says is left out.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None,
        image_token: str,
        num_image_tokens: int,
        plain: bool = False,
    ):
        self.tokenizer, self.chat_template, self.plain = tokenizer, chat_template, plain
        self.image_token, self.num_image_tokens = image_token, num_image_tokens

    def text(self, turns: Sequence[Turn], prompt: bool = False) -> str:
        """Text of turns; `prompt` adds what the assistant's answer begins with."""
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
            text = f"{self.tokenizer.bos_token or ''}{shown}\n{answers}"
        else:
            text = self.tokenizer.apply_chat_template(
                as_messages(turns),
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=prompt,
            )
        return text.replace(self.image_token, self.image_token * self.num_image_tokens)

    def answer_spans(self, turns: Sequence[Turn]) -> tuple[str, list[tuple[int, int]]]:
        """Text, and (start, end) in characters of each answer with what ends it.

        Raises:
            ConversationError: the template writes earlier turns differently once later ones follow, so that answers
                cannot be found.
        """
        whole, spans = self.text(turns), []
        for number, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            before, after = self.text(turns[:number], prompt=True), self.text(turns[: number + 1])
            if not (after.startswith(before) and whole.startswith(after)):
                raise ConversationError(
                    f"the chat template writes the first {number + 1} turns differently when more follow, so answers"
                    " cannot be told from questions; give another template as head.chat_template"
                )
            spans.append((len(before), len(after)))
        return whole, spans

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
        kept, cut = list(turns), None
        first = 1 + (kept[0].role == "system")  # of the first answer
        while True:
            encoded = self._encode_all(kept)
            if len(encoded.input_ids) <= max_length:
                break
            if len(kept) > first + 1:
                kept = kept[:-2]
                cut = f"turns from {len(kept)} on, of {len(turns)}"
                continue
            labels = encoded.labels[:max_length]
            if all(label == IGNORED for label in labels):
                raise ConversationError(
                    f"image and question alone have more than data.max_length={max_length} tokens"
                    f" ({self.num_image_tokens} of the image); shorten the question, or raise max_length"
                )
            lost = len(encoded.input_ids) - max_length
            cut = f"the last {lost} tokens of the first answer" + (f", and {cut}" if cut else "")
            encoded = Encoded(encoded.input_ids[:max_length], labels)
            break
        return Encoded(encoded.input_ids, encoded.labels, cut)

    def _encode_all(self, turns: Sequence[Turn]) -> Encoded:
        text, spans = self.answer_spans(turns)
        tokens = self.tokenize(text)
        input_ids, labels = list(tokens["input_ids"]), [IGNORED] * len(tokens["input_ids"])
        for position, (start, end) in enumerate(tokens["offset_mapping"]):
            if any(start < high and end > low for low, high in spans):  # none holds a token without characters
                labels[position] = input_ids[position]
        return Encoded(input_ids, labels)

    def encode_prompt(self, turns: Sequence[Turn]) -> list[int]:
        """Tokens of turns that end with the user's, and of what an answer begins with."""
        return list(self.tokenize(self.text(turns, prompt=True))["input_ids"])


def processor_template(chat_template: str, image_token: str) -> str:
    """Chat template of a processor, which takes messages of images and texts, from a language model's."""
    return FLATTEN_PARTS.replace("IMAGE_TOKEN", image_token) + chat_template
