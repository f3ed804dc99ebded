"""Figures: answers known by hand, and scikit-learn's where it has the same figure."""

import numpy as np
import pytest
import torch

from modeling_ehm.hierarchy_ehm import build_hierarchy
from modeling_ehm.training.metrics import (
    block_labels,
    hierarchy_accuracy,
    knn_accuracy,
    linear_probe_accuracy,
    mask_statistics,
    partition_scores,
    patch_segments,
    reference_partition_accuracy,
    segment_counts,
)


def clusters(num_images: int, width: int = 6, spread: float = 0.1, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of three classes around three axes."""
    labels = torch.arange(num_images) % 3
    noise = torch.randn(num_images, width, generator=torch.Generator().manual_seed(seed))
    return torch.eye(3, width)[labels] + spread * noise, labels


def tree_of(segments: torch.Tensor, grid_size: tuple[int, int] | None = None):
    """Trees of an affinity that is 1 within a segment and 0 across, so that the right cut finds the segments."""
    return build_hierarchy((segments[:, :, None] == segments[:, None]).float(), grid_size=grid_size)


# k-NN


def test_knn_finds_separated_clusters():
    train, test = clusters(60), clusters(30, seed=1)
    assert knn_accuracy(*train, *test) == 1.0
    assert knn_accuracy(train[0].numpy(), train[1].numpy(), test[0].numpy(), test[1].numpy()) == 1.0
    assert knn_accuracy(*train, test[0], (test[1] + 1) % 3) == 0.0


def test_knn_weighs_by_cosine():
    # One neighbour at cosine 1 against two at 0.8: exp(1 / t) beats 2 exp(0.8 / t) if t is below 0.2 / ln 2 = 0.29.
    train, labels = torch.tensor([[1.0, 0], [0.8, 0.6], [0.8, -0.6]]), torch.tensor([5, 9, 9])
    test = torch.tensor([[2.0, 0]])
    assert knn_accuracy(train, labels, test, torch.tensor([5]), k=3, temperature=0.28) == 1.0
    assert knn_accuracy(train, labels, test, torch.tensor([9]), k=3, temperature=0.30) == 1.0
    assert knn_accuracy(train, labels, test, torch.tensor([5]), k=1, temperature=0.30) == 1.0


def test_knn_with_fewer_images_than_k_and_with_ties():
    train = torch.ones(4, 2)  # all equally near: the first two count, and their equal votes go to the smaller label
    labels = torch.tensor([7, 3, 3, 3])
    assert knn_accuracy(train, labels, train[:1], torch.tensor([3]), k=2) == 1.0
    assert knn_accuracy(train, labels, train[:1], torch.tensor([7]), k=1) == 1.0
    assert knn_accuracy(train, labels, train[:1], torch.tensor([3]), k=20) == 1.0


def test_knn_equals_sklearn():
    from sklearn.neighbors import KNeighborsClassifier

    train, test = clusters(700, spread=0.6), clusters(600, spread=0.6, seed=1)  # more test images than one chunk
    reference = KNeighborsClassifier(20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    reference.fit(train[0].numpy(), train[1].numpy())
    expected = (reference.predict(test[0].numpy()) == test[1].numpy()).mean()
    assert 0.5 < expected < 1
    assert knn_accuracy(*train, *test) == pytest.approx(expected, abs=1e-9)


# Ridge probe


def test_probe_finds_separated_clusters_whatever_the_scale_of_a_feature():
    train, test = clusters(90), clusters(30, seed=1)
    scale, shift = torch.tensor([1e4, 1, 1e-3, 1, 0, 1]), torch.tensor([0.0, 1e3, 0, 0, 5, 0])  # one is constant
    assert linear_probe_accuracy(*train, *test) == 1.0
    assert linear_probe_accuracy(train[0] * scale + shift, train[1], test[0] * scale + shift, test[1]) == 1.0


def test_probe_equals_sklearn_ridge():
    from sklearn.linear_model import RidgeClassifier
    from sklearn.preprocessing import StandardScaler

    train, test = clusters(300, spread=0.7), clusters(200, spread=0.7, seed=1)
    scaler = StandardScaler().fit(train[0].numpy())
    reference = RidgeClassifier(alpha=0.01 * 300).fit(scaler.transform(train[0].numpy()), train[1].numpy())
    expected = reference.score(scaler.transform(test[0].numpy()), test[1].numpy())
    assert 0.5 < expected < 1
    assert linear_probe_accuracy(*train, *test, ridges=[0.01]) == pytest.approx(expected)


def test_probe_picks_a_strength_on_held_out_images():
    # 60 images of width 80: without a strong ridge the map fits noise.
    train, test = clusters(60, width=80, spread=0.5), clusters(300, width=80, spread=0.5, seed=1)
    chosen = linear_probe_accuracy(*train, *test, ridges=[1e-9, 10.0])
    assert chosen in [linear_probe_accuracy(*train, *test, ridges=[ridge]) for ridge in (1e-9, 10.0)]
    assert chosen == linear_probe_accuracy(*train, *test, ridges=[10.0, 1e-9])  # the order does not matter


def test_probe_needs_no_seed():
    train, test = clusters(50, spread=0.7), clusters(50, spread=0.7, seed=1)
    state = torch.get_rng_state()
    assert linear_probe_accuracy(*train, *test) == linear_probe_accuracy(*train, *test)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("metric", [knn_accuracy, linear_probe_accuracy])
def test_feature_errors_name_the_argument(metric):
    (train, labels), (test, test_labels) = clusters(9), clusters(3)
    with pytest.raises(ValueError, match=r"train_features has shape \(9,\)"):
        metric(train[:, 0], labels, test, test_labels)
    with pytest.raises(ValueError, match="train_labels has shape"):
        metric(train, labels[:8], test, test_labels)
    with pytest.raises(ValueError, match="test_labels .* dtype torch.float32"):
        metric(train, labels, test, test_labels.float())
    with pytest.raises(ValueError, match="test_features has width 5, train_features has 6"):
        metric(train, labels, test[:, :5], test_labels)
    with pytest.raises(ValueError, match="test_features holds NaN"):
        metric(train, labels, test * float("nan"), test_labels)


def test_option_errors():
    (train, labels), test = clusters(9), clusters(3)
    with pytest.raises(ValueError, match="k=0"):
        knn_accuracy(train, labels, *test, k=0)
    with pytest.raises(ValueError, match="temperature=0"):
        knn_accuracy(train, labels, *test, temperature=0)
    with pytest.raises(ValueError, match=r"ridges=\[0.0\]"):
        linear_probe_accuracy(train, labels, *test, ridges=[0.0])
    with pytest.raises(ValueError, match="at least 2"):
        linear_probe_accuracy(train[:1], labels[:1], *test)


# Segments of patches


def test_patch_takes_its_majority_segment():
    segments = torch.tensor([[[0, 0, 5, 5], [0, 3, 5, 5], [1, 2, 9, 9], [2, 1, 9, 4]]])
    assert patch_segments(segments, (2, 2)).tolist() == [[0, 5, 1, 9]]  # 1 and 2 tie: the smaller number
    assert patch_segments(segments[:, :2].numpy(), (1, 2)).tolist() == [[0, 5]]


def test_patch_is_ignored_if_most_of_its_pixels_are():
    segments = torch.tensor([[[255, 255, 255, 255], [255, 3, 7, 7]]])
    assert patch_segments(segments, (1, 2), ignore_index=255).tolist() == [[-1, 7]]  # half is not most
    assert patch_segments(segments, (1, 2)).tolist() == [[255, 7]]
    assert patch_segments(segments.where(segments != 255, -100), (1, 2), ignore_index=-100).tolist() == [[-1, 7]]


def test_segment_errors():
    with pytest.raises(ValueError, match=r"5x4 pixels, not a multiple of grid_size=\(2, 2\)"):
        patch_segments(torch.zeros(1, 5, 4, dtype=torch.long), (2, 2))
    with pytest.raises(ValueError, match="segments holds -1"):
        patch_segments(torch.full((1, 4, 4), -1), (2, 2))
    with pytest.raises(ValueError, match="torch.float32"):
        patch_segments(torch.zeros(1, 4, 4), (2, 2))


# Hierarchies


def test_perfect_hierarchy_scores_one():
    segments = torch.tensor([[4, 4, 0, 0, 9, 9], [1, 1, 1, 2, 2, 2]])  # three segments and two: two different cuts
    assert segment_counts(segments).tolist() == [3, 2]
    assert hierarchy_accuracy(tree_of(segments), segments) == {"ari": 1.0, "purity": 1.0, "iou": 1.0}


def test_scores_known_by_hand():
    # Nodes {0 1} {2 3 4 5}, segments {0 1 2} {3 4 5}. IoU 2/3 and 3/4; ARI from 15 pairs: 4 together in both,
    # 6 together in segments, 7 in nodes: (4 - 42/15) / (6.5 - 42/15) = 12/37.
    scores = partition_scores(torch.tensor([[0, 0, 1, 1, 1, 1]]), torch.tensor([[0, 0, 0, 1, 1, 1]]))
    assert scores["ari"].item() == pytest.approx(12 / 37)
    assert scores["purity"].item() == pytest.approx(5 / 6)
    assert scores["iou"].item() == pytest.approx((2 / 3 + 3 / 4) / 2)


def test_ari_equals_sklearn():
    from sklearn.metrics import adjusted_rand_score

    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (50, 36), generator=generator)
    segments = torch.where(torch.rand(50, 36, generator=generator) < 0.6, labels // 2 * 10, 3)
    segments[:25, :9] = -1
    expected = [adjusted_rand_score(s[s >= 0], p[s >= 0]) for p, s in zip(labels, segments, strict=True)]
    assert partition_scores(labels, segments)["ari"].tolist() == pytest.approx(expected, abs=1e-12)


def test_ignored_patches_and_plain_images_do_not_count():
    segments = torch.tensor([[0, 0, 1, 1, -1], [2, 2, 2, 2, -1]])  # the second shows one thing only
    labels = torch.tensor([[0, 0, 1, 1, 0], [0, 1, 2, 3, 4]])
    scores = partition_scores(labels, segments)
    assert scores["ari"].tolist() == [1.0, pytest.approx(float("nan"), nan_ok=True)]
    trees = tree_of(torch.tensor([[0, 0, 1, 1, 1], [0, 1, 2, 3, 4]]))
    assert hierarchy_accuracy(trees, segments) == {"ari": 1.0, "purity": 1.0, "iou": 1.0}


def test_hierarchy_errors():
    segments = torch.tensor([[0, 0, 1, 1]])
    with pytest.raises(ValueError, match=r"segments has shape \(1, 3\), the trees are over \(1, 4\)"):
        hierarchy_accuracy(tree_of(segments), segments[:, :3])
    with pytest.raises(ValueError, match="none of 1 images has at least 2"):
        hierarchy_accuracy(tree_of(segments), torch.tensor([[0, 0, 0, -1]]))
    with pytest.raises(ValueError, match=r"grid_size=\(3, 3\) does not hold the 4 patches"):
        reference_partition_accuracy(segments, (3, 3))


def test_blocks_are_equal_and_near_square():
    assert block_labels((2, 4), 2).tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    assert block_labels((4, 4), 4).reshape(4, 4)[::2, ::2].tolist() == [[0, 1], [2, 3]]
    for grid_size in ((1, 1), (1, 7), (3, 3), (2, 5), (14, 14)):
        for count in range(1, grid_size[0] * grid_size[1] + 1):
            assert block_labels(grid_size, count).unique().tolist() == list(range(count))
    assert block_labels((14, 14), 6).bincount().tolist() == [35, 28, 35, 35, 28, 35]
    with pytest.raises(ValueError, match="count=5"):
        block_labels((2, 2), 5)


def test_references_bracket_what_there_is_to_learn():
    segments = block_labels((8, 8), 4).repeat(40, 1)  # segments that are blocks
    reference = reference_partition_accuracy(segments, (8, 8))
    assert reference["blocks"] == {"ari": 1.0, "purity": 1.0, "iou": 1.0}
    assert reference["random"]["ari"] == pytest.approx(0, abs=0.02)
    assert 0.25 < reference["random"]["purity"] < 0.5
    assert reference == reference_partition_accuracy(segments, (8, 8))


# Masks


def test_mask_regions_known_by_hand():
    picture = """
        ##..
        #..#
        ...#
        #...
    """
    mask = torch.tensor([[character == "#" for character in "".join(picture.split())]])
    # Regions of 3, 2 and 1 patches (corners do not join). Side-by-side pairs: 3 are hidden, 13 touch a hidden patch.
    statistics = mask_statistics(mask, (4, 4))
    assert statistics["region_size"] == pytest.approx(2.0)
    assert statistics["largest_region_share"] == pytest.approx(0.5)
    assert statistics["compactness"] == pytest.approx(3 / 13)


def test_mask_statistics_average_over_images():
    snake = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    lone = torch.zeros(5, 5)
    lone[2, 2] = 1
    masks = torch.stack([snake.flatten() > 0, lone.flatten() > 0])
    assert mask_statistics(masks[:1], (5, 5))["region_size"] == 17  # one region, however winding
    assert mask_statistics(masks, (5, 5)) == {
        "region_size": (17 + 1) / 2,
        "largest_region_share": 1.0,
        "compactness": pytest.approx((16 / 34 + 0) / 2),  # 40 pairs: 16 hidden, 6 visible, 18 mixed
    }


def test_mask_regions_equal_scipy():
    from scipy.ndimage import label

    masks = torch.rand(40, 7 * 9, generator=torch.Generator().manual_seed(0)) < 0.55
    sizes = [np.bincount(label(mask.reshape(7, 9))[0].ravel())[1:] for mask in masks.numpy()]
    statistics = mask_statistics(masks.numpy(), (7, 9))
    assert statistics["region_size"] == pytest.approx(np.mean([size.mean() for size in sizes]))
    assert statistics["largest_region_share"] == pytest.approx(np.mean([size.max() / size.sum() for size in sizes]))


def test_random_masks_have_the_compactness_that_the_docstring_names():
    masks = torch.rand(500, 400, generator=torch.Generator().manual_seed(0)) < 0.75
    assert mask_statistics(masks, (20, 20))["compactness"] == pytest.approx(0.6, abs=0.01)


def test_mask_errors():
    mask = torch.ones(2, 16, dtype=torch.bool)
    with pytest.raises(ValueError, match="dtype torch.float32"):
        mask_statistics(mask.float(), (4, 4))
    with pytest.raises(ValueError, match=r"\(images, 20\)"):
        mask_statistics(mask, (4, 5))
    mask[1] = False
    with pytest.raises(ValueError, match="no patch of image 1"):
        mask_statistics(mask, (4, 4))
