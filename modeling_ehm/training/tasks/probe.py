"""Probes of a frozen encoder: k-NN, linear and attentive probe on features that are computed once.

All learning rates of both probes are trained side by side in one run, since they share the features; a held-out part of
the training images chooses among them (as DINOv2's linear evaluation does), and the test images judge the chosen one.
MAE's linear probe instead sees augmented images for 90 epochs under LARS, so figures do not compare with the paper's.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TrainerState
from transformers.trainer_utils import SaveStrategy
from transformers.utils import ModelOutput

from modeling_ehm.configuration_ehm import to_pair
from modeling_ehm.modeling_ehm import EHMModel
from modeling_ehm.training.arguments import TaskTrainingArguments
from modeling_ehm.training.data import keyed_order
from modeling_ehm.training.decoding import to_uint8_tensor
from modeling_ehm.training.evaluation import pixel_features
from modeling_ehm.training.features import frozen_features
from modeling_ehm.training.hub import RunRecord, task_card
from modeling_ehm.training.labelled import (
    EvaluationImages,
    LabelledData,
    LabelledRows,
    check_channels,
    check_labels,
    class_names,
    count_steps,
    image_processor,
    resized,
)
from modeling_ehm.training.metrics import knn_accuracy, top_k_accuracy
from modeling_ehm.training.pretrained import load_encoder
from modeling_ehm.training.recipes import Recipe, Schema
from modeling_ehm.training.recorded_trainer import RecordedTrainer
from modeling_ehm.training.tasks import finetuning
from modeling_ehm.training.tasks.classify import USAGE, put_classifier

PROBES = ("knn", "linear", "attentive")
HELD_OUT_PART = 1  # of `keyed_order`; part 0 is the order of training examples


@dataclass
class ProbeHead:
    """The `head` section.

    Attributes:
        kinds: Of "knn", "linear", "attentive".
        learning_rates: Rates of AdamW that both trained probes try, each for a batch of 256.
        attentive_heads: Attention heads of the attentive probe.
        k: Neighbours of k-NN.
        temperature: Of k-NN's votes.
        held_out_share: Share of the training images that chooses the learning rate.
    """

    kinds: list[str] = field(default_factory=lambda: list(PROBES))
    learning_rates: list[float] = field(default_factory=lambda: [3e-4, 1e-3, 3e-3, 1e-2])
    attentive_heads: int = 4
    k: int = 20
    temperature: float = 0.07
    held_out_share: float = 0.1

    def __post_init__(self):
        if not self.kinds or set(self.kinds) - set(PROBES):
            raise ValueError(f"head.kinds={self.kinds} must name at least one of {', '.join(PROBES)}, and no other")
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise ValueError(f"head.learning_rates={self.learning_rates} must hold at least one rate, all above 0")
        if not 0 < self.held_out_share < 1:
            raise ValueError(f"head.held_out_share={self.held_out_share} must lie strictly between 0 and 1")

    @property
    def trained(self) -> list[str]:
        return [kind for kind in self.kinds if kind != "knn"]


SCHEMA = Schema(LabelledData, TaskTrainingArguments, ProbeHead)


class LinearProbe(nn.Module):
    """Batch norm without weights and a linear layer, as in MAE's linear probe; `(B, D)` -> `(B, num_labels)`."""

    def __init__(self, width: int, num_labels: int):
        super().__init__()
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        self.classifier = nn.Linear(width, num_labels)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, pooled: Tensor, tokens: Tensor | None) -> Tensor:
        return self.classifier(self.norm(pooled))

    def folded(self) -> dict[str, Tensor]:
        """Weight and bias of a linear layer on features as they are, which gives the same logits in evaluation."""
        scale = (self.norm.running_var + self.norm.eps).rsqrt()
        weight = self.classifier.weight * scale
        return {"weight": weight, "bias": self.classifier.bias - weight @ self.norm.running_mean}


class AttentiveProbe(nn.Module):
    """One learnt query attends to the patch tokens, then a linear layer; `(B, N, D)` -> `(B, num_labels)`.

    Sources: the attentive probes of CAE (Chen et al. 2022) and V-JEPA (Bardes et al. 2024), without their MLP.
    """

    def __init__(self, width: int, num_heads: int, num_labels: int):
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.classifier = nn.Linear(width, num_labels)

    def forward(self, pooled: Tensor, tokens: Tensor) -> Tensor:
        tokens = self.norm(tokens)
        attended, _ = self.attention(self.query.expand(len(tokens), -1, -1), tokens, tokens, need_weights=False)
        return self.classifier(attended[:, 0])


@dataclass
class ProbesOutput(ModelOutput):
    """`loss`, the sum over probes; `logits` `(B, probes, num_labels)`."""

    loss: Tensor | None = None
    logits: Tensor | None = None


class Probes(nn.Module):
    """Probes of all kinds and learning rates, trained side by side; `names` says kind and rate of each."""

    accepts_loss_kwargs = False

    def __init__(self, head: ProbeHead, width: int, num_labels: int):
        super().__init__()
        self.names = [(kind, rate) for kind in head.trained for rate in head.learning_rates]
        self.probes = nn.ModuleList(
            LinearProbe(width, num_labels)
            if kind == "linear"
            else AttentiveProbe(width, head.attentive_heads, num_labels)
            for kind, _ in self.names
        )

    def forward(
        self, pooled: Tensor, tokens: Tensor | None = None, labels: Tensor | None = None, return_loss: bool = True
    ) -> ProbesOutput:
        logits = torch.stack([probe(pooled, tokens) for probe in self.probes], dim=1)  # (B, probes, num_labels)
        loss = None
        if labels is not None:
            targets = labels[:, None].expand(-1, len(self.names)).flatten()
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets) * len(self.names)
        return ProbesOutput(loss=loss, logits=logits)


class FeatureRows(torch.utils.data.Dataset):
    """Features and labels of chosen rows; `positions` says which row stands where."""

    def __init__(self, features: dict[str, np.ndarray], pooling: str, labels: np.ndarray, positions: np.ndarray):
        self.features, self.pooling, self.labels, self.positions = features, pooling, labels, positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, position: int) -> dict:
        row = self.positions[position]
        example = {"pooled": torch.from_numpy(self.features[self.pooling][row].copy()), "labels": int(self.labels[row])}
        if "tokens" in self.features:
            example["tokens"] = torch.from_numpy(self.features["tokens"][row].astype(np.float32))
        return example


class ProbeTrainer(RecordedTrainer):
    """Gives each probe its own learning rate; `images_per_step` scales them as it does any base rate."""

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            model = self.model if model is None else model
            factor = self.args.images_per_step / 256
            groups = [
                {"params": list(probe.parameters()), "lr": rate * factor, "weight_decay": 0.0}
                for probe, (_, rate) in zip(model.probes, model.names, strict=True)
            ]
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer


@dataclass
class ProbeTask:
    """What `prepare` hands to `execute`."""

    recipe: Recipe
    args: TaskTrainingArguments
    encoder: EHMModel
    rows: dict[str, LabelledRows]  # "train", "test"
    names: list[str]


def prepare(recipe: Recipe) -> ProbeTask:
    """Load encoder and data, and check them."""
    finetuning.refuse_options(recipe, ("push_to_hub", "layer_decay", "weight_average_decay", "freeze_encoder"))
    args, _ = finetuning.start(recipe)
    args.save_strategy = SaveStrategy.NO  # probes take minutes: an interrupted run starts them again
    encoder = load_encoder(recipe.pretrained, args.attn_implementation, **recipe.model).to(args.device)
    rows, names = labelled_rows(recipe, encoder)
    return ProbeTask(recipe, args, encoder, rows, names)


def labelled_rows(recipe: Recipe, encoder: EHMModel) -> tuple[dict[str, LabelledRows], list[str]]:
    """Training and test rows with classes, checked against each other, and the names of the classes."""
    data, config = recipe.data, encoder.config
    check_channels(config, data.image_mean)
    rows = {
        name: LabelledRows(
            source, {"label": source.label_column}, to_pair(config.image_size), config.num_channels, data.max_pixels
        )
        for name, source in (("train", data.train), ("test", data.test))
    }
    names = class_names(rows["train"])
    check_labels(rows["test"], len(names), names)
    return rows, names


def execute(task: ProbeTask) -> dict[str, float]:
    """Features, k-NN, trained probes; saves the encoder with the linear probe as an image classifier."""
    recipe, args, head = task.recipe, task.args, task.recipe.head
    data, config = recipe.data, task.encoder.config
    processor = image_processor(config, data.image_mean, data.image_std)
    kinds = tuple({config.pooling, *(["tokens"] if "attentive" in head.kinds else [])})
    with args.main_process_first(desc="features"):
        features = {
            name: frozen_features(
                task.encoder,
                rows,
                processor,
                Path(args.output_dir) / "features",
                kinds,
                args.per_device_eval_batch_size,
                args.dataloader_num_workers,
                torch.bfloat16 if args.bf16 else torch.float32,
                not args.disable_tqdm,
            )
            for name, rows in task.rows.items()
        }
    labels = {name: np.array(rows.column("label")) for name, rows in task.rows.items()}
    run = finetuning.describe_run(recipe, args)
    run.references = pixel_reference(task.rows, labels, head)
    run.begin(None, args.world_size)
    figures, more = {}, {"steps": 0, "seconds": 0.0}
    if "knn" in head.kinds:
        train, test = ((np.array(features[n][config.pooling]), labels[n]) for n in ("train", "test"))
        figures["knn"] = 100 * knn_accuracy(*train, *test, k=head.k, temperature=head.temperature)
    if head.trained:
        trained, more, best = train_probes(task, features, labels)
        figures |= trained
        if "linear" in best and args.should_save:
            model = put_classifier(task.encoder, task.names, None)
            model.classifier.load_state_dict(best["linear"].cpu().folded())
            model.save_pretrained(args.output_dir)
            processor.save_pretrained(args.output_dir)
            write_card(run, figures, more["steps"])
    if args.process_index == 0:
        finetuning.report(run, figures, more)
    return figures


def write_card(run: RunRecord, figures: dict[str, float], steps: int) -> None:
    """Model card of the saved classifier, in the output folder."""
    folder, evaluated = Path(run.folder), {f"eval_{name}": value for name, value in figures.items()}
    state = TrainerState(global_step=steps, max_steps=steps, log_history=[evaluated])
    (folder / "README.md").write_text(task_card(run, state, folder, USAGE))


def train_probes(task: ProbeTask, features: dict, labels: dict) -> tuple[dict, dict, dict[str, nn.Module]]:
    """Figures of the trained probes, steps and seconds, and the chosen probe of each kind."""
    args, head, config = task.args, task.recipe.head, task.encoder.config
    order = keyed_order(args.seed, 0, HELD_OUT_PART, len(labels["train"]))
    held_out, learn = np.split(order, [max(1, round(head.held_out_share * len(order)))])
    count_steps(args, len(learn))
    passes = -(-args.max_steps * args.images_per_step // len(learn))
    positions = np.concatenate([learn[keyed_order(args.seed, n, 0, len(learn))] for n in range(passes)])
    positions = positions[: args.max_steps * args.images_per_step]
    model = Probes(head, config.hidden_size, len(task.names))
    trainer = ProbeTrainer(
        model=model,
        args=args,
        train_dataset=FeatureRows(features["train"], config.pooling, labels["train"], positions),
    )
    trained = trainer.train()
    scores = {}
    for part, name, rows in (("train", "held out", held_out), ("test", "test", np.arange(len(labels["test"])))):
        predicted = trainer.predict(FeatureRows(features[part], config.pooling, labels[part], rows))
        logits = torch.from_numpy(predicted.predictions)  # (n, probes, num_labels)
        scores[name] = [top_k_accuracy(logits[:, n], labels[part][rows]) for n in range(len(model.names))]
    figures, best = {}, {}
    for kind in head.trained:
        tried = [n for n, (name, _) in enumerate(model.names) if name == kind]
        chosen = max(tried, key=lambda n: scores["held out"][n]["top1"])
        figures[kind] = 100 * scores["test"][chosen]["top1"]
        figures[f"{kind}_top5"] = 100 * scores["test"][chosen]["top5"]
        figures[f"{kind}_learning_rate"] = model.names[chosen][1]
        best[kind] = model.probes[chosen]
    return figures, {"steps": args.max_steps, "seconds": trained.metrics["train_runtime"]}, best


def pixel_reference(rows: dict[str, LabelledRows], labels: dict[str, np.ndarray], head: ProbeHead) -> dict[str, float]:
    """k-NN on 12x12 raw pixels, the reference that features must beat."""
    if "knn" not in head.kinds:
        return {}

    def pixels(columns: dict) -> Tensor:
        return pixel_features(to_uint8_tensor(resized(columns["image"], (48, 48)))[None])[0]

    parts = []
    for name in ("train", "test"):
        examples = EvaluationImages(rows[name], pixels)
        parts += [torch.stack([examples[row] for row in range(len(examples))]), labels[name]]
    return {"knn": 100 * knn_accuracy(*parts, k=head.k, temperature=head.temperature)}
