"""What a model and the sums of its updates must satisfy: refused where they are made, before any round."""

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from fedapp.ckks import Ckks
from fedapp.codec import Codec, Layout
from fedapp.codec.packet import pack, padded
from fedapp.dp_step import DpStep
from fedapp.errors import ConfigError
from fedapp.models import batch_norms
from fedapp.training import DpSgd
from fedapp.vector import layout_of

if TYPE_CHECKING:
    from fedapp.job import Job


def check_padding(job: "Job") -> None:
    """Refuse packets of a size that not even zeros fit."""
    if job.mechanism is not None and job.mechanism.packet_bytes and job.wire_codec is not None:
        layout = layout_of(job.initial)
        zeros, rng = np.zeros(layout.size, np.float32), np.random.default_rng(0)
        nothing = pack(job.wire_codec.encode(zeros, layout, {}, rng)[0], job.wire_codec, layout)
        padded(nothing, nothing, job.mechanism.packet_bytes)


def check_model(job: "Job", model: nn.Module) -> None:
    """Refuse a model that the codec cannot code, the trainer not train, or a sum would leave out in part."""
    _check_codec(job.codec, model)
    if isinstance(job.trainer, (DpSgd, DpStep)):
        _check_private_model(job, model)
    summed = job.privacy.unit == "client" or job.secure is not None
    summed |= isinstance(job.aggregation, Ckks) or job.steers or job.assigns or job.norm_bound is not None
    if summed and any(True for _ in model.buffers()):
        raise ConfigError(
            f"privacy={job.choices['privacy']} aggregation={job.choices['aggregation']} "
            f"strategy={job.choices['strategy']} assignment={job.choices['assignment']} "
            f"norm_bound={job.norm_bound} deals in parameters, and this model has other state too "
            f"({next(name for name, _ in model.named_buffers())}): use model.norm=group for resnet18"
        )


def _check_codec(codec: Codec, model: nn.Module) -> None:
    """Code a few values a layer there and back: stages may not fit together, or not this model."""
    arrays = model.state_dict().items()
    layout = Layout.of((name, (2,) * array.ndim) for name, array in arrays if array.is_floating_point())
    x = np.linspace(-1, 1, layout.size, dtype=np.float32)
    try:
        packet, _ = codec.encode(x, layout, {}, np.random.default_rng(0))
        codec.decode(packet, layout)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"codec={codec} cannot code an update ({error}): order its stages anew") from error


def _check_private_model(job: "Job", model: nn.Module) -> None:
    from opacus.validators import ModuleValidator

    errors: list[Any] = ModuleValidator.validate(model, strict=False)
    mixing = batch_norms(model)  # Opacus lets those pass of which nothing is trained
    if errors or mixing:
        said = str(errors[0]).splitlines()[0] if errors else f"{mixing[0]} mixes the examples of a batch"
        raise ConfigError(
            f"this model cannot be trained under privacy={job.choices['privacy']} ({said}): "
            f"use group normalisation (model.norm=group for resnet18), or privacy=none"
        )
