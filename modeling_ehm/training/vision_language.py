"""A vision tower and a language model, joined as transformers' own LLaVA: model, processor, and what of it learns.

The tower is exported as plain `vit`, which is exact, so that the result loads without this package and without remote
code. Source: LLaVA-1.5 (Liu et al. 2024): features of one layer, a two-layer MLP, the language model.

Letters: N image tokens, D width of the tower.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ViTModel,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from modeling_ehm.configuration_ehm import to_pair
from modeling_ehm.conversion import quiet_loading, to_vit
from modeling_ehm.modeling_ehm import EHMModel
from modeling_ehm.training.conversations import IMAGE_PLACEHOLDER, VICUNA_TEMPLATE, processor_template
from modeling_ehm.training.recipes import RecipeError

logger = logging.getLogger(__name__)

TRAINING_OF_LANGUAGE_MODEL = ("frozen", "full", "lora")
STRATEGIES = ("default", "full")


@dataclass
class AlignmentHead:
    """The `head` section: the language model, how the tower is read, and what learns.

    Attributes:
        language_model: Directory or Hub id of any `AutoModelForCausalLM`; None goes on with the one in
            `model.pretrained`, which then is the directory of an earlier stage.
        language_model_revision: Commit of a Hub id.
        dtype: Of the language model's weights: "float32", or "bfloat16" to halve the memory of frozen ones.
        chat_template: "vicuna" (LLaVA-1.5's prompts, without its system sentence), or a file that holds a Jinja
            template; None takes the tokenizer's.
        pad_token: A token of the tokenizer that fills short texts, where it names none itself.
        projector: Directory of an aligned model whose projector to start from; None starts at random.
        vision_feature_layer: Layer of the tower whose patch tokens are read, counted as Python counts; several are
            put side by side. -1 is the last layer, after the final norm.
        vision_feature_select_strategy: "default" leaves the class token out, "full" keeps it.
        language_model_training: "frozen" (LLaVA's first stage), "full" (its second), or "lora".
        train_projector: Whether the projector learns.
        train_tower: Whether the tower learns.
        projector_learning_rate: Its own rate; None takes `training.learning_rate`.
        tower_learning_rate: Its own rate; None takes `training.learning_rate`.
        lora_rank: Rank of the updates of "lora".
        lora_alpha: Their scale is lora_alpha / lora_rank.
        lora_dropout: Dropout before them.
        lora_targets: Names of the linear layers that get one; None takes all linear layers of the language model.
        max_new_tokens: Longest answer that is written in evaluations.
    """

    language_model: str | None = None
    language_model_revision: str | None = None
    dtype: str = "float32"
    chat_template: str | None = None
    pad_token: str | None = None
    projector: str | None = None
    vision_feature_layer: int | list[int] = -1
    vision_feature_select_strategy: str = "default"
    language_model_training: str = "frozen"
    train_projector: bool = True
    train_tower: bool = False
    projector_learning_rate: float | None = None
    tower_learning_rate: float | None = None
    lora_rank: int = 128
    lora_alpha: int = 256
    lora_dropout: float = 0.05
    lora_targets: list[str] | None = None
    max_new_tokens: int = 32

    def __post_init__(self):
        for name, value, known in (
            ("language_model_training", self.language_model_training, TRAINING_OF_LANGUAGE_MODEL),
            ("vision_feature_select_strategy", self.vision_feature_select_strategy, STRATEGIES),
            ("dtype", self.dtype, ("float32", "bfloat16")),
        ):
            if value not in known:
                raise ValueError(f"head.{name}={value!r} is not one of {', '.join(known)}")
        if self.language_model_training == "frozen" and not (self.train_projector or self.train_tower):
            raise ValueError("head: nothing would learn; set train_projector, train_tower or language_model_training")
        if self.dtype != "float32" and self.language_model_training == "full":
            raise ValueError(
                f"head.dtype={self.dtype!r} with language_model_training='full': small steps would be rounded away;"
                " keep float32 weights and set training.bf16, or take lora"
            )
        for name in ("lora_rank", "lora_alpha", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"head.{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"head.lora_dropout={self.lora_dropout} must lie in [0, 1)")
        for name in ("projector_learning_rate", "tower_learning_rate"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"head.{name}={getattr(self, name)} must be positive, or null for learning_rate")
        if self.language_model is None and self.language_model_revision is not None:
            raise ValueError("head.language_model_revision without head.language_model names no commit of anything")


@dataclass(frozen=True)
class VisionLanguage:
    """A joined model and its processor."""

    model: LlavaForConditionalGeneration
    processor: LlavaProcessor

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.processor.tokenizer

    @property
    def num_image_tokens(self) -> int:
        """N."""
        return self.model.config.image_seq_length

    @property
    def max_length(self) -> int | None:
        """Tokens that the language model has positions for; None if its config does not say."""
        return getattr(self.model.config.text_config, "max_position_embeddings", None)

    def end_answers_with(self, token: str) -> None:
        """Let generation, here and from the saved directory, stop at this token too."""
        config, token_id = self.model.generation_config, self.tokenizer.convert_tokens_to_ids(token)
        known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        known = [number for number in known if number is not None]
        config.eos_token_id = known if token_id in known else [*known, token_id]


# Building


def join(tower: EHMModel, image_processor, head: AlignmentHead, needs_template: bool = True) -> VisionLanguage:
    """A LLaVA of this tower and the language model that `head` names; the projector at random or from `head`.

    Args:
        tower: Encoder of any EHM checkpoint.
        image_processor: Makes images of the tower's native size.
        head: See `AlignmentHead`.
        needs_template: Whether a language model without a chat template is refused.

    Raises:
        RecipeError: no pad token or chat template; layers the tower lacks; patches that are not square; a projector of
            another width; a language model whose output is more than one matrix.
        OSError: no such language model.
    """
    patch, across = to_pair(tower.config.patch_size)
    if patch != across:
        raise RecipeError(
            f"patch_size={tower.config.patch_size} is not square, and LlavaProcessor counts the tokens of an image with"
            " one side; pre-train a tower with square patches"
        )
    language_model, tokenizer = load_language_model(head)
    template = find_template(tokenizer, head, needs_template)
    vit = with_pooler(to_vit(tower))
    check_layers(head.vision_feature_layer, tower.config.num_hidden_layers)
    rows, columns = tower.config.grid_size
    num_image_tokens = rows * columns + int(head.vision_feature_select_strategy == "full")
    config = LlavaConfig(
        vision_config=vit.config,
        text_config=language_model.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER),
        image_seq_length=num_image_tokens,
        vision_feature_layer=head.vision_feature_layer,
        vision_feature_select_strategy=head.vision_feature_select_strategy,
        tie_word_embeddings=language_model.config.tie_word_embeddings,
    )
    if config.tie_word_embeddings and not hasattr(language_model.base_model, "embed_tokens"):
        raise RecipeError(
            f"head.language_model={head.language_model!r}: a {type(language_model).__name__} shares its output with"
            " embeddings of a name that LLaVA does not know; take a model of the Llama, Mistral or Qwen kind"
        )
    with torch.device("meta"):  # a frame, whose parts are all put in: nothing large is made twice
        model = LlavaForConditionalGeneration(config)
    projector = LlavaMultiModalProjector(config).apply(model._init_weights)
    if head.projector is not None:
        load_projector(projector, head.projector)
    model.model.vision_tower, model.model.multi_modal_projector = vit, projector
    model.model.language_model, model.lm_head = language_model.base_model, language_model.get_output_embeddings()
    model.generation_config = language_model.generation_config
    check_joined(model, language_model)
    processor = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy=head.vision_feature_select_strategy,
        num_additional_image_tokens=1,  # the class token; "default" takes it off again
        chat_template=None if template is None else processor_template(template, IMAGE_PLACEHOLDER),
        image_token=IMAGE_PLACEHOLDER,
    )
    return VisionLanguage(model.train(), processor)


def load_joined(path_or_id: str, head: AlignmentHead) -> VisionLanguage:
    """An aligned model of an earlier stage, as it is.

    Raises:
        RecipeError: `head` asks for other features than those the projector knows.
    """
    with quiet_loading():
        model = LlavaForConditionalGeneration.from_pretrained(path_or_id, dtype=torch.float32)
    model.model.language_model.to(getattr(torch, head.dtype))
    model.lm_head.to(getattr(torch, head.dtype))
    processor = AutoProcessor.from_pretrained(path_or_id)
    for name in ("vision_feature_layer", "vision_feature_select_strategy"):
        asked, saved = getattr(head, name), getattr(model.config, name)
        if asked != saved:
            raise RecipeError(
                f"head.{name}={asked!r}, but the projector in {path_or_id} was trained with {saved!r}; set that, or"
                " name tower and language model to start a new projector"
            )
    for field in ("projector", "chat_template", "pad_token"):
        if getattr(head, field) is not None:
            raise RecipeError(f"head.{field}={getattr(head, field)!r}: {path_or_id} has its own; leave it out")
    return VisionLanguage(model.train(), processor)


def load_language_model(head: AlignmentHead) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The language model and its tokenizer, which has a pad token and an image token.

    Raises:
        OSError: neither a directory nor a Hub id that can be read.
        RecipeError: the tokenizer names no pad token, and neither does `head`.
    """
    name = head.language_model
    options = {"revision": head.language_model_revision} if head.language_model_revision else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        with quiet_loading():
            model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, head.dtype), **options)
    except OSError as error:
        raise OSError(
            f"head.language_model={name!r} is no directory that holds a language model and its tokenizer, nor could it"
            f" be read from the Hub: {error}"
        ) from None
    where = f"head.language_model={name!r}: its tokenizer"
    if not tokenizer.is_fast:
        raise RecipeError(f"{where} cannot say where its tokens stand in a text; take a model with a tokenizer.json")
    if tokenizer.eos_token is None:
        raise RecipeError(f"{where} names no end token (eos_token), so answers would have no end; add one to it")
    if head.pad_token is not None:
        if head.pad_token not in tokenizer.get_vocab():
            raise RecipeError(f"head.pad_token={head.pad_token!r} is not among the tokens of {name}; name one that is")
        tokenizer.pad_token = head.pad_token
    if tokenizer.pad_token is None:
        likely = tokenizer.unk_token or tokenizer.eos_token
        raise RecipeError(
            f"{where} names no pad token, with which short texts are filled; name one of its tokens as head.pad_token,"
            f" for example {likely!r}"
        )
    tokenizer.add_tokens([IMAGE_PLACEHOLDER], special_tokens=True)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def find_template(tokenizer: PreTrainedTokenizerBase, head: AlignmentHead, needed: bool) -> str | None:
    """The chat template: the one `head` names, or the tokenizer's.

    Raises:
        RecipeError: there is none, and it is needed; or the file cannot be read.
    """
    if head.chat_template == "vicuna":
        return VICUNA_TEMPLATE
    if head.chat_template is not None:
        try:
            return Path(head.chat_template).read_text()
        except OSError as error:
            raise RecipeError(
                f"head.chat_template={head.chat_template!r} is neither 'vicuna' nor a file that can be read ({error})"
            ) from None
    if tokenizer.chat_template is None and needed:
        raise RecipeError(
            f"the tokenizer of {head.language_model} has no chat template; set head.chat_template to vicuna or to a"
            " file with a Jinja template, or, for captions, data.plain=true"
        )
    return tokenizer.get_chat_template() if tokenizer.chat_template is not None else None


def with_pooler(vit: ViTModel) -> ViTModel:
    """The same encoder with ViT's pooler, all zeros, and its last hidden state after the final norm.

    LLaVA builds its tower with a pooler that it never reads; without one, loading would warn of missing weights.
    """
    vit.config.tie_last_hidden_states = True
    pooled = ViTModel(vit.config, add_pooling_layer=True).to(vit.dtype)
    zeros = {f"pooler.{name}": torch.zeros_like(weight) for name, weight in pooled.pooler.state_dict().items()}
    pooled.load_state_dict(vit.state_dict() | zeros)
    return pooled


def load_projector(projector: nn.Module, path_or_id: str) -> None:
    """Take over the projector of an aligned model.

    Raises:
        RecipeError: it is for another width.
    """
    try:
        kind = AutoConfig.from_pretrained(path_or_id).model_type
    except (OSError, ValueError) as error:
        raise RecipeError(f"head.projector={path_or_id!r} cannot be read: {error}") from None
    if kind != "llava":
        raise RecipeError(f"head.projector={path_or_id!r} is no aligned model; give the directory of an earlier stage")
    weights = read_weights(path_or_id, "multi_modal_projector.")
    for name, parameter in projector.state_dict().items():
        if weights[name].shape != parameter.shape:
            raise RecipeError(
                f"head.projector={path_or_id!r}: its {name} is {tuple(weights[name].shape)}, but this tower and"
                f" language model need {tuple(parameter.shape)} (out, in); the tower's width times the layers read is"
                " the input of linear_1, the language model's width the rest. Leave head.projector out"
            )
    projector.load_state_dict(weights)


def read_weights(path_or_id: str, part: str) -> dict[str, torch.Tensor]:
    """Weights whose names hold `part`, by what stands behind it; other files of a large model are not read.

    Raises:
        OSError: no safetensors there.
    """
    index = cached_file(path_or_id, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    names = {SAFE_WEIGHTS_NAME}
    if index is not None:
        names = {file for key, file in json.loads(Path(index).read_text())["weight_map"].items() if part in key}
    found = {}
    for name in sorted(names):
        with safe_open(cached_file(path_or_id, name), "pt") as file:
            found |= {key.split(part)[1]: file.get_tensor(key) for key in file.keys() if part in key}  # noqa: SIM118
    return found


def check_layers(layers: int | list[int], num_hidden_layers: int) -> None:
    """Raise a RecipeError for layers that the tower lacks; 0 are the patch embeddings."""
    for layer in [layers] if isinstance(layers, int) else layers:
        if not -num_hidden_layers - 1 <= layer <= num_hidden_layers:
            raise RecipeError(
                f"head.vision_feature_layer={layers}: {layer} is not in [{-num_hidden_layers - 1},"
                f" {num_hidden_layers}], the layers of the tower"
            )
    if layers == []:
        raise RecipeError("head.vision_feature_layer=[] names no layer; give one or several")


@torch.no_grad()
def check_joined(model: LlavaForConditionalGeneration, language_model: PreTrainedModel) -> None:
    """Raise a RecipeError unless the joined model writes what the language model writes: LLaVA's output is one matrix,
    without bias, scale or cap."""
    biased = model.lm_head.bias is not None  # used here, but not saved
    ids = torch.arange(8, device=language_model.device)[None] % language_model.config.vocab_size
    modes = [(m, m.training) for m in (model, language_model)]
    model.eval(), language_model.eval()
    same = torch.allclose(model(input_ids=ids).logits, language_model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    for module, training in modes:
        module.train(training)
    if biased or not same:
        raise RecipeError(
            f"head.language_model: a {type(language_model).__name__} does more to its output than one matrix (a bias,"
            " a scale, a cap), which LlavaForConditionalGeneration leaves out; take a language model of the Llama,"
            " Mistral or Qwen kind"
        )


# What learns


def set_trainable(model: LlavaForConditionalGeneration, head: AlignmentHead) -> None:
    """Freeze all that `head` does not train; loading makes every weight trainable, so this comes last.

    Of a tower in training only what the features depend on learns: no layer above them, no pooler.
    """
    model.requires_grad_(False)
    inner = model.model
    inner.multi_modal_projector.requires_grad_(head.train_projector)
    if head.train_tower:
        tower, layers = inner.vision_tower, head.vision_feature_layer
        count = len(tower.layers)
        indices = [n % (count + 1) for n in ([layers] if isinstance(layers, int) else layers)]
        tower.embeddings.requires_grad_(True)
        tower.embeddings.position_embeddings.requires_grad_(False)  # sin-cos: fixed in pre-training, and here
        tower.layers[: max(indices)].requires_grad_(True)
        tower.layernorm.requires_grad_(max(indices) == count)
    if head.language_model_training == "full":
        inner.language_model.requires_grad_(True)
        model.lm_head.requires_grad_(True)


def add_lora(model: LlavaForConditionalGeneration, head: AlignmentHead):
    """Put low-rank updates, which learn, beside linear layers of the language model.

    Returns:
        peft's tuner, whose `merge_and_unload` adds them to the weights.

    Raises:
        ImportError: peft is missing.
        RecipeError: no layer has one of the names.
    """
    try:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel
    except ImportError as error:
        raise ImportError('language_model_training="lora" needs peft: pip install "modeling_ehm[align]"') from error
    names = [
        name
        for name, module in model.model.language_model.named_modules()
        if isinstance(module, nn.Linear) and (head.lora_targets is None or name.rsplit(".", 1)[-1] in head.lora_targets)
    ]
    if not names:
        raise RecipeError(f"head.lora_targets={head.lora_targets} names no linear layer of the language model")
    config = LoraConfig(
        r=head.lora_rank, lora_alpha=head.lora_alpha, lora_dropout=head.lora_dropout, target_modules=names
    )
    return LoraModel(model.model.language_model, {"default": config}, "default")


def parameter_groups(model: nn.Module, head: AlignmentHead, learning_rate: float, weight_decay: float) -> list[dict]:
    """Groups for a torch optimiser, each with "name": projector, tower, language_model; decay on matrices only."""
    rates = {"projector": head.projector_learning_rate, "tower": head.tower_learning_rate, "language_model": None}
    groups: dict[tuple[str, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = (
            "projector" if "multi_modal_projector" in name else "tower" if "vision_tower" in name else "language_model"
        )
        decays = parameter.ndim > 1 and not name.endswith("cls_token")
        rate = learning_rate if rates[part] is None else rates[part]
        group = groups.setdefault(
            (part, decays),
            {"params": [], "lr": rate, "weight_decay": weight_decay if decays else 0.0, "name": part},
        )
        group["params"].append(parameter)
    return list(groups.values())
