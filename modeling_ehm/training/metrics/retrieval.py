"""Figures of retrieval: how far up the ranked database the right images stand.

Letters: Q queries, N database images.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray | Tensor


def average_precision(ranked_relevance: Array | Sequence[bool]) -> float:
    """Mean, over the right answers, of the share of right ones among all answers up to and with it.

    Args:
        ranked_relevance: `(N,)` bool, best answer first, True = right; all right answers must be in it.

    Returns:
        In (0, 1]; 1 if all right answers come first.

    Raises:
        ValueError: not one-dimensional, or without a right answer, for which the figure has no value.
    """
    relevance = torch.as_tensor(ranked_relevance).detach().cpu().numpy().astype(bool)
    if relevance.ndim != 1 or not relevance.any():
        raise ValueError(
            f"ranked_relevance has shape {relevance.shape} and {relevance.sum()} right answers; one row with at least"
            " one is expected"
        )
    places = np.flatnonzero(relevance) + 1
    return float(np.mean(np.arange(1, len(places) + 1) / places))


def retrieval_scores(
    similarity: Array,
    query_groups: Array | Sequence,
    database_groups: Array | Sequence,
    tags: Sequence[str] | None = None,
) -> dict[str, float]:
    """Mean average precision, and how often the first answer is right.

    Every database image of the query's group is a right answer. Of images that are equally similar the wrong ones come
    first, so that a constant similarity scores as low as it can, whatever the order of the database. A query must not
    be in the database itself: it would find itself.

    Args:
        similarity: `(Q, N)`, the higher the more alike.
        query_groups: `(Q,)` integers, what each query shows.
        database_groups: `(N,)` integers; duplicates are several right answers.
        tags: `(Q,)` names, for instance of the alteration each query was made by; None for no breakdown.

    Returns:
        `map`, the mean of the average precision over the queries; `recall_at_1`, the share of queries whose first
        answer is right; and for each tag, by name, `map_<tag>` over its queries. In [0, 1].

    Raises:
        ValueError: shapes that do not fit, no queries, NaN or infinite similarities, a query whose group is not in the
            database.
    """
    similarity = torch.as_tensor(similarity).detach().cpu().double().numpy()
    queries, database = _groups("query_groups", query_groups), _groups("database_groups", database_groups)
    if similarity.shape != (len(queries), len(database)) or 0 in similarity.shape:
        raise ValueError(
            f"similarity has shape {similarity.shape}; ({len(queries)}, {len(database)}) is expected, a row for each of"
            " query_groups and a column for each of database_groups, at least 1 of each"
        )
    if not np.isfinite(similarity).all():
        row = int((~np.isfinite(similarity)).any(1).nonzero()[0][0])
        raise ValueError(f"similarity holds NaN or infinite values in row {row}; look for descriptors of length 0")
    if tags is not None and len(tags) != len(queries):
        raise ValueError(f"tags has {len(tags)} names, there are {len(queries)} queries")
    precisions, first = np.zeros(len(queries)), np.zeros(len(queries))
    for row, group in enumerate(queries):
        relevant = database == group
        if not relevant.any():
            raise ValueError(
                f"query {row} of group {group} has no match in the database; add an image of its group, or drop it"
            )
        ranked = relevant[np.lexsort((relevant, -similarity[row]))]  # by similarity; of equals, wrong ones first
        precisions[row], first[row] = average_precision(ranked), ranked[0]
    scores = {"map": float(precisions.mean()), "recall_at_1": float(first.mean())}
    for tag in sorted(set(tags or ())):
        scores[f"map_{tag}"] = float(precisions[[name == tag for name in tags]].mean())
    return scores


def _groups(name: str, groups: Array | Sequence) -> np.ndarray:
    groups = torch.as_tensor(groups).detach().cpu().numpy()
    if groups.ndim != 1 or groups.dtype.kind not in "iu":
        raise ValueError(f"{name} has shape {groups.shape} and dtype {groups.dtype}; a list of integers is expected")
    return groups


__all__ = ["average_precision", "retrieval_scores"]
