"""One call of the user's loss on its way through the stages: what it was given, what replaces it, how it is reduced."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from dataparams.criterion import REGRESSION_KINDS, SOFTMAX_KINDS, Criterion
from dataparams.functional import dynamics as observe
from dataparams.functional.dynamics import Observation
from dataparams.tables import ParameterTable, Visit


@dataclass
class LossCall:
    """One call of the criterion on its way through the stages. Stages read and replace ``input``, ``target``,
    ``losses``.

    Attributes:
        criterion: the user's.
        input: logits, log probabilities or predictions, ``(B, ...)``.
        target: as the user gave it.
        index: rows of the batch's samples, ``(B,)`` int64, on the CPU where the loader made it.
        valid: bool ``(B,)``; samples with at least one element that counts.
        complete: every element counts, and the host knows it without waiting for a device.
        losses: per-element losses that replace the criterion's output, or None while it stands.
        log_terms: ``(B,)`` terms added to each instance's loss (the log sigma of a noise scale).
        weight: ``(B,)`` that :meth:`weigh` multiplies each instance's losses by; None: 1.
        logits: the input as the user gave it.
        given: the target as the user gave it.
        transforms: what turned the logits into ``input``, in order.
        upstream: d total / d loss, once back-propagation has reached it, without the GradScaler's factor.
        reached: called once when back-propagation reaches the loss; a loss that is thrown away leaves no trace.
        visits: visits of instance rows made for this call; their gradient is read per instance when asked for.
        unbatched: the user gave one sample without a batch dimension.
        counted: bool like ``target``; elements of a task's regression that have a target. None: all.
        plain: per-element losses of the input and target as they were given, where :meth:`look` had to compute them.
        means: those of each sample, over its elements that count, ``(B,)``.
        loss: ``(B,)`` plain loss of each sample, the mean over its elements that count; no gradient.
        seen: all of its training dynamics, where they were asked for.
        outer: applied to the finished loss, for weights of the whole task, which are no part of a sample's own loss.
        number: of the call in its training step.
    """

    criterion: Criterion
    input: Tensor
    target: Tensor
    index: Tensor
    valid: Tensor
    losses: Tensor | None = None
    log_terms: list[Tensor] = field(default_factory=list)
    weight: Tensor | None = None
    logits: Tensor = field(init=False)
    given: Tensor = field(init=False)
    transforms: list[Callable[[Tensor], Tensor]] = field(default_factory=list)
    upstream: Tensor | None = None
    reached: list[Callable[[], None]] = field(default_factory=list)
    visits: list[Visit] = field(default_factory=list)
    unbatched: bool = False
    counted: Tensor | None = None
    complete: bool = False
    plain: Tensor | None = None
    means: Tensor | None = None
    loss: Tensor | None = None
    seen: Observation | None = None
    outer: Callable[[Tensor], Tensor] | None = None
    number: int = 0

    def __post_init__(self) -> None:
        self.logits, self.given = self.input, self.target

    def transform(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace ``input`` by ``function(input)``; a look-ahead follows the logits' change through it."""
        self.input = function(self.input)
        self.transforms.append(function)

    def weigh(self, weight: Tensor) -> Tensor:
        """Multiply each instance's losses by ``weight``, ``(B,)``; returns them as they were."""
        self.weight = weight if self.weight is None else self.weight * weight
        return self.elementwise()

    def _weighed(self, output: Tensor) -> Tensor:
        """Weights of 1 leave the criterion's output as it is, bit for bit."""
        assert self.weight is not None
        losses = self.elementwise()
        weight = self.weight.reshape(self.weight.shape + (1,) * (losses.dim() - 1)).to(losses.dtype)
        if self.losses is not None or self.criterion.reduction == "none":
            return self.reduce(losses * weight)
        return output + self.reduce(losses * (weight - 1))

    def rows(self, table: ParameterTable) -> Tensor:
        """The batch's rows of an instance table, as a leaf ``(B, *row_shape)`` on the logits' device."""
        return self.visit(table, self.index, self.valid)

    def visit(self, table: ParameterTable, index: Tensor, valid: Tensor | None) -> Tensor:
        """Rows of any table (a class table, say), with the call's reading of gradients per instance."""
        rows = table.rows(index, device=self.input.device, valid=valid)
        if rows.requires_grad:
            self.visits.append(table.pending[-1])
        return rows

    def elementwise(self) -> Tensor:
        """The current per-element losses."""
        if self.losses is not None:
            return self.losses
        if self.plain is not None and self.as_given:
            return self.plain
        return self.criterion.elementwise(self.input, self.target)

    @property
    def as_given(self) -> bool:
        """No stage has replaced input, target or losses."""
        return self.losses is None and self.input is self.logits and self.target is self.given

    def reduce(self, losses: Tensor) -> Tensor:
        """Reduce per-element losses as the user's criterion does: its mean divides by the class weights it applied."""
        if self.criterion.reduction == "none":
            return losses
        if self.criterion.reduction == "sum":
            return losses.sum()
        if self.criterion.kind == "given":
            return losses.sum() / (len(losses) if self.complete else self.target.sum().clamp(min=1))
        if not self.counts_classes:
            return losses.mean()
        return losses.sum() / self.divisor()

    @property
    def counts_classes(self) -> bool:
        """The criterion's mean is over class indices: ignored ones do not count, class weights do."""
        return self.criterion.kind in ("cross_entropy", "nll") and not self.given.is_floating_point()

    def divisor(self) -> Tensor:
        """What the criterion's mean over class indices divides by."""
        counted = self.given != self.criterion.ignore_index
        if self.criterion.weight is None or self.target.is_floating_point():  # torch counts soft labels, unweighted
            return counted.sum().clamp(min=1 if self.criterion.task else 0)
        weights = self.criterion.weight[self.given.where(counted, torch.zeros_like(self.given))]
        return (weights * counted).sum()

    def share(self, elements: int) -> Tensor:
        """d total / d (sum of a sample's per-element losses), ``(B,)`` or scalar: 1 / B for a mean over B.

        Known once back-propagation has reached the loss.

        Args:
            elements: number of per-element losses.
        """
        assert self.upstream is not None
        if self.criterion.reduction == "none":
            return self.upstream.reshape(len(self.upstream), -1).mean(1)
        if self.criterion.reduction == "sum":
            return self.upstream
        return self.upstream / (self.divisor() if self.counts_classes else elements)

    def finish(self, output: Tensor) -> Tensor:
        """The value that the user's code receives in place of the criterion's ``output``."""
        if self.criterion.task and not self.complete and self.counts_classes and self.criterion.reduction == "mean":
            output = torch.where(self.valid.any(), output, torch.zeros_like(output))  # no label at all: 0 / 0
        if self.weight is not None:
            output = self._weighed(output)
        elif (
            self.losses is not None and self.complete and self.losses.dim() == 1 and self.criterion.reduction == "mean"
        ):
            return self.reduce(sum(self.log_terms, self.losses))
        elif self.losses is not None:
            output = self.reduce(self.losses)
        for term in self.log_terms:
            output = output + self.reduce_instances(term, output)
        return output.squeeze(0) if self.unbatched and output.dim() else output

    @property
    def _one_mean(self) -> bool:
        """Losses and log terms are averaged alike."""
        assert self.losses is not None
        return self.complete and self.losses.dim() == 1 and self.criterion.reduction == "mean"

    def read_scales(self, upstream: Tensor, loss_scale: Tensor | None) -> None:
        """Tell each visit how to get from its leaf's gradient to that of the samples' own losses.

        d total / d loss, ``upstream``, holds the accumulation's divisor, loss weights and the GradScaler's factor,
        which must not change a row's rate per visit. The scaler's factor stays: the row optimizer is unscaled like any
        other.
        """
        mean = self.criterion.reduction == "mean"
        on_host = upstream.device.type == "cpu" and loss_scale is None and not upstream.dim()
        for visit in self.visits:
            dense = visit.index.dim() > 1  # a row an element (a class temperature a pixel), not one a sample
            if not upstream.dim():
                valid = self.valid if not dense or visit.valid is None else visit.valid
                if on_host:  # a number that is there already: no operations on tensors of one element
                    count = (valid.numel() if self.complete and not dense else int(valid.sum())) if mean else 1
                    value = upstream.item()
                    visit.scale = count / value if value else 0.0
                    continue
                share = upstream / valid.sum() if mean else upstream
            elif dense and upstream.numel() == visit.index.numel():
                share = upstream.reshape(visit.index.shape)
            else:
                share = upstream.reshape(upstream.shape[0], -1).sum(1) if upstream.numel() else upstream
                share = share.reshape(share.shape + (1,) * (visit.index.dim() - share.dim()))
            scale = torch.where(share == 0, torch.zeros_like(share), 1 / share).float()
            visit.scale = scale if loss_scale is None else scale * loss_scale

    def reduce_instances(self, term: Tensor, output: Tensor) -> Tensor:
        """A term of each instance, ``(B,)``, as often in the loss as its losses are: of a task only where there is a
        label."""
        everywhere = self.complete or not self.criterion.task
        if self.criterion.reduction == "none":
            term = term if everywhere else term * self.valid
            return term.reshape(term.shape + (1,) * (output.dim() - term.dim()))
        if self.criterion.reduction == "mean":
            return term.mean() if everywhere else (term * self.valid).sum() / self.valid.sum().clamp(min=1)
        if not everywhere and self.counted is not None:
            term = term * self.counted.reshape(len(self.valid), -1).float().mean(1)
        elif not everywhere:
            term = term * self.valid
        return term.sum() * math.prod(self.input.shape[1:])

    def look(self, in_full: bool = True) -> None:
        """Which samples count, their plain losses and, in full, their training dynamics, from what the user's model and
        data gave: call it before the stages.

        Args:
            in_full: False: only the loss, of a task that is not the main one.
        """
        kind, losses = self.criterion.kind, None
        if self.criterion.task and kind in REGRESSION_KINDS:
            self.leave_out_missing()
            losses = self.plain = self.criterion.elementwise(self.input, self.target)  # its weight will ask for them
        elif kind == "given":
            losses = self.plain = self.criterion.elementwise(self.input, self.target)
        elif in_full and kind == "bce":
            self.seen = observe.binary_classification(self.input.detach(), self.target.detach())
        elif in_full and kind in SOFTMAX_KINDS and self._softmax_like:
            self.seen = observe.classification(self.input.detach(), self.target.detach(), self.criterion.ignore_index)
        else:
            losses = self._plain_losses()
        if self.seen is not None or losses is None:
            assert self.seen is not None
            self.loss, self.valid = self.seen.loss, self.seen.valid
        else:
            counted = self._counted(losses)
            self.means, self.valid = observe.sample_losses(losses, counted, self.valid)
            self.loss = self.means.detach()
            self.complete = self.complete or (counted is None and bool(self.criterion.task))
            if in_full:
                self.seen = observe.regression(self.loss, self.valid)
        if not self.complete and self.valid.device.type == "cpu" and self.target.dim() == 1:
            self.complete = bool(self.valid.all())

    def _counted(self, losses: Tensor) -> Tensor | None:
        if self.complete:
            return None
        counted = self.target if self.criterion.kind == "given" else self.counted
        if self.criterion.kind in SOFTMAX_KINDS and not self.target.is_floating_point():
            counted = self.target != self.criterion.ignore_index
        if counted is None or counted.shape != losses.shape:
            return None
        if counted.device.type == "cpu" and bool(counted.all()):
            self.complete = True
            return None
        return counted

    def _plain_losses(self) -> Tensor:
        """Of each element, without class weights and label smoothing."""
        plain = {"cross_entropy": F.cross_entropy, "nll": F.nll_loss}.get(self.criterion.kind)
        if plain is None or self.target.is_floating_point():
            with torch.no_grad():
                return self.criterion.elementwise(self.input, self.target)
        # without gradients as it is, for neither asks for one
        return plain(self.input.detach(), self.target, ignore_index=self.criterion.ignore_index, reduction="none")

    @property
    def _softmax_like(self) -> bool:
        if self.input.dim() < 2:
            return False
        if self.target.is_floating_point():
            return self.target.shape == self.input.shape
        return self.target.dim() == self.input.dim() - 1

    def leave_out_missing(self) -> None:
        """Put the prediction in the place of targets that are NaN: no loss and no gradient comes from them."""
        missing = self.target.isnan()
        if missing.device.type == "cpu" and not bool(missing.any()):
            self.complete = True
            return
        self.target = torch.where(missing, self.input.detach().to(self.target.dtype), self.target)
        self.given, self.counted = self.target, ~missing
