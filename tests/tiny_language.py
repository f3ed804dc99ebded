"""A tokenizer and a language model of a few thousand weights, made on the spot."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{%- for message in messages -%}{{ '<|' + message.role + '|>' + message.content + '<|end|>' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)
SPECIAL = ["<pad>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
TEXTS = ["what colour is it? red green blue yellow", "describe the image. is there a shape? yes no"]


def tiny_tokenizer(**changes) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a chat template; `changes` are keyword arguments, None removes one."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        TEXTS * 10,
        trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    options = {"pad_token": "<pad>", "eos_token": "<|end|>", "chat_template": TEMPLATE} | changes
    template = options.pop("chat_template")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, **{name: value for name, value in options.items() if value is not None}
    )
    tokenizer.chat_template = template
    return tokenizer


def write_language_model(folder: Path, tokenizer=None, model_class=LlamaForCausalLM, **changes) -> Path:
    """A directory as `AutoModelForCausalLM` and `AutoTokenizer` read it, with random weights."""
    tokenizer = tokenizer or tiny_tokenizer()
    fields = {
        "vocab_size": len(tokenizer),  # no room for the image token, as in many models
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(0)
    config_class = LlamaConfig if model_class is LlamaForCausalLM else model_class.config_class
    model_class(config_class(**(fields | changes))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
