"""Arguments of training: `transformers.TrainingArguments` with MAE's recipes as defaults, and a few more."""

import math
import os
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.util import find_spec

import torch
from accelerate import PartialState
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations, is_tensorboard_available

# Options of the Trainer that would break the sequence of samples, or resuming, in silence: why, and what to do instead.
REFUSED = {
    "auto_find_batch_size": "smaller batches would end the run before its images; where memory is short, set"
    " gradient_accumulation_steps",
    "ignore_data_skip": "a resumed run would see images again, and others never",
    "save_only_model": "without the optimiser's state no run goes on exactly; save_total_limit bounds the disk",
}

UNLISTED_LOGGERS = {"flyte": "flytekit", "azure_ml": "azureml"}  # packages of loggers that transformers may leave out


@dataclass
class ImageTrainingArguments(TrainingArguments):
    """What the `training` sections of all tasks share.

    Defaults that differ from the Trainer's: fused AdamW, weight decay 0.05 on matrices only, linear warm-up, half a
    cosine down to 0, no gradient clipping, exact resuming from the newest checkpoint.

    Attributes:
        base_learning_rate: Rate for a batch of 256; sets `learning_rate`. None leaves `learning_rate` alone.
        global_batch_size: Images per optimiser step over all processes; sets `per_device_train_batch_size`, so that a
            recipe means the same on 1 and on 8 processes. None leaves `per_device_train_batch_size` alone.
        num_samples: Images to train on, each visit counted: sets `max_steps`, also where a stream has no length. None
            leaves that to `max_steps` or `num_train_epochs`.
        attn_implementation: Attention kernels: "sdpa", "eager" (the faster one for bfloat16 on CPUs), or another that
            transformers offers.
        resume_from_checkpoint: "auto" goes on from the newest checkpoint in `output_dir`, if any; "never" or None
            starts afresh; else a checkpoint folder.
        require_push: Whether a final push that fails ends the run with an exit code, once all else is written.
        push_timeout: Seconds after which a push that hangs is given up.
        use_cpu: Where there is no accelerator the CPU is used, whether or not this says so.
    """

    base_learning_rate: float | None = field(default=None, metadata={"help": "learning rate for a batch of 256"})
    global_batch_size: int | None = field(default=None, metadata={"help": "images per optimiser step, all processes"})
    num_samples: int | None = field(default=None, metadata={"help": "images to train on; sets max_steps"})
    attn_implementation: str = field(default="sdpa", metadata={"help": "attention kernels: sdpa, eager, ..."})
    require_push: bool = field(default=False, metadata={"help": "fail at the end if the final push fails"})
    push_timeout: float = field(default=600.0, metadata={"help": "seconds after which a push is given up"})

    report_to: None | str | list[str] = None  # TensorBoard where it is installed; "none" switches loggers off
    weight_decay: float = 0.05
    max_grad_norm: float = 0.0
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.1
    optim: str = "adamw_torch_fused"
    logging_nan_inf_filter: bool = False  # the Trainer's default would hide a diverged loss behind an average
    save_total_limit: int | None = 3
    per_device_eval_batch_size: int = 128
    remove_unused_columns: bool = False
    resume_from_checkpoint: str | None = "auto"
    train_sampling_strategy: str = "sequential"  # positions in order: the data set itself is shuffled
    ddp_find_unused_parameters: bool | None = False

    def __post_init__(self):
        if self.report_to is None:
            self.report_to = ["tensorboard"] if is_tensorboard_available() else []
        if self.train_sampling_strategy != "sequential":
            raise ValueError(
                f"training.train_sampling_strategy={self.train_sampling_strategy!r} must stay 'sequential': the data"
                " set itself is shuffled by (seed, pass), and a second shuffling would undo exact resuming"
            )
        self._check_pushes()
        self._check_options()
        if not torch.accelerator.is_available():
            self.use_cpu = True  # else the Trainer refuses bf16, which CPUs can do too
        if self.use_cpu and "RANK" in os.environ:  # the Trainer would leave ddp_timeout out on CPUs
            PartialState(cpu=True, backend=self.ddp_backend, timeout=timedelta(seconds=self.ddp_timeout))
        super().__post_init__()
        self._check_loggers()
        for name in ("save_strategy", "logging_strategy", "eval_strategy"):
            if getattr(self, name) == "epoch":
                raise ValueError(
                    f"training.{name}='epoch': the data set holds all passes one after the other, so that the only"
                    f" epoch's end is the run's; set it to steps, and {name.replace('strategy', 'steps')} (a share of"
                    " the run if below 1)"
                )
        if self.device.type == "cpu":
            if self.fp16:  # accelerate would silently train in float32
                raise ValueError("training.fp16=True: CPUs do not train in float16; set bf16 instead")
            self.dataloader_pin_memory = False  # nothing to pin for; torch would warn at every loader
            if self.fsdp:  # accelerate would silently train whole copies
                raise ValueError(
                    f"training.fsdp={self.fsdp!r}: weights are sharded on accelerators only, and this is a CPU; leave"
                    " it out"
                )
        if self.n_gpu > 1:
            raise ValueError(
                f"one process would drive {self.n_gpu} GPUs, and multiply the batch: start with `accelerate launch`, or"
                " name one GPU in CUDA_VISIBLE_DEVICES"
            )
        if self.per_device_train_batch_size < 1:
            size = self.per_device_train_batch_size
            raise ValueError(f"training.per_device_train_batch_size={size} must be at least 1")
        self._set_batch_and_length()

    def _check_options(self) -> None:
        for name, why in REFUSED.items():
            if getattr(self, name):
                raise ValueError(f"training.{name}=True: {why}; leave it out")
        if self.gradient_accumulation_steps < 1:
            raise ValueError(
                f"training.gradient_accumulation_steps={self.gradient_accumulation_steps} must be at least 1"
            )
        if self.dataloader_num_workers < 0:
            raise ValueError(
                f"training.dataloader_num_workers={self.dataloader_num_workers} must be at least 0, where 0 reads in"
                " the training process itself"
            )
        for name in ("learning_rate", "base_learning_rate"):
            rate = getattr(self, name)
            if rate is not None and not 0 <= rate < math.inf:
                raise ValueError(f"training.{name}={rate} must be a number of at least 0")

    def _check_loggers(self) -> None:
        """Before the Trainer makes them, and ends in a traceback where a package is missing."""
        installed = get_available_reporting_integrations()
        installed += [name for name, package in UNLISTED_LOGGERS.items() if find_spec(package) is not None]
        if missing := [name for name in self.report_to if name not in installed]:
            raise ValueError(
                f"training.report_to={self.report_to} names {', '.join(missing)}, which is unknown or not installed;"
                f" here are {', '.join(installed) or 'none'}: install its package, or choose of these, or 'none'"
            )

    def _check_pushes(self) -> None:
        if self.hub_token is not None:
            raise ValueError(
                "training.hub_token would be written to files; log in with `hf auth login` or set HF_TOKEN"
            )
        if self.hub_strategy not in ("end", "every_save"):
            raise ValueError(
                f"training.hub_strategy={self.hub_strategy!r} is not supported: end pushes the finished model,"
                " every_save each checkpoint's model too; optimiser states stay here"
            )
        if not self.push_timeout > 0:
            raise ValueError(f"training.push_timeout={self.push_timeout} must be a positive number of seconds")
        if self.require_push and not self.push_to_hub:
            raise ValueError("training.require_push=True needs training.push_to_hub=True")

    def _set_batch_and_length(self) -> None:
        """What follows from `global_batch_size`, `num_samples` and `base_learning_rate`."""
        if self.global_batch_size is not None:
            share = self.world_size * self.gradient_accumulation_steps
            if self.global_batch_size % share or self.global_batch_size < 1:
                raise ValueError(
                    f"training.global_batch_size={self.global_batch_size} cannot be split over {self.world_size}"
                    f" processes x gradient_accumulation_steps={self.gradient_accumulation_steps}; make it a"
                    f" multiple of {share}"
                )
            self.per_device_train_batch_size = self.global_batch_size // share
        if self.num_samples is not None:
            if self.max_steps > 0:
                raise ValueError(
                    f"training.num_samples={self.num_samples} and training.max_steps={self.max_steps} both say how long"
                    " to train; give one of them"
                )
            if self.num_samples < self.images_per_step:
                raise ValueError(
                    f"training.num_samples={self.num_samples} is less than one step of {self.images_per_step} images"
                )
            self.max_steps = self.num_samples // self.images_per_step
        if self.base_learning_rate is not None:
            self.learning_rate = self.base_learning_rate * self.images_per_step / 256

    @property
    def images_per_step(self) -> int:
        """Images per optimiser step over all processes and accumulated batches."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size


@dataclass
class EHMTrainingArguments(ImageTrainingArguments):
    """The `training` section of a pre-training recipe; defaults are MAE's (He et al. 2022, Appendix A.1; their code):
    AdamW with betas 0.9 and 0.95.

    Attributes:
        num_gallery_images: Images of the gallery that is drawn at each evaluation; 0 draws none.
        linear_probe: Whether evaluations add a linear probe to k-NN.
        import_modules: Python modules to import before the model is made, so that the mask policies they register are
            known; they are found as any import is, so put their folder on PYTHONPATH.
    """

    num_gallery_images: int = field(default=4, metadata={"help": "images of the gallery; 0 draws none"})
    linear_probe: bool = field(default=True, metadata={"help": "add a linear probe to k-NN"})
    import_modules: list[str] = field(default_factory=list, metadata={"help": "modules that register mask policies"})

    adam_beta2: float = 0.95

    def __post_init__(self):
        if self.load_best_model_at_end:
            raise ValueError(
                "training.load_best_model_at_end=True would save the weights of one step beside the figures of another;"
                " leave it out, and take the checkpoint you want (save_total_limit says how many are kept)"
            )
        super().__post_init__()


@dataclass
class TaskTrainingArguments(ImageTrainingArguments):
    """The `training` section of a downstream recipe; defaults are those of MAE's fine-tuning (Appendix A.2).

    Attributes:
        layer_decay: The learning rate of the layer n from the end is multiplied by `layer_decay ** n`; 1 treats all
            layers alike. MAE fine-tunes ViT-B with 0.65, ViT-L with 0.75.
        weight_average_decay: Decay per step of a moving average of the weights, which is what is evaluated and saved;
            None keeps none. It warms up as the EMA teacher of pre-training does.
        freeze_encoder: Whether only the head learns.
    """

    layer_decay: float = field(default=1.0, metadata={"help": "factor of the learning rate from layer to layer"})
    weight_average_decay: float | None = field(default=None, metadata={"help": "decay of averaged weights"})
    freeze_encoder: bool = field(default=False, metadata={"help": "train the head only"})

    def __post_init__(self):
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"training.layer_decay={self.layer_decay} must lie in (0, 1]; 1 treats all layers alike")
        if self.weight_average_decay is not None and not 0 <= self.weight_average_decay < 1:
            raise ValueError(
                f"training.weight_average_decay={self.weight_average_decay} must lie in [0, 1), or be null for none"
            )
        if self.weight_average_decay is not None:
            if self.load_best_model_at_end:
                raise ValueError(
                    "training.load_best_model_at_end=True goes back to an earlier step, but the average of"
                    " training.weight_average_decay goes on to the last; leave one of them out"
                )
            if self.push_to_hub and self.hub_strategy == "every_save":
                raise ValueError(
                    "training.hub_strategy='every_save' would push the weights in training beside figures of the"
                    " average of training.weight_average_decay; set hub_strategy to end"
                )
        super().__post_init__()


@dataclass
class AlignmentTrainingArguments(ImageTrainingArguments):
    """The `training` section of an alignment recipe; defaults are LLaVA-1.5's: no weight decay, 3 % warm-up, gradients
    clipped at 1.
    """

    weight_decay: float = 0.0
    warmup_steps: float = 0.03
    max_grad_norm: float = 1.0
    per_device_eval_batch_size: int = 32
