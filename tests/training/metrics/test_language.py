"""Figures of answers and captions, against cases by hand."""

import math

import pytest

from modeling_ehm.training.metrics import (
    as_evaluate_metric,
    bleu,
    cider,
    exact_match,
    named_share,
    true_false_accuracy,
    vqa_accuracy,
)
from modeling_ehm.training.metrics.language import normalized


def test_texts_are_compared_without_case_articles_and_punctuation():
    assert normalized("  The TWO  red cats, sitting. ") == "2 red cats sitting"
    assert exact_match(["A dog.", "cat", ""], [["the Dog"], ["dog"], ["yes"]]) == pytest.approx(1 / 3)
    assert exact_match(["grey"], [["gray", "grey"]]) == 1
    assert exact_match(["", "a", "B"], [["A"], ["A"], ["b."]]) == pytest.approx(2 / 3)


def test_vqa_accuracy_leaves_one_person_out():
    """Ten people. Two agree: eight times 2/3, twice 1/3; three agree: 7 times 1, 3 times 2/3; four: always 1."""
    people = ["red"] * 2 + ["blue"] * 3 + ["green"] * 4 + ["pink"]
    expected = {"red": 0.6, "blue": 0.9, "green": 1.0, "pink": 9 / 10 / 3, "black": 0.0}
    for answer, value in expected.items():
        assert vqa_accuracy([answer], [people]) == pytest.approx(value)
    assert vqa_accuracy(["red", "x"], [["Red"], ["y"]]) == 0.5


def test_true_and_false_are_judged_alone():
    predictions = ["Yes, it is", "no", "perhaps", "red", "true"]
    references = [["yes"], ["yes"], ["no"], ["red"], ["True"]]
    assert true_false_accuracy(predictions, references) == 2 / 4
    assert math.isnan(true_false_accuracy(["red"], [["red"]]))
    assert math.isnan(true_false_accuracy(["no parking"], [["No Parking"]]))
    assert true_false_accuracy(["no"], [["yes", "no", "no"]]) == 1


def test_bleu_by_hand():
    """Papineni's example of clipping: 2 of 7; short texts pay exp(1 - 4 / 2)."""
    words = ["it it it it it it it"]
    assert bleu(words, [["it is on it"]], 1) == pytest.approx(2 / 7)
    assert bleu(["red cat"], [["red cat sat there"]], 2) == pytest.approx(math.exp(-1))
    assert bleu(["red cat sat there"], [["red cat sat there"]]) == 1
    assert bleu(["red cat"], [["red cat"]]) == 0  # no run of four words


def test_cider_by_hand():
    """One word each: of two images with different references, the idf is log 2, the cosine 1 or 0."""
    assert cider(["red", "red"], [["red"], ["blue"]], 1) == pytest.approx(10 / 2)
    assert cider(["red"], [["red"]], 1) == 0  # in every reference: no weight
    perfect = ["red cat sat there", "blue dog ran far away"]
    assert cider(perfect, [[text] for text in perfect]) == pytest.approx(10)


def test_names_are_whole_words():
    assert named_share(["a photo of a sea slug.", "a slug"], ["sea slug", "lug"]) == 0.5


@pytest.mark.parametrize("figure", [exact_match, vqa_accuracy, true_false_accuracy, bleu, cider])
def test_unequal_numbers_are_refused(figure):
    for predictions, references in ((["a"], []), ([], [])):
        with pytest.raises(ValueError, match=f"{len(predictions)} predictions for {len(references)} references"):
            figure(predictions, references)


def test_evaluate_gives_the_same():
    metric = as_evaluate_metric("answer_scores")
    metric.add(predictions="red", references=["red", "red", "blue"])
    metric.add_batch(predictions=["no"], references=[["yes"]])
    predictions, references = ["red", "no"], [["red", "red", "blue"], ["yes"]]
    scores = metric.compute()
    assert scores == {
        "exact_match": exact_match(predictions, references),
        "vqa_accuracy": vqa_accuracy(predictions, references),
        "true_false_accuracy": 0.0,
    }
    metric = as_evaluate_metric("caption_scores")
    metric.add_batch(predictions=["red cat", "dog"], references=[["red cat"], ["blue dog"]])
    scores = metric.compute(names=["cat", "cow"])
    assert scores["named"] == 0.5 and scores["cider"] == cider(["red cat", "dog"], [["red cat"], ["blue dog"]])
