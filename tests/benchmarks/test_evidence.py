"""What ``make evidence`` writes."""

from __future__ import annotations

import json

from evidence import sections, write_results
from experiments import ARMS, TITLES


def test_tables_of_runs_that_are_not_here_are_kept_in_the_order_of_the_experiments(tmp_path):
    results, root = tmp_path / "RESULTS.md", tmp_path / "runs"
    digits, split, few = (TITLES[name] for name in ("digits_noise", "split_mnist", "permuted_mnist_few"))
    old = "".join(f"## {title}\n\nold\n\n" for title in (split, few, digits, "Left out"))
    results.write_text(f"# Evidence\n\nBefore.\n\n{old}")
    for arm in ARMS["permuted_mnist_few"]:
        for seed in range(2):
            folder = root / "permuted_mnist_few" / arm.name / f"seed{seed}"
            folder.mkdir(parents=True)
            keys = ("average_accuracy", "forgetting", "learning_accuracy", "forward_transfer")
            (folder / "results.json").write_text(json.dumps(dict.fromkeys(keys, 0.25)))
    write_results(results, root, ["cifar10"], "cpu")
    written = sections(results.read_text())
    assert list(written) == [digits, few, split, "Left out"]
    assert [written[title].split()[-1] for title in (digits, split)] == ["old", "old"]
    assert "| linear head | 25.0 ± 0.0 |" in written[few]
    assert written["Left out"].endswith("cifar10.")
    write_results(results, root, [], "cpu")
    assert "Left out" not in sections(results.read_text())
