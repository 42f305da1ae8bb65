"""How a session meets the user's loss: finding it, hooks on a loss module, a mode around inline calls."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from dataparams.criterion import FUNCTION_KINDS, MODULE_KINDS, REGRESSION_KINDS, Criterion

if TYPE_CHECKING:
    from dataparams.callbacks.session import Session

WAYS_IN = (
    "There are three ways in: (1) give the module a loss module (self.criterion = nn.CrossEntropyLoss()) or name it "
    "with "
    'criterion="attribute"; (2) call F.cross_entropy, F.nll_loss or another of torch\'s losses inside training_step; '
    "(3) compute the loss with callback.loss(logits, target, index=...)."
)


class LossMode(TorchFunctionMode):
    """Sends calls of torch's loss functions inside ``training_step`` through the objective."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in FUNCTION_KINDS and self.session.takes(func):
            return self.session.function_call(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def make_hooks(session: Session, criterion: Criterion) -> tuple[Callable[..., Any], Callable[..., Any]]:
    # Plain functions over a weak reference: a bound method would be deep-copied with the module (weight averaging does
    # that).
    ref = weakref.ref(session)

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        session = ref()
        if session is None or not (session.listening and module.training):
            return None
        return session.begin_module_call(criterion, args, kwargs)

    def end(module: nn.Module, output: Any) -> Any:
        session = ref()
        if session is None or not (session.listening and module.training):
            return None
        return session.end_module_call(output)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling():
            return eagerly(begin, module, args, kwargs)
        return begin(module, args, kwargs)  # the detour would cost as much as the hook

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if torch.compiler.is_compiling():
            return eagerly(end, module, output)
        return end(module, output)

    return before, after


def _call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


eagerly: Callable[..., Any] = torch.compiler.disable(_call)  # dynamo has no business in the objective


def is_compiled(module: L.LightningModule) -> bool:
    children = any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) for m in module.modules())
    return children or getattr(module, "_compiler_ctx", None) is not None


def name_in(module: nn.Module, child: nn.Module) -> str:
    """How the user would write ``child``: ``self.loss``, or its class where it is not a part of the module."""
    found = (f"self.{name}" for name, other in module.named_modules() if other is child)
    return next(found, type(child).__name__)


def find_criterion(module: L.LightningModule, wanted: Any) -> tuple[Any, list[str]]:
    """The loss that a callback was told of, or the module's only loss module.

    Args:
        module: the user's.
        wanted: attribute name, loss module, one of torch's loss functions, or None.

    Returns:
        A module, a function, or None where the loss must be inline; and modules that look like losses but are not
        known, for messages.

    Raises:
        ValueError: no such attribute, nothing that is a loss, or several losses to choose from.
    """
    unknown: list[str] = []
    if isinstance(wanted, str):
        try:
            wanted = attrgetter(wanted)(module)
        except AttributeError:
            raise ValueError(
                f"criterion={wanted!r}: {type(module).__name__} has no such attribute. {WAYS_IN}"
            ) from None
    if wanted is None:
        wanted, unknown = _search(module)
    if wanted is not None and not isinstance(wanted, nn.Module) and wanted not in FUNCTION_KINDS:
        raise ValueError(f"criterion={wanted!r} is neither a loss module nor one of torch's loss functions. {WAYS_IN}")
    return wanted, unknown


def _search(module: L.LightningModule) -> tuple[nn.Module | None, list[str]]:
    found = {name: child for name, child in module.named_modules() if isinstance(child, tuple(MODULE_KINDS))}
    classifying = {
        name: child
        for name, child in found.items()
        if not isinstance(child, tuple(k for k, v in MODULE_KINDS.items() if v in REGRESSION_KINDS))
    }
    candidates = classifying or found
    losses = {name: type(child).__name__ for name, child in module.named_modules() if name and name not in found}
    unknown = [f"self.{name} is a {kind}" for name, kind in losses.items() if kind.endswith("Loss")]
    if len(candidates) > 1:
        names = ", ".join(f"self.{name} ({type(child).__name__})" for name, child in candidates.items())
        raise ValueError(
            f'{type(module).__name__} has several loss modules: {names}; name the one that trains with criterion="..."'
        )
    return next(iter(candidates.values()), None), unknown
