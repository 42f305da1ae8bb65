"""The clusters that a selection keeps level: classes, k-means on features, or on an embedding of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from dataparams.callbacks.evaluation_pass import Evaluated, EvaluationPass
from dataparams.callbacks.magnet import MagnetTraining
from dataparams.callbacks.network import Network
from dataparams.criterion import Criterion
from dataparams.randomness import isolated, mixed
from dataparams.sampling.clusters import ClusterIndex, cluster_by_class, filled_by_class
from dataparams.sampling.pace import require_finite

Kind = Literal["class", "features", "magnet"]
Mode = Literal["concurrent", "pretrain", "frozen"]
COMPONENTS, FITTED = 32, 5000  # of the principal components: how many, and of how many samples
WEIGHTS = 10  # a use of the seed
CHUNK = 1 << 16  # samples compared with all centers at a time


class Clusters:
    """Says which cluster each sample is in.

    A sample whose features are not finite goes by the mean of its class's (of all, where its class has none), makes no
    clusters and trains no embedding.

    Args:
        kind, embedding, mode, clusters_per_class, seed: see :class:`dataparams.SelfPacedSelection`.

    Attributes:
        index: of the last look; None for classes.
        known: ``(P,)`` bool, whose features were finite then.
        network: the embedding, where it is a network of its own.

    Raises:
        ValueError: arguments that do not go together.
    """

    def __init__(self, kind: Kind, embedding: Any, mode: Mode, clusters_per_class: int, seed: int) -> None:
        if kind not in ("class", "features", "magnet"):
            raise ValueError(f"clusters must be 'class', 'features' or 'magnet', got {kind!r}")
        if mode not in ("concurrent", "pretrain", "frozen"):
            raise ValueError(f"mode must be 'concurrent', 'pretrain' or 'frozen', got {mode!r}")
        if kind == "class" and embedding is not None:
            raise ValueError("clusters='class' needs no embedding; for k-means on it: clusters='features' or 'magnet'")
        if clusters_per_class < 1:
            raise ValueError(f"clusters_per_class must be at least 1, got {clusters_per_class}")
        self.kind: Kind = kind
        self.mode: Mode = mode
        self.clusters_per_class = clusters_per_class
        self.seed = seed
        self.index: ClusterIndex | None = None
        self.known = torch.zeros(0, dtype=torch.bool)
        self.given: Tensor | None = None  # features by position
        self.trunk: str | None = None
        self.named = embedding if isinstance(embedding, str) else None
        self.network: nn.Module | None = None
        self.magnet: MagnetTraining | None = None
        self._components: Any = None
        self._read(embedding)
        if kind == "magnet" and self.network is None:
            raise ValueError(
                "clusters='magnet' trains an embedding network: give embedding=nn.Module (x -> (B, E)) or the name of "
                "a torchvision model; the student's own trunk and arrays go with clusters='features'"
            )
        if kind == "magnet" and self.network is not None:
            self.magnet = MagnetTraining(self.network, seed=seed)

    def _read(self, embedding: Any) -> None:
        if isinstance(embedding, nn.Module):
            self.network = embedding
        elif isinstance(embedding, str) and embedding in torchvision.models.list_models():
            with isolated(torch.device("cpu"), mixed(self.seed, WEIGHTS)):
                self.network = torchvision.models.get_model(embedding)
        elif isinstance(embedding, str):
            self.trunk = embedding
        elif embedding is not None:
            self.given = torch.as_tensor(np.asarray(embedding)).float().flatten(1)

    def start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Before the first step: is what was named there?

        Raises:
            ValueError: no such submodule.
        """
        if self.named is not None and self.kind == "features" and _has(module, self.named):
            self.network, self.trunk = None, self.named  # the user's own comes before torchvision's of that name
        if self.trunk is not None:
            try:
                module.get_submodule(self.trunk)
            except AttributeError:
                raise ValueError(
                    f"embedding={self.trunk!r} is neither a submodule of {type(module).__name__} nor a model of "
                    "torchvision"
                ) from None

    def check_length(self, count: int) -> None:
        """Features that are given belong to the training data set's samples, by position.

        Raises:
            ValueError: another number of them.
        """
        if self.given is not None and len(self.given) != count:
            raise ValueError(
                f"embedding has features of {len(self.given)} samples, the training data set {count}; give a row for "
                "each sample, in the data set's order (of a Subset: the Subset's)"
            )

    # -- looking ---------------------------------------------------------------------------------------------------

    def look(
        self,
        look: EvaluationPass,
        module: L.LightningModule,
        network: Network,
        criterion: Criterion,
        selected: Tensor | None,
    ) -> Evaluated:
        """Losses, labels and features of all samples; k-means where there are features.

        Args:
            look: over the training set.
            module: the user's.
            network: from its inputs to logits.
            criterion: the user's.
            selected: ``(P,)`` bool: an embedding that is trained on these is divided by these; None: by all.

        Raises:
            ValueError: no sample has a finite loss, or none has finite features.
        """
        features, handle = self._features(module)
        modules = [module] if self.network is None else [module, self.network]
        try:
            with network.silent():
                found = look.run(modules, network, criterion, features)
        finally:
            if handle is not None:
                handle.remove()
        if self.kind == "class":
            return found
        require_finite(found.loss)
        values, finite = self._values(found), found.loss.isfinite()
        self.known = values.isfinite().all(1)
        values = filled_by_class(values, found.label)
        chosen = finite & self.known
        if self.magnet is not None and selected is not None:
            chosen = chosen & selected
        # A class without any has clusters of its own too, for the day that it comes in.
        chosen = chosen | (finite & ~torch.isin(found.label, found.label[chosen]))
        index = cluster_by_class(values[chosen], found.label[chosen], self.clusters_per_class, self.seed)
        cluster = nearest_of_class(values, found.label, index)
        cluster[chosen] = index.cluster
        self.index = dataclasses.replace(index, cluster=cluster)
        return found

    def _features(self, module: L.LightningModule) -> tuple[Callable[[Any], Tensor] | None, Any]:
        if self.kind == "class" or self.given is not None:
            return None, None
        if self.network is not None:
            return self.network, None
        if self.trunk is None:
            return (lambda inputs: inputs), None
        seen: list[Tensor] = []

        def after(child: nn.Module, args: Any, output: Tensor) -> None:
            seen[:] = [output]

        return (lambda inputs: seen[0]), module.get_submodule(self.trunk).register_forward_hook(after)

    def _values(self, found: Evaluated) -> Tensor:
        if self.given is not None:
            return self.given[found.positions]
        assert found.features is not None
        if self.network is not None or self.trunk is not None:
            return found.features
        known = found.features.isfinite().all(1)
        flat = found.features[known].numpy()
        if len(flat) < 2:  # nothing varies, and nothing has to
            return found.features
        if self._components is None:
            from sklearn.decomposition import PCA  # a second and a half to import, for those who need it

            count = min(COMPONENTS, *flat.shape)
            chosen = np.linspace(0, len(flat) - 1, min(FITTED, len(flat))).round().astype(np.int64)
            self._components = PCA(count, svd_solver="randomized", random_state=0).fit(flat[chosen])
        values = torch.full((len(known), self._components.n_components_), torch.nan)
        values[known] = torch.from_numpy(self._components.transform(flat)).float()
        return values

    def assign(self, found: Evaluated) -> Tensor:
        """Cluster of each sample of the last look, ``(P,)``."""
        return found.label if self.index is None else self.index.cluster

    def close(self) -> None:
        """Let go of what loads."""
        if self.magnet is not None:
            self.magnet.close()

    def state_dict(self) -> dict[str, Any]:
        """The embedding, where it is a network of its own, and its training."""
        if self.magnet is not None:
            return {"magnet": self.magnet.state_dict()}
        return {} if self.network is None else {"network": self.network.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them.

        Raises:
            ValueError: the state is of other clusters.
        """
        wanted = {"magnet"} if self.magnet is not None else set() if self.network is None else {"network"}
        if set(state) != wanted:
            raise ValueError(
                f"the checkpoint's clusters have {sorted(state) or 'no network'}, this selection's "
                f"{sorted(wanted) or 'no network'}: make it with the arguments that it was trained with"
            )
        if self.magnet is not None:
            self.magnet.load_state_dict(state["magnet"])
        elif self.network is not None:
            self.network.load_state_dict(state["network"])


def _has(module: nn.Module, name: str) -> bool:
    try:
        module.get_submodule(name)
    except AttributeError:
        return False
    return True


def nearest_of_class(values: Tensor, labels: Tensor, index: ClusterIndex) -> Tensor:
    """The nearest cluster of each sample's own class, ``(P,)``; 0 where its class has none.

    Args:
        values: ``(P, E)``.
        labels: ``(P,)``.
        index: whose centers and classes are used.
    """
    found = []
    for points, classes in zip(values.split(CHUNK), labels.split(CHUNK), strict=True):
        distance = torch.cdist(points, index.centers.to(points))
        distance = distance.masked_fill(classes[:, None] != index.classes, torch.inf)
        nearest, cluster = distance.min(1)
        found.append(torch.where(nearest.isinf(), torch.zeros_like(cluster), cluster))
    return torch.cat(found)
