"""What the method callbacks of one trainer share during a fit: the index, the hook on the loss, the objective.

The first callback to join installs it, the last to leave undoes it, after success, an exception or Ctrl-C.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor, nn

from dataparams.callbacks.hooks import WAYS_IN, LossMode, eagerly, find_criterion, is_compiled, make_hooks, name_in
from dataparams.callbacks.recorder import Recorder
from dataparams.callbacks.tasks import MultiTask, OfTask, main_task
from dataparams.criterion import FUNCTION_KINDS, Criterion
from dataparams.dynamics import DynamicsTable
from dataparams.ids import rows_of
from dataparams.index import IndexTracker
from dataparams.loss_call import LossCall
from dataparams.objective import Objective, Stage, samples_in

if TYPE_CHECKING:
    from dataparams.callbacks.base import MethodCallback
    from dataparams.callbacks.lookahead import LookAhead

_SESSIONS: weakref.WeakKeyDictionary[L.Trainer, Session] = weakref.WeakKeyDictionary()


class Session:
    """One fit of one trainer. Made by :meth:`join`; callbacks talk to it, users do not."""

    def __init__(self, trainer: L.Trainer) -> None:
        self.members: list[MethodCallback] = []
        self.objective = Objective()
        self.tracker = IndexTracker()
        self.dynamics: DynamicsTable | None = None
        self.recorder = Recorder(self.members, self.tracker)
        self.lookahead: LookAhead | None = None
        self.splits = False  # a meta set is held out of the training loader
        self.active = False
        self._trainer = weakref.ref(trainer)
        self.device = trainer.strategy.root_device
        self._handles: list[Any] = []
        self._module_calls: list[LossCall | None] = []
        self.tasks: list[str] = []  # where there are several
        self._functions: set[Callable[..., Any]] | None = None
        self._used_functions: set[str] = set()
        self._calls = 0
        self._ever_called = False
        self._prepared = False
        self._num_rows: int | None = None
        self._criterion_name = ""
        self._criterion: nn.Module | None = None
        self._unknown: list[str] = []

    # -- members ---------------------------------------------------------------------------------------------------

    @property
    def needs_loss(self) -> bool:
        """Whether a member has a part in the loss; where none has, a loss that is not found is no error."""
        return any(member.needs_loss for member in self.members)

    @classmethod
    def join(cls, trainer: L.Trainer, member: MethodCallback) -> Session:
        """Enter the trainer's session; the first to join patches the trainer's loader hook."""
        session = _SESSIONS.get(trainer)
        members = [*(session.members if session else []), member]
        agreed = {name: cls._agreed(members, name) for name in ("index_key", "ids", "num_rows")}
        if session is None:  # nothing is patched before the arguments are known to be good
            session = _SESSIONS[trainer] = cls(trainer)
            session.tracker.install(trainer)
        session.members = session.recorder.members = sorted(members, key=lambda m: (type(m).__name__, m.state_key))
        session.tracker.required = session.needs_loss
        for name, value in agreed.items():
            setattr(session.tracker, name, value)
        return session

    @staticmethod
    def _agreed(members: list[MethodCallback], name: str) -> Any:
        given = [value for value in (getattr(member, name) for member in members) if value is not None]
        if any(value is not given[0] and value != given[0] for value in given[1:]):
            raise ValueError(f"the method callbacks of one trainer must agree on {name}; got {given}")
        return given[0] if given else None

    def leave(self, member: MethodCallback) -> None:
        """Leave; the last one undoes everything."""
        if member in self.members:
            self.members.remove(member)
        trainer = self._trainer()
        if not self.members and trainer is not None:
            self.close(trainer)

    def close(self, trainer: L.Trainer) -> None:
        """Undo every patch and hook."""
        while self._handles:
            self._handles.pop().remove()
        vars(trainer.strategy).pop("training_step", None)
        self.tracker.uninstall(trainer)
        if self.lookahead is not None:
            self.lookahead.close()
            self.lookahead = None
        self.active = False
        self.recorder.guard.drain()
        _SESSIONS.pop(trainer, None)

    # -- life cycle ------------------------------------------------------------------------------------------------

    def start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """On fit start: find the criterion, put the hook on it, bracket the training step. Idempotent."""
        if "training_step" in trainer.strategy.__dict__:
            return
        if "dataloader_iter" in inspect.signature(module.training_step).parameters:
            raise ValueError(
                "training_step(dataloader_iter) hides the batches; take (batch, batch_idx) to train with method "
                "callbacks"
            )
        self.objective = Objective()
        self.objective.inspector = self.recorder.inspect
        self.objective.observer = self.recorder.record
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            self.objective.loss_scale = lambda: scaler.scale(torch.ones((), device=trainer.strategy.root_device))
        self._find_criterion(module)
        self.objective.add_stages([stage for member in self.members for stage in self._stages_of(member)])

        if is_compiled(module):
            torch.compiler.reset()  # graphs compiled before the hooks came would go on without them

        original = trainer.strategy.training_step

        def training_step(*args: Any, **kwargs: Any) -> Any:
            if not self._prepared:  # a trial step of a learning-rate or batch-size finder: plain training
                return original(*args, **kwargs)
            for member in self.members:
                if (other := member.replace_batch(trainer, args[0])) is not None:
                    return original(other, *args[1:], **kwargs)  # other samples than the rows'
            for member in self.members:
                member.begin_step(trainer, module, args[0])
            with self._listen():
                output = original(*args, **kwargs)
            skipped = output is None and module.automatic_optimization
            if not skipped:
                self._check_called()
                for member in self.members:
                    member.end_step(trainer, module)
                    output = member.add_to_loss(trainer, module, args, output)
            return output

        trainer.strategy.training_step = training_step

    def prepare(self, trainer: L.Trainer) -> None:
        """When the training loaders are there: size the tables, or check that a reload kept the length."""
        known = next((names for member in self.members if (names := member.names) is not None), None)
        num_rows = self.tracker.settle(trainer, known)
        if self._prepared and num_rows == self._num_rows:
            return
        self._prepared, self._num_rows = True, num_rows
        for member in self.members:
            member.meet_data(num_rows, self.tracker.base)
        self._check_same_subset()
        device = trainer.strategy.root_device
        capacity = 1024 if num_rows is None else num_rows
        if self.tracker.growing:  # the tables were grown ahead of the ids
            capacity = max([capacity, *(member.num_rows_built or 0 for member in self.members)])
        for member in self.members:
            member.prepare(capacity, trainer)
        restored = next((m.dynamics for m in self.members if m.dynamics is not None), None)
        self.dynamics = (restored or DynamicsTable(capacity)).to(device)
        for member in self.members:
            member.dynamics = self.dynamics
            member.row_ids, member.base_positions = self.tracker.row_ids, self.tracker.base

    def _check_same_subset(self) -> None:
        for member in self.members:
            before, now = member.base_positions, self.tracker.base
            if member.num_rows_built is not None and before is not None and list(before) != now:
                raise ValueError(
                    f"{type(member).__name__} holds rows for another subset of the data set, from a checkpoint or an "
                    "earlier fit: the rows would meet other samples. Draw the same subset (seed random_split), or "
                    "start anew with a new callback and without the checkpoint"
                )

    def _find_criterion(self, module: L.LightningModule) -> None:
        finder = next((member for member in self.members if isinstance(member, MultiTask)), None)
        if finder is not None:
            return self._find_tasks(finder, module)
        try:
            wanted, self._unknown = find_criterion(module, self._agreed(self.members, "criterion"))
        except ValueError:
            if self.needs_loss:
                raise
            return  # training goes on without training dynamics
        if isinstance(wanted, nn.Module):
            self._criterion_name, self._criterion = name_in(module, wanted), wanted
            self.objective.criterion = self._hook(wanted, self._criterion_name)
        else:
            self._functions = set(FUNCTION_KINDS) if wanted is None else {wanted}

    def _find_tasks(self, finder: MultiTask, module: L.LightningModule) -> None:
        """Hook the loss of every task. The one that ``criterion`` names, or the first, is the main one."""
        found = finder.find_tasks(module)
        for member in self.members:
            if isinstance(member, MultiTask) and member.find_tasks(module) != found:
                raise ValueError("the callbacks of one trainer that weigh tasks must name the same tasks")
        others = [member for member in self.members if not isinstance(member, MultiTask)]
        single = [member for member in others if member.stages() or member.repeats_loss]
        main = main_task(module, found, self._agreed(self.members, "criterion"), [type(m).__name__ for m in single])
        criteria = {
            task: self._hook(child, name_in(module, child), task, finder.kinds.get(task))
            for task, child in found.items()
        }
        self.objective.main_task, self.objective.criterion = main, criteria[main]
        self._criterion_name, self._criterion = criteria[main].name, found[main]
        for member in self.members:
            if isinstance(member, MultiTask):
                member.take_tasks(criteria, found)
        self.tasks = self.recorder.tasks = list(finder.forms)

    def _hook(self, child: nn.Module, name: str, task: str = "", kind: str | None = None) -> Criterion:
        criterion = Criterion.of_module(child, name, task, kind in ("l1", "l2", "other"))
        before, after = make_hooks(self, criterion)
        self._handles.append(child.register_forward_pre_hook(before, with_kwargs=True))
        self._handles.append(child.register_forward_hook(after, with_kwargs=True))
        return criterion

    def _stages_of(self, member: MethodCallback) -> list[Stage]:
        """Of several tasks a method that knows none acts on the main one."""
        if isinstance(member, MultiTask) or not self.tasks:
            return member.stages()
        return [OfTask(stage, self.objective.main_task) for stage in member.stages()]

    # -- the training step -----------------------------------------------------------------------------------------

    @contextmanager
    def _listen(self) -> Iterator[None]:
        self.recorder.begin_step()
        self._grow()
        self._module_calls.clear()
        for member in self.members:
            for table in member.tables.values():
                table.pending = table.visited()  # what an earlier step gathered and never used
        self._calls = 0
        self.active = True
        try:
            with nullcontext() if self._functions is None else LossMode(self):
                yield
        finally:
            self.active = False
            self.recorder.end_step()

    @property
    def listening(self) -> bool:
        """Inside a training step, where gradients are recorded."""
        return self.active and torch.is_grad_enabled()

    def takes(self, function: Callable[..., Any]) -> bool:
        """Whether a call of one of torch's loss functions is the objective's."""
        return self.listening and self._functions is not None and function in self._functions

    def function_call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """An inline loss, through the objective."""
        names = iter(args)
        input, target = (kwargs[name] if name in kwargs else next(names, None) for name in ("input", "target"))
        if input is None or target is None or not input.requires_grad:
            return function(*args, **kwargs)
        self._used_functions.add(f"F.{function.__name__}")
        if len(self._used_functions) > 1 and not self.needs_loss:
            return function(*args, **kwargs)
        if len(self._used_functions) > 1:
            raise ValueError(
                f"training_step calls {' and '.join(sorted(self._used_functions))}; say which one carries the rows, "
                "for example "
                "criterion=torch.nn.functional.cross_entropy"
            )
        samples = samples_in(FUNCTION_KINDS[function], input, target)
        index = self._index_for(samples, f"F.{function.__name__}")
        if index is None:
            return function(*args, **kwargs)
        return self.explicit_call(function, index, *args, **kwargs)

    def explicit_call(self, function: Callable[..., Any], index: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """A loss with its rows given, through the objective; hooks stay silent meanwhile."""
        self._calls += 1
        was_active, self.active = self.active, False
        try:
            return eagerly(self.objective, function, index, *args, **kwargs)
        finally:
            self.active = was_active

    def begin_module_call(
        self, criterion: Criterion, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before the loss module's forward: its arguments, as the stages want them; None: as they are."""
        names = list(kwargs)
        values = [*args, *kwargs.values()]
        if len(values) < 2:
            raise ValueError(
                f"{criterion.name} was called with {len(values)} argument(s); a loss takes (input, target)"
            )
        named = values[2] if criterion.kind == "given" and len(values) > 2 else None
        if named is not None:
            index = rows_of(named, self.tracker.row_ids)
        else:
            index = self._index_for(samples_in(criterion.kind, values[0], values[1]), criterion.name)
        if index is None:
            self._module_calls.append(None)
            return None
        self._calls += 1
        call = self.objective.begin(criterion, values[0], values[1], index)
        self._module_calls.append(call)
        values[0], values[1] = call.input, call.target
        return tuple(values[: len(args)]), dict(zip(names, values[len(args) :], strict=True))

    def end_module_call(self, output: Tensor) -> Tensor:
        """After the loss module's forward: what the user's code gets."""
        call = self._module_calls.pop()
        return output if call is None else self.objective.end(call, output)

    def _index_for(self, samples: int, name: str) -> Tensor | None:
        """Rows of the samples of a loss; None where they are not known and nobody needs them."""
        if self.needs_loss or any(len(chunk) == samples for chunk in self.tracker.current):
            return self.tracker.index_for(samples, name)
        return None

    def _check_called(self) -> None:
        self._ever_called = self._ever_called or self._calls > 0
        if self._ever_called or not self.needs_loss:
            return
        what = (
            f"{self._criterion_name} was found but training_step did not call it"
            if self._criterion_name
            else "no loss was found"
        )
        silent = self._criterion is not None and not self._criterion.training
        what += " in training mode (it is in eval mode)" if silent else ""
        inline = (
            " If the loss is computed inline, pass criterion=torch.nn.functional.cross_entropy."
            if self._criterion_name
            else ""
        )
        if self._unknown:
            what += f" ({', '.join(self._unknown)}: not one that is known; if it takes logits, name it with criterion=)"
        raise RuntimeError(f"{what}, so no row would ever learn.{inline} {WAYS_IN}")

    def _grow(self) -> None:
        ids, dynamics = self.tracker.row_ids, self.dynamics
        if ids is None or dynamics is None or ids.count is None or ids.count <= dynamics.num_rows:
            return
        capacity = max(ids.count, 2 * dynamics.num_rows)  # doubling: amortised O(1) a sample
        dynamics.resize(capacity)
        for member in self.members:
            member.resize(capacity)

    def flush(self, trainer: L.Trainer) -> None:
        """After a batch. Only the first member's call does it."""
        self.recorder.flush(trainer, self.dynamics)
