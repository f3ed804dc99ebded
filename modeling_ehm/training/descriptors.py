"""Descriptors of whole images and of their patches, for retrieval; pure functions over tensors.

Letters: n m images, N patches of an image, T tokens of a set, D width, K kept dimensions.
"""

import importlib.util

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

GEM_FLOOR = 1e-6  # GeM takes powers of features, which must not be negative


def snapped_size(size: tuple[int, int], scale: float, patch_size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) at a scale, each side the nearest multiple of the patch, at least one patch."""
    return tuple(max(1, round(side * scale / patch)) * patch for side, patch in zip(size, patch_size, strict=True))


def pool(tokens: Tensor, kind: str, gem_p: float = 3.0) -> Tensor:
    """Descriptors of images: `(n, 1 + N, D)`, class token first, -> `(n, D)`.

    Args:
        tokens: Of images of one size.
        kind: "mean" of the patches; "gem", their generalised mean (Radenovic et al. 2018), negative features taken as
            0; "cls", the class token.
        gem_p: Power of "gem": 1 is the mean of the positive parts, large ones approach the maximum.
    """
    if kind == "cls":
        return tokens[:, 0]
    if kind == "mean":
        return tokens[:, 1:].mean(1)
    return tokens[:, 1:].clamp(min=GEM_FLOOR).pow(gem_p).mean(1).pow(1 / gem_p)


def fit_whitening(features: Tensor, shrinkage: float, num_kept: int | None = None) -> tuple[Tensor, Tensor]:
    """PCA whitening: with mean and matrix, `(features - mean) @ matrix` has the identity as covariance.

    Args:
        features: `(T, D)`.
        shrinkage: Share in [0, 1] of the mean variance that is mixed into each direction's, so that directions in which
            little happens are not blown up; 0 whitens wholly, 1 only rotates and scales.
        num_kept: K, the directions of largest variance that are kept; None keeps all.

    Returns:
        Mean `(D,)` and matrix `(D, K)`, float32.
    """
    features = features.double()
    mean = features.mean(0)
    centred = features - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(features))  # ascending
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    values = (1 - shrinkage) * values + shrinkage * values.mean()
    matrix = vectors * values.clamp(min=1e-12).rsqrt()
    return mean.float(), matrix[:, :num_kept].float()


def whiten(features: Tensor, mean: Tensor, matrix: Tensor) -> Tensor:
    """`(..., D)` -> `(..., K)` of unit length."""
    return F.normalize((features - mean) @ matrix, dim=-1)


def nearest(database: Tensor, queries: Tensor, count: int, use_faiss: bool | None = None) -> Tensor:
    """Rows of the `count` nearest database descriptors of each query by inner product, best first; `(n, count)` int64.

    Args:
        database: `(m, K)`.
        queries: `(n, K)`.
        count: At most m.
        use_faiss: Whether to search through `datasets`' index of FAISS; None does where `faiss` is installed. Both ways
            are exact.
    """
    if use_faiss is None:
        use_faiss = importlib.util.find_spec("faiss") is not None
    if not use_faiss:
        return (queries @ database.T).topk(count, dim=1).indices
    import datasets
    import faiss

    index = datasets.Dataset.from_dict({"row": range(len(database))})
    index.add_faiss_index_from_external_arrays(
        external_arrays=database.numpy().astype(np.float32),
        index_name="descriptor",
        metric_type=faiss.METRIC_INNER_PRODUCT,
    )
    found = index.search_batch("descriptor", queries.numpy().astype(np.float32), k=count).total_indices
    return torch.from_numpy(np.asarray(found, dtype=np.int64))


def padded(tokens: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Token sets of any sizes `(S_j, K)` -> `(m, S, K)`, and which of these are no padding, `(m, S)` bool.

    Padding repeats a set's first token, so that a maximum over tokens needs no mask.
    """
    lengths = torch.tensor([len(t) for t in tokens])
    is_token = torch.arange(lengths.max()) < lengths[:, None]
    stacked = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
    return torch.where(is_token[..., None], stacked, stacked[:, :1]), is_token


def local_similarity(query: Tensor, database: Tensor, is_token: Tensor) -> tuple[Tensor, Tensor]:
    """How well the patches of a query are found in database images, and the other way round.

    Args:
        query: `(T, K)`, tokens of unit length.
        database: `(m, S, K)`, tokens of unit length, as `padded` stacks them.
        is_token: `(m, S)` bool, as `padded` gives it.

    Returns:
        `(m,)` each: the mean, over the query's tokens, of the best cosine in the image; and the mean, over the image's
        tokens, of the best cosine in the query.
    """
    cosine = query @ database.transpose(1, 2)  # (m, T, S)
    there = cosine.amax(2).mean(1)
    back = (cosine.amax(1) * is_token).sum(1) / is_token.sum(1)
    return there, back
