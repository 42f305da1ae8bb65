"""Self-paced selection: training on the easy samples first, in every cluster, and on more of them round by round.

What is learned: nothing; what is kept is who is selected, from which round, at which loss. A round is a whole epoch.
The selection takes over which samples the training loader yields: as many an epoch as before (the selected ones in
reshuffled passes), so that schedules, validation and ``max_steps`` stay as they are.

How to use::

    trainer = L.Trainer(callbacks=[SelfPacedSelection(max_fraction="auto")])
    trainer.fit(model, train_loader)
    trainer.callbacks[0].to_frame()              # first_round: when a sample came in; NaN: never

When it helps: wrong labels, with a limit on how much is ever selected (``max_fraction``), which is the whole result.
When it does not: clean data. The published threshold rule (``rule="threshold"``) drops whole classes of clean or
long-tailed data; the default takes the same share of every class or cluster, and is level with uniform training there.

Suggested settings: ``max_fraction="auto"`` where labels may be wrong, else the defaults.

Works with: every other method; the meta set of a look-ahead is left out. Cost: an evaluation pass over the training set
every ``refresh_every`` rounds; with ``clusters="features"`` also k-means (together up to 1.2 passes, small CNN on 7,000
images), with ``"magnet"`` also a pass of its network (2.4), and its steps.

Source: :mod:`dataparams.functional.self_paced`.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import lightning as L
import numpy as np
import pandas as pd
import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from tqdm import trange

from dataparams.batch import INPUT_NAMES, TARGET_NAMES, read_part
from dataparams.callbacks.base import MethodCallback
from dataparams.callbacks.clusters import Clusters
from dataparams.callbacks.evaluation_pass import Evaluated, EvaluationPass, is_quiet
from dataparams.callbacks.network import Network
from dataparams.callbacks.selection_summary import selection_summary
from dataparams.callbacks.self_paced_checks import check_batch, check_loader, check_schedulers, check_shrink
from dataparams.functional.dynamics import Observation
from dataparams.ids import IndexKey
from dataparams.index import wrapped_sampler
from dataparams.sampling import trained_positions
from dataparams.sampling.pace import Pace, Rule
from dataparams.sampling.selection import loader_of_selected

PRETRAIN_STEPS = 660  # as measured, see the README


class SelfPacedSelection(MethodCallback):
    """Chooses which samples the training loader yields, round by round.

    Args:
        rule: ``"fraction"`` (default), ``"threshold"`` (the published one), ``"count"`` or ``"random"`` (a control):
            see :class:`dataparams.sampling.pace.Pace`.
        clusters: ``"class"`` (default): the given classes; ``"features"``: k-means within each class on features;
            ``"magnet"``: the same on an embedding trained beside the model by the Magnet loss.
        embedding: where features come from: the name of a submodule of the user's module (its own trunk, as it stands),
            a network ``x -> (B, E)``, the name of a torchvision model (untrained), or an array ``(N, E)`` by position.
            Default: with ``"features"`` the first 32 principal components of the inputs. Samples whose features are
            not finite go to the cluster nearest to the mean of their class's.
        mode: of ``"magnet"``: ``"concurrent"`` (default) trains the embedding a step beside each step of the model,
            ``"pretrain"`` before the first round, ``"frozen"`` not at all.
        start_fraction: share selected in the first round of selection, in (0, 1]; default 0.5.
        growth: of the share, or of age and diversity, per round, at least 1; default 1.1.
        max_fraction: largest share ever selected; ``"auto"`` finds the share of labels that look right from the losses;
            default None: all in the end.
        class_floor: fewest samples selected of a class: a number, or below 1 a share of the class. Default 0.1.
        refresh_every: evaluation pass and clusters anew every so many rounds; in between the losses of training serve.
            Default 1; 0: never after the first.
        warmup_rounds: rounds on all samples before the first selection, at least 1, for an untrained model's losses say
            nothing; default 1 [our choice].
        diversity: see :class:`dataparams.sampling.pace.Pace`; default 1.
        clusters_per_class: of k-means; default 8.
        epoch: ``"keep"`` (default): as many updates an epoch as without selection; ``"shrink"``: one pass over the
            selection, which schedules that count steps do not know of.
        eval_dataset: the training samples without augmentation, in the same order; default: the loader's own data set.
        input_key, target_key, logits: see :class:`dataparams.callbacks.meta.MetaCallback`.
        seed: of the order of samples and of k-means.
        **options: those of :class:`MethodCallback`.

    Raises:
        ValueError: an argument out of range.
    """

    repeats_loss: ClassVar = True
    detectors: ClassVar = MethodCallback.detectors | {"selection_loss": ("selection_loss", 1.0)}

    def __init__(
        self,
        rule: Rule = "fraction",
        clusters: Literal["class", "features", "magnet"] = "class",
        embedding: Any = None,
        mode: Literal["concurrent", "pretrain", "frozen"] = "concurrent",
        *,
        start_fraction: float = 0.5,
        growth: float = 1.1,
        max_fraction: float | Literal["auto"] | None = None,
        class_floor: float = 0.1,
        refresh_every: int = 1,
        warmup_rounds: int = 1,
        diversity: float = 1.0,
        clusters_per_class: int = 8,
        epoch: Literal["keep", "shrink"] = "keep",
        eval_dataset: Any = None,
        input_key: IndexKey | None = None,
        target_key: IndexKey | None = None,
        logits: Any = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        for name, value, least in (("refresh_every", refresh_every, 0), ("warmup_rounds", warmup_rounds, 1)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if epoch not in ("keep", "shrink"):
            raise ValueError(f"epoch must be 'keep' or 'shrink', got {epoch!r}")
        if isinstance(eval_dataset, IterableDataset):
            raise ValueError("eval_dataset must be map-style: its samples are found by position")
        if clusters == "magnet" and mode != "frozen" and refresh_every == 0:
            raise ValueError(
                "refresh_every=0 would never look at the embedding that clusters='magnet' trains; set it to 1"
            )
        self.pace = Pace(rule, start_fraction, growth, max_fraction, class_floor, diversity, seed)
        self.clusterer = Clusters(clusters, embedding, mode, clusters_per_class, seed)
        self.refresh_every = refresh_every
        self.warmup_rounds = warmup_rounds
        self.epoch = epoch
        self.eval_dataset = eval_dataset
        self.input_key = input_key
        self.target_key = target_key
        self.logits = logits
        self.seed = seed
        self.round = 0  # epochs that have ended
        # By row, once there was a selection:
        self.selected: Tensor | None = None
        self.selection_loss = torch.zeros(0)
        self.first_round = torch.zeros(0, dtype=torch.int32)
        self.cluster = torch.zeros(0, dtype=torch.int64)
        self._label = torch.zeros(0, dtype=torch.int64)
        self._rows: Tensor | None = None  # of the candidates, where they are not their positions
        self._candidates = torch.zeros(0, dtype=torch.int64)
        self._global_step = 0
        self._loader: DataLoader | None = None
        self._network: Network | None = None

    # -- the loader ------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Join; take over the training loader."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self._session is not None:
            if self.epoch == "shrink":
                check_shrink(trainer)
            if self.clusterer.network is not None:  # before a checkpoint brings the optimizer's state
                self.clusterer.network.to(trainer.strategy.root_device)
            self._loader = None
            self._session.tracker.edits.append(lambda loader: self._take_over(loader, trainer))

    def _take_over(self, loader: Any, trainer: L.Trainer) -> Any:
        dataset = getattr(loader, "dataset", None)
        if not isinstance(loader, DataLoader) or isinstance(dataset, IterableDataset):
            if self._key is None and self.num_rows is None:
                return loader  # the tracker says what is wrong with it for every method
            raise ValueError(
                "SelfPacedSelection needs a DataLoader over a map-style training data set, to choose from it"
            )
        check_loader(loader, self.eval_dataset)
        self.clusterer.check_length(len(dataset))  # type: ignore[arg-type]
        self._loader, self._candidates = loader, trained_positions(loader, wrapped_sampler)
        if self._rows is not None and len(self._rows) != len(self._candidates):
            self._rows = self.selected = None  # ids of another data set: all of it, and another look
        elif self._rows is None and self.selected is not None and len(dataset) > len(self.selected):  # type: ignore[arg-type]
            return loader  # more samples than rows: refused when the tables see it
        return loader_of_selected(
            loader, self._selection, self.seed, trainer.global_rank, trainer.world_size, self.epoch == "shrink"
        )

    @property
    def _key(self) -> IndexKey | None:
        """Where batches hold ids: this method's, or that of another one of the trainer."""
        return self.index_key if self._session is None else self._session.tracker.index_key

    def _selection(self) -> tuple[int, Tensor | None]:
        """The round, and the positions selected in it; None: all."""
        if self.selected is None or self.round < self.warmup_rounds:
            return self.round, None
        mask = self.selected[self._candidates if self._rows is None else self._rows]
        return self.round, None if bool(mask.all()) else self._candidates[mask]

    # -- rounds ----------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Know the network; one loader only."""
        super().on_train_start(trainer, pl_module)
        if self._session is None:
            return
        if self._session.tracker.num_loaders > 1:
            raise ValueError("SelfPacedSelection chooses from one training loader, and there are several")
        if self.epoch == "shrink":
            check_schedulers(trainer)
        self._global_step = trainer.global_step
        self._network = Network(pl_module, self.logits, trainer.strategy.root_device)
        self.clusterer.start(trainer, pl_module)
        self._announce_length(trainer)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Tell the trainer how long a shrunken epoch is."""
        super().on_train_epoch_start(trainer, pl_module)
        self._announce_length(trainer)

    def _announce_length(self, trainer: L.Trainer) -> None:
        if self.epoch == "shrink" and self._session is not None:
            self._session.tracker.announce_length(trainer)

    def begin_step(self, trainer: L.Trainer, module: L.LightningModule, batch: Any) -> None:
        """Where ids say who is in the batch: is everybody?"""
        if self._key is not None and self._session is not None and self._loader is not None:
            check_batch(sum(map(len, self._session.tracker.current)), self._loader, trainer.is_last_batch)

    def observe(self, index: Tensor, seen: Observation) -> None:
        """Losses of training, for rounds without an evaluation pass; kept where they are until the epoch ends."""
        if self.refresh_every == 1 or not len(self.selection_loss):
            return
        loss = torch.where(seen.valid, seen.loss.float(), torch.full_like(seen.loss.float(), torch.nan))
        # Of a sample that comes twice the larger one: the same on every device and process.
        self.selection_loss = self.selection_loss.to(index.device).scatter_reduce_(
            0, index, loss, "amax", include_self=False
        )

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A round is over: select the next one's samples."""
        if _is_cut_short(trainer):
            super().on_train_epoch_end(trainer, pl_module)
            return
        self.round += 1
        self.selection_loss = self.selection_loss.cpu()
        number = self.round - self.warmup_rounds
        if self._session is not None and number >= 0:
            due = number % self.refresh_every == 0 if self.refresh_every else self.selected is None
            if (due or self.selected is None) and self._session.objective.criterion is not None:
                self._look(trainer, pl_module)
            if len(self.selection_loss):  # an inline loss is not known right after a resume without a batch
                self._select(number, trainer)
        super().on_train_epoch_end(trainer, pl_module)

    def _read_input(self, batch: Any) -> Any:
        return read_part(batch, self.input_key, INPUT_NAMES, 0, "input_key", self._key)

    def _read_target(self, batch: Any) -> Any:
        return read_part(batch, self.target_key, TARGET_NAMES, 1, "target_key", self._key)

    def _look(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        session, network = self._session, self._network
        assert session is not None
        assert network is not None
        assert self._loader is not None
        criterion = session.objective.criterion
        assert criterion is not None
        look = EvaluationPass(
            trainer, session.tracker, self._loader, self.eval_dataset, self._candidates, self._read_input,
            self._read_target,
        )  # fmt: skip
        rows = self._candidates if self._rows is None else self._rows
        selected = None if self.selected is None else self.selected[rows]
        self._keep(self.clusterer.look(look, module, network, criterion, selected))

    def _keep(self, found: Evaluated) -> None:
        if self._key is not None:
            self._rows = found.rows
        self._make_room(max(int(found.rows.max()) + 1, self.num_rows_built or 0))
        self.selection_loss[found.rows] = found.loss
        self._label[found.rows] = found.label
        self.cluster[found.rows] = self.clusterer.assign(found)

    def _make_room(self, num_rows: int) -> None:
        grown = max(num_rows - len(self.selection_loss), 0)
        missing = self.selection_loss.new_full((grown,), torch.nan)
        self.selection_loss = torch.cat([self.selection_loss, missing])
        self.first_round = torch.cat([self.first_round, torch.full((grown,), -1, dtype=torch.int32)])
        self.cluster = torch.cat([self.cluster, torch.full((grown,), -1)])
        self._label = torch.cat([self._label, torch.full((grown,), -1)])

    def resize(self, num_rows: int) -> None:
        """Room for ids that have come."""
        super().resize(num_rows)
        self._make_room(num_rows if len(self.selection_loss) else 0)  # before the first look there is none

    def _select(self, number: int, trainer: L.Trainer) -> None:
        rows = self._candidates if self._rows is None else self._rows
        mask = self.pace.select(number, self.selection_loss[rows], self.cluster[rows], self._label[rows])
        self.selected = torch.zeros(len(self.selection_loss), dtype=torch.bool)
        self.selected[rows] = mask
        entered = self.selected & (self.first_round < 0)
        self.first_round[entered] = self.round
        self._train_embedding(trainer, mask)
        rank_zero_info(
            f"SelfPacedSelection: {int(mask.sum()):,} of {len(rows):,} samples in round {self.round} (at most "
            f"{self.pace.limit:.0%})"
        )

    # -- the embedding ---------------------------------------------------------------------------------------------

    def _train_embedding(self, trainer: L.Trainer, mask: Tensor) -> None:
        """From now on on those selected; all of a pretraining at once, after the first selection."""
        magnet, index = self.clusterer.magnet, self.clusterer.index
        if magnet is None or index is None or self.clusterer.mode == "frozen":
            return
        magnet.refresh(index, self._candidates, mask & self.clusterer.known, self.round, trainer)
        if self.clusterer.mode == "pretrain" and magnet.steps == 0:
            for _ in trange(PRETRAIN_STEPS, desc="training the embedding", leave=False, disable=is_quiet(trainer)):
                self._step_embedding(trainer)

    def _step_embedding(self, trainer: L.Trainer) -> None:
        assert self._session is not None
        assert self._loader is not None
        assert self.clusterer.magnet is not None
        self.clusterer.magnet.step(trainer, self._session.tracker, self._loader, self._read_input)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A step of the embedding beside each of the model's, which may take several batches."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        stepped, self._global_step = trainer.global_step != self._global_step, trainer.global_step
        trains = self.clusterer.magnet is not None and self.clusterer.mode == "concurrent"
        if self._session is not None and trains and stepped:
            self._step_embedding(trainer)

    def _leave(self) -> None:
        self.clusterer.close()
        super()._leave()

    # -- what the user gets ----------------------------------------------------------------------------------------

    def columns(self, frame: pd.DataFrame) -> dict[str, Any]:
        """``first_round``: epoch (from 0) at whose start the sample was first selected, NaN: never; ``selected``
        for the coming epoch (after the last one, that of a longer run); ``selection_loss`` and ``cluster`` of the last
        look."""
        count = len(frame)

        def padded(values: Tensor, missing: float) -> np.ndarray:
            column = np.full(count, missing)
            column[: len(values)] = values[:count].double().cpu().numpy()
            return column

        first = padded(self.first_round, -1)
        selected = np.zeros(count, dtype=bool) if self.selected is None else padded(self.selected, 0).astype(bool)
        return {
            "first_round": np.where(first < 0, np.nan, first),
            "selected": selected,
            "selection_loss": padded(self.selection_loss, np.nan),
            "cluster": padded(self.cluster, -1).astype(np.int64),
        }

    def summary(self, rows: pd.DataFrame) -> dict[str, float]:
        """See :func:`dataparams.callbacks.selection_summary.selection_summary`."""
        return selection_summary(rows)

    # -- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The shared state; who is selected, since when, at which loss; the pace; the embedding."""
        state = super().state_dict()
        if not state:
            return state
        own = {
            "round": self.round, "selected": self.selected, "selection_loss": self.selection_loss.cpu(),
            "first_round": self.first_round, "cluster": self.cluster, "label": self._label, "rows": self._rows,
            "pace": self.pace.state_dict(), "clusters": self.clusterer.state_dict(),
        }  # fmt: skip
        return state | {"selection": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore those too."""
        super().load_state_dict(state_dict)
        if not (own := state_dict.get("selection")):
            return
        self.round, self.selected, self._rows = own["round"], own["selected"], own["rows"]
        self.selection_loss, self.first_round = own["selection_loss"].clone(), own["first_round"].clone()
        self.cluster, self._label = own["cluster"].clone(), own["label"].clone()
        self.pace.load_state_dict(own["pace"])
        self.clusterer.load_state_dict(own["clusters"])


def _is_cut_short(trainer: L.Trainer) -> bool:
    """Whether the epoch stops before its last batch: a run that is resumed goes on with it."""
    stops = trainer.should_stop or 0 <= trainer.max_steps <= trainer.global_step
    return stops and not trainer.is_last_batch
