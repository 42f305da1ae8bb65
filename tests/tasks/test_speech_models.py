"""The two networks and the spotter: padding, shapes, decisions."""

from functools import partial

import lightning as L
import numpy as np
import pytest
import torch

from dataparams import DataParameters, LearnableSoftLabels, SelfPacedSelection
from dataparams.tasks import FrameMLP, KeywordResNet, KeywordSpotter, SpeechCommandsData
from dataparams.tasks.speech import Speech
from dataparams.tasks.speech.spotter import utterance_scores

pytest.importorskip("librosa", reason='needs pip install ".[speech]"')
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu",
         "num_sanity_val_steps": 0, "enable_model_summary": False}  # fmt: skip


def data(root, **options):
    return SpeechCommandsData(root, keywords=("yes", "no"), batch_size=16, stream_hours=0.02, **options)


def test_the_papers_network_has_247_inputs_and_five_layers_of_64():
    linear = [layer for layer in FrameMLP(12).modules() if isinstance(layer, torch.nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [(247, 64)] + 4 * [(64, 64)] + [(64, 12)]


@pytest.mark.parametrize("model", [FrameMLP(3), KeywordResNet(3, channels=(8, 12))])
@pytest.mark.parametrize("length", [100, 400, 5000, 12_345])
def test_padding_changes_nothing(model, length):
    torch.manual_seed(0)
    model.eval()
    model.front.norm.mean.normal_()
    audio = torch.randn(length) * 0.1
    batch = torch.zeros(2, 16_000)
    batch[0, :length], batch[1] = audio, torch.randn(16_000)
    with torch.no_grad():
        alone, padded = model(audio[None])[0], model(Speech(batch, torch.tensor([length, 16_000])))[0]
    if alone.dim() == 2:
        frames = max(length - 400, 0) // 160 + 1
        assert alone.shape == (frames, 3)
        assert padded.shape == (98, 3)
        padded = padded[:frames]
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-4)


def test_padding_frames_send_no_gradient_to_the_weights(tone_corpus):
    module = data(tone_corpus, targets="frames")
    module.setup()
    spotter = KeywordSpotter(FrameMLP(4), SGD)
    speech, target = next(batch for batch in module.train_dataloader() if batch[0].length.min() < 12_000)
    spotter.criterion(spotter(speech), target).backward()
    wanted = [torch.zeros(()) if p.grad is None else p.grad.clone() for p in spotter.parameters()]
    assert sum(float(g.abs().sum()) for g in wanted) > 0
    for p in spotter.parameters():
        p.grad = None
    longer = torch.nn.functional.pad(speech.audio, (0, 8000))
    spotter.criterion(
        spotter(Speech(longer, speech.length)), torch.nn.functional.pad(target, (0, 50), value=-100)
    ).backward()
    for p, gradient in zip(spotter.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, gradient, atol=1e-6, rtol=1e-4)


def test_an_utterance_is_what_its_smoothed_frames_say():
    logits = torch.full((3, 98, 4), -4.0)
    logits[..., 3] = 4.0  # silence
    logits[0, 40:80, 1], logits[0, 40:80, 3] = 6.0, -4.0  # 0.4 s of class 1
    logits[1, 50:52, 0], logits[1, 50:52, 3] = 8.0, -4.0  # a click of 0.02 s
    logits[2, 60:, 2] = 20.0  # padding
    mask = torch.ones(3, 98, dtype=torch.bool)
    mask[2, 60:] = False
    scores = utterance_scores(logits, mask)
    assert scores.argmax(1).tolist() == [1, 3, 3]
    torch.testing.assert_close(scores.exp().sum(1), torch.ones(3))
    short = utterance_scores(logits[:1, 40:50], torch.ones(1, 10, dtype=torch.bool))
    assert short.argmax(1).tolist() == [1]


@pytest.mark.parametrize("targets", ["frames", "utterance"])
def test_tones_are_learned_and_resumed_bit_for_bit(tone_corpus, targets, tmp_path):
    model = partial(FrameMLP, 4, width=16) if targets == "frames" else partial(KeywordResNet, 4, channels=(8, 12))

    def fit(epochs, ckpt=None, workers=0):
        L.seed_everything(0, verbose=False)
        module, method = KeywordSpotter(model(), SGD), DataParameters(num_classes=4, level="joint")
        trainer = L.Trainer(max_epochs=epochs, callbacks=[method], **QUIET)
        trainer.fit(module, datamodule=data(tone_corpus, targets=targets, num_workers=workers), ckpt_path=ckpt)
        return trainer, module, method

    _, module, method = fit(4)
    trainer, *_ = fit(2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    for workers in (0, 2):  # and any number of workers
        _, resumed, other = fit(4, tmp_path / "half.ckpt", workers)
        for a, b in zip(module.state_dict().values(), resumed.state_dict().values(), strict=True):
            assert torch.equal(a, b)
        assert method.to_frame().equals(other.to_frame())
    set_up = data(tone_corpus, targets=targets)
    set_up.setup()
    scores = module.scores(set_up)
    assert 0.55 < scores["test_accuracy"] <= 1  # half are of other words
    assert set(scores) >= {"test_accuracy_snr_-10", "test_accuracy_snr_10", "false_reject", "false_alarms_per_hour"}
    again = module.scores(set_up)
    assert again == scores
    rows = method.to_frame()
    assert rows["visits"].tolist() == [4] * len(set_up.train_set)
    assert np.isfinite(rows["log_temperature"]).all()


@pytest.mark.filterwarnings("ignore:.*has moved by.*")
def test_copies_that_share_a_row_are_visits_of_one(tone_corpus):
    module = data(tone_corpus, shared_rows=True, noisy_copies=2)
    module.setup()
    method = DataParameters(num_classes=4, index_key=module.index_key, num_rows=module.num_rows)
    trainer = L.Trainer(max_epochs=2, callbacks=[method], **QUIET)
    trainer.fit(KeywordSpotter(KeywordResNet(4, channels=(8, 12)), SGD), datamodule=module)
    assert method.to_frame()["visits"].tolist() == [6] * 56 + [2] * 6


@pytest.mark.filterwarnings("ignore:.*has moved by.*", "ignore:.*hardly.*")
@pytest.mark.parametrize("method", [LearnableSoftLabels, SelfPacedSelection])
def test_methods_that_look_at_the_batch_find_their_way(tone_corpus, method):
    module = data(tone_corpus)
    module.setup()
    callback = method(num_classes=4, meta=module.val_dataloader()) if method is LearnableSoftLabels else method()
    trainer = L.Trainer(max_epochs=2, callbacks=[callback], **QUIET)
    trainer.fit(KeywordSpotter(KeywordResNet(4, channels=(8, 12)), SGD), datamodule=module)
    frame = callback.to_frame()
    assert (frame["visits"] > 0).sum() > 50
