"""Images of one's own: each source gives each image the label that it was written with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_module
from PIL import Image

from dataparams.report.rows import read_rows
from dataparams.tasks import ImagesData
from dataparams.train import run

COLORS = {"blue": (20, 30, 220), "green": (20, 210, 40), "red": (230, 20, 30)}
CLASSES = list(COLORS)


def draw(path: Path, name: str, number: int) -> Path:
    """A wide image in the color of its class whose green channel says which one it is, kept exactly."""
    path.parent.mkdir(parents=True, exist_ok=True)
    color = np.add(COLORS[name], (0, number % 20, 0))
    Image.fromarray(np.full((12, 20, 3), color, dtype=np.uint8)).save(path)
    return path


def shown(data: ImagesData, images) -> list[str]:
    """The class that each image shows."""
    pixels = (images * torch.tensor(data.std).view(-1, 1, 1) + torch.tensor(data.mean).view(-1, 1, 1)).mean((2, 3))
    distance = (pixels[:, None] - torch.tensor(list(COLORS.values()))[None]).abs().sum(2)
    return [CLASSES[place] for place in distance.argmin(1)]


def check(data: ImagesData) -> None:
    """Training, validation and test set have the images of their labels."""
    for part in (data.train_set, data.val_set, data.test_set):
        items = part.__getitems__(list(range(len(part))))
        images = torch.stack([image for image, _ in items])
        assert images.shape[1:] == (3, 16, 16)
        assert shown(data, images) == [data.class_names[label] for _, label in items]
        torch.testing.assert_close(part[0][0], images[0])


def ids_of(data: ImagesData) -> list[str]:
    return list(map(str, data.ids or []))


def folders(root: Path, count: int = 20) -> Path:
    for name in CLASSES:
        for number in range(count):
            draw(root / name / f"{number}.png", name, number)
    return root


def test_class_folders(tmp_path):
    data = ImagesData(folders(tmp_path / "set"), image_size=16, seed=1)
    data.setup("fit")
    check(data)
    assert (data.num_classes, data.class_names) == (3, CLASSES)
    assert [len(part) for part in (data.train_set, data.val_set, data.test_set)] == [49, 5, 6]
    assert data.true_labels is None
    assert data.is_corrupt is None
    for place, name in enumerate(ids_of(data)):
        assert name.startswith(f"{CLASSES[data.given_labels[place]]}/")
        assert data.media(place).size == (20, 12)
        assert np.asarray(data.media(place))[0, 0, 1] == np.asarray(Image.open(tmp_path / "set" / name))[0, 0, 1]


def test_parts_of_the_source_stay_what_they_are(tmp_path):
    for part, count in (("train", 20), ("val", 4), ("test", 5)):
        folders(tmp_path / part, count)
    data = ImagesData(tmp_path, image_size=16)
    data.setup("fit")
    check(data)
    assert [len(part) for part in (data.train_set, data.val_set, data.test_set)] == [60, 12, 15]
    assert all(name.startswith("train/") for name in ids_of(data))
    for path in (tmp_path / "test").rglob("*.png"):
        path.unlink()
    (tmp_path / "test").rename(tmp_path / "other")
    data = ImagesData(tmp_path, image_size=16, val_size=6)
    data.setup("fit")  # ImageNet's layout: val is what is tested on, validation comes out of train
    assert [len(part) for part in (data.train_set, data.val_set, data.test_set)] == [54, 6, 12]


def test_noise_on_top_is_known(tmp_path):
    data = ImagesData(folders(tmp_path), image_size=16, noise="symmetric", noise_rate=0.5)
    data.setup("fit")
    assert data.true_labels is not None
    assert data.is_corrupt is not None
    right = [CLASSES.index(name.split("/")[0]) for name in ids_of(data)]
    assert data.true_labels.tolist() == right
    assert data.is_corrupt.tolist() == (data.given_labels.numpy() != right).tolist()
    assert 0.2 < data.is_corrupt.mean() < 0.7


@pytest.fixture
def csv(tmp_path):
    lines = []
    for number in range(40):
        name = CLASSES[number % 3]
        draw(tmp_path / "images" / f"{number}.png", name, number)
        wrong = CLASSES[(number + 1) % 3]
        split = "test" if number >= 34 else "val" if number >= 30 else "train"
        lines.append({"path": f"images/{number}.png", "label": name, "split": split, "true_label": name})
        if number % 5 == 0 and split == "train":
            lines[-1]["label"] = wrong
    pd.DataFrame(lines).to_csv(tmp_path / "labels.csv", index=False)
    return tmp_path / "labels.csv"


def test_a_csv_with_what_is_known_of_its_labels(csv):
    data = ImagesData(csv, image_size=16)
    data.setup("fit")
    table = pd.read_csv(csv).query("split == 'train'")
    assert data.ids == table["path"].tolist()
    assert [CLASSES[label] for label in data.given_labels] == table["label"].tolist()
    assert data.true_labels is not None
    assert [CLASSES[label] for label in data.true_labels] == table["true_label"].tolist()
    assert data.is_corrupt is not None
    assert data.is_corrupt.sum() == 6
    assert [len(data.val_set), len(data.test_set)] == [4, 6]
    with pytest.raises(ValueError, match="on top of a column true_label"):
        ImagesData(csv, noise="symmetric", noise_rate=0.1).setup("fit")


def test_a_hugging_face_set_on_disk(tmp_path):
    datasets = pytest.importorskip("datasets", reason='not installed: pip install ".[huggingface]"')
    files = [draw(tmp_path / f"{number}.png", CLASSES[number % 3], number) for number in range(30)]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    whole = {"img": [str(path) for path in files], "label": [number % 3 for number in range(30)]}
    both = datasets.DatasetDict(
        train=datasets.Dataset.from_dict({name: values[:24] for name, values in whole.items()}, features=features),
        test=datasets.Dataset.from_dict({name: values[24:] for name, values in whole.items()}, features=features),
    )
    both.save_to_disk(str(tmp_path / "saved"))
    data = ImagesData(tmp_path / "saved", image_size=16)
    data.setup("fit")
    check(data)
    assert [len(part) for part in (data.train_set, data.val_set, data.test_set)] == [22, 2, 6]
    assert all(name.startswith("train:") for name in ids_of(data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.drop(columns="label"), "has no column label; it has path, split, true_label"),
        (lambda table: table.assign(split="dev"), "unknown split 'dev'"),
        (lambda table: table.assign(path="absent.png"), "absent.png, which is not there"),
        (lambda table: table.assign(label=[None, *table["label"][1:]]), "label is empty in line 2"),
        (lambda table: table.assign(split="test"), "no training samples"),
    ],
)
def test_what_does_not_fit_is_named(csv, change, message):
    change(pd.read_csv(csv)).to_csv(csv, index=False)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ImagesData(csv).setup("fit")


def test_other_mistakes_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"need data\.source=PATH"):
        ImagesData().setup("fit")
    with pytest.raises(FileNotFoundError, match="no folder or file"):
        ImagesData(tmp_path / "absent").setup("fit")
    with pytest.raises(ValueError, match="has 3 classes, the model 10: set num_classes=3"):
        ImagesData(folders(tmp_path / "set"), num_classes=10).setup("fit")
    (tmp_path / "parts" / "test" / "red").mkdir(parents=True)
    folders(tmp_path / "parts" / "train", 2)
    draw(tmp_path / "parts" / "test" / "red" / "1.png", "red", 1)
    with pytest.raises(ValueError, match="other class folders"):
        ImagesData(tmp_path / "parts").setup("fit")


def test_a_run_on_a_csv_ranks_its_wrong_labels_and_shows_them(csv, tmp_path):
    overrides = [
        "experiment=images", "model=small_bn", f"data.source={csv}", "num_classes=3", "data.image_size=16",
        "data.num_workers=0", "data.batch_size=10", "data.augment=false", "trainer.max_epochs=3",
        "trainer.accelerator=cpu", "plots=false", "progress_bar=false", f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    with initialize_config_module("dataparams.conf", version_base="1.3"):
        results = run(compose("config", overrides))
    assert results["auroc_mean_loss_last"] > 0.9
    rows = read_rows(tmp_path / "run" / "rows.parquet")
    assert rows["id"].tolist() == pd.read_csv(csv).query("split == 'train'")["path"].tolist()
    text = (tmp_path / "run" / "report.html").read_text().partition('id="data">')[2].partition("</script>")[0]
    page = json.loads(text)
    assert page["views"][0]["classes"] == CLASSES
    assert len(page["media"]) == len(rows)
