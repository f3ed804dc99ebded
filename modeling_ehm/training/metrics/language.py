"""Figures of texts that a model wrote: answers to questions, and captions."""

import math
import re
from collections import Counter
from collections.abc import Sequence

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = re.compile(r"[^\w\s']")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {word: str(number) for number, word in enumerate(NUMBERS)} | {"none": "0"}
TRUE, FALSE = {"true", "yes"}, {"false", "no"}


def normalized(text: str) -> str:
    """Lower case, without punctuation and articles, numbers as digits, single spaces.

    Source: the gist of the VQA evaluation (Antol et al. 2015); its table of contractions is left out.
    """
    plain = PUNCTUATION.sub(" ", text.lower())
    words = ARTICLES.sub(" ", plain).split() or plain.split()  # "A" may be an answer
    return " ".join(DIGITS.get(word, word) for word in words)


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share of predictions that equal one of their references after `normalized`, in [0, 1]."""
    _check_lengths(predictions, references)
    hits = [
        normalized(text) in {normalized(reference) for reference in accepted}
        for text, accepted in zip(predictions, references, strict=True)
    ]
    return sum(hits) / len(hits)


def vqa_accuracy(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """VQA accuracy in [0, 1]: an answer that three others of ten people gave counts fully.

    Mean over the ways to leave one person out of min(agreeing / 3, 1). With a single reference it is exact match.
    Source: Antol et al. 2015, https://visualqa.org/evaluation.html.
    """
    _check_lengths(predictions, references)
    total = 0.0
    for text, people in zip(predictions, references, strict=True):
        given, answer = [normalized(person) for person in people], normalized(text)
        if len(given) == 1:
            total += answer == given[0]
            continue
        agreeing = given.count(answer)
        others = [agreeing - (person == answer) for person in given]
        total += sum(min(count / 3, 1) for count in others) / len(others)
    return total / len(predictions)


def true_false_accuracy(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share of right answers among questions whose reference, the commonest of several, is true, false, yes or no.

    Whatever else is said, but for more behind a comma, is wrong.

    NaN if there is no such question.
    """
    _check_lengths(predictions, references)
    right = count = 0
    for text, accepted in zip(predictions, references, strict=True):
        truth = _truth(Counter(accepted).most_common(1)[0][0])
        if truth is None:
            continue
        count += 1
        right += _truth(text.split(",")[0]) is truth  # "Yes, it is"
    return right / count if count else math.nan


def _truth(text: str) -> bool | None:
    word = normalized(text)
    return True if word in TRUE else False if word in FALSE else None


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]], max_order: int = 4) -> float:
    """Corpus BLEU in [0, 1] without smoothing, on the words of `normalized`.

    Source: Papineni et al. 2002; of several references the one of the nearest length counts for the brevity penalty.
    """
    _check_lengths(predictions, references)
    matched, possible = [0] * max_order, [0] * max_order
    length = reference_length = 0
    for text, accepted in zip(predictions, references, strict=True):
        words, others = normalized(text).split(), [normalized(reference).split() for reference in accepted]
        length += len(words)
        reference_length += min((abs(len(other) - len(words)), len(other)) for other in others)[1]
        for order in range(1, max_order + 1):
            found, allowed = _ngrams(words, order), Counter()
            for other in others:
                allowed |= _ngrams(other, order)
            matched[order - 1] += (found & allowed).total()
            possible[order - 1] += found.total()
    if min(matched) == 0:
        return 0.0
    precision = sum(math.log(m / p) for m, p in zip(matched, possible, strict=True)) / max_order
    return math.exp(precision + min(0.0, 1 - reference_length / length))


def cider(predictions: Sequence[str], references: Sequence[Sequence[str]], max_order: int = 4) -> float:
    """CIDEr-D, 0 and up, 10 for perfect captions: cosines of TF-IDF weighted n-grams, mean over 1 to 4 words.

    Words are those of `normalized`, without the stemming of the original. Document frequencies are those of the
    references given here, so single images score 0. Source: Vedantam et al. 2015.
    """
    _check_lengths(predictions, references)
    sigma, scale = 6.0, 10.0
    tokens = [
        (normalized(text).split(), [normalized(reference).split() for reference in accepted])
        for text, accepted in zip(predictions, references, strict=True)
    ]
    total = 0.0
    for order in range(1, max_order + 1):
        frequency = Counter()
        for _, others in tokens:
            frequency.update(set().union(*(_ngrams(other, order) for other in others)))
        log_count = math.log(len(tokens))

        def weighted(words: list[str], order=order, frequency=frequency, log_count=log_count) -> dict:
            return {
                gram: count * (log_count - math.log(max(frequency[gram], 1)))
                for gram, count in _ngrams(words, order).items()
            }

        for words, others in tokens:
            mine = weighted(words)
            for other in others:
                theirs = weighted(other)
                clipped = sum(min(value, theirs[gram]) * theirs[gram] for gram, value in mine.items() if gram in theirs)
                norm = _norm(mine) * _norm(theirs)
                penalty = math.exp(-((len(words) - len(other)) ** 2) / (2 * sigma**2))
                total += penalty * clipped / norm / len(others) if norm else 0.0
    return scale * total / max_order / len(tokens)


def named_share(predictions: Sequence[str], names: Sequence[str]) -> float:
    """Share of texts in which the right name occurs as whole words, in [0, 1]."""
    _check_lengths(predictions, names)
    hits = [f" {normalized(name)} " in f" {normalized(text)} " for text, name in zip(predictions, names, strict=True)]
    return sum(hits) / len(hits)


def _ngrams(words: list[str], order: int) -> Counter:
    return Counter(tuple(words[i : i + order]) for i in range(len(words) - order + 1))


def _norm(weights: dict) -> float:
    return math.sqrt(sum(value**2 for value in weights.values()))


def _check_lengths(predictions: Sequence, references: Sequence) -> None:
    if len(predictions) != len(references) or not predictions:
        raise ValueError(
            f"{len(predictions)} predictions for {len(references)} references; one each, and at least one, is expected"
        )
