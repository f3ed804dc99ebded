"""Average precision of ranked answers: known by hand, and scikit-learn's where no similarities are equal."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from modeling_ehm.training.metrics import average_precision, retrieval_scores


def test_average_precision_known_by_hand():
    assert average_precision([True, False, True, False, False]) == pytest.approx((1 / 1 + 2 / 3) / 2)
    assert average_precision(torch.tensor([0, 0, 0, 1])) == 1 / 4
    assert average_precision(np.array([True, True, False])) == 1.0


def test_scores_known_by_hand():
    similarity = torch.tensor([[0.9, 0.8, 0.1, 0.0], [0.2, 0.9, 0.1, 0.3], [0.1, 0.2, 0.3, 0.4]])
    database_groups = torch.tensor([7, 8, 7, 9])  # 7 twice
    # Ranks: query 0 finds group 7 first and third; query 1 finds group 8 first; query 2 finds group 8 third.
    scores = retrieval_scores(similarity, torch.tensor([7, 8, 8]), database_groups, tags=["crop", "turn", "crop"])
    first = (1 + 2 / 3) / 2
    assert scores == {
        "map": pytest.approx((first + 1 + 1 / 3) / 3),
        "recall_at_1": pytest.approx(2 / 3),
        "map_crop": pytest.approx((first + 1 / 3) / 2),
        "map_turn": 1.0,
    }
    assert set(retrieval_scores(similarity, torch.tensor([7, 8, 8]), database_groups)) == {"map", "recall_at_1"}


def test_map_equals_sklearn():
    generator = np.random.default_rng(0)
    database_groups, query_groups = generator.integers(8, size=60), np.arange(24) % 8
    relevant = query_groups[:, None] == database_groups
    similarity = generator.normal(size=(24, 60)) + relevant
    expected = [average_precision_score(row, values) for row, values in zip(relevant, similarity, strict=True)]
    scores = retrieval_scores(similarity, query_groups, database_groups, [f"turn-{i % 3}" for i in range(24)])
    assert scores["map"] == pytest.approx(np.mean(expected), abs=1e-12)
    assert scores["map_turn-1"] == pytest.approx(np.mean(expected[1::3]), abs=1e-12)
    assert scores["recall_at_1"] == np.mean(relevant[np.arange(24), similarity.argmax(1)])
    assert 0.2 < scores["map"] < 0.9


def test_of_equal_similarities_the_wrong_answers_come_first():
    database_groups = torch.arange(10)
    for group in range(10):  # wherever the right answer stands
        scores = retrieval_scores(torch.ones(1, 10), torch.tensor([group]), database_groups)
        assert scores == {"map": 1 / 10, "recall_at_1": 0.0}
    tie = torch.tensor([[0.5, 0.5, 0.9, 0.1]])
    assert retrieval_scores(tie, torch.tensor([0]), torch.tensor([0, 1, 2, 3]))["map"] == 1 / 3


def test_errors_name_the_query():
    similarity, queries, database = torch.rand(2, 3), torch.tensor([0, 1]), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match="query 1 of group 5 has no match in the database"):
        retrieval_scores(similarity, torch.tensor([0, 5]), database)
    with pytest.raises(ValueError, match=r"similarity has shape \(2, 3\); \(2, 2\) is expected"):
        retrieval_scores(similarity, queries, database[:2])
    with pytest.raises(ValueError, match="query_groups .* dtype float32"):
        retrieval_scores(similarity, queries.float(), database)
    with pytest.raises(ValueError, match="tags has 1 names, there are 2 queries"):
        retrieval_scores(similarity, queries, database, ["crop"])
    with pytest.raises(ValueError, match="infinite values in row 1"):
        retrieval_scores(similarity / torch.tensor([[1.0], [0.0]]), queries, database)
    with pytest.raises(ValueError, match="0 right answers"):
        average_precision([False, False])
