"""Top-k accuracy: known by hand, and scikit-learn's where no logits are equal."""

import numpy as np
import pytest
import torch
from sklearn.metrics import top_k_accuracy_score

from modeling_ehm.training.metrics import top_k_accuracy


def test_accuracy_known_by_hand():
    logits = torch.tensor([[3.0, 2, 1, 0], [0, 1, 2, 3], [1, 3, 0, 2]])
    labels = torch.tensor([0, 1, 0])  # first, third, third
    assert top_k_accuracy(logits, labels, k=(1, 2, 3)) == {"top1": 1 / 3, "top2": 1 / 3, "top3": 1.0}
    assert set(top_k_accuracy(logits, labels)) == {"top1", "top5"}


def test_accuracy_equals_sklearn():
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(size=(300, 12)), generator.integers(12, size=300)
    logits[np.arange(300), labels] += 1
    scores = top_k_accuracy(logits, labels, k=range(1, 12))
    for k in range(1, 12):
        assert scores[f"top{k}"] == pytest.approx(top_k_accuracy_score(labels, logits, k=k, labels=range(12)))
    assert 0.1 < scores["top1"] < scores["top5"] < 1


def test_more_guesses_than_classes_find_every_class():
    logits, labels = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 3
    assert top_k_accuracy(logits, labels, k=(1, 5))["top5"] == 1.0


def test_of_equal_logits_the_smaller_class_comes_first():
    constant, labels = torch.zeros(10, 10), torch.arange(10)
    assert top_k_accuracy(constant, labels, k=(1, 5)) == {"top1": 0.1, "top5": 0.5}
    assert top_k_accuracy(constant, torch.full((10,), 9), k=(1, 5, 9)) == {"top1": 0.0, "top5": 0.0, "top9": 0.0}
    tie = torch.tensor([[0.0, 7, 7]])
    assert top_k_accuracy(tie, torch.tensor([1]), k=(1,)) == {"top1": 1.0}
    assert top_k_accuracy(tie, torch.tensor([2]), k=(1, 2)) == {"top1": 0.0, "top2": 1.0}


def test_half_precision_logits_are_fine():
    logits = torch.tensor([[0.0, 2, 1], [2, 0, 1]], dtype=torch.bfloat16)
    assert top_k_accuracy(logits, torch.tensor([1, 2]), k=(1,)) == {"top1": 0.5}


def test_errors_name_the_row():
    logits, labels = torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])
    with pytest.raises(ValueError, match=r"logits has shape \(4,\)"):
        top_k_accuracy(logits[:, 0], labels)
    with pytest.raises(ValueError, match=r"logits has shape \(0, 3\)"):
        top_k_accuracy(logits[:0], labels[:0])
    with pytest.raises(ValueError, match=r"labels has shape \(3,\)"):
        top_k_accuracy(logits, labels[:3])
    with pytest.raises(ValueError, match="dtype torch.float32"):
        top_k_accuracy(logits, labels.float())
    with pytest.raises(ValueError, match=r"labels\[2\]=2 is not in \[0, 2\)"):
        top_k_accuracy(logits[:, :2], labels)
    with pytest.raises(ValueError, match=r"labels\[1\]=-1"):
        top_k_accuracy(logits, torch.tensor([0, -1, 2, 0]))
    with pytest.raises(ValueError, match=r"k=\(0, 5\)"):
        top_k_accuracy(logits, labels, k=(0, 5))
    logits[3, 1] = float("nan")
    with pytest.raises(ValueError, match="NaN in row 3"):
        top_k_accuracy(logits, labels)
