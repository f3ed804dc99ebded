"""Alignment: the joined model is its parts, what learns is what the recipe says, and rows are answered or named."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, Features, Image, Sequence, Value
from PIL import Image as PILImage
from safetensors.torch import load_file
from tiny_language import TEMPLATE, tiny_tokenizer, write_language_model
from tiny_recipes import MODEL, ROOT, child_environment, encode, losses_of, run_task, write_task_recipe
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    CohereForCausalLM,
    GPT2LMHeadModel,
    GPTNeoXForCausalLM,
    PhiForCausalLM,
)

from modeling_ehm import EHMConfig, EHMForPreTraining, EHMModel
from modeling_ehm.training.recipes import RecipeError
from modeling_ehm.training.tasks import align, load_recipe

COLOURS = {"red": (220, 20, 20), "green": (20, 220, 20), "blue": (20, 20, 220), "yellow": (220, 220, 20)}
ROWS = [list(COLOURS)[number % 4] for number in range(12)]


def square(colour: str, side: int = 32) -> bytes:
    return encode(PILImage.new("RGB", (side, side), COLOURS[colour]))


def write_rows(path, features: dict, images=None, **columns) -> str:
    images = [square(colour) for colour in ROWS] if images is None else images
    rows = {"image": [None if content is None else {"bytes": content, "path": None} for content in images]} | columns
    features = Features({"image": Image()} | features)
    Dataset.from_dict(rows, features=features).to_parquet(str(path))
    return str(path)


def questions(path, images=None, asked=None, answers=None) -> dict:
    """Two questions an image, the second's answer a class."""
    names = ClassLabel(names=[*COLOURS, "yes", "no"])
    asked = asked or [["what colour is it?", "is there a shape?"]] * len(ROWS)
    answers = answers or [[names.str2int(colour), names.str2int("yes")] for colour in ROWS]
    text = Value("string")
    features = {"questions": Sequence(text), "answers": Sequence(names)}
    files = write_rows(path, features, images, questions=asked, answers=answers)
    return {"path": "parquet", "data_files": files, "question_column": "questions", "answer_column": "answers"}


def captions(path, values=None) -> dict:
    values = list(COLOURS).index
    names = ClassLabel(names=list(COLOURS))
    files = write_rows(path, {"label": names}, label=[values(colour) for colour in ROWS])
    return {"path": "parquet", "data_files": files, "text_column": "label"}


def conversations(path, all_messages, images) -> dict:
    message = {"from": Value("string"), "value": Value("string")}
    files = write_rows(path, {"talk": [message]}, images, talk=all_messages)
    return {"path": "parquet", "data_files": files, "conversations_column": "talk"}


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    return write_language_model(tmp_path_factory.mktemp("language"))


def recipe_of(folder, pretrained, data, head, training=None, model=None):
    settings = {"learning_rate": 1.0e-2} | (training or {})
    head = {"max_new_tokens": 4} | {k: str(v) if k in ("language_model", "projector") else v for k, v in head.items()}
    return write_task_recipe(folder / "recipe.yaml", "align", pretrained, data, settings, head=head, model=model or {})


@pytest.fixture
def first_stage(tmp_path, pretrained, language_model):
    """Directory of a first stage of two steps."""
    folder = tmp_path / "first"
    folder.mkdir()
    data = {"train": questions(folder / "train.parquet")}
    run_task(recipe_of(folder, pretrained, data, {"language_model": language_model}))
    return folder / "out"


def prepared(folder, pretrained, data, head, training=None, **model):
    return align.prepare(load_recipe(recipe_of(folder, pretrained, data, head, training, model)))


# The joined model is its parts


@pytest.mark.parametrize("layer, strategy", [(-1, "default"), (-1, "full"), (2, "default"), ([1, -1], "default")])
def test_the_joined_model_is_tower_projector_and_language_model(tmp_path, pretrained, language_model, layer, strategy):
    """Features are those of EHMModel, the last layer's after the final norm; texts alone are the language model's."""
    data = {"train": questions(tmp_path / "train.parquet")}
    head = {
        "language_model": language_model,
        "vision_feature_layer": layer,
        "vision_feature_select_strategy": strategy,
    }
    joined = prepared(tmp_path, pretrained, data, head).joined
    model, tower = joined.model.eval(), EHMModel.from_pretrained(pretrained).eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        outputs = tower(pixels, output_hidden_states=True)
        hidden = [*outputs.hidden_states[:-1], outputs.last_hidden_state]
        chosen = torch.cat([hidden[n] for n in ([layer] if isinstance(layer, int) else layer)], dim=-1)
        chosen = chosen if strategy == "full" else chosen[:, 1:]
        expected = model.model.multi_modal_projector(chosen)
        features = torch.stack(list(model.get_image_features(pixels).pooler_output))
        assert torch.allclose(features, expected, atol=1e-6)
        assert features.shape[1] == joined.num_image_tokens == 16 + (strategy == "full")
        ids = torch.tensor([[5, 6, 7]])
        alone = AutoModelForCausalLM.from_pretrained(language_model).eval()
        assert torch.equal(model(input_ids=ids).logits[..., :250], alone(input_ids=ids).logits[..., :250])


def test_training_tokens_are_the_processors(tmp_path, pretrained, language_model):
    """What `apply_chat_template` and the processor make of a message is what training saw before the answer."""
    data = {"train": questions(tmp_path / "train.parquet"), "test": questions(tmp_path / "test.parquet")}
    trainer = prepared(tmp_path, pretrained, data, {"language_model": language_model})
    processor, question = trainer.joined.processor, trainer.questions.questions[0]
    image = PILImage.new("RGB", (50, 40), COLOURS["red"])
    content = [{"type": "image"}, {"type": "text", "text": "what colour is it?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=image, text=text, return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == question.prompt
    assert torch.equal(inputs["pixel_values"][0], trainer.questions.pixels.of_image(image))
    example = trainer.train_dataset[0]
    assert example["input_ids"][: len(question.prompt)] == question.prompt
    assert trainer.joined.model(**inputs).logits.shape[1] == len(question.prompt)


def test_the_aligned_directory_needs_nothing_of_ours(tmp_path, pretrained, language_model, run_without_package):
    """Without this package and without remote code: the same weights, the same greedy answers, and a pipeline."""
    data = {"train": questions(tmp_path / "train.parquet"), "test": questions(tmp_path / "test.parquet")}
    head = {"language_model": language_model, "language_model_training": "full", "train_tower": True}
    run_task(recipe_of(tmp_path, pretrained, data, head, {"max_steps": 4}))
    lines = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert len(lines) == 24 and lines[0]["question"] == "what colour is it?" and lines[1]["references"] == ["yes"]
    PILImage.new("RGB", (32, 32), COLOURS[ROWS[0]]).save(tmp_path / "image.png")
    program = """
import json
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

folder, picture = sys.argv[1:]
model, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
assert not report["missing_keys"] and not report["unexpected_keys"], report
processor = AutoProcessor.from_pretrained(folder)
content = [{"type": "image"}, {"type": "text", "text": "what colour is it?"}]
text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
inputs = processor(images=Image.open(picture), text=text, return_tensors="pt")
written = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1]:]
answer = processor.batch_decode(written, skip_special_tokens=True)[0].strip()
message = {"role": "user", "content": [{"type": "image", "url": picture}, content[1]]}
piped = pipeline("image-text-to-text", model=folder)
piped = piped(text=[message], return_full_text=False, generate_kwargs={"max_new_tokens": 4, "do_sample": False})
print(json.dumps([answer, piped[0]["generated_text"].strip()]))
"""
    done = run_without_package(program, tmp_path / "out", tmp_path / "image.png")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [lines[0]["answer"]] * 2
    assert not list((tmp_path / "out").glob("*.py"))


def test_a_spare_row_of_the_vocabulary_is_used(tmp_path, pretrained, language_model):
    """Where embeddings have room for the image token they keep their size."""
    tokenizer = tiny_tokenizer()
    roomy = write_language_model(tmp_path / "roomy", vocab_size=len(tokenizer) + 8)
    data = {"train": questions(tmp_path / "train.parquet")}
    for name, folder, rows in (("full", language_model, len(tokenizer) + 1), ("spare", roomy, len(tokenizer) + 8)):
        (tmp_path / name).mkdir()
        joined = prepared(tmp_path / name, pretrained, data, {"language_model": folder}).joined
        assert joined.model.get_input_embeddings().num_embeddings == rows
        assert joined.model.config.image_token_id == len(tokenizer)


def test_answers_end_where_the_template_ends_them(tmp_path, pretrained):
    """Chat models end turns with another token than their tokenizer's end of text: generation must stop there."""
    folder = write_language_model(tmp_path / "chat", tiny_tokenizer(eos_token="<|system|>"))
    source = captions(tmp_path / "t.parquet")
    data = {"train": source, "test": source, "templates": ["it is {}"]}
    head = {"language_model": folder, "language_model_training": "full", "train_tower": True, "max_new_tokens": 12}
    figures = run_task(recipe_of(tmp_path, pretrained, data, head, {"max_steps": 100, "global_batch_size": 12}))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")]
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "out").generation_config.eos_token_id == ends
    assert figures["loss"] < 0.5
    lines = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert all(line["answer"].count("it is") == 1 for line in lines)


def test_a_new_projector_is_drawn_as_the_library_draws_it(tmp_path, pretrained, language_model):
    """Normal with the language model's standard deviation, biases zero, a function of the seed."""
    data = {"train": questions(tmp_path / "train.parquet")}
    projectors = [
        prepared(tmp_path, pretrained, data, {"language_model": language_model}, {"seed": seed}).joined
        for seed in (0, 0, 1)
    ]
    one, same, other = (joined.model.model.multi_modal_projector for joined in projectors)
    assert one.linear_1.weight.std().item() == pytest.approx(0.02, rel=0.1) and one.linear_1.bias.abs().max() == 0
    assert torch.equal(one.linear_2.weight, same.linear_2.weight)
    assert not torch.equal(one.linear_2.weight, other.linear_2.weight)


def test_the_card_and_the_records_are_this_runs(tmp_path, pretrained, language_model):
    """No folder of the machine, and nothing that an earlier run skipped in the same folder."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "skipped_rows.jsonl").write_text('{"sample_id": 3}\n')
    data = {"train": questions(tmp_path / "train.parquet")}
    run_task(recipe_of(tmp_path, pretrained, data, {"language_model": language_model}))
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"language_model: {language_model.name}\n" in card and str(language_model.parent) not in card
    assert "pipeline_tag: image-text-to-text" in card and not (tmp_path / "out" / "skipped_rows.jsonl").exists()


def test_defaults_are_llavas(tmp_path, pretrained, language_model):
    data = {"train": questions(tmp_path / "train.parquet")}
    path = recipe_of(tmp_path, pretrained, data, {"language_model": language_model})
    sections = yaml.safe_load(path.read_text())
    del sections["training"]["warmup_steps"]
    path.write_text(yaml.safe_dump(sections))
    args = align.prepare(load_recipe(path)).args
    assert (args.weight_decay, args.warmup_steps, args.max_grad_norm) == (0.0, 0.03, 1.0)


# What learns


def changed_parts(before: dict, after: dict) -> set[str]:
    parts = {"tower": "vision_tower", "projector": "multi_modal_projector", "language": "language_model"}
    return {
        part
        for part, name in parts.items()
        if any(name in key and not torch.equal(before[key], after[key]) for key in before)
    }


@pytest.mark.parametrize(
    "head, expected",
    [
        ({}, {"projector"}),
        ({"language_model_training": "full"}, {"projector", "language"}),
        ({"language_model_training": "full", "train_projector": False}, {"language"}),
        ({"train_tower": True, "tower_learning_rate": 1.0e-3}, {"projector", "tower"}),
        ({"language_model_training": "lora", "lora_rank": 2, "lora_alpha": 4}, {"projector", "language"}),
    ],
)
def test_what_learns_is_what_the_recipe_says(tmp_path, pretrained, first_stage, head, expected):
    data = {"train": questions(tmp_path / "train.parquet")}
    (tmp_path / "second").mkdir()
    run_task(recipe_of(tmp_path / "second", first_stage, data, head))
    before, after = (load_file(f / "model.safetensors") for f in (first_stage, tmp_path / "second" / "out"))
    assert before.keys() == after.keys()  # low-rank updates are merged
    assert changed_parts(before, after) == expected
    fixed = [name for name in before if "position_embeddings" in name or "pooler" in name]
    assert len(fixed) == 3 and all(torch.equal(before[name], after[name]) for name in fixed)


def test_frozen_weights_may_be_half_as_large(tmp_path, pretrained, language_model):
    """The language model in bfloat16: what learns is float32, the updates of its layers too; it runs end to end."""
    data = {"train": questions(tmp_path / "train.parquet"), "test": questions(tmp_path / "test.parquet")}
    head = {"language_model": language_model, "dtype": "bfloat16", "language_model_training": "lora", "lora_rank": 2}
    trainer = prepared(tmp_path, pretrained, data, head, {"bf16": True})
    dtypes = {p.requires_grad: p.dtype for n, p in trainer.model.named_parameters() if "language_model" in n}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters() if p.requires_grad)
    run_task(tmp_path / "recipe.yaml")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    (tmp_path / "second").mkdir()
    again = prepared(tmp_path / "second", tmp_path / "out", data, {"dtype": "bfloat16"}, {"bf16": True}).joined.model
    assert torch.equal(again.model.multi_modal_projector.linear_1.weight, saved["multi_modal_projector.linear_1.weight"]
                       if "multi_modal_projector.linear_1.weight" in saved
                       else saved["model.multi_modal_projector.linear_1.weight"])  # fmt: skip
    assert again.lm_head.weight.dtype == torch.bfloat16
    assert next(w for n, w in saved.items() if "q_proj" in n and "language" in n).dtype == torch.bfloat16
    with pytest.raises(RecipeError, match="head.dtype='bfloat16' beside float32 weights in training needs"):
        prepared(tmp_path, pretrained, data, head, {"bf16": False})


def test_answers_are_written_in_the_precision_of_the_saved_weights(tmp_path, pretrained, language_model, monkeypatch):
    """Mixed precision decides otherwise between nearly equal words; bfloat16 weights beside float32 ones need it."""
    data = {"train": questions(tmp_path / "train.parquet"), "test": questions(tmp_path / "test.parquet")}
    mixed = []
    own = align.write_answers

    def write_answers(model, *args, **kwargs):
        model.lm_head.register_forward_hook(lambda *_: mixed.append(torch.is_autocast_enabled("cpu")))
        return own(model, *args, **kwargs)

    monkeypatch.setattr(align, "write_answers", write_answers)
    lora = {"language_model_training": "lora", "lora_rank": 2}
    for number, head in enumerate(({}, {"dtype": "bfloat16"} | lora)):
        folder = tmp_path / str(number)
        folder.mkdir()
        trainer = prepared(folder, pretrained, data, {"language_model": language_model} | head, {"bf16": True})
        align.execute(trainer)
        assert mixed and set(mixed) == {number == 1}
        mixed.clear()
        with torch.no_grad():  # and training would go on as before
            trainer.evaluate()
        assert mixed and set(mixed) == {True}
        mixed.clear()


def test_each_part_has_its_rate(tmp_path, pretrained, first_stage):
    data = {"train": questions(tmp_path / "train.parquet")}
    head = {"language_model_training": "full", "train_tower": True, "vision_feature_layer": -1}
    head |= {"tower_learning_rate": 1.0e-4, "projector_learning_rate": 3.0e-3}
    trainer = prepared(tmp_path, first_stage, data, head, {"weight_decay": 0.1})
    groups = trainer.create_optimizer().param_groups
    rates = {group["name"]: group["lr"] for group in groups}
    assert rates == {"projector": 3.0e-3, "tower": 1.0e-4, "language_model": 1.0e-2}
    for group in groups:
        assert all((p.ndim > 1) == (group["weight_decay"] > 0) or p.shape[:2] == (1, 1) for p in group["params"])
    learning = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert learning == sum(p.numel() for group in groups for p in group["params"])


def test_layers_above_the_features_do_not_learn(tmp_path, pretrained, language_model):
    data = {"train": questions(tmp_path / "train.parquet")}
    head = {"language_model": language_model, "train_tower": True, "vision_feature_layer": -2}
    trainer = prepared(tmp_path, pretrained, data, head)
    names = {name for name, p in trainer.model.named_parameters() if p.requires_grad and "vision_tower" in name}
    assert any("layers.1." in name for name in names)
    assert not any("layers.2." in name or "tower.layernorm" in name or "pooler" in name for name in names)


@pytest.mark.parametrize(
    "head",
    [
        {},
        {"language_model_training": "full", "train_tower": True},
        {"language_model_training": "lora", "lora_rank": 2, "lora_alpha": 4, "lora_dropout": 0.5},
    ],
    ids=["projector", "full", "lora"],
)
def test_a_resumed_run_is_the_unbroken_one(tmp_path, pretrained, first_stage, head):
    """Four steps, or two and two: losses, final weights and answers are the same bits."""
    files = tmp_path / "train.parquet", tmp_path / "test.parquet"
    data = {"train": questions(files[0]), "test": questions(files[1]), "max_turns": 1}
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
        run_task(recipe_of(tmp_path / name, first_stage, data, head, settings))
    whole, broken = tmp_path / "whole" / "out", tmp_path / "broken" / "out"
    shutil.rmtree(broken / "checkpoint-4")
    for name in ("model.safetensors", "answers.jsonl", "trainer_state.json"):
        (broken / name).unlink()
    run_task(tmp_path / "broken" / "recipe.yaml")
    assert losses_of(broken) == losses_of(whole) and len(losses_of(whole)) == 4
    assert (broken / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert (broken / "answers.jsonl").read_text() == (whole / "answers.jsonl").read_text()
    assert not list(whole.glob("**/*.bin"))
    with pytest.raises(ValueError, match=r"other settings: data.train.max_images=2 .*data.train.rows=2 "):
        run_task(tmp_path / "broken" / "recipe.yaml", "data.train.max_images=2")


def test_two_processes_train_as_one(tmp_path, pretrained, language_model):
    """A global batch of 4 in one process, or 2 + 2, with answers of unequal length: losses and answers agree."""
    data = {"train": questions(tmp_path / "train.parquet"), "test": questions(tmp_path / "test.parquet")}
    data["max_turns"] = 1
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        recipe_of(tmp_path / name, pretrained, data, {"language_model": language_model}, {"max_steps": 3})
    run_task(tmp_path / "one" / "recipe.yaml")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [ROOT / "train_ehm.py", tmp_path / "two" / "recipe.yaml"]
    environment = child_environment(tmp_path / "home")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one, two = (tmp_path / name / "out" for name in ("one", "two"))
    assert losses_of(two) == pytest.approx(losses_of(one), abs=1e-4)
    assert (one / "answers.jsonl").read_text() == (two / "answers.jsonl").read_text()


def test_a_projector_is_taken_over(tmp_path, pretrained, language_model, first_stage):
    """Of the same widths; for another width both are named."""
    data = {"train": questions(tmp_path / "train.parquet")}
    head = {"language_model": language_model, "projector": first_stage}
    kept = prepared(tmp_path, pretrained, data, head).joined.model.model.multi_modal_projector
    saved = AutoModelForImageTextToText.from_pretrained(first_stage).model.multi_modal_projector
    assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), saved.parameters(), strict=True))
    message = r"its linear_1.weight is \(32, 64\), but this tower and language model need \(32, 128\)"
    with pytest.raises(RecipeError, match=message):
        prepared(tmp_path, pretrained, data, head | {"vision_feature_layer": [-2, -1]})
    with pytest.raises(RecipeError, match="is no aligned model"):
        prepared(tmp_path, pretrained, data, head | {"projector": pretrained})
    with pytest.raises(RecipeError, match="head.projector='no/where/at/all' cannot be read"):
        prepared(tmp_path, pretrained, data, head | {"projector": "no/where/at/all"})


# Rows


def test_captions_are_class_names_in_drawn_templates(tmp_path, pretrained, language_model):
    """Which template and prompt, is a function of (seed, pass, row); tests accept all templates and name the class."""
    source = captions(tmp_path / "train.parquet")
    templates = ["it is {}", "{} is there"]
    data = {"train": source, "test": source, "templates": templates, "prompts": ["describe", "what is it?"]}
    trainer = prepared(tmp_path, pretrained, data, {"language_model": language_model}, {"max_steps": 20})
    again = prepared(tmp_path, pretrained, data, {"language_model": language_model}, {"max_steps": 20})
    examples = [trainer.train_dataset[position]["input_ids"] for position in range(24)]
    assert examples == [again.train_dataset[position]["input_ids"] for position in range(24)]
    texts = [trainer.joined.tokenizer.decode(ids) for ids in examples]
    assert {("it is" in text, "describe" in text) for text in texts} == {(a, b) for a in (0, 1) for b in (0, 1)}
    question = trainer.questions.questions[1]
    assert question.name == "green" and question.references == ["it is green", "green is there"]
    assert "describe" in trainer.joined.tokenizer.decode(question.prompt)


def test_drawn_questions_change_from_pass_to_pass(tmp_path, pretrained, language_model):
    data = {"train": questions(tmp_path / "train.parquet"), "max_turns": 1}
    trainer = prepared(tmp_path, pretrained, data, {"language_model": language_model}, {"max_steps": 30})
    texts = [trainer.joined.tokenizer.decode(trainer.train_dataset[n]["input_ids"]) for n in range(48)]
    assert all(text.count("<|user|>") == 1 for text in texts)
    share = np.mean(["is there a shape?" in text for text in texts])
    assert 0.25 < share < 0.75


def test_the_blind_model_sees_the_same_of_every_image(tmp_path, pretrained, language_model):
    data = {"train": questions(tmp_path / "train.parquet"), "test": questions(tmp_path / "test.parquet"), "blind": True}
    trainer = prepared(tmp_path, pretrained, data, {"language_model": language_model})
    assert all(trainer.train_dataset[n]["pixel_values"].abs().max() == 0 for n in range(4))
    assert trainer.questions.pixels(trainer.questions.rows.dataset[0]["image"]).abs().max() == 0


def test_a_question_with_several_peoples_answers_learns_the_commonest(tmp_path, pretrained, language_model):
    text = Value("string")
    answers = [["red", "blue", "blue"]] * len(ROWS)
    features = {"question": text, "answers": Sequence(text)}
    files = write_rows(tmp_path / "t.parquet", features, question=["what is it?"] * len(ROWS), answers=answers)
    source = {"path": "parquet", "data_files": files, "question_column": "question", "answer_column": "answers"}
    path = recipe_of(tmp_path, pretrained, {"train": source, "test": source}, {"language_model": language_model})
    trainer = align.prepare(load_recipe(path))
    assert "blue" in trainer.joined.tokenizer.decode(trainer.train_dataset[0]["input_ids"])
    assert trainer.questions.questions[0].references == ["red", "blue", "blue"]
    assert "vqa_accuracy" in run_task(path)


TALK = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "red"}]
TEXT_ALONE = [{"from": "human", "value": "is there a shape?"}, {"from": "gpt", "value": "no"}]


@pytest.mark.parametrize("streaming", [False, True])
def test_unusable_rows_are_recorded_and_replaced(tmp_path, pretrained, language_model, streaming):
    """Of six rows one is broken, one has no answer, one has an image too few; a text without an image is fine."""
    rows = [
        (TALK, square("red")),
        (TALK, b"no image"),
        (TALK[:1], square("red")),
        (TEXT_ALONE, None),
        (TALK, None),
        (TALK + TEXT_ALONE * 40, square("blue")),  # longer than the context
    ]
    source = conversations(tmp_path / "t.parquet", [talk for talk, _ in rows], [image for _, image in rows])
    source |= {"streaming": streaming}
    path = recipe_of(
        tmp_path, pretrained, {"train": source, "max_skipped_share": 1.0}, {"language_model": language_model}
    )
    run_task(path)
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped_rows.jsonl").read_text().splitlines()]
    errors = {line["row"]: line["error"] for line in skipped}
    assert set(errors) == {1, 2, 4}
    assert "UnidentifiedImageError" in errors[1] and "an answer is missing" in errors[2]
    assert "1 times <image> in the conversation, but 0 image" in errors[4]
    cut = [json.loads(line) for line in (tmp_path / "out" / "cut_texts.jsonl").read_text().splitlines()]
    assert {line["row"] for line in cut} == {5} and cut[0]["cut"].startswith("turns from ")


def test_a_batch_of_texts_alone_gets_a_grey_image(tmp_path, pretrained, language_model):
    """One row more, without an answer: the loss is that of the texts, and the projector has a gradient, of zero."""
    source = conversations(tmp_path / "t.parquet", [TEXT_ALONE, TALK], [None, square("red")])
    trainer = prepared(tmp_path, pretrained, {"train": source}, {"language_model": language_model})
    examples = [trainer.train_dataset[n] for n in range(2)]
    alone = [e for e in examples if "pixel_values" not in e]
    assert len(alone) == 1
    both, batch = trainer.data_collator(examples), trainer.data_collator(alone)
    assert both["pixel_values"].shape == (1, 3, 32, 32) and both["input_ids"].shape[0] == 2
    assert (both["labels"][both["attention_mask"] == 0] == -100).all()
    assert batch["input_ids"].shape[0] == 2 and batch["pixel_values"].abs().max() == 0
    model = trainer.model.eval()
    ids = torch.tensor([alone[0]["input_ids"]])
    expected = model(input_ids=ids, labels=torch.tensor([alone[0]["labels"]])).loss
    loss = model(**batch).loss
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    loss.backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().max() == 0


def test_texts_alone_are_learned_and_judged(tmp_path, pretrained, language_model):
    source = conversations(tmp_path / "t.parquet", [TEXT_ALONE] * 4 + [TALK], [None] * 4 + [square("red")])
    path = recipe_of(tmp_path, pretrained, {"train": source, "test": source}, {"language_model": language_model})
    figures = run_task(path, "training.per_device_eval_batch_size=2", "training.global_batch_size=2")
    assert {"loss", "exact_match", "true_false_accuracy"} == set(figures)
    assert len((tmp_path / "out" / "answers.jsonl").read_text().splitlines()) == 5


def test_test_rows_that_cannot_be_asked_are_named(tmp_path, pretrained, language_model):
    train = questions(tmp_path / "train.parquet")
    head = {"language_model": language_model}
    empty = [["what colour is it?", "is it?"]] * 11 + [["what colour is it?", " "]]
    bad = questions(tmp_path / "bad.parquet", asked=empty)
    with pytest.raises(ValueError, match="row 11: the question is ' '; a text is expected"):
        prepared(tmp_path, pretrained, {"train": train, "test": bad}, head)
    uneven = questions(tmp_path / "uneven.parquet", asked=[["what colour is it?"]] + [["a?", "b?"]] * 11)
    with pytest.raises(ValueError, match="row 0: 1 questions, but 2 answers"):
        prepared(tmp_path, pretrained, {"train": train, "test": uneven}, head)
    long = questions(tmp_path / "long.parquet", asked=[["what colour is it? " * 40, "b?"]] * 12)
    with pytest.raises(ValueError, match=r"row 0: the question has \d+ tokens with its image; 124 are left"):
        prepared(tmp_path, pretrained, {"train": train, "test": long}, head)


# What is refused


def test_language_models_that_lack_something_are_refused(tmp_path, pretrained):
    data = {"train": questions(tmp_path / "train.parquet")}

    def refused(name, message, head=None, error=RecipeError, **changes):
        folder = write_language_model(tmp_path / name, tiny_tokenizer(**changes))
        with pytest.raises(error, match=message):
            prepared(tmp_path, pretrained, data, {"language_model": folder} | (head or {}))

    refused("pad", r"names no pad token.*head.pad_token, for example '<\|end\|>'", pad_token=None)
    refused("wrong pad", "head.pad_token='<no>' is not among the tokens", {"pad_token": "<no>"}, pad_token=None)
    refused("template", "has no chat template; set head.chat_template to vicuna", chat_template=None)
    refused("end", "names no end token", eos_token=None)
    refused("file", "neither 'vicuna' nor a file", {"chat_template": "nowhere.jinja"})
    refused("layer", r"head.vision_feature_layer=\[1, 4\]: 4 is not in \[-4, 3\]", {"vision_feature_layer": [1, 4]})
    refused("targets", "head.lora_targets=.* names no linear layer",
            {"language_model_training": "lora", "lora_targets": ["nothing"]})  # fmt: skip
    with pytest.raises(OSError, match="head.language_model='nowhere' is no directory that holds a language model"):
        prepared(tmp_path, pretrained, data, {"language_model": "nowhere"})


def test_what_is_missing_can_be_given(tmp_path, pretrained):
    """A pad token and a template by the recipe; captions need no template at all."""
    data = {"train": questions(tmp_path / "train.parquet"), "max_turns": 1}
    bare = write_language_model(tmp_path / "bare", tiny_tokenizer(pad_token=None, chat_template=None))
    head = {"language_model": bare, "pad_token": "<pad>", "chat_template": "vicuna"}
    trainer = prepared(tmp_path, pretrained, data, head)
    assert "USER: <image>" in trainer.joined.tokenizer.decode(trainer.train_dataset[0]["input_ids"])
    assert trainer.joined.tokenizer.pad_token == "<pad>"
    (tmp_path / "own.jinja").write_text("Q" + TEMPLATE)
    head["chat_template"] = str(tmp_path / "own.jinja")
    trainer = prepared(tmp_path, pretrained, data, head)
    assert trainer.joined.tokenizer.decode(trainer.train_dataset[0]["input_ids"]).startswith("Q<|user|>")
    del head["chat_template"]
    source = captions(tmp_path / "captions.parquet")
    plain = {"train": source, "test": source, "plain": True, "templates": ["it is {}"]}
    (tmp_path / "plain").mkdir()
    assert "named" in run_task(recipe_of(tmp_path / "plain", pretrained, plain, head))
    with pytest.raises(RecipeError, match="has no chat template: its first stage was plain"):
        prepared(tmp_path, tmp_path / "plain" / "out", data, {})


def test_an_output_that_is_more_than_one_matrix_is_refused(tmp_path, pretrained, monkeypatch):
    """A language model that scales its logits would write otherwise under LLaVA's plain output."""
    tokenizer = tiny_tokenizer()
    folder = write_language_model(tmp_path / "scaled", tokenizer, CohereForCausalLM, logit_scale=0.5)
    data = {"train": questions(tmp_path / "train.parquet")}
    with pytest.raises(RecipeError, match="CohereForCausalLM does more to its output than one matrix"):
        prepared(tmp_path, pretrained, data, {"language_model": folder})


@pytest.mark.parametrize(
    "model_class, fields, message",
    [
        (PhiForCausalLM, {}, "a PhiForCausalLM does more to its output than one matrix"),
        (GPT2LMHeadModel, {"n_embd": 32, "n_layer": 1, "n_head": 2}, "a GPT2LMHeadModel shares its output"),
    ],
)
def test_outputs_that_llava_cannot_save_are_refused(tmp_path, pretrained, model_class, fields, message):
    """A bias would work here and be gone in the saved directory; GPT-2 names its embeddings otherwise."""
    folder = write_language_model(tmp_path / "other", None, model_class, **fields)
    data = {"train": questions(tmp_path / "train.parquet")}
    with pytest.raises(RecipeError, match=message):
        prepared(tmp_path, pretrained, data, {"language_model": folder})


def test_patches_that_are_not_square_are_refused(tmp_path, language_model):
    EHMForPreTraining(EHMConfig(**MODEL | {"patch_size": [8, 16]})).save_pretrained(tmp_path / "tower")
    data = {"train": questions(tmp_path / "train.parquet")}
    with pytest.raises(RecipeError, match=r"patch_size=\[8, 16\] is not square, and LlavaProcessor counts"):
        prepared(tmp_path, tmp_path / "tower", data, {"language_model": language_model})


def test_lengths_that_cannot_hold_an_image_are_refused(tmp_path, pretrained, language_model):
    data = {"train": questions(tmp_path / "train.parquet")}
    head = {"language_model": language_model}
    with pytest.raises(RecipeError, match="data.max_length=500 exceeds the 128 positions of the language model"):
        prepared(tmp_path, pretrained, data | {"max_length": 500}, head)
    with pytest.raises(RecipeError, match="20 tokens .* do not hold the 16 of an image and head.max_new_tokens=4"):
        prepared(tmp_path, pretrained, data | {"max_length": 20}, head)


def test_other_kinds_of_language_models_are_joined(tmp_path, pretrained):
    """The path is the same for whatever AutoModelForCausalLM reads: here one with another base model."""
    fields = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    folder = write_language_model(tmp_path / "neox", None, GPTNeoXForCausalLM, **fields)
    data = {"train": questions(tmp_path / "train.parquet")}
    run_task(recipe_of(tmp_path, pretrained, data, {"language_model": folder}))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert type(model.model.language_model).__name__ == "GPTNeoXModel"


def test_a_second_stage_keeps_what_the_projector_knows(tmp_path, pretrained, first_stage):
    data = {"train": questions(tmp_path / "train.parquet")}
    with pytest.raises(RecipeError, match="head.vision_feature_layer=-2, but the projector in .* trained with -1"):
        prepared(tmp_path, first_stage, data, {"vision_feature_layer": -2})
    with pytest.raises(RecipeError, match="head.pad_token='<pad>': .* has its own; leave it out"):
        prepared(tmp_path, first_stage, data, {"pad_token": "<pad>"})
    with pytest.raises(RecipeError, match="is aligned, and its tower stays; leave out {'image_size': 64}"):
        prepared(tmp_path, first_stage, data, {}, image_size=64)
    with pytest.raises(RecipeError, match=r"data.image_std=\[1, 1, 1\], but .* was made with \[0.229"):
        prepared(tmp_path, first_stage, data | {"image_std": [1, 1, 1]}, {})
    with pytest.raises(RecipeError, match="head.language_model is missing, and model.pretrained=.* is no aligned"):
        prepared(tmp_path, pretrained, data, {})


@pytest.mark.parametrize(
    "section, changes, message",
    [
        ("head", {"language_model_training": "some"}, "head.language_model_training='some' is not one of frozen"),
        ("head", {"train_projector": False}, "head: nothing would learn"),
        ("head", {"dtype": "bfloat16", "language_model_training": "full"}, "head.dtype='bfloat16' with"),
        ("head", {"lora_dropout": 1.5}, r"head.lora_dropout=1.5 must lie in \[0, 1\)"),
        ("head", {"tower_learning_rate": -1.0}, "head.tower_learning_rate=-1.0 must be positive"),
        ("data", {"max_turns": 2}, "data.max_turns=2 draws questions of data.train.question_column"),
        ("head", {"lora_rank": 0}, "head.lora_rank=0 must be at least 1"),
        ("data", {"templates": ["no gap"]}, "data.templates: 'no gap' must hold {} once"),
        ("data", {"prompts": []}, r"data.prompts=\[\] must hold"),
        ("data", {"max_length": 0}, "data.max_length=0 must be at least 1"),
        ("data", {"max_skipped_share": 2.0}, "data.max_skipped_share=2.0 must lie in"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, pretrained, section, changes, message):
    source = {"path": "parquet", "data_files": "t.parquet", "text_column": "text"}
    data, head = {"train": source}, {"language_model": "somewhere"}
    (data if section == "data" else head).update(changes)
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe_of(tmp_path, pretrained, data, head))


@pytest.mark.parametrize("columns", [{}, {"question_column": "q"}, {"text_column": "t", "conversations_column": "c"}])
def test_sources_say_what_their_rows_are(tmp_path, pretrained, columns):
    data = {"train": {"path": "parquet", "data_files": "t.parquet"} | columns}
    with pytest.raises(RecipeError, match="data.train must name conversations_column, or question_column and"):
        load_recipe(recipe_of(tmp_path, pretrained, data, {"language_model": "somewhere"}))


def test_a_column_that_is_not_there_is_named(tmp_path, pretrained, language_model):
    source = questions(tmp_path / "train.parquet") | {"answer_column": "replies"}
    with pytest.raises(ValueError, match=r"has no column 'replies' \(answer_column\); its columns are"):
        prepared(tmp_path, pretrained, {"train": source}, {"language_model": language_model})


def test_pushes_of_unmerged_updates_are_refused(tmp_path, pretrained, language_model):
    data = {"train": questions(tmp_path / "train.parquet")}
    head = {"language_model": language_model, "language_model_training": "lora"}
    training = {"push_to_hub": True, "hub_strategy": "every_save", "hub_model_id": "me/it"}
    with pytest.raises(RecipeError, match="low-rank updates are not merged"):
        prepared(tmp_path, pretrained, data, head, training)
