"""The look-ahead of a fit: what the model's last step did to a meta loss, for every sample that took part in it.

It watches the forward passes of training steps, keeps the weights from before a step, takes the gradient of the meta
loss after it, and runs the step's batches through the network once more in forward mode. The methods of a trainer
share it: each gets the logits' derivatives along the meta gradient.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dataparams.callbacks.meta_checks import check_meta_set
from dataparams.callbacks.network import ForwardPass, Network, alike, full
from dataparams.callbacks.preconditioner import update_derivatives
from dataparams.criterion import Criterion
from dataparams.functional.lookahead import Mode
from dataparams.loss_call import LossCall
from dataparams.randomness import RandomState, mixed
from dataparams.sampling import MetaBatches

if TYPE_CHECKING:
    from dataparams.callbacks.session import Session

META_FORWARD = 4  # a use of the seed
ReadInput = Callable[[Any], Any]


@dataclass(eq=False)
class Entry:
    """A loss call of the window, the forward pass below it, and what each method does with the logits' derivatives."""

    call: LossCall
    forward: ForwardPass
    readers: list[Callable[[Tensor], None]] = field(default_factory=list)


@dataclass(eq=False)
class Step:
    """A step of the model whose look-ahead is due: weights before it, d step / d gradient, the window's batches."""

    before: dict[str, Tensor]
    window: list[Entry]
    derivatives: dict[str, Tensor | float] = field(default_factory=dict)


class LookAhead:
    """One fit's look-ahead.

    Args:
        session: of the trainer.
        trainer: whose optimizers step.
        module: the user's.
        logits: see :class:`dataparams.callbacks.meta.MetaCallback`.
        batches: of the meta set, or None: the next training batch's gradient serves.
        read_input, read_target: from a batch to the network's input and to the loss's target.
        every_n_steps: look ahead at every n-th step.
        mode: how the pass is differentiated.
        seed: of the random numbers of the meta pass.
        members: called when a look-ahead is done, to step their rows.
    """

    def __init__(
        self,
        session: Session,
        trainer: L.Trainer,
        module: L.LightningModule,
        *,
        logits: str | Callable[..., Any] | None,
        batches: MetaBatches | None,
        read_input: ReadInput,
        read_target: ReadInput,
        every_n_steps: int,
        mode: Mode,
        seed: int,
        members: Sequence[Callable[[], None]],
    ) -> None:
        self._session = weakref.ref(session)
        self.trainer = trainer
        self.network = Network(module, logits, trainer.strategy.root_device)
        self.batches = batches
        self.read_input = read_input
        self.read_target = read_target
        self.every_n_steps = every_n_steps
        self.mode: Mode = mode
        self.seed = seed
        self.members = list(members)
        self.device = trainer.strategy.root_device
        self._passes: list[ForwardPass] = []
        self._batch: Any = None
        self._start = RandomState.now(self.device)
        self._window: list[Entry] = []
        self._step: Step | None = None
        self._waiting: Step | None = None
        self._handles: list[Any] = []
        self._criterion: Criterion | None = None
        self._compared = False
        self._install()

    # -- watching a training step ----------------------------------------------------------------------------------

    def _install(self) -> None:
        ref = weakref.ref(self)  # hooks are deep-copied with the module by weight averaging

        @torch.compiler.disable
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ahead = ref()
            if ahead is not None and ahead._listening(module):
                ahead._passes.append(ForwardPass(args, kwargs, RandomState.now(ahead.device)))

        @torch.compiler.disable
        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            ahead = ref()
            if ahead is not None and ahead._listening(module):
                matching = next((p for p in reversed(ahead._passes) if p.args is args or _same(p.args, args)), None)
                if matching is not None and isinstance(output, Tensor):
                    matching.output = output

        watched = self.network.watched
        hooks: tuple[Any, Any] = before, after
        if watched is not None:
            self._handles.append(watched.register_forward_pre_hook(hooks[0], with_kwargs=True))
            self._handles.append(watched.register_forward_hook(hooks[1], with_kwargs=True))

        def stepped(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            ahead = ref()
            if ahead is not None:
                ahead._after_step(optimizer)

        for optimizer in self.trainer.optimizers:
            self._handles.append(optimizer.register_step_post_hook(stepped))

    def close(self) -> None:
        """Remove every hook; let go of workers and batches."""
        while self._handles:
            self._handles.pop().remove()
        self.forget()
        if self.batches is not None:
            self.batches.close()

    def forget(self) -> None:
        """Drop what waits for a next batch, and windows that never came to a step."""
        self._passes, self._window, self._batch = [], [], None
        self._step = self._waiting = None

    def _listening(self, module: nn.Module) -> bool:
        session = self._session()
        return session is not None and session.listening and module.training

    def begin(self, batch: Any) -> None:
        """A training step starts with this batch."""
        self._passes, self._batch = [], batch
        self._start = RandomState.now(self.device)

    def watch(self, call: LossCall, read: Callable[[Tensor], None], same: bool = False) -> Tensor:
        """Have ``read`` called with the logits' derivatives after the step, if back-propagation reaches the loss.

        Args:
            call: of the user's criterion.
            read: gets a tensor of the logits' shape.
            same: what the criterion was called with must be what the network returned; with a meta set it must be in
                any case, for the meta loss goes from one to the other.

        Raises:
            ValueError: the first time, where the logits are not those of ``forward(x)``, or the meta set will not do.

        Returns:
            The network's output below this loss, to differentiate through; the loss's own input where no forward pass
            was seen.
        """
        self._criterion = call.criterion
        forward = self._forward_of(call)
        if not self._compared:
            self._compare(call, forward, same or self.batches is not None)
            if self.batches is not None:
                check_meta_set(self.batches, self.read_target, call)
                self._try(self.batches)
            self._compared = True

        def reached() -> None:
            entry = next((entry for entry in self._window if entry.call is call), None)
            if entry is None:
                self._window.append(entry := Entry(call, forward))
            entry.readers.append(read)

        call.reached.append(reached)
        return call.logits if forward.output is None else forward.output

    def _forward_of(self, call: LossCall) -> ForwardPass:
        done = [p for p in self._passes if p.output is not None]
        for forward in done:
            if forward.output is call.logits:
                return forward
        if len(done) == 1:
            return done[0]
        if done:
            raise ValueError(
                f"the network ran {len(done)} times in a training step, and what {call.criterion.name} was called with "
                "is none of its outputs, so that the one to differentiate cannot be told; give the loss the network's "
                "output as it is, or name the submodule with logits='...'"
            )
        # The network was not called as such: its input is the batch's, its random numbers started with the step.
        forward = ForwardPass((self.read_input(self._batch),), {}, self._start)
        self._passes.append(forward)
        return forward

    def _compare(self, call: LossCall, forward: ForwardPass, same: bool) -> None:
        """Once: a pass that is not what training_step did would be differentiated in silence."""
        with self._silent(), self.network.untouched(forward.random), torch.no_grad():
            again = self.network.at({}, forward.args, forward.kwargs)
        # In half precision dropout may draw another mask than in the single precision of a look-ahead.
        exact = call.logits.element_size() >= 4 and not torch.is_autocast_enabled(self.device.type)
        name, network = call.criterion.name, self.network.name
        if forward.output is not None and not alike(forward.output, again, exact):
            raise ValueError(
                f"{network} does not give the same again on the same input, weights and random numbers, so that it "
                "cannot be differentiated: does it change its input in place, or read a buffer that it moves?"
            )
        seen = again if forward.output is None else forward.output
        if (same or forward.output is None) and seen is not call.logits and not alike(seen, call.logits, exact):
            raise ValueError(
                f"{name} was called with logits of shape {tuple(call.logits.shape)} that are not those of {network} on "
                f"the batch's input, {tuple(seen.shape)}. Call the network as self(x) in training_step, or name the "
                "submodule that is called with logits='...'; what happens between network and loss belongs into "
                "logits=lambda module, x: ..."
            )

    # -- the model's step ------------------------------------------------------------------------------------------

    @property
    def due(self) -> bool:
        """Whether the coming step is looked at."""
        return self.trainer.global_step % self.every_n_steps == 0

    def before_step(self) -> None:
        """Gradients are complete and unscaled, the weights not yet stepped."""
        if self.batches is None and self._waiting is not None:
            step, self._waiting = self._waiting, None
            gradient = {name: p.grad for name, p in self.network.moving().items() if p.grad is not None}
            self._look(step, {name: full(value.detach()) for name, value in gradient.items()})
        window, self._window = self._window, []
        self._step = None
        if self.due and (window or self.trainer.world_size > 1):
            before = {name: full(p.detach()).clone() for name, p in self.network.moving().items()}
            self._step = Step(before, window)

    def _after_step(self, optimizer: torch.optim.Optimizer) -> None:
        step, self._step = self._step, None
        if step is None:
            return
        step.derivatives = update_derivatives(optimizer, self.network.moving(), step.before)
        if self.batches is None:
            self._waiting = step
        else:
            self._look(step, self._meta_gradient(step))

    def _look(self, step: Step, gradient: dict[str, Tensor]) -> None:
        direction = {
            name: derivative * gradient[name] for name, derivative in step.derivatives.items() if name in gradient
        }
        for entry in step.window:
            with self._silent():
                tangent = self.network.tangent(entry.forward, step.before, direction, self.mode)
            for read in entry.readers:
                read(tangent)
        for finish in self.members:
            finish()

    @contextmanager
    def _silent(self) -> Iterator[None]:
        """Losses computed inside are not the user's."""
        session = self._session()
        active = session.active if session is not None else False
        try:
            if session is not None:
                session.active = False
            yield
        finally:
            if session is not None:
                session.active = active

    def _meta_gradient(self, step: Step) -> dict[str, Tensor]:
        """Gradient of the mean loss of the next meta batch, over all processes, at the weights as they are."""
        assert self.batches is not None
        session = self._session()
        assert session is not None
        number = self.batches.drawn
        seed = mixed(self.seed, META_FORWARD, number, self.trainer.global_rank)
        parameters = {name: full(p.detach()).requires_grad_() for name, p in self.network.moving().items()}
        batch = self.batches.next()
        with self._silent(), self.network.untouched(seed=seed):
            batch = session.tracker.to_device(self.trainer, batch)
            with torch.enable_grad():
                output = self.network.at(parameters, (self.read_input(batch),), {})
                total, count = self._sum_of_losses(output, self.read_target(batch))
                gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        found = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters.values(), gradients, strict=True)]
        if self.trainer.world_size > 1:
            flat = torch.cat([*(g.flatten() for g in found), count.to(found[0]).reshape(1)])
            dist.all_reduce(flat)
            found = [
                part.view_as(g) for part, g in zip(flat[:-1].split([g.numel() for g in found]), found, strict=True)
            ]
            count = flat[-1]
        return {name: g / count for name, g in zip(parameters, found, strict=True)}

    def _try(self, batches: MetaBatches) -> None:
        """Once: a meta batch that the network cannot take should not wait for the first step to say so."""
        session = self._session()
        assert session is not None
        host = next(batches.sample(64))
        try:
            with self._silent(), self.network.untouched(), torch.no_grad():
                batch = session.tracker.to_device(self.trainer, host)
                self._sum_of_losses(self.network.at({}, (self.read_input(batch),), {}), self.read_target(batch))
        except (KeyError, RuntimeError, TypeError, ValueError, IndexError) as error:
            raise ValueError(
                f"the network or the loss cannot take a batch of the meta set ({error}); its samples must be of the "
                "kind that is trained on"
            ) from error

    def _sum_of_losses(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The user's criterion over the meta batch, and what its mean divides by."""
        assert self._criterion is not None
        valid = torch.ones(len(output), dtype=torch.bool, device=output.device)
        call = LossCall(self._criterion, output, target, torch.arange(len(output)), valid)
        losses = call.elementwise()
        count = call.divisor() if call.counts_classes else torch.tensor(losses.numel(), device=losses.device)
        return losses.sum(), count


def _same(left: tuple[Any, ...], right: tuple[Any, ...]) -> bool:
    return len(left) == len(right) and all(a is b for a, b in zip(left, right, strict=True))
