"""One step of DP-SGD, and the trainer whose rounds are one: what it adds up others add noise to.

Where fedapp knows all layers of a model, it clips (`example_gradients`); else Opacus does, by ghost clipping.
The noise is Opacus' in any case.
"""

import warnings
from collections.abc import Callable
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass
from inspect import unwrap
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedapp import check
from fedapp.example_gradients import ExampleGradients, are_known, example_gradients
from fedapp.privacy.secret import Secret, uniform
from fedapp.tasks import Data, Task

if TYPE_CHECKING:
    from fedapp.training import DpSgd


@dataclass(frozen=True)
class DpStep:
    """Adds up gradients over a Poisson sample, each clipped to `max_grad_norm`: the first half of DP-SGD.

    *Formal guarantees* are those of `DistributedExample`, which rounds the sum and adds the noise: what is
    made here is private, and must not leave the client. Every example joins by itself with probability
    `sampling_rate`, from secret bytes, as do dropout masks. An example whose gradient is not finite, or
    beyond 1e30, counts as zero. `examples_per_client` is a public number, by which with the rate the mean is
    divided, whatever a client holds. The learning rate is the server's.

    `physical_batch_size` bounds memory as in `DpSgd`, and changes no result.
    """

    max_grad_norm: float = 0.1
    sampling_rate: float = 0.12
    examples_per_client: int = 6000
    physical_batch_size: int = 512
    noise_multiplier: ClassVar[float] = 0.0  # what Opacus is to add
    momentum: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        check.real("trainer.max_grad_norm", self.max_grad_norm, above=0.0, high=1e6)
        check.real("trainer.sampling_rate", self.sampling_rate, above=0.0, high=1.0)
        check.whole("trainer.examples_per_client", self.examples_per_client, 1)
        check.whole("trainer.physical_batch_size", self.physical_batch_size, 1)

    def total(
        self,
        task: Task,
        model: nn.Module,
        data: Data,
        secret: Secret,
        step_of: "Callable[[Task, nn.Module, DpStep, None, float], Step] | None" = None,
    ) -> NDArray[np.float64]:
        """The sum over one draw, float64 (size,): parameters end to end. `model` stays as it is.

        In double precision throughout, since the sensitivity of the rounded sum counts on it. `step_of` makes
        the step where an audit puts canaries into it.
        """
        drawn = torch.from_numpy(np.flatnonzero(uniform(len(data), secret) < self.sampling_rate))
        torch.manual_seed(int.from_bytes(secret(8), "little"))  # dropout draws from the global generator
        wide = deepcopy(model).double().train()
        with closing((step_of or Step)(task, wide, self, None, 0.0)) as step:
            return step.total(data, drawn.to(data.x.device)).cpu().numpy()


class PlainSgd(torch.optim.SGD):
    """SGD without what keeps torch's compiler off it: that imports the compiler first, for over a second."""

    add_param_group = unwrap(torch.optim.SGD.add_param_group)
    zero_grad = unwrap(torch.optim.SGD.zero_grad)
    step = torch.no_grad()(unwrap(torch.optim.SGD.step))


class Step:
    """One noised step on a drawn batch, in physical batches that fit the memory."""

    def __init__(
        self, task: Task, model: nn.Module, dp: "DpSgd | DpStep", noise: torch.Generator | None, lr: float
    ) -> None:
        from opacus.optimizers import DPOptimizerFastGradientClipping

        self._task, self._chunk = task, dp.physical_batch_size
        self._parameters: list[Any] = [p for p in model.parameters() if p.requires_grad]
        # A norm that is measured too short lets a gradient pass that is longer than the clip norm. Torch adds
        # up squares in eight sums, in the parameters' precision: it lacks eps / 32 a value at most.
        largest = max(p.numel() for p in self._parameters)
        kept = 1 - torch.finfo(self._parameters[0].dtype).eps * (8 + largest / 32)
        self._clip = kept * dp.max_grad_norm
        self._model = model
        self._opacus: Any = None if are_known(model) else _opacus(model, self._clip)
        self._optimizer = DPOptimizerFastGradientClipping(
            PlainSgd(self._parameters, lr=lr, momentum=dp.momentum),
            noise_multiplier=dp.noise_multiplier / kept,  # of what it clips to
            max_grad_norm=self._clip,
            expected_batch_size=dp.sampling_rate * dp.examples_per_client,
            generator=noise,
        )

    def __call__(self, data: Data, batch: torch.Tensor) -> None:
        self._add_up(data, batch, steps=True)
        self._optimizer.zero_grad(set_to_none=True)

    def total(self, data: Data, batch: torch.Tensor) -> torch.Tensor:
        """Instead of a step the sum of clipped gradients, (size,), without noise; once only."""
        self._add_up(data, batch, steps=False)
        return torch.cat([p.summed_grad.reshape(-1) for p in self._parameters])

    def _add_up(self, data: Data, batch: torch.Tensor, steps: bool) -> None:
        chunks = batch.split(self._chunk) if len(batch) else (batch,)
        for last, chunk in zip([False] * (len(chunks) - 1) + [True], chunks, strict=True):
            self._optimizer.zero_grad(set_to_none=True)
            self._optimizer.signal_skip_step(not (last and steps))
            self._backward(data.x[chunk].to(self._parameters[0].dtype), data.y[chunk])
            self._optimizer.step()

    def _backward(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Gradients of these examples where Opacus looks; one that is not finite counts as zero.

        No clip bounds it, and no noise hides that it was there; who made the weights may have aimed at it.
        """
        if not len(x):  # an empty sample releases noise alone
            for p in self._parameters:
                p.grad = torch.zeros_like(p)
            return
        finite = self._clipped(x, y) if self._opacus is None else self._clipped_by_opacus(x, y)
        if not finite.all():
            for p in self._parameters:
                p.grad = None
            self._backward(x[finite], y[finite])

    def _clipped(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Leave the sum of clipped gradients in `p.grad`; returns which examples' are finite."""
        gradients = self._gradients(x, y)
        norms = gradients.norms()
        total = gradients.total(self._shares(norms))
        for p in self._parameters:
            p.grad = total[p] if p in total else torch.zeros_like(p)
        return norms.isfinite()

    def _gradients(self, x: torch.Tensor, y: torch.Tensor) -> ExampleGradients:
        return example_gradients(self._model, lambda: self._task.loss(self._model(x), y, reduction="none"))

    def _shares(self, norms: torch.Tensor) -> torch.Tensor:
        """What is left of gradients of these norms, as Opacus has it."""
        shares: torch.Tensor = self._clip / (norms + 1e-6)
        return shares.clamp(max=1.0)

    def _clipped_by_opacus(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The same, by one backward pass for the norms and one for the sum."""
        from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

        with warnings.catch_warnings():  # the first layer's input needs no gradient, and need not
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            losses = self._task.loss(self._opacus(x), y, reduction="none")
            DPTensorFastGradientClipping(self._opacus, self._optimizer, losses).backward()
        finite: torch.Tensor = self._opacus.get_norm_sample().isfinite()
        return finite

    def close(self) -> None:
        """Leave the model as it was: no hooks, no gradients."""
        if self._opacus is not None:
            self._opacus._close()
        for p in self._parameters:
            p.grad = None


def _opacus(model: nn.Module, clip: float) -> Any:
    """The model in Opacus' hands."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    return GradSampleModuleFastGradientClipping(model, max_grad_norm=clip)
