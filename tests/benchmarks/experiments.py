"""What ``make evidence`` trains: experiments, the arms compared in each, and the runs they come to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SEEDS = range(5)
BASELINES = ("none", "data_parameters", "elr", "gce", "superloss", "label_smoothing")
DATA = {
    "digits_noise": None,
    "digits_meta": None,
    "digits_meta_few": None,
    "fashion_noise": "FashionMNIST",
    "fashion_meta": "FashionMNIST",
    "self_paced": "FashionMNIST",
    "self_paced_clean": "FashionMNIST",
    "self_paced_tail": "FashionMNIST",
    "magnet": "FashionMNIST",
    "multimnist_noise": "MNIST",
    "surreal": None,
    "permuted_mnist": "MNIST",
    "permuted_mnist_few": "MNIST",
    "split_mnist": "MNIST",
    "imbalanced_permuted_mnist": "MNIST",
    "cifar10": "cifar10",
    "keyword_spotting": "SpeechCommands",
    "keyword_spotting_clean": "SpeechCommands",
}
TITLES = {
    "digits_noise": "Digits, 40% symmetric noise, 40 epochs, batch 32, model rate 0.01",
    "fashion_noise": "Fashion-MNIST, first 4,000, 40% symmetric noise, 24 epochs, batch 64, model rate 0.03",
    "cifar10_large": "CIFAR-10, all images from the JPEG pack, 40% symmetric noise, ResNet-18, 84 epochs",
    "cifar10": "CIFAR-10, the 8,068 lossless images, 40% symmetric noise, small BatchNorm network, 15 epochs",
    "digits_meta": "Digits, 40% symmetric noise, 10% clean meta set, 25 epochs, batch 32, model rate 0.05",
    "digits_meta_few": "The same with 2% clean data",
    "fashion_meta": "Fashion-MNIST, first 4,000, 40% symmetric noise, 10% clean meta set, 24 epochs, batch 64, model "
    "rate 0.03",
    "self_paced": "Selection: Fashion-MNIST, first 7,000, 40% symmetric noise, 20 epochs of 110 updates, batch 64, "
    "model rate 0.03",
    "self_paced_clean": "The same without noise",
    "self_paced_tail": "The same without noise, long tail of 50:1 (about 1,825 samples, 20 epochs of 29 updates)",
    "multimnist_noise": "Several tasks: MultiMNIST, 4,000 pictures; left digit 40% wrong labels, right digit clean, "
    "ink mass 30% corrupt; 18 epochs, batch 64, model rate 0.01",
    "surreal": "People: miniature SURREAL, 1,000 clips, one frame each an epoch, 64 pixels; 30% of the clips have "
    "another's labels for one task; 20 epochs, batch 16, RMSprop 0.003",
    "permuted_mnist": "Tasks one after another: permuted MNIST, 10 tasks of 12,000 digits, 2 epochs each, 2x400, SGD "
    "0.01, batch 64",
    "permuted_mnist_few": "Few steps: the same with 1,280 digits a task and one epoch, 20 steps; eta 0.1, alpha "
    "uniform in [0, 1); 2,500 test digits",
    "split_mnist": "Split MNIST, 5 tasks of two digits, all training images, 4 epochs each, 2x256, SGD 0.01, batch 64",
    "imbalanced_permuted_mnist": "Permuted MNIST with another share, 0.1 to 1, of each class in each task",
    "keyword_spotting": "Keywords in noise: Speech Commands, a subset of 896 training utterances, each clean and in "
    "noise (-10 to 10 dB); frames, 5x64, 16 epochs, batch 32, model rate 0.1",
    "keyword_spotting_clean": "The same, trained on clean speech alone",
    "magnet": "An embedding: Fashion-MNIST, first 7,000, 660 updates with Adam at 0.001, batch 64, 16 dimensions",
}
MAGNET = {
    "softmax": "softmax network",
    "magnet": "Magnet, nearest clusters (kNC)",
    "random_impostors": "the same with impostors by lot (broken on purpose)",
    "sigma_4": "the same with sigma^4 in the exponent (broken on purpose)",
}
# With --device gpu: all 50,000 images, the paper's length
LARGE, LARGE_METHODS = "cifar10_large", ("none", "data_parameters", "elr", "gce")
EXTRA = {
    "cifar10": ["data.source=lossless"],
    LARGE: [
        "model=resnet18", "data.source=jpeg", "data.augment=true", "trainer.max_epochs=84",
        "optimizer.lr=0.1", "optimizer.weight_decay=5e-4", "scheduler=multistep",
    ],
}  # fmt: skip
# The grid on which the defaults must do no harm: data, noise and the model's rate vary, data parameters stay untuned.
HARMLESS_RATES = (0.01, 0.05)
HARMLESS_NOISE = (0.0, 0.4)
HARMLESS_EXTRA = {
    "digits_noise": [],
    "fashion_noise": ["trainer.max_epochs=12"],
    "cifar10": ["data.train_size=4000", "data.source=lossless", "trainer.max_epochs=6"],
}


@dataclass(frozen=True)
class Job:
    """One training run: where it goes and what it overrides, or the variant and seed of a Magnet embedding."""

    folder: str
    overrides: tuple[str, ...]
    magnet: tuple[str, int] | None = None


@dataclass(frozen=True)
class Arm:
    """A line of a table: name of its folder, what the table calls it, the method and what it overrides.

    ``beside`` is a second method of the same trainer, as the name in the configuration and its class.
    """

    name: str
    title: str
    method: str
    overrides: tuple[str, ...] = ()
    beside: tuple[str, str] | None = None

    def config(self, seed: int) -> tuple[str, ...]:
        """Overrides of the run with this seed."""
        added: tuple[str, ...] = ()
        if self.beside is not None:
            node = f"+callbacks.{self.beside[0]}"
            added = (f"{node}._target_={self.beside[1]}", f"{node}.num_classes=10")
            if self.beside[0] == "soft_labels":  # methods that share a look-ahead share its seed
                added += (f"{node}.seed={seed}",)
        return (f"method={self.method}", f"seed={seed}", *self.overrides, *added)


PLAIN = Arm("none", "plain training", "none")
FINETUNE = Arm("finetune_meta", "plain, then fine-tuned on the meta set", "finetune_meta")
RATES = Arm("instance_lr", "`instance_lr`", "instance_lr")
LABELS = Arm("soft_labels", "`soft_labels`", "soft_labels")
NOISY = "data.meta_clean=false"
CAPPED = ("callbacks.selection.max_fraction=0.6",)
SELECTIONS = (
    PLAIN,
    Arm("random_subset", "`random_subset` (ignores the loss)", "random_subset"),
    Arm("self_paced", "`self_paced` (default: the same share of every class)", "self_paced"),
    Arm("spl", "`spl` (threshold)", "spl"),
    Arm("spld", "`spld` (threshold, clusters of principal components)", "spld"),
    Arm("magnet", "`self_paced_magnet` (threshold, SPL-ADVisE)", "self_paced_magnet"),
)
# Tasks one after another: what is added to plain training in order, by either head, from either initialisation.
PENALTIES = {"": "finetune", "ewc": "online EWC", "si": "SI", "mas": "MAS"}


# On permuted MNIST the published head forgets more, and other strengths are best for it.
KAIMING_STRENGTHS = {"ewc": 20, "si": 30, "mas": 0.02}


def sequence_arms(
    init: str,
    penalties: Sequence[str] = tuple(PENALTIES),
    traced: Sequence[str] = tuple(PENALTIES),
    strengths: Mapping[str, float] | None = None,
) -> tuple[Arm, ...]:
    """Penalties, and the traced ones of them with a trace, all from the same initial head. ``strengths``: in place of
    the tuned ones."""
    suffix, note = ("", "") if init == "linear" else (f"_{init}", f", {init} head")
    arms = []
    for penalty in penalties:
        strength = (strengths or {}).get(penalty)
        options = (f"model.head_init={init}", *([f"tuned.{penalty}.strength={strength}"] if strength else []))
        title, method = PENALTIES[penalty], f"dhp_{penalty}" if penalty else "dhp"
        arms.append(Arm(f"{penalty or 'finetune'}{suffix}", title + note, penalty or "finetune", options))
        if penalty in traced:
            arms.append(Arm(f"{method}{suffix}", f"DHP{' + ' + title if penalty else ''}{note}", method, options))
    return tuple(arms)


WEIGHTINGS = ("equal", "uncertainty", "dwa", "gradnorm", "random_weighting", "task_weights")
# By corrupt task, the weightings compared: all with one, and the sum and the instance level with each.
SURREAL = {
    "depth": WEIGHTINGS,
    "parts": ("equal", "task_weights"),
    "pose2d": ("equal", "task_weights"),
    "pose3d": ("equal", "task_weights"),
}
CLEAN_CLIPS = tuple(f"data.corrupt.{task}=0" for task in SURREAL)
# Speech: every level of temperature.
SPEECH = (
    PLAIN,
    *(
        Arm(level, f"`data_parameters`, {level}", "data_parameters", (f"callbacks.data_parameters.level={level}",))
        for level in ("class", "instance", "joint")
    ),
)


FEW = ("model.dhp.eta=0.1", "model.dhp.alpha_init=[0.0,1.0]")
CLEAN = ("experiment=self_paced", "data.noise=none", "data.noise_rate=0")
ARMS = {
    "digits_meta": (
        PLAIN,
        Arm("meta_added", "plain, the meta set added to training", "none", ("data.meta_use=add",)),
        Arm("meta_only", "plain, the meta set alone", "none", ("data.meta_use=only",)),
        FINETUNE,
        RATES,
        Arm(
            "instance_lr_free", "`instance_lr`, `normalize=false`", "instance_lr",
            ("callbacks.instance_lr.normalize=false",),
        ),
        LABELS,
        Arm(
            "both", "`instance_lr` + `soft_labels`", "instance_lr", (),
            ("soft_labels", "dataparams.LearnableSoftLabels"),
        ),
        Arm(
            "instance_lr_temperature", "`instance_lr` + `data_parameters`", "instance_lr", (),
            ("data_parameters", "dataparams.DataParameters"),
        ),
        Arm("data_parameters", "`data_parameters` (no meta set)", "data_parameters"),
        Arm("pencil", "`pencil` (no meta set)", "pencil"),
        Arm("instance_lr_noisy", "`instance_lr`, **noisy** meta set", "instance_lr", (NOISY,)),
        Arm("soft_labels_noisy", "`soft_labels`, **noisy** meta set", "soft_labels", (NOISY,)),
    ),
    "digits_meta_few": (PLAIN, FINETUNE, RATES, LABELS),
    "fashion_meta": (PLAIN, FINETUNE, RATES, LABELS),
    "self_paced": (
        PLAIN,
        Arm("random_subset", "`random_subset`, `max_fraction=0.6` (ignores the loss)", "random_subset", CAPPED),
        Arm("spl_free", "`spl`, grown to all data", "spl"),
        Arm("spl", "`spl`, `max_fraction=0.6`", "spl", CAPPED),
        Arm("spld", "`spld`, `max_fraction=0.6`", "spld", CAPPED),
        Arm("magnet", "`self_paced_magnet`, `max_fraction=0.6`", "self_paced_magnet", CAPPED),
        Arm("self_paced", "`self_paced`, `max_fraction=0.6`", "self_paced", CAPPED),
        Arm("self_paced_auto", "`self_paced`, `max_fraction=auto`", "self_paced",
            ("callbacks.selection.max_fraction=auto",)),
    ),
    "self_paced_clean": (
        *SELECTIONS,
        Arm("self_paced_auto", "`self_paced`, `max_fraction=auto`", "self_paced",
            ("callbacks.selection.max_fraction=auto",)),
    ),
    "self_paced_tail": SELECTIONS,
    "multimnist_noise": tuple(
        Arm(name, f"`{name}`", name)
        for name in WEIGHTINGS
    ),
    "surreal": tuple(
        Arm(f"{wrong}_{name}", f"corrupt {wrong}: `{name}`", name, (*CLEAN_CLIPS, f"data.corrupt.{wrong}=0.3"))
        for wrong, names in SURREAL.items()
        for name in names
    ),
    "keyword_spotting": SPEECH,
    "keyword_spotting_clean": SPEECH,
    "permuted_mnist": sequence_arms("linear") + sequence_arms("kaiming", traced=[""], strengths=KAIMING_STRENGTHS),
    "split_mnist": sequence_arms("linear") + sequence_arms("kaiming", ("", "mas"), traced=[""]),
    "imbalanced_permuted_mnist": sequence_arms("linear", ("", "mas")),
    "permuted_mnist_few": tuple(
        Arm(f"{name}{suffix}", f"{title}{note}", method, (*FEW, f"model.head_init={init}", *more))
        for init, suffix, note in (("linear", "", ""), ("kaiming", "_kaiming", ", kaiming head"))
        for name, title, method, more in (
            ("finetune", "linear head", "finetune", ()),
            ("dhp", "DHP", "dhp", ()),
            ("twice", "linear head, all at twice the rate", "finetune", ("optimizer.lr=0.02",)),
            ("frozen", "DHP, the trace never updated", "dhp", ("model.dhp.update=never",)),
        )
    ),
}  # fmt: skip
BASE = {
    "digits_meta": ("experiment=digits_meta",),
    "digits_meta_few": ("experiment=digits_meta", "data.meta_fraction=0.02"),
    "fashion_meta": ("experiment=fashion_noise", "data.meta_fraction=0.1", "data.meta_clean=true"),
    "self_paced": ("experiment=self_paced",),
    "self_paced_clean": CLEAN,
    "self_paced_tail": (*CLEAN, "data.imbalance=50"),
    "multimnist_noise": ("experiment=multimnist_noise",),
    "surreal": ("experiment=surreal",),
    "permuted_mnist": ("experiment=permuted_mnist",),
    "permuted_mnist_few": (
        "experiment=permuted_mnist",
        "data.train_size=1280",
        "data.test_size=2500",
        "trainer.max_epochs=10",
    ),
    "split_mnist": ("experiment=split_mnist",),
    "imbalanced_permuted_mnist": ("experiment=imbalanced_permuted_mnist",),
    "keyword_spotting": ("experiment=keyword_spotting",),
    "keyword_spotting_clean": ("experiment=keyword_spotting", "data.noisy_copies=0"),
}


def jobs_of(experiments: Sequence[str], large: bool, seeds: Sequence[int] = SEEDS) -> list[Job]:
    """Every run of these experiments; ``large`` adds the one that wants a GPU."""
    reference = [name for name in experiments if name not in ARMS and name != "magnet"]
    return [
        *reference_jobs([*reference, *([LARGE] if large else [])], seeds),
        *arm_jobs([name for name in experiments if name in ARMS], seeds),
        *(magnet_jobs(seeds) if "magnet" in experiments else []),
        *harmless_jobs(reference, seeds),
    ]


def reference_jobs(experiments: Sequence[str], seeds: Sequence[int]) -> list[Job]:
    """Every method and seed of the reference experiments, averaged weights beside."""
    jobs = []
    for experiment in experiments:
        name, extra = "cifar10" if experiment == LARGE else experiment, EXTRA.get(experiment, [])
        for seed in seeds:
            for method in LARGE_METHODS if experiment == LARGE else BASELINES:
                overrides = (f"experiment={name}", f"method={method}", f"seed={seed}", "ema=0.995", *extra)
                jobs.append(Job(f"{experiment}/{method}/seed{seed}", overrides))
    return jobs


def magnet_jobs(seeds: Sequence[int]) -> list[Job]:
    """The embedding, its broken variants and a softmax network."""
    return [Job(f"magnet/{name}/seed{seed}", (), (name, seed)) for seed in seeds for name in MAGNET]


def arm_jobs(experiments: Sequence[str], seeds: Sequence[int]) -> list[Job]:
    """Every arm and seed of the experiments with arms of their own."""
    return [
        Job(f"{experiment}/{arm.name}/seed{seed}", (*BASE[experiment], *arm.config(seed)))
        for experiment in experiments
        for seed in seeds
        for arm in ARMS[experiment]
    ]


def harmless_jobs(experiments: Sequence[str], seeds: Sequence[int]) -> list[Job]:
    """Plain training and the defaults of data parameters on every cell of the grid."""
    jobs = []
    for experiment in experiments:
        for noise in HARMLESS_NOISE:
            for rate in HARMLESS_RATES:
                for seed in seeds:
                    for method in ("none", "data_parameters"):
                        overrides = (
                            f"experiment={experiment}", f"method={method}", f"seed={seed}", f"optimizer.lr={rate}",
                            f"data.noise_rate={noise}", f"data.noise={'symmetric' if noise else 'none'}",
                            *(["~tuned.data_parameters"] if method == "data_parameters" else []),
                            *HARMLESS_EXTRA[experiment],
                        )  # fmt: skip
                        jobs.append(
                            Job(f"harmless/{experiment}-noise{noise}-rate{rate}/{method}/seed{seed}", overrides)
                        )
    return jobs
