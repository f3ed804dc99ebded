"""`TaskTrainer`: the Trainer of downstream tasks, with layer-wise learning rates and averaged weights."""

import re
from contextlib import nullcontext
from pathlib import Path

from accelerate.utils import broadcast
from torch import nn

from modeling_ehm.modeling_ehm import EHMModel
from modeling_ehm.training import hub
from modeling_ehm.training.callbacks import WeightAverageCallback
from modeling_ehm.training.recorded_trainer import RecordedTrainer


def find_encoder(model: nn.Module) -> tuple[str, EHMModel]:
    """Name and module of the EHM encoder inside a model with any head.

    Raises:
        ValueError: the model holds none, or several.
    """
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, EHMModel)]
    if len(found) != 1:
        raise ValueError(f"{type(model).__name__} holds {len(found)} EHM encoders; one is expected")
    return found[0]


def layer_of(name: str, encoder_name: str, num_hidden_layers: int) -> int:
    """Layer of a parameter by MAE's rule: 0 embeddings, 1 ... L the layers, L + 1 final norm and everything after it.

    Source: facebookresearch/mae, util/lr_decay.py, `get_layer_id_for_vit`.
    """
    prefix = f"{encoder_name}." if encoder_name else ""
    if name.startswith(prefix):
        inner = name.removeprefix(prefix)
        if inner.startswith("embeddings."):
            return 0
        if found := re.match(r"layers\.(\d+)\.", inner):
            return int(found[1]) + 1
    return num_hidden_layers + 1


def layer_decay_groups(model: nn.Module, learning_rate: float, weight_decay: float, layer_decay: float) -> list[dict]:
    """Parameter groups of MAE's fine-tuning: rates that fall from the head to the first layer, decay on matrices only.

    The rate of layer n of `layer_of` is `learning_rate * layer_decay ** (L + 1 - n)`. Vectors, class and mask token
    have no weight decay. Source: facebookresearch/mae, util/lr_decay.py, `param_groups_lrd`.

    Returns:
        Groups for a torch optimiser, with "params", "lr", "weight_decay", and for reading "layer" and "names"; frozen
        parameters are left out. The head's come first: the Trainer logs the rate of the first group.
    """
    encoder_name, encoder = find_encoder(model)
    last = encoder.config.num_hidden_layers + 1
    groups: dict[tuple[int, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = layer_of(name, encoder_name, last - 1)
        decays = parameter.ndim > 1 and not name.endswith(("cls_token", "mask_token"))
        group = groups.setdefault(
            (layer, decays),
            {
                "params": [],
                "lr": learning_rate * layer_decay ** (last - layer),
                "weight_decay": weight_decay if decays else 0.0,
                "layer": layer,
                "names": [],
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return sorted(groups.values(), key=lambda group: -group["layer"])


class TaskTrainer(RecordedTrainer):
    """Trainer of a head on an EHM encoder; its arguments are `TaskTrainingArguments`.

    Evaluations and the saved model use the averaged weights, if `weight_average_decay` is set.

    Args:
        usage: Python lines for the model card that load the result and use it.
        args, kwargs: As for `RecordedTrainer`.
    """

    def __init__(self, *args, usage: str = "", **kwargs):
        super().__init__(*args, **kwargs)
        self.usage = usage
        decay = self.args.weight_average_decay
        self.weight_average = None if decay is None else WeightAverageCallback(decay)
        if self.weight_average is not None:
            self.add_callback(self.weight_average)

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            model = self.model if model is None else model
            args = self.args
            groups = layer_decay_groups(model, args.learning_rate, args.weight_decay, args.layer_decay)
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(args, model)
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def averaged_weights(self):
        """Context in which the model has the averaged weights, if there are any."""
        return nullcontext() if self.weight_average is None else self.weight_average.applied_to(self.bare_model)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        for buffer in self.bare_model.buffers():
            # Statistics of batch norms differ between processes, and those of the first are saved: judge with them.
            buffer.data.copy_(broadcast(buffer.data))
        with self.averaged_weights():
            return super().evaluate(*args, **kwargs)

    def save_final_model(self) -> None:
        with self.averaged_weights():
            super().save_final_model()

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save and self.weight_average is not None and output_dir != self.args.output_dir:
            self.weight_average.save(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.weight_average is not None:
            self.weight_average.resumed_from = Path(resume_from_checkpoint)

    def _write_card(self, folder: Path) -> None:
        if self.run is not None:
            (folder / "README.md").write_text(hub.task_card(self.run, self.state, folder, self.usage))
