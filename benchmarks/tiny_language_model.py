"""Make a small language model and its tokenizer from the texts of alignment recipes alone, without their images.

    python benchmarks/tiny_language_model.py outputs/tiny_lm configs/align/easy_vqa_projector.yaml

A byte-level BPE tokenizer with a chat template, and a Llama of about a million weights, trained on the conversations of
`data.train`: what a model that never sees an image can know. Saved as any language model is, so that
`head.language_model` may name it where nothing can be downloaded.
"""

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from modeling_ehm.training.conversations import IMAGE_PLACEHOLDER, Renderer, Turn, processor_template
from modeling_ehm.training.data import open_samples
from modeling_ehm.training.tasks import load_recipe
from modeling_ehm.training.tasks.align import Collator, Texts, columns_of, draws, kind_of

TEMPLATE = """\
{%- for message in messages -%}
{{ "<|" + message.role + "|>" + message.content + "<|end|>" }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ "<|assistant|>" }}
{%- endif -%}
"""
SPECIAL = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
HEAD = 48  # width of an attention head
IMAGE_SIZE = (64, 64)  # of embedded synthetic images, which are not looked at


class Conversations(torch.utils.data.Dataset):
    """Turns of the training rows of recipes, without images, by position: the recipes in turn, each row after row, then
    anew with new draws."""

    def __init__(self, recipe_paths: list[str], seed: int):
        self.seed, self.parts = seed, []
        for path in recipe_paths:
            data = load_recipe(path).data
            columns = columns_of(data.train, "data.train")
            samples = open_samples(data.train, seed, data.shuffle_window, IMAGE_SIZE, columns)
            features = {name: samples.dataset.features[name] for name in columns}
            self.parts.append((samples, Texts(kind_of(data.train, "data.train"), features, data)))
        self.rows = sum(samples.samples_per_pass for samples, _ in self.parts)

    def turns(self, position: int) -> list[Turn]:
        samples, texts = self.parts[position % len(self.parts)]
        sample = next(samples.candidates(position // len(self.parts)))
        turns = texts.turns(sample.columns, draws(self.seed, sample, sample.columns))
        return [Turn(turn.role, turn.text) for turn in turns]


class Examples(torch.utils.data.Dataset):
    """Tokens of conversations, every one of them a label."""

    def __init__(self, conversations: Conversations, renderer: Renderer, count: int, max_length: int):
        self.conversations, self.renderer = conversations, renderer
        self.count, self.max_length = count, max_length

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, position: int) -> dict:
        ids = self.renderer.encode(self.conversations.turns(position), self.max_length).input_ids
        return {"input_ids": ids, "labels": list(ids)}


def train_tokenizer(conversations: Conversations, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE on the turns of as many positions as there are rows."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (turn.text for position in range(conversations.rows) for turn in conversations.turns(position))
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<|pad|>", eos_token="<|end|>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--hidden-size", type=int, default=144)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--vocab-size", type=int, default=1000, help="at most; few texts give fewer")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.hidden_size < HEAD or options.hidden_size % HEAD:
        parser.error(f"--hidden-size={options.hidden_size} must be a multiple of {HEAD}, the width of a head")
    conversations = Conversations(options.recipes, options.seed)
    tokenizer = train_tokenizer(conversations, options.vocab_size)
    set_seed(options.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 1,  # room for the image token
        hidden_size=options.hidden_size,
        intermediate_size=options.hidden_size * 8 // 3,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden_size // HEAD,
        num_key_value_heads=options.hidden_size // HEAD,
        max_position_embeddings=options.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    renderer = Renderer(tokenizer, processor_template(TEMPLATE, IMAGE_PLACEHOLDER), IMAGE_PLACEHOLDER, 0)
    arguments = TrainingArguments(
        output_dir=str(options.out),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=1e-3,
        warmup_steps=0.05,
        lr_scheduler_type="cosine",
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        seed=options.seed,
        use_cpu=not torch.accelerator.is_available(),
        train_sampling_strategy="sequential",
        logging_steps=max(1, options.steps // 20),
    )
    examples = Examples(conversations, renderer, options.steps * options.batch_size, options.context)
    Trainer(model=model, args=arguments, train_dataset=examples, data_collator=Collator(tokenizer.pad_token_id)).train()
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    weights = model.num_parameters()
    print(f"wrote {weights / 1e6:.1f} million weights and {len(tokenizer)} tokens to {options.out}")


if __name__ == "__main__":
    main()
