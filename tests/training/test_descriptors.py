"""Descriptors: pooling, whitening and local matching by hand; FAISS finds what exact search finds."""

import pytest
import torch
import torch.nn.functional as F

from modeling_ehm.training.descriptors import (
    fit_whitening,
    local_similarity,
    nearest,
    padded,
    pool,
    snapped_size,
    whiten,
)


def test_sizes_snap_to_the_patch():
    assert snapped_size((180, 240), 1.0, (8, 8)) == (176, 240)  # 22.5 patches round to the even 22
    assert snapped_size((30, 45), 0.5, (8, 8)) == (16, 24)
    assert snapped_size((3, 100), 1.0, (8, 16)) == (8, 96)


def test_pooling_by_hand():
    tokens = torch.tensor([[[9.0, 9.0], [1.0, -4.0], [3.0, 2.0]]])  # class token, two patches
    assert pool(tokens, "cls").tolist() == [[9, 9]]
    assert pool(tokens, "mean").tolist() == [[2, -1]]
    gem = pool(tokens, "gem", 2.0)  # sqrt((1 + 9) / 2), and the negative feature counts as nothing
    assert gem[0].tolist() == pytest.approx([5**0.5, 2**0.5], rel=1e-4)
    assert pool(tokens.abs(), "gem", 1.0)[0].tolist() == pytest.approx([2, 3])
    assert pool(tokens.abs(), "gem", 30.0)[0].tolist() == pytest.approx([3, 4], rel=0.03)


def test_whitened_features_have_the_identity_as_covariance():
    torch.manual_seed(0)
    features = torch.randn(500, 4) @ torch.randn(4, 4) + 3
    mean, matrix = fit_whitening(features, 0.0)
    made = (features - mean) @ matrix
    assert torch.allclose(made.mean(0), torch.zeros(4), atol=1e-4)
    assert torch.allclose(torch.cov(made.T, correction=0), torch.eye(4), atol=1e-3)
    assert torch.allclose(whiten(features, mean, matrix), F.normalize(made, dim=1), atol=1e-6)


def test_shrinkage_and_kept_directions():
    """Variances 4 and 0: without shrinkage the empty direction would be blown up; half shrunk it counts as 1, not 0."""
    features = torch.tensor([[2.0, 0.0], [-2.0, 0.0]])
    mean, matrix = fit_whitening(features, 0.5)
    assert matrix.abs().amax(0).tolist() == pytest.approx([3**-0.5, 1])  # (4 + 2) / 2 and (0 + 2) / 2
    assert fit_whitening(features, 0.5, num_kept=1)[1].shape == (2, 1)
    rotated = fit_whitening(features, 1.0)[1]
    assert torch.allclose(rotated.T @ rotated, torch.eye(2) / 2)  # a rotation over sqrt(mean variance 2)


def test_local_similarity_by_hand():
    """Two images, the second padded: best cosines both ways, padding never counts."""
    a, b, c = torch.eye(3)
    query = torch.stack([a, b])
    tokens, is_token = padded([torch.stack([a, c, c]), torch.stack([-a])])
    assert is_token.tolist() == [[True, True, True], [True, False, False]]
    there, back = local_similarity(query, tokens, is_token)
    assert there.tolist() == [0.5, -0.5]  # a is found, b is orthogonal; and of -a, a has -1 and b 0
    assert back.tolist() == pytest.approx([1 / 3, 0])


def test_a_part_is_found_wherever_it_lies():
    torch.manual_seed(0)
    whole = F.normalize(torch.randn(20, 8), dim=1)
    there, _ = local_similarity(whole[5:9], *padded([whole, F.normalize(torch.randn(20, 8), dim=1)]))
    assert there[0] == pytest.approx(1, abs=1e-6) and there[1] < 0.95


def test_faiss_finds_what_exact_search_finds():
    torch.manual_seed(0)
    database, queries = (F.normalize(torch.randn(n, 16), dim=1) for n in (50, 7))
    exact = nearest(database, queries, 10, use_faiss=False)
    assert exact.shape == (7, 10) and torch.equal(exact[:, 0], (queries @ database.T).argmax(1))
    assert torch.equal(nearest(database, queries, 10, use_faiss=True), exact)
    assert torch.equal(nearest(database, queries, 10), exact)
