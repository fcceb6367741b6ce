"""Of which classes samples are that bear a label, by what all the others' labels foretell of them; none is trusted.

Shape legend: n samples, C classes, B samples of one of them or some at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .bank import exact
from .readout import ROWS, WEAK, Foretold, checked, fit, left_out
from .seeding import generator

TAILS = (0.1, 0.2, 0.5)  # shares of a class's samples, those that are most unlike another class
SHARPNESS = [2 ** (step / 2) for step in range(-4, 21)]
FOUND = (1, 0.75, 0.5, 0.25, 0)  # of a matrix found pair by pair: how much of it counts
SHARPENED_BY = 10_000  # samples, drawn: every so many might be of one class


@torch.no_grad()
def transition(embeddings: Tensor, labels: Tensor, ridge: float = WEAK) -> Foretold:
    r"""Estimate which labels each class's samples bear, and how likely each label is right, with no trusted one.

    `readout` takes a wrong label for one drawn from all other classes. Those that people and machines give look like
    right ones: a cat's for a dog. With κ as `mixed` has it, no pair of classes less so than by symmetric noise of the
    rate that `readout` estimates in classes of one size, and V_jc the share of class c among the samples of label j,

    .. math:: V_{jc} = \frac{\kappa_{jc}}{\sum_k \kappa_{jk}}, \qquad
              T_{cj} = P(\text{label } j \mid \text{class } c) \propto V_{jc}\, P(\text{label } j)

    which is exact where each label is right as often. `readout` ranks better beside a class of nine tenths of the
    samples: see `mixed`. What is foretold, f, are probabilities of labels, in too even shares, as regression on
    indicators has them under a ridge; those of classes are g with f = g T (Patrini et al., CVPR 2017), and so

    .. math:: g = \mathrm{softmax}(s f T^{-1}), \qquad
              P(\text{class } c \mid x, \text{label } j) = \frac{g_c T_{cj}}{\sum_k g_k T_{kj}}, \qquad
              \eta = 1 - \tfrac1n \sum_i P(\text{class } j_i \mid x_i, \text{label } j_i)

    Of many classes that features hardly tell, chance mixes some pairs too much. So it is λ V + (1 - λ) V° in place of
    V, where V° is of symmetric noise of `readout`'s rate, with the λ and the s that make the labels likeliest, of each
    of which f knows nothing.

    Args:
        embeddings: (n, d) that no label has shaped.
        labels, ridge: as for `readout`.

    Returns the log odds that each label is right, as margins, η, and the probabilities of classes, up to the highest
    label. Raises ValueError as `readout` does.
    """
    there_C, labels = checked(labels, embeddings).unique(return_inverse=True)
    f_nC = torch.cat([f_BC.float() for f_BC, _ in left_out(embeddings, labels, ridge)])
    n, classes = f_nC.shape
    chance = 1 - 1 / classes
    rate = min(chance, max(1 / n, fit([(f_nC, labels[:, None])], labels).noise_rate))
    kappa_CC = mixed(f_nC, labels, rate / (classes - 1) / (1 - rate)).fill_diagonal_(1)
    v_CC = kappa_CC / kappa_CC.sum(1, keepdim=True)
    even_CC = torch.full_like(v_CC, rate / (classes - 1)).fill_diagonal_(1 - rate)
    share_C = labels.bincount().to(v_CC.dtype) / n
    pairs = [borne(found * v_CC + (1 - found) * even_CC, share_C, f_nC.dtype) for found in FOUND]
    some = torch.from_numpy(np.sort(generator(0, "sharpness").permutation(n)[:SHARPENED_BY])).to(labels.device)
    (t_CC, undone_CC), sharpness = likeliest(f_nC[some], pairs, labels[some])
    odds, classes_nK = [], f_nC.new_zeros(n, int(there_C[-1]) + 1)
    for rows, f_BC, label_B in zip(classes_nK.split(ROWS), f_nC.split(ROWS), labels.split(ROWS), strict=True):
        g_BC = (sharpness * (f_BC @ undone_CC)).softmax(1)
        joint_BC = (g_BC * t_CC.T[label_B]).clamp(min=torch.finfo(g_BC.dtype).tiny)
        right_B1 = joint_BC.gather(1, label_B[:, None])
        odds.append(right_B1[:, 0].log() - joint_BC.scatter(1, label_B[:, None], 0).sum(1).log())
        rows[:, there_C] = F.normalize(joint_BC, p=1.0, dim=1)
    odds_n = torch.cat(odds)
    return Foretold(odds_n, (-odds_n).sigmoid().double().mean().item(), "transition", classes_nK)


def borne(v_CC: Tensor, share_C: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return T (C, C), which labels the samples of a class bear, and its inverse, of V and each label's share."""
    joint_CC = (v_CC * share_C[:, None]).T
    t_CC = (joint_CC / joint_CC.sum(1, keepdim=True)).to(dtype)
    return t_CC, torch.linalg.pinv(t_CC.cpu()).to(t_CC.device)


def likeliest(
    f_nC: Tensor, pairs: Sequence[tuple[Tensor, Tensor]], labels: Tensor
) -> tuple[tuple[Tensor, Tensor], float]:
    """Return the T and T⁻¹, and the s, by which labels (n,) are likeliest, drawn from softmax(s f T⁻¹) T."""
    likely = [
        ((s * g_nC).softmax(1) * bears_nC).sum(1).log().mean()
        for g_nC, bears_nC in ((f_nC @ inverse_CC, t_CC.T[labels]) for t_CC, inverse_CC in pairs)
        for s in SHARPNESS
    ]
    best, sharpest = divmod(int(torch.stack(likely).argmax()), len(SHARPNESS))
    return pairs[best], SHARPNESS[sharpest]


def mixed(f_nC: Tensor, labels: Tensor, least: float) -> Tensor:
    r"""Return κ (C, C) in [least, 1]: V_jc / V_cc of `transition`, class c's share of label j over that of its own.

    Where d = f_c - f_j is so large that few samples of label c reach it, hardly one of class j does: those of either
    label that are there are of class c. So with q a quantile of d among the samples of label c

    .. math:: \kappa_{jc} = \frac{P(d > q \mid \text{label } j)}{P(d > q \mid \text{label } c)}

    but for chance bounds it from above, the closer the further out (mixture proportion estimation: Blanchard, Lee and
    Scott, JMLR 2010), unless those of label c are of a third class: in a ring, where each class is taken for the next,
    κ falls far short. Of the `TAILS` that one counts in which κ and its standard error are least together. Classes that
    merely look alike overlap both ways: κ counts whole where it is above its counterpart by √(2 ln C(C - 1)) errors of
    both, which is as far as chance takes the largest of so many, and else what is above as many errors of its own.
    Where that is no more than twice ``least``, it is ``least``.

    Args:
        f_nC: what is foretold. labels: (n,), each of the C classes among them. least: κ of symmetric noise.
    """
    precise = exact(f_nC.device)
    count_C = labels.bincount().to(precise)
    classes = len(count_C)
    own_n = f_nC.gather(1, labels[:, None])[:, 0]
    kappa_CC, error_CC = f_nC.new_full((2, classes, classes), torch.inf, dtype=precise)
    for c in range(classes):
        f_BC = f_nC[labels == c]
        sorted_BC, d_n = (f_BC[:, c : c + 1] - f_BC).sort(0).values, f_nC[:, c] - own_n
        for tail in TAILS:
            beyond = max(1, math.floor(tail * len(f_BC)))
            q_C = sorted_BC[-beyond - 1] if beyond < len(f_BC) else sorted_BC[0] - torch.inf
            met_C = labels[d_n > q_C[labels]].bincount(minlength=classes).to(precise)
            scale_C = count_C[c] / beyond / count_C
            error_C = scale_C * ((met_C + 1) * (1 + met_C / beyond)).sqrt()
            less_C = scale_C * met_C + error_C < kappa_CC[:, c] + error_CC[:, c]
            kappa_CC[:, c] = torch.where(less_C, scale_C * met_C, kappa_CC[:, c])
            error_CC[:, c] = torch.where(less_C, error_C, error_CC[:, c])
    far = math.sqrt(2 * math.log(classes * (classes - 1)))
    one_way_CC = kappa_CC - kappa_CC.T > far * (error_CC.square() + error_CC.T.square()).sqrt()
    kappa_CC = torch.where(one_way_CC, kappa_CC, kappa_CC - far * error_CC)
    return torch.where(kappa_CC > 2 * least, kappa_CC.clamp(max=1), least)
