"""The plain keyword spotter of the command line, the example and the tests: it knows nothing of data parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics.classification import MulticlassAccuracy

from dataparams.nn import FrameCrossEntropy
from dataparams.tasks.speech.dataset import SpeechDataset
from dataparams.tasks.speech.features import Speech, as_speech, frame_mask
from dataparams.tasks.speech.streaming import Detections, listen, smoothed

SMOOTHED_FRAMES = 30


class KeywordSpotter(L.LightningModule):
    """Trains a model with cross-entropy, of every frame or of the utterance, and scores it.

    Batches are (Speech, target, ...), the target (B,), or (B, T) in training a model with an output a frame. Logs
    `train_loss` (epoch mean), `val_loss` and `val_accuracy` of utterances; in testing `test_accuracy`.

    Args:
        model: maps `Speech` to logits (B, T, K) or (B, K); see `FrameMLP` and `KeywordResNet`.
        optimizer: called with the model's parameters; a `functools.partial` of an optimizer class, or Hydra's
            `_partial_: true`.
        scheduler: called with the optimizer, stepped once an epoch; none by default.
        alarms_per_hour: false alarms an hour at which false rejects are measured.
    """

    monitor = "val_accuracy"

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[..., Optimizer],
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        alarms_per_hour: float = 10.0,
    ) -> None:
        super().__init__()
        if not callable(optimizer):
            raise TypeError(
                "optimizer is called with the parameters: give functools.partial(torch.optim.SGD, lr=...) or "
                f"_partial_: true in a config, not {type(optimizer).__name__}"
            )
        self.model = model
        self.criterion = FrameCrossEntropy()
        self.val_accuracy = MulticlassAccuracy(average="micro")
        self.test_accuracy = MulticlassAccuracy(average="micro")
        self.alarms_per_hour = alarms_per_hour
        self._optimizer = optimizer
        self._scheduler = scheduler

    def forward(self, speech: Speech | Tensor) -> Tensor:
        return self.model(speech)

    def class_scores(self, speech: Speech | Tensor) -> Tensor:
        """Log scores of the classes for whole utterances, (B, K): see `utterance_scores`."""
        logits = self(speech)
        if logits.dim() == 2:
            return logits.log_softmax(1)
        return utterance_scores(logits, frame_mask(as_speech(speech).length, logits.shape[1]))

    def training_step(self, batch: tuple, batch_idx: int) -> Any:
        speech, target = batch[:2]
        loss = self.criterion(self(speech), target)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(target))
        return loss

    def validation_step(self, batch: tuple, batch_idx: int) -> None:
        speech, target = batch[:2]
        scores = self.class_scores(speech)
        self.val_accuracy(scores, target)
        self.log("val_loss", F.nll_loss(scores, target), batch_size=len(target))
        self.log("val_accuracy", self.val_accuracy, prog_bar=True, batch_size=len(target))

    def test_step(self, batch: tuple, batch_idx: int) -> None:
        speech, target = batch[:2]
        self.test_accuracy(self.class_scores(speech), target)
        self.log("test_accuracy", self.test_accuracy, batch_size=len(target))

    def configure_optimizers(self) -> Any:
        optimizer = self._optimizer(self.model.parameters())
        if self._scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self._scheduler(optimizer)}

    # -- scores ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def accuracy(self, datamodule: Any, dataset: SpeechDataset) -> float:
        """Share of a set's utterances whose class has the highest score, in evaluation mode."""
        was_training = self.training
        self.eval()
        right = [
            self.class_scores(Speech(*(part.to(self.device) for part in speech))).argmax(1).cpu() == target
            for speech, target in datamodule.loader(dataset)
        ]
        self.train(was_training)
        return float(torch.cat(right).double().mean())

    def listen(self, datamodule: Any, split: str) -> Detections:
        """What it detects on the stream of "val" or "test", in evaluation mode."""
        was_training = self.training
        self.eval()
        found = listen(self.model, datamodule.stream(split), len(datamodule.keywords), self.device)
        self.train(was_training)
        return found

    def scores(self, datamodule: Any) -> dict[str, float]:
        """Accuracies on unseen speakers, and false rejects on a stream of theirs.

        `val_accuracy`; `test_accuracy` on clean speech, `test_accuracy_snr_<decibels>`, and `test_accuracy_noisy`,
        their mean. `false_reject`, and by kind of utterance `false_reject_clean` and `false_reject_noisy`, at the
        threshold that has `alarms_per_hour` false alarms an hour on the *validation* stream; `false_alarms_per_hour`,
        how many it then has on the test stream; `detection_threshold`; `false_reject_val`.
        """
        scores = {
            "val_accuracy": self.accuracy(datamodule, datamodule.val_set),
            "test_accuracy": self.accuracy(datamodule, datamodule.test_at(None)),
        }
        noisy = {snr: self.accuracy(datamodule, datamodule.test_at(snr)) for snr in datamodule.eval_snrs}
        scores |= {f"test_accuracy_snr_{snr:g}": value for snr, value in noisy.items()}
        if noisy:
            scores["test_accuracy_noisy"] = sum(noisy.values()) / len(noisy)
        val, test = self.listen(datamodule, "val"), self.listen(datamodule, "test")
        threshold = val.threshold_at(self.alarms_per_hour)
        missed, is_noisy = test.hits < threshold, test.spoken["is_noisy"].to_numpy(dtype=bool)
        return {
            **scores,
            "false_reject": test.false_reject(threshold),
            "false_reject_clean": float(missed[~is_noisy].mean()) if (~is_noisy).any() else float("nan"),
            "false_reject_noisy": float(missed[is_noisy].mean()) if is_noisy.any() else float("nan"),
            "false_alarms_per_hour": test.alarms_per_hour(threshold),
            "false_reject_val": val.false_reject(threshold),
            "detection_threshold": threshold,
        }


def utterance_scores(logits: Tensor, mask: Tensor) -> Tensor:
    """From the frames of an utterance to scores of its classes, as on a stream.

    Posteriors are averaged over 30 frames. Silence, the last class, has the smallest that it reaches: an utterance is
    silent where nothing is heard throughout. The rest is divided among the other classes as their largest posteriors
    are.

    Args:
        logits: (B, T, K).
        mask: frames that are not padding, bool (B, T), True in front.

    Returns:
        Logs of (B, K), whose exponentials sum to 1.
    """
    track = smoothed(logits.float().softmax(2), SMOOTHED_FRAMES)
    # Before a whole window has been heard single frames decide: only utterances that are shorter may do that.
    count = torch.arange(1, track.shape[1] + 1, device=track.device)
    heard = mask & (count >= mask.sum(1, keepdim=True).clamp(max=SMOOTHED_FRAMES))
    highest = track.masked_fill(~heard[..., None], 0.0).amax(1)[:, :-1]
    silent = track[..., -1:].masked_fill(~heard[..., None], 1.0).amin(1)
    spoken = (1 - silent) * highest / highest.sum(1, keepdim=True).clamp(min=1e-12)
    return torch.cat([spoken, silent], dim=1).clamp(min=1e-12).log()
