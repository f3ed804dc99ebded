"""Alignment with a language model: images and texts -> LLaVA's two stages -> answers, judged.

The first stage trains the projector on captions, the second projector and language model on instructions; which of
them a recipe is, its `head` section says. Training examples follow the keyed sequence of pre-training, streams
included, and rows that cannot be used are recorded and replaced.

Letters: B rows, T tokens, C channels, H W pixels.
"""

import importlib.util
import json
import logging
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import ClassLabel
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from modeling_ehm.configuration_ehm import to_pair
from modeling_ehm.modeling_ehm import evaluation_mode
from modeling_ehm.training import hub, pictures
from modeling_ehm.training.arguments import AlignmentTrainingArguments
from modeling_ehm.training.conversations import (
    IGNORED,
    ConversationError,
    Renderer,
    Turn,
    end_of_answers,
    turns_of_messages,
    turns_of_questions,
)
from modeling_ehm.training.data import (
    SAMPLE_STREAM,
    ImageSource,
    IndexedSamples,
    Sample,
    SampledExamples,
    StreamedSamples,
    describe_source,
    keyed_bits,
    open_samples,
)
from modeling_ehm.training.decoding import decode_image
from modeling_ehm.training.labelled import ImageData, LabelledRows, check_channels, count_steps, image_processor
from modeling_ehm.training.metrics import as_evaluate_metric, exact_match
from modeling_ehm.training.pretrained import load_encoder
from modeling_ehm.training.recipes import Recipe, RecipeError, Schema
from modeling_ehm.training.recorded_trainer import RecordedTrainer
from modeling_ehm.training.tasks import finetuning
from modeling_ehm.training.vision_language import (
    AlignmentHead,
    VisionLanguage,
    add_lora,
    join,
    load_joined,
    parameter_groups,
    set_trainable,
)

logger = logging.getLogger(__name__)

SKIPPED, CUT = "skipped_rows.jsonl", "cut_texts.jsonl"  # records in the output folder
KINDS = {  # columns of a source, by what its rows are
    "conversations": ("conversations",),
    "questions": ("question", "answer"),
    "captions": ("text",),
}


@dataclass
class AlignmentData(ImageData):
    """The `data` section; other fields: see `ImageData`.

    The sources name `conversations_column`, or `question_column` and `answer_column`, or `text_column`.

    Attributes:
        train: Images and texts to learn from; may be streamed.
        test: Images and texts to judge by; None judges nothing.
        plain: Captions without a chat template: image, text, end token, as in LLaVA's first stage.
        blind: The model sees grey instead of each image: what can be answered without looking.
        templates: Sentences with `{}`, into which the values of `text_column` are put; which one, is drawn.
        prompts: What the user says when a caption is wanted; which one, is drawn; evaluations take the first.
        max_turns: Of a row with several questions, so many are drawn, in an order that is drawn; None takes all as
            they stand.
        max_length: Longest text in tokens, the image's included; None takes what the language model has positions for.
        shuffle_window: Rows of a stream that are shuffled among each other.
        max_skipped_share: Share of unusable rows above which the run stops.
    """

    train: ImageSource
    test: ImageSource | None = None
    plain: bool = False
    blind: bool = False
    templates: list[str] = field(default_factory=lambda: ["{}"])
    prompts: list[str] = field(default_factory=lambda: ["Describe the image."])
    max_turns: int | None = None
    max_length: int | None = None
    shuffle_window: int = 2048
    max_skipped_share: float = 0.01

    def __post_init__(self):
        super().__post_init__()
        for name, source in (("train", self.train), ("test", self.test)):
            if source is not None:
                kind_of(source, f"data.{name}")
        for template in self.templates:
            if template.count("{}") != 1:
                raise ValueError(f"data.templates: {template!r} must hold {{}} once, where the text is put")
        for name in ("templates", "prompts"):
            if not getattr(self, name):
                raise ValueError(f"data.{name}=[] must hold at least one sentence")
        for name in ("max_turns", "max_length", "shuffle_window"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"data.{name}={getattr(self, name)} must be at least 1")
        if self.max_turns is not None and self.train.question_column is None:
            raise ValueError(f"data.max_turns={self.max_turns} draws questions of data.train.question_column; name one")
        if not 0 <= self.max_skipped_share <= 1:
            raise ValueError(f"data.max_skipped_share={self.max_skipped_share} must lie in [0, 1]")


SCHEMA = Schema(AlignmentData, AlignmentTrainingArguments, AlignmentHead)


def kind_of(source: ImageSource, where: str) -> str:
    """What the rows of a source are: conversations, questions or captions.

    Raises:
        ValueError: the source names the columns of none, or of several.
    """
    named = {kind: [getattr(source, f"{name}_column") for name in names] for kind, names in KINDS.items()}
    chosen = [kind for kind, columns in named.items() if any(column is not None for column in columns)]
    if len(chosen) != 1 or None in named[chosen[0]]:
        raise ValueError(
            f"{where} must name conversations_column, or question_column and answer_column, or text_column"
            f" (found {', '.join(chosen) or 'none of them'})"
        )
    return chosen[0]


def columns_of(source: ImageSource, where: str) -> dict[str, str]:
    """Canonical names of the text columns of a source, with their names there."""
    return {name: getattr(source, f"{name}_column") for name in KINDS[kind_of(source, where)]}


# Rows


class Texts:
    """Columns of a row -> questions and answers, or turns. Classes are written by their names, underscores as spaces.

    Args:
        kind: Of the source.
        features: `datasets` features of the columns, by canonical name.
        data: Templates and prompts.
    """

    def __init__(self, kind: str, features, data: AlignmentData):
        self.kind, self.data = kind, data
        self.class_names = {}
        for name, feature in features.items():
            inner = getattr(feature, "feature", feature)
            if isinstance(inner, ClassLabel):
                self.class_names[name] = inner.names

    def text(self, name: str, value) -> str:
        """A value as text.

        Raises:
            ConversationError: neither a text nor the number of a class, or nothing at all.
        """
        if name in self.class_names and isinstance(value, int):
            if not 0 <= value < len(self.class_names[name]):
                raise ConversationError(f"{name} {value} is not in [0, {len(self.class_names[name]) - 1}], the classes")
            value = self.class_names[name][value].replace("_", " ")
        if not isinstance(value, str) or not value.strip():
            raise ConversationError(f"the {name} is {value!r}; a text is expected")
        return value.strip()

    def questions(self, columns: dict) -> list[tuple[str, list[str]]]:
        """Questions, each with its references: one, or those of several people.

        Raises:
            ConversationError: as `text`; lists of unequal lengths.
        """
        asked, given = columns["question"], columns["answer"]
        if not isinstance(asked, list):
            people = given if isinstance(given, list) else [given]
            if not people:
                raise ConversationError("the question has no answer")
            return [(self.text("question", asked), [self.text("answer", answer) for answer in people])]
        if not isinstance(given, list) or len(given) != len(asked) or not asked:
            count = len(given) if isinstance(given, list) else 1
            raise ConversationError(f"{len(asked)} questions, but {count} answers; one each is expected")
        return [
            (self.text("question", question), [self.text("answer", answer)])
            for question, answer in zip(asked, given, strict=True)
        ]

    def captions(self, columns: dict) -> list[str]:
        """Captions of the row: one, or several.

        Raises:
            ConversationError: as `text`; none.
        """
        given = columns["text"] if isinstance(columns["text"], list) else [columns["text"]]
        if not given:
            raise ConversationError("the row holds no caption")
        return [self.text("text", caption) for caption in given]

    def turns(self, columns: dict, bits) -> list[Turn]:
        """Turns of a row for training; what is drawn is drawn with `bits` `(n,)` uint64.

        Raises:
            ConversationError: the row is no usable conversation.
        """
        has_image = columns["image"] is not None
        if self.kind == "conversations":
            return turns_of_messages(columns["conversations"] or [], has_image)
        if not has_image:
            raise ConversationError("the row holds no image")
        if self.kind == "captions":
            template = self.data.templates[int(bits[0]) % len(self.data.templates)]
            prompt = "" if self.data.plain else self.data.prompts[int(bits[1]) % len(self.data.prompts)]
            captions = self.captions(columns)
            return turns_of_questions([prompt], [template.format(captions[int(bits[2]) % len(captions)])], True)
        pairs = self.questions(columns)
        if self.data.max_turns is not None:
            pairs = [pairs[i] for i in bits[: len(pairs)].argsort(kind="stable")[: self.data.max_turns]]
        answers = [Counter(people).most_common(1)[0][0] for _, people in pairs]
        return turns_of_questions([question for question, _ in pairs], answers, True)

    def tests(self, columns: dict) -> list[tuple[list[Turn], list[str], str | None]]:
        """What is asked of a test row: turns that end with the user's, references, and the name a caption must hold.

        Raises:
            ConversationError: the row is no usable conversation.
        """
        if self.kind == "questions":
            return [([Turn("user", q, image=True)], references, None) for q, references in self.questions(columns)]
        if self.kind == "captions":
            captions = self.captions(columns)
            name = captions[0] if "text" in self.class_names or self.data.templates != ["{}"] else None
            prompt = "" if self.data.plain else self.data.prompts[0]
            references = [template.format(caption) for caption in captions for template in self.data.templates]
            return [([Turn("user", prompt, image=True)], references, name)]
        turns = turns_of_messages(columns["conversations"] or [], columns["image"] is not None)
        asked = [number for number, turn in enumerate(turns) if turn.role == "assistant"]
        return [(turns[:number], [turns[number].text], None) for number in asked]


def draws(seed: int, key: Sample, columns: dict) -> np.ndarray:
    """Numbers with which `Texts.turns` draws, `(n,)` uint64: a pure function of (seed, pass, row)."""
    asked = columns.get("question")
    count = max(3, len(asked) if isinstance(asked, list) else 1)  # template, prompt and caption, or one a question
    return keyed_bits(seed, SAMPLE_STREAM, key.pass_index, key.sample_id, count=count)


class Pixels:
    """Encoded image -> `pixel_values` `(C, H, W)` float32 as the image processor makes them; zeros if `blind`."""

    def __init__(self, processor, num_channels: int, data: AlignmentData):
        self.processor, self.num_channels, self.data = processor, num_channels, data

    def __call__(self, encoded: dict) -> Tensor:
        return self.of_image(decode_image(encoded, self.num_channels, self.data.max_pixels))

    def of_image(self, image) -> Tensor:
        pixels = self.processor(image, return_tensors="pt")["pixel_values"][0]
        return torch.zeros_like(pixels) if self.data.blind else pixels


class AlignmentExamples(SampledExamples):
    """Training examples: `input_ids`, `labels` (lists of T), and `pixel_values` `(C, H, W)` unless a row has no image.

    Args:
        samples: Endless keyed sequence of rows.
        texts: Columns to turns.
        pixels: Images to tensors.
        renderer: Turns to tokens.
        max_length: Longest text in tokens.
        seed: Key of what is drawn.
        num_positions: Steps times images a step.
        folder: Output folder, for `skipped_rows.jsonl` and `cut_texts.jsonl`; None records nothing.
        max_skipped_share: Share of unusable rows above which the run stops.
    """

    def __init__(
        self,
        samples: IndexedSamples | StreamedSamples,
        texts: Texts,
        pixels: Pixels,
        renderer: Renderer,
        max_length: int,
        seed: int,
        num_positions: int,
        folder: Path | None = None,
        max_skipped_share: float = 0.01,
    ):
        record = None if folder is None else folder / SKIPPED
        super().__init__(samples, num_positions, record, max_skipped_share)
        self.texts, self.pixels, self.renderer = texts, pixels, renderer
        self.max_length, self.seed = max_length, seed
        self.cuts = None if folder is None else folder / CUT

    def read(self, sample: Sample, key: Sample) -> dict:
        columns = sample.columns
        encoded = self.renderer.encode(self.texts.turns(columns, draws(self.seed, key, columns)), self.max_length)
        example = {"input_ids": encoded.input_ids, "labels": encoded.labels}
        if columns["image"] is not None:
            example["pixel_values"] = self.pixels(columns["image"])
        if encoded.cut is not None and self.cuts is not None:
            line = {"pass": sample.pass_index, "sample_id": sample.sample_id, **sample.place, "cut": encoded.cut}
            self.cuts.parent.mkdir(parents=True, exist_ok=True)
            with open(self.cuts, "ab", buffering=0) as file:  # one write a line: workers may append side by side
                file.write((json.dumps(line) + "\n").encode())
        return example


class Collator:
    """Pad at the right: `input_ids`, `attention_mask`, `labels` `(B, T)`; `pixel_values` `(images, C, H, W)`.

    A batch of texts alone gets one more row, the example `grey`, which is an image and no answer: tower and projector
    take part in every step, with a gradient of zero, as processes that wait for each other need it.
    """

    def __init__(self, pad_token_id: int, grey: dict | None = None):
        self.pad_token_id, self.grey = pad_token_id, grey

    def __call__(self, examples: list[dict]) -> dict[str, Tensor]:
        if self.grey is not None and not any("pixel_values" in example for example in examples):
            examples = [*examples, self.grey]
        longest = max(len(example["input_ids"]) for example in examples)
        batch = {name: [] for name in ("input_ids", "attention_mask", "labels")}
        for example in examples:
            count = len(example["input_ids"])
            rest = longest - count
            batch["input_ids"].append(example["input_ids"] + [self.pad_token_id] * rest)
            batch["attention_mask"].append([1] * count + [0] * rest)
            batch["labels"].append(example["labels"] + [IGNORED] * rest)
        tensors = {name: torch.tensor(rows) for name, rows in batch.items()}
        images = [example["pixel_values"] for example in examples if "pixel_values" in example]
        if images:
            tensors["pixel_values"] = torch.stack(images)
        return tensors


# Training


class AlignmentTrainer(RecordedTrainer):
    """Trainer of a LLaVA; its arguments are `AlignmentTrainingArguments`.

    Args:
        joined: Model and processor.
        head: Learning rates of the parts.
        tuner: peft's, whose updates are added to the weights of the saved model; None if there is none.
        questions: What is asked at the end; None asks nothing.
        kwargs: As for `RecordedTrainer`.
    """

    def __init__(self, joined: VisionLanguage, head: AlignmentHead, tuner, questions, **kwargs):
        super().__init__(model=joined.model, processing_class=joined.processor, **kwargs)
        self.joined, self.head, self.tuner, self.questions = joined, head, tuner, questions

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            model = self.model if model is None else model
            groups = parameter_groups(model, self.head, self.args.learning_rate, self.args.weight_decay)
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def merge_updates(self) -> None:
        """Add low-rank updates to the weights; after this nothing more can be trained."""
        if self.tuner is not None:
            self.bare_model.model.language_model = self.tuner.merge_and_unload()
            self.tuner = None

    def _write_card(self, folder: Path) -> None:
        if self.run is not None:
            (folder / "README.md").write_text(hub.task_card(self.run, self.state, folder, USAGE))


def prepare(recipe: Recipe) -> AlignmentTrainer:
    """Build everything that the recipe names, up to the first step; all test rows are checked."""
    args, resume_from = finetuning.start(recipe, AlignmentTrainingArguments)
    data, head = recipe.data, recipe.head
    if resume_from is None and args.process_index == 0:
        for name in (SKIPPED, CUT):  # of an earlier run in this folder
            (Path(args.output_dir) / name).unlink(missing_ok=True)
    if args.push_to_hub and args.hub_strategy == "every_save" and head.language_model_training == "lora":
        raise RecipeError(
            "training.hub_strategy='every_save' would push checkpoints whose low-rank updates are not merged; set"
            " hub_strategy to end"
        )
    if head.dtype == "bfloat16" and not args.bf16:
        raise RecipeError("head.dtype='bfloat16' beside float32 weights in training needs training.bf16=true")
    joined = build(recipe, args)
    vision = joined.model.config.vision_config
    check_channels(vision, data.image_mean)
    set_trainable(joined.model, head)
    tuner = add_lora(joined.model, head) if head.language_model_training == "lora" else None
    for parameter in joined.model.parameters():
        if parameter.requires_grad:  # small steps would be rounded away in head.dtype
            parameter.data = parameter.data.float()
    max_length = find_max_length(data, head, joined)
    renderer = make_renderer(joined, data.plain)
    pixels = Pixels(joined.processor.image_processor, vision.num_channels, data)
    size = to_pair(vision.image_size)
    train = training_examples(recipe, args, renderer, pixels, max_length, size)
    questions = test_set = None
    if data.test is not None:
        questions = TestQuestions(data, renderer, pixels, max_length, head.max_new_tokens, size)
        test_set = TestExamples(questions)
    run = finetuning.describe_run(recipe, args, train)
    if questions is not None and questions.texts.kind == "questions":
        run.references["exact_match"] = 100 * questions.share_of_commonest()
    run.begin(resume_from, args.world_size)
    trainer = AlignmentTrainer(
        joined,
        head,
        tuner,
        questions,
        args=args,
        train_dataset=train,
        eval_dataset=test_set,
        data_collator=Collator(joined.tokenizer.pad_token_id, grey_example(joined)),
        run=run,
    )
    trainer.resume_from = resume_from
    return trainer


def make_renderer(joined: VisionLanguage, plain: bool) -> Renderer:
    """How conversations are written; the model learns to stop where the template ends an answer.

    Raises:
        RecipeError: a template that cannot be learned from.
    """
    tokenizer, template = joined.tokenizer, joined.processor.chat_template
    renderer = Renderer(tokenizer, template, joined.processor.image_token, joined.num_image_tokens, plain)
    if not plain:
        try:
            renderer.end_token = end_of_answers(renderer)
        except ConversationError as error:
            raise RecipeError(str(error)) from None
    joined.end_answers_with(renderer.end_token)
    return renderer


def find_max_length(data: AlignmentData, head: AlignmentHead, joined: VisionLanguage) -> int:
    """Longest text in tokens.

    Raises:
        RecipeError: more than the language model has positions for, or too few for an image and an answer.
    """
    known, asked, image = joined.max_length, data.max_length, joined.num_image_tokens
    if known is None and asked is None:
        raise RecipeError("data.max_length must be set: the language model's config names no max_position_embeddings")
    if known is not None and asked is not None and asked > known:
        raise RecipeError(
            f"data.max_length={asked} exceeds the {known} positions of the language model; set it to less"
        )
    limit = asked or known
    if limit <= image + head.max_new_tokens:
        raise RecipeError(
            f"{limit} tokens (data.max_length, or the language model's positions) do not hold the {image} of an image"
            f" and head.max_new_tokens={head.max_new_tokens}; raise the limit, or take a smaller model.image_size"
        )
    return limit


def grey_example(joined: VisionLanguage) -> dict:
    """An image of zeros without an answer; see `Collator`."""
    vision = joined.model.config.vision_config
    ids = [joined.model.config.image_token_id] * joined.num_image_tokens
    pixels = torch.zeros(vision.num_channels, *to_pair(vision.image_size))
    return {"input_ids": ids, "labels": [IGNORED] * len(ids), "pixel_values": pixels}


def build(recipe: Recipe, args: AlignmentTrainingArguments) -> VisionLanguage:
    """The joined model of an earlier stage, or a new one of the tower and the language model that the recipe names."""
    head = recipe.head
    if head.language_model is None:
        if recipe.pretrained is None or AutoConfig.from_pretrained(recipe.pretrained).model_type != "llava":
            raise RecipeError(
                f"head.language_model is missing, and model.pretrained={recipe.pretrained!r} is no aligned model that"
                " has one; name a language model, or the directory of an earlier stage"
            )
        if recipe.model:
            raise RecipeError(f"model: {recipe.pretrained!r} is aligned, and its tower stays; leave out {recipe.model}")
        joined = load_joined(recipe.pretrained, head)
        for name in ("image_mean", "image_std"):
            asked, saved = getattr(recipe.data, name), list(getattr(joined.processor.image_processor, name))
            if asked != saved:
                raise RecipeError(f"data.{name}={asked}, but {recipe.pretrained} was made with {saved}; set that")
    else:
        tower = load_encoder(recipe.pretrained, args.attn_implementation, **recipe.model)
        processor = image_processor(tower.config, recipe.data.image_mean, recipe.data.image_std)
        joined = join(tower, processor, head, needs_template=not recipe.data.plain)
    if joined.processor.chat_template is None and not recipe.data.plain:
        raise RecipeError(f"{recipe.pretrained} has no chat template: its first stage was plain; set data.plain=true")
    joined.model.set_attn_implementation(args.attn_implementation)
    return joined


def training_examples(
    recipe: Recipe, args, renderer: Renderer, pixels: Pixels, max_length: int, image_size: tuple[int, int]
) -> AlignmentExamples:
    """The training set: as many positions as the run has steps times images a step."""
    data = recipe.data
    columns = columns_of(data.train, "data.train")
    samples = open_samples(data.train, args.seed, data.shuffle_window, image_size, columns)
    count_steps(args, samples.samples_per_pass)
    features = {name: samples.dataset.features[name] for name in columns} if samples.dataset.features else {}
    return AlignmentExamples(
        samples,
        Texts(kind_of(data.train, "data.train"), features, data),
        pixels,
        renderer,
        max_length,
        args.seed,
        args.max_steps * args.images_per_step,
        Path(args.output_dir),
        data.max_skipped_share,
    )


# Answers


@dataclass(frozen=True)
class TestQuestion:
    """What is asked of a test row: tokens of the prompt, its text, references, the name a caption must hold."""

    row: int
    prompt: list[int]
    text: str
    references: list[str]
    name: str | None


class TestQuestions:
    """All questions of the test set, in the order of its rows.

    Args:
        data: Names the source.
        renderer: Turns to tokens.
        pixels: Images to tensors.
        max_length: Longest text in tokens.
        max_new_tokens: How many of them an answer may take.
        image_size: (height, width) of embedded synthetic images.

    Raises:
        ValueError: a row that cannot be used, or whose prompt is too long; it is named.
    """

    __test__ = False  # not pytest's

    def __init__(
        self,
        data: AlignmentData,
        renderer: Renderer,
        pixels: Pixels,
        max_length: int,
        max_new_tokens: int,
        image_size: tuple[int, int],
    ):
        self.renderer, self.pixels, self.data = renderer, pixels, data
        self.max_length, self.longest_prompt = max_length, max_length - max_new_tokens
        columns = columns_of(data.test, "data.test")
        self.rows = LabelledRows(data.test, columns, image_size, pixels.num_channels, data.max_pixels)
        features = {name: self.rows.features[name] for name in columns}
        self.texts = Texts(kind_of(data.test, "data.test"), features, data)
        self.questions: list[TestQuestion] = []
        self.examples: list[dict] = []
        for number in range(len(self.rows)):
            try:
                self._add(number)
            except Exception as error:  # Pillow raises nearly every type on broken files
                reason = error if isinstance(error, ConversationError) else f"{type(error).__name__}: {error}"
                raise ValueError(f"{describe_source(data.test)}: row {number}: {reason}") from None

    def _add(self, number: int) -> None:
        columns = self.rows.dataset[number]
        if columns["image"] is not None:
            self.pixels(columns["image"])  # so that a broken one is found before training
        for turns, references, name in self.texts.tests(columns):
            prompt = self.renderer.encode_prompt(turns)
            if len(prompt) > self.longest_prompt:
                raise ConversationError(
                    f"the question has {len(prompt)} tokens with its image; {self.longest_prompt} are left beside"
                    " head.max_new_tokens; shorten it, or raise data.max_length where the model's context is longer"
                )
            self.questions.append(TestQuestion(number, prompt, turns[-1].text, references, name))
        bits = np.arange(10_000, dtype=np.uint64)  # nothing is drawn: first template, questions as they stand
        encoded = self.renderer.encode(self.texts.turns(columns, bits), self.max_length)
        self.examples.append({"input_ids": encoded.input_ids, "labels": encoded.labels})

    def image(self, row: int) -> Tensor | None:
        """`pixel_values` `(C, H, W)`, or None of a text alone."""
        encoded = self.rows.dataset[row]["image"]
        return None if encoded is None else self.pixels(encoded)

    def share_of_commonest(self) -> float:
        """Exact match of whoever gives the commonest answer to every question."""
        commonest = Counter(question.references[0] for question in self.questions).most_common(1)[0][0]
        return exact_match([commonest] * len(self.questions), [question.references for question in self.questions])


class TestExamples(torch.utils.data.Dataset):
    """The test rows as training examples, for the loss."""

    __test__ = False  # not pytest's

    def __init__(self, questions: TestQuestions):
        self.questions = questions

    def __len__(self) -> int:
        return len(self.questions.examples)

    def __getitem__(self, row: int) -> dict:
        pixels = self.questions.image(row)
        return self.questions.examples[row] | ({} if pixels is None else {"pixel_values": pixels})


@contextmanager
def precision_of_answers(trainer: "AlignmentTrainer"):
    """That of the saved weights, so that the answers on record are those which the directory gives afterwards.

    Mixed precision is for training; between two nearly equal words it can decide otherwise. Where some weights are
    bfloat16 (`head.dtype`), or the attention is a kernel for half precision, it is needed here too.
    """
    model = trainer.bare_model
    parts = model.config, model.config.vision_config, model.config.text_config
    fused = any((part._attn_implementation or "").startswith("flash") for part in parts)
    if fused or any(p.dtype != torch.float32 for p in model.parameters()):
        with trainer.compute_loss_context_manager():
            yield
        return
    wrapped = model.__dict__.get("forward")  # accelerate puts it before the class's own, for mixed precision
    if hasattr(model, "_original_forward"):
        model.forward = model._original_forward
    try:
        yield
    finally:
        if wrapped is not None:
            model.forward = wrapped


@torch.no_grad()
def write_answers(
    model,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[TestQuestion],
    images,
    batch_size: int,
    max_new_tokens: int,
    progress_bar: bool = True,
) -> list[str]:
    """Greedy answers, one a question; `images(row)` gives pixel values `(C, H, W)` or None."""
    saved = model.generation_config  # of its other settings, as penalties of repetition, none is wanted here
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=saved.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    answers: list[str] = []
    order = sorted(range(len(questions)), key=lambda n: len(questions[n].prompt))  # little padding
    for start in tqdm(range(0, len(order), batch_size), desc="answers", disable=not progress_bar):
        chosen = [questions[n] for n in order[start : start + batch_size]]
        longest = max(len(question.prompt) for question in chosen)
        padding = [longest - len(question.prompt) for question in chosen]  # at the left: answers begin together
        ids = torch.tensor(
            [[tokenizer.pad_token_id] * p + q.prompt for p, q in zip(padding, chosen, strict=True)], device=model.device
        )
        mask = torch.tensor([[0] * p + [1] * len(q.prompt) for p, q in zip(padding, chosen, strict=True)])
        pixels = [image for q in chosen if (image := images(q.row)) is not None]
        more = {"pixel_values": torch.stack(pixels).to(model.device)} if pixels else {}
        written = model.generate(input_ids=ids, attention_mask=mask.to(model.device), generation_config=greedy, **more)
        answers += tokenizer.batch_decode(written[:, longest:], skip_special_tokens=True)
    back = sorted(range(len(order)), key=order.__getitem__)
    return [answers[n].strip() for n in back]


def judge(kind: str, answers: list[str], questions: list[TestQuestion]) -> dict[str, float]:
    """Figures in percent (CIDEr as it is, up to 10) of answers to all questions."""
    references = [question.references for question in questions]
    if kind == "captions":
        metric = as_evaluate_metric("caption_scores")
        metric.add_batch(predictions=answers, references=references)
        names = [question.name for question in questions]
        scores = metric.compute(names=None if None in names else names)
        return {name: value if name == "cider" else 100 * value for name, value in scores.items()}
    metric = as_evaluate_metric("answer_scores")
    metric.add_batch(predictions=answers, references=references)
    return {name: 100 * value for name, value in metric.compute().items()}


USAGE = """
from transformers import pipeline

answer = pipeline("image-text-to-text", model=repo)
message = {"role": "user", "content": [{"type": "image", "url": image}, {"type": "text", "text": question}]}
answer(text=[message], max_new_tokens=32, return_full_text=False)  # [{"generated_text": ...}]
"""


def execute(trainer: AlignmentTrainer) -> dict[str, float]:
    """Train, merge, ask all test questions, save, push; returns the figures."""
    args = trainer.args
    trainer.announce()
    try:
        trained = trainer.train(resume_from_checkpoint=trainer.resume_from)
    finally:
        trainer.train_dataset.close()
    trainer.merge_updates()
    trainer.save_final_model()  # before anything else can fail
    figures = {}
    if trainer.questions is not None:
        evaluated = trainer.evaluate()
        figures = {"loss": evaluated["eval_loss"]} | ask_all(trainer)
        trainer.log({f"eval_{name}": value for name, value in figures.items()})
        trainer.create_model_card()  # with the figures
    trainer.save_state()
    if trainer.is_world_process_zero():
        report_records(Path(args.output_dir))
        steps = {"steps": trainer.state.global_step, "seconds": trained.metrics["train_runtime"]}
        finetuning.report(trainer.run, figures, steps)
    trainer.finish_pushes()
    return figures


def ask_all(trainer: AlignmentTrainer) -> dict[str, float]:
    """Figures of the answers to all test questions; writes them to `answers.jsonl`, and some to `answers.png`."""
    args, test, model = trainer.args, trainer.questions, trainer.bare_model
    mine = list(range(len(test.questions)))[args.process_index :: args.world_size]

    with evaluation_mode(model), precision_of_answers(trainer):
        answers = write_answers(
            model,
            trainer.joined.tokenizer,
            [test.questions[n] for n in mine],
            test.image,
            args.per_device_eval_batch_size,
            trainer.head.max_new_tokens,
            progress_bar=not args.disable_tqdm and args.process_index == 0,
        )
    numbered = gather_object(list(zip(mine, answers, strict=True)))
    answers = [answer for _, answer in sorted(numbered)]
    if args.process_index == 0:
        folder = Path(args.output_dir)
        with open(folder / "answers.jsonl", "w") as file:
            for question, answer in zip(test.questions, answers, strict=True):
                line = {"row": question.row, "question": question.text, "answer": answer}
                file.write(json.dumps(line | {"references": question.references}) + "\n")
        if importlib.util.find_spec("matplotlib") is not None:
            draw_answers(test, answers, folder / "answers.png")
    return judge(test.texts.kind, answers, test.questions)


def draw_answers(test: TestQuestions, answers: list[str], path: Path) -> None:
    """Draw up to `pictures.MAX_ANSWERS` questions, at even distances in the set, with answers and references."""
    count = min(len(answers), pictures.MAX_ANSWERS)
    chosen = [round(n * (len(answers) - 1) / max(1, count - 1)) for n in range(count)]
    shown = []
    for number in chosen:
        question = test.questions[number]
        columns = test.rows.dataset[question.row]
        if columns["image"] is None:
            continue
        image = decode_image(columns["image"], 3, test.data.max_pixels)
        shown.append((image, question.text, answers[number], question.references[0]))
    pictures.render_answers(shown, path)


def report_records(folder: Path) -> None:
    """Say how many rows were skipped and how many texts were cut, and where they are listed."""
    for name, what in ((SKIPPED, "rows were skipped"), (CUT, "texts were cut to fit")):
        path = folder / name
        if path.exists():
            count = len({json.loads(line)["sample_id"] for line in path.read_text().splitlines() if line})
            logger.warning("%d %s; see %s", count, what, path)
