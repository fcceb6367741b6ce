"""The scores of `pruning.scores` as SQL: one row an id, columns l0 … l{W-1} of losses in float64, NULL where one lacks.

Each score is written twice: `whole` is for trajectories without a gap and says which rows are none, `gappy` takes any.
Sums of squares are about an element of the trajectory itself, so that a constant's is exactly 0, and any other's loses
a factor of W of float64's precision at the most, however far from 0 it lies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations

LARGEST = 3.4028234663852886e38  # of float32, in which losses are logged; what is larger counts as infinite
SCORES = ("das", "spearman", "cosine", "settled")
LEAST = 3  # common checkpoints, below which a correlation is 0

Reference = Sequence[float | None]  # a loss a checkpoint; None where there is none to compare with


def whole(score: str, source: str, reference: Reference) -> str:
    """Return SQL of id and score for a source of id, l0 …, again, apart.

    The score is NULL where a loss is missing, infinite, huge or one too many, and NaN in rows that are apart.
    """
    known = _known(reference)
    first = next(iter(known), 0)
    source = _select(source, ["*", *(f"l{k} - l{first} AS d{k}" for k in range(len(reference)))])
    source = _select(source, ["*", f"{_plus(f'd{k} * d{k}' for k in range(len(reference)))} AS squares"])
    source = _select(
        source,
        [
            "*",
            f"coalesce(abs(l{first}) <= 1e37 AND isfinite(squares) AND squares <= 1e74, FALSE) AND again = 0 AS whole",
        ],
    )
    return _WHOLE[score](source, reference)


def gappy(score: str, source: str, reference: Reference) -> str:
    """Return SQL of id, score, gaps, bad, again; ``gaps`` counts missing losses, ``bad`` those that are not finite."""
    every = range(len(reference))
    source = _select(source, ["*", *(f"CASE WHEN {finite(f'l{k}')} THEN l{k} END AS v{k}" for k in every)])
    gaps = _plus(f"(l{k} IS NULL)::INTEGER" for k in every)
    bad = _plus(f"(l{k} IS NOT NULL AND v{k} IS NULL)::INTEGER" for k in every)
    seen = _plus(f"(v{k} IS NOT NULL)::INTEGER" for k in every)
    return _GAPPY[score](_select(source, ["*", f"{gaps} AS gaps", f"{bad} AS bad", f"{seen} AS seen"]), reference)


def finite(loss: str) -> str:
    """Return SQL of whether a loss is a number; comparisons alone DuckDB answers by footers' bounds, which skip NaN."""
    return f"(isfinite({loss}) AND abs({loss}) <= {LARGEST!r})"


def _select(source: str, columns: Sequence[str]) -> str:
    return f"SELECT {', '.join(columns)}\nFROM ({source})"


def _plus(terms: Iterable[str]) -> str:
    """Return the sum of terms as SQL in which none lies deep; 0 where there are none."""
    terms = list(terms)
    if len(terms) < 2:
        return terms[0] if terms else "0"
    half = len(terms) // 2
    return f"({_plus(terms[:half])} + {_plus(terms[half:])})"


def _known(reference: Reference) -> dict[int, float]:
    return {k: value for k, value in enumerate(reference) if value is not None}


# ---- trajectories without a gap: the reference's side is done beforehand --------------------------------------------


def _of_whole(source: str, score: str) -> str:
    return _select(source, ["id", f"CASE WHEN apart THEN 'NaN'::DOUBLE WHEN whole THEN {score} END::FLOAT AS score"])


def _aligned(source: str, shares: dict[int, float], values: str, square: str) -> str:
    """Return SQL of the correlation of columns ``values``{k} with ``shares``, 0 where ``square`` is none."""
    product = _plus(f"{values}{k} * {share!r}::DOUBLE" for k, share in shares.items())
    source = _select(source, ["*", f"{product} AS product", f"{square} AS square"])
    ratio = "greatest(-1, least(1, product / sqrt(square)))"
    return _of_whole(source, f"CASE WHEN square > 0 THEN {ratio} ELSE 0 END")


def _direction(reference: dict[int, float]) -> dict[int, float]:
    """Return a vector of the same direction and length 1; empty where it is 0, or too short for a correlation."""
    largest = max(map(abs, reference.values()), default=0)
    if len(reference) < LEAST or largest == 0:
        return {}
    scaled = {k: value / largest for k, value in reference.items()}
    length = math.sqrt(math.fsum(value * value for value in scaled.values()))
    return {k: value / length for k, value in scaled.items()}


def _das_whole(source: str, reference: Reference) -> str:
    known = _known(reference)
    shifted = {k: value - next(iter(known.values())) for k, value in known.items()}  # exactly 0 if it is constant
    mean = math.fsum(shifted.values()) / max(1, len(shifted))
    shares = _direction({k: value - mean for k, value in shifted.items()})
    if not shares:
        return _of_whole(source, "0")
    total = _plus(f"d{k}" for k in known)
    squares = "squares" if len(known) == len(reference) else _plus(f"d{k} * d{k}" for k in known)
    source = _select(source, ["*", f"{total} AS total"])
    return _aligned(source, shares, "d", f"{squares} - total * total / {len(known)}")


def _spearman_whole(source: str, reference: Reference) -> str:
    known = _known(reference)
    shares = _direction({k: float(sum(_sign(r - other) for other in known.values())) for k, r in known.items()})
    if not shares:
        return _of_whole(source, "0")
    source = _select(source, ["*", *(f"sign(l{i} - l{j})::INTEGER AS s{i}_{j}" for i, j in combinations(known, 2))])
    source = _select(source, ["*", *(f"{_rank('s', k, known)} AS rank{k}" for k in known)])
    return _aligned(source, shares, "rank", _plus(f"rank{k} * rank{k}" for k in known))


def _sign(x: float) -> int:
    return (x > 0) - (x < 0)


def _rank(signs: str, k: int, among: Iterable[int]) -> str:
    """Return SQL of twice the k-th rank about 0, out of the signs of all differences."""
    among = list(among)
    above, below = _plus(f"{signs}{k}_{j}" for j in among if j > k), _plus(f"{signs}{i}_{k}" for i in among if i < k)
    return f"({above} - {below})::DOUBLE"


def _cosine_whole(source: str, reference: Reference) -> str:
    shares = _direction(_known(reference))
    return _aligned(source, shares, "l", _plus(f"l{k} * l{k}" for k in shares))


def _settled_whole(source: str, reference: Reference) -> str:
    return _of_whole(source, f"-{_plus(f'l{k}' for k in range(len(reference)))} / {len(reference)}")


# ---- any trajectories: v{k} beside r{k}, the reference where there is a loss too -------------------------------------


def _of_gappy(source: str, score: str) -> str:
    score = f"CASE WHEN apart THEN 'NaN'::DOUBLE WHEN seen > 0 THEN {score} END::FLOAT AS score"
    return _select(source, ["id", score, "gaps", "bad", "again"])


def _common(source: str, reference: Reference) -> tuple[str, list[int]]:
    """Return the source with r{k} and ``common``, how many of these there are; and the k."""
    known = _known(reference)
    largest = max(map(abs, known.values()), default=0) or 1
    beside = [f"CASE WHEN v{k} IS NOT NULL THEN {r / largest!r}::DOUBLE END AS r{k}" for k, r in known.items()]
    common = _plus(f"(v{k} IS NOT NULL)::INTEGER" for k in known)
    return _select(source, ["*", *beside, f"{common} AS common"]), list(known)


def _related(source: str, product: Callable[[str, str], str], left: str, right: str) -> str:
    """Return SQL of the correlation of columns ``left``{k} and ``right``{k} by an inner product."""
    sums = [f"{product(left, right)} AS product", f"{product(left, left)} AS p", f"{product(right, right)} AS q"]
    ratio = "greatest(-1, least(1, product / sqrt(p) / sqrt(q)))"
    return _of_gappy(
        _select(source, ["*", *sums]), f"CASE WHEN common >= {LEAST} AND p > 0 AND q > 0 THEN {ratio} ELSE 0 END"
    )


def _das_gappy(source: str, reference: Reference) -> str:
    source, known = _common(source, reference)
    if not known:
        return _of_gappy(source, "0")
    firsts = [f"coalesce({', '.join(f'{side}{k}' for k in known)}) AS first_{side}" for side in "vr"]
    source = _select(source, ["*", *firsts])
    shifted = [f"coalesce({v}{k} - first_{v}, 0) AS {d}{k}" for k in known for v, d in ("vd", "re")]
    source = _select(source, ["*", *shifted])
    source = _select(source, ["*", *(f"{_plus(f'{d}{k}' for k in known)} AS total_{d}" for d in "de")])

    def about_the_means(d: str, e: str) -> str:
        return f"{_plus(f'{d}{k} * {e}{k}' for k in known)} - total_{d} * total_{e} / common"

    return _related(source, about_the_means, "d", "e")


def _spearman_gappy(source: str, reference: Reference) -> str:
    source, known = _common(source, reference)
    pairs = list(combinations(known, 2))
    signs = [f"coalesce(sign({v}{i} - {v}{j}), 0)::INTEGER AS {s}{i}_{j}" for i, j in pairs for v, s in ("vs", "rt")]
    source = _select(source, ["*", *signs])
    ranks = [f"{_rank(s, k, known)} AS {name}{k}" for k in known for s, name in (("s", "rank"), ("t", "place"))]
    return _related(_select(source, ["*", *ranks]), _inner(known), "rank", "place")


def _cosine_gappy(source: str, reference: Reference) -> str:
    source, known = _common(source, reference)
    return _related(source, _inner(known), "v", "r")


def _inner(known: Sequence[int]) -> Callable[[str, str], str]:
    return lambda left, right: _plus(f"coalesce({left}{k} * {right}{k}, 0)" for k in known)


def _settled_gappy(source: str, reference: Reference) -> str:
    return _of_gappy(source, f"-{_plus(f'coalesce(v{k}, 0)' for k in range(len(reference)))} / seen")


_WHOLE = {"das": _das_whole, "spearman": _spearman_whole, "cosine": _cosine_whole, "settled": _settled_whole}
_GAPPY = {"das": _das_gappy, "spearman": _spearman_gappy, "cosine": _cosine_gappy, "settled": _settled_gappy}
