"""Settings of a training that need a package which flexalign does not bring: refused beforehand."""

import os
from importlib.util import find_spec
from typing import Any

from transformers import Trainer, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from flexalign._packages import require_packages
from flexalign.errors import ConfigError

__all__ = ["require_deepspeed", "require_settings_packages"]

_REPORTERS = {
    "clearml": ("clearml", "clearml"),
    "codecarbon": ("codecarbon", "codecarbon"),
    "comet_ml": ("comet_ml", "comet-ml"),
    "dagshub": ("dagshub", "dagshub"),
    "dvclive": ("dvclive", "dvclive"),
    "flyte": ("flytekit", "flytekit"),
    "mlflow": ("mlflow", "mlflow"),
    "neptune": ("neptune", "neptune"),
    "swanlab": ("swanlab", "swanlab"),
    "trackio": ("trackio", "trackio"),
    "wandb": ("wandb", "wandb"),
}
"""What transformers reports to: the module for it, and what pip calls that."""


def require_deepspeed(settings: object) -> None:
    """Make sure that DeepSpeed is there if a run asks for it, itself or by its launcher.

    Goes before the trainer's settings are made, which would fail without a word of advice.

    Args:
        settings: The value of ``deepspeed`` among them, or None.

    Raises:
        ConfigError: If it is missing.
    """
    launched = os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("1", "true", "yes")
    if settings or launched:
        require_packages("DeepSpeed's ZeRO", "deepspeed", install="'flexalign[deepspeed]'")


def require_settings_packages(args: TrainingArguments) -> None:
    """Make sure that what a trainer's settings name is there: kernels, reporters, an optimizer.

    Otherwise the trainer would find out when the models have been loaded, and some of it when the
    first step begins.

    Args:
        args: The trainer's settings, of any of TRL's trainers.

    Raises:
        ConfigError: If a package is missing, or a reporter is unknown.
    """
    if args.use_liger_kernel:
        require_packages("use_liger_kernel", "liger_kernel", install="liger-kernel (and a GPU)")
    reporters = args.report_to if isinstance(args.report_to, list) else [args.report_to]
    _require_reporters([name for name in reporters if name and name != "none"])
    _require_optimizer(args)


def _require_reporters(names: list[str]) -> None:
    try:
        get_reporting_integration_callbacks(names)
    except ValueError as error:
        raise ConfigError(f"report_to: {error}") from None
    for name in names:
        if name in _REPORTERS:
            module, package = _REPORTERS[name]
            require_packages(f"report_to {name}", module, install=package)
        elif name == "tensorboard" and find_spec("tensorboardX") is None:
            require_packages("report_to tensorboard", "tensorboard", install="tensorboard")


def _require_optimizer(args: Any) -> None:
    """Ask transformers, which knows what each of its optimizers needs."""
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except ImportError as error:
        name = getattr(args.optim, "value", args.optim)
        reason = " ".join(str(error).split())
        raise ConfigError(f"optim {name} needs a package more: {reason}") from None
    except (ValueError, TypeError, AttributeError):
        # Some want the model, which is not there yet; the trainer asks again when it is.
        return
