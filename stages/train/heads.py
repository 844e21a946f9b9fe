"""Heads: from embeddings and labels to a loss, and to the cosines by which training is judged.

All have one form. With e the embedding, ŵ_j the centre of class j, and y the own class,

    L = mean over i of −log( e^{z_i} / (e^{z_i} + Σ_{j≠y_i} e^{e_i·ŵ_j}) ) = mean of softplus(R_i − z_i),
    R_i = log Σ_{j≠y_i} e^{e_i·ŵ_j},

and a head is how e is scaled and what it makes of the own class's e_i·ŵ_y, which is z_i. So the margin touches N
numbers and no N×C matrix, and what is left, R, is the same for all: see `similarities`.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import params
from pipeline.errors import InputError
from stages.train.ranks import (
    ALONE,
    Ranks,
    gathered,
    gathered_copies,
    gathered_parts,
    greatest_of,
    log_sum,
    only_one,
    summed,
)

CHUNK = 1 << 17
"""Classes whose similarities are held at once; with more of them, they are computed again for the gradient."""
EPSILON = 1e-12
_STRETCH = 1 << 20
"""Numbers drawn at a time, a multiple of 16."""
_ROWS = {"cpu": 1 << 11, "cuda": 1 << 14}
"""Centres whose gradients are made ready at a time: what that needs beside them stays small, and a GPU busy."""


@dataclass(frozen=True)
class Judgement:
    """What a head says of N embeddings; all but the loss without gradient, and without the margin."""

    loss: Tensor
    """Scalar fp32, the mean; NaN where an embedding is longer than fp32 can tell."""
    own: Tensor
    """N fp32, cosine to the centre of the own class."""
    nearest: Tensor
    """N fp32, cosine to the nearest of the other centres."""
    correct: Tensor
    """N bool: whether the own class is the likeliest."""
    beyond: Tensor
    """N bool: whether it is so even with the margin."""


class Head(nn.Module, ABC):
    """Class centres, C×D, and the loss that they pull embeddings by.

    Of several ranks each holds its slice of the centres, and all have the loss of all their examples: `hold`. Part of
    the centres may stand for all: `choose`.

    Args:
        classes: C, identities.
        embedding: D, length of the embedding.
        scale: of the normalised embedding: s; None where the embedding keeps its own length.
    """

    normalised = True
    """Whether centres count by their direction alone."""

    def __init__(self, classes: int, embedding: int, scale: float | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(draw_centres(classes, embedding, range(classes)))
        self.scale = scale
        self.classes = classes
        self.ranks = ALONE
        self.rows: Tensor | None = None
        """Which of this rank's centres `weight` holds for the time being, in order; None: all."""

    def hold(self, centres: Tensor, classes: int, ranks: Ranks) -> None:
        """Take this rank's slice, `ranks.share(classes)`, of the centres of so many classes."""
        self.weight, self.classes, self.ranks = nn.Parameter(centres), classes, ranks

    def choose(self, labels: Tensor, rate: float, generator: torch.Generator) -> Tensor:
        """Rows of this rank's centres for one iteration: those of the labels, and others by chance, `rate` of all.

        PartialFC (An et al., CVPR 2022, arXiv 2203.15565, Algorithm 1).

        Args:
            labels: N int64, of all ranks.
            rate: share of the centres, above 0; more where the labels have more.
            generator: on the device of the centres.

        Returns:
            k int64, increasing.
        """
        mine = self.ranks.share(self.classes)
        own = labels[(labels >= mine.start) & (labels < mine.stop)].unique() - mine.start
        chance = torch.rand(len(mine), device=labels.device, generator=generator)
        chance[own] = 2.0
        count = max(round(rate * len(mine)), len(own), 2)
        return chance.topk(min(count, len(mine))).indices.sort().values

    @abstractmethod
    def margined(self, cosines: Tensor, norms: Tensor) -> Tensor:
        """What a head makes of the own class's cosine.

        Args:
            cosines: N, of the angle θ to the own centre.
            norms: N, lengths of the embeddings, without gradient.

        Returns:
            N, in place of the cosines.
        """

    def advance(self) -> None:
        """An iteration of training is over, all parts of its batch seen: what goes by iterations goes on."""

    def forward(self, embeddings: Tensor, labels: Tensor) -> Judgement:
        """Loss and cosines, computed in the centres' precision, fp32, under any autocast.

        Args:
            embeddings: N×D float, not normalised. Of several ranks each gives its own in training, and has the loss
                of all; in evaluation all give the same.
            labels: N int64 in [0, C), likewise.
        """
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings = embeddings.to(self.weight.dtype)
            norms = embeddings.norm(dim=1)
            if self.scale is None:
                scaled, lengths = embeddings, norms
            else:
                scaled, lengths = self.scale * F.normalize(embeddings), torch.full_like(norms, self.scale)
            several = self.ranks.size > 1
            if several and self.training:
                scaled, lengths = gathered_parts(scaled), gathered_copies(lengths)
                norms, labels = gathered(norms), gathered(labels)
            places = self._places(labels) if several or self.rows is not None else labels
            found = similarities(scaled, self.weight, places, normalised=self.normalised)
            own_centres, near_centres = self._centres(places), self._centres(found.index)
            if several:
                nearest, near_centres = greatest_of(found.nearest, near_centres)
                found = Similarities(log_sum(found.others), only_one(found.own), nearest, found.index)
                own_centres = summed(own_centres)
            # As long as a centre where its length counts (softmax), so that what is margined is a cosine
            own_lengths = lengths * own_centres
            own = found.own / own_lengths.clamp_min(EPSILON)
            target = own_lengths * self.margined(own, norms.detach())
            loss = F.softplus(found.others - target).mean()
            # Normalised by a length of infinity an embedding is 0: its loss would be finite, its gradient 0 for good
            loss = loss + (0 * norms.detach()).sum()
            with torch.no_grad():
                nearest = found.nearest / (lengths * near_centres).clamp_min(EPSILON)
            correct, beyond = found.own > found.nearest, target.detach() > found.nearest
            return Judgement(loss, own.detach(), nearest, correct, beyond)

    def _places(self, labels: Tensor) -> Tensor:
        """(N,) rows of `weight` that labels have; −1 for those of other ranks."""
        mine = self.ranks.share(self.classes)
        places = torch.where((labels >= mine.start) & (labels < mine.stop), labels - mine.start, -1)
        if self.rows is None:
            return places
        among = torch.searchsorted(self.rows, places).clamp_max(len(self.rows) - 1)
        return torch.where(self.rows[among] == places, among, -1)

    def _centres(self, places: Tensor) -> Tensor:
        """(N,) lengths of the centres in some rows, without gradient; 1 where only directions count; 0 for −1."""
        here = (places >= 0).float()
        return here if self.normalised else here * self.weight.detach()[places.clamp_min(0)].norm(dim=1)

    def extra_repr(self) -> str:
        """Shape and hyper-parameters, for `print(head)`."""
        values = {name: value for name, value in vars(self).items() if isinstance(value, float | int | bool)}
        del values["training"], values["classes"]
        return ", ".join([f"classes={self.classes}", *(f"{name}={value:g}" for name, value in values.items())])


class Softmax(Head):
    """Softmax cross-entropy without bias (CosFace, Eq. 2): centres and embeddings keep their lengths."""

    normalised = False

    def __init__(self, classes: int, embedding: int) -> None:
        super().__init__(classes, embedding, None)

    def margined(self, cosines: Tensor, norms: Tensor) -> Tensor:
        """cos θ"""
        return cosines


class CosFace(Head):
    """The Large Margin Cosine Loss, LMCL (Wang et al., CVPR 2018, Eq. 4); with m = 0 the normalised softmax loss (NSL).

    Args:
        classes: C.
        embedding: D.
        scale: s.
        margin: m, subtracted from the cosine.
    """

    def __init__(self, classes: int, embedding: int, scale: float, margin: float) -> None:
        super().__init__(classes, embedding, scale)
        self.margin = margin

    def margined(self, cosines: Tensor, norms: Tensor) -> Tensor:
        """cos θ − m"""
        return cosines - self.margin


class ArcFace(Head):
    """The additive angular margin loss (Deng et al., CVPR 2019, Eq. 3).

    Args:
        classes: C.
        embedding: D.
        scale: s.
        margin: m, added to the angle, radians.
        easy: leave examples more than 90° from their centre alone, as the authors' code has it by option. Otherwise,
            where θ + m would pass π, the cosine is lowered by m·sin m instead, so that the loss stays monotone.
    """

    def __init__(self, classes: int, embedding: int, scale: float, margin: float, *, easy: bool) -> None:
        super().__init__(classes, embedding, scale)
        self.margin = margin
        self.easy = easy

    def margined(self, cosines: Tensor, norms: Tensor) -> Tensor:
        """cos(θ + m), guarded"""
        m = self.margin
        # The sine's slope is infinite where the cosine is 1; there it is kept finite
        sines = (1 - cosines.square()).clamp_min(EPSILON).sqrt()
        turned = cosines * math.cos(m) - sines * math.sin(m)
        if self.easy:
            return torch.where(cosines > 0, turned, cosines)
        return torch.where(cosines > math.cos(math.pi - m), turned, cosines - m * math.sin(m))


class ASoftmax(Head):
    """A-Softmax (Liu et al., SphereFace, CVPR 2017, Eq. 7): ψ(θ) = (−1)^k cos(mθ) − 2k for θ in [kπ/m, (k+1)π/m].

    Embeddings keep their lengths. ψ is mixed with the cosine, (λ cos θ + ψ(θ)) / (1 + λ), and λ falls with the number
    of iterations t as max(`least`, `first` / (1 + `rate`·t)), which is how SphereFace's authors have it converge.

    Args:
        classes: C.
        embedding: D.
        margin: m, a whole number.
        first: λ of the first iteration.
        least: λ in the end.
        rate: γ.
    """

    steps: Tensor

    def __init__(self, classes: int, embedding: int, margin: int, first: float, least: float, rate: float) -> None:
        super().__init__(classes, embedding, None)
        self.margin = margin
        self.first, self.least, self.rate = first, least, rate
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @property
    def annealing(self) -> Tensor:
        """λ, scalar."""
        return (self.first / (1 + self.rate * self.steps)).clamp_min(self.least)

    def margined(self, cosines: Tensor, norms: Tensor) -> Tensor:
        """(λ cos θ + ψ(θ)) / (1 + λ)"""
        annealing = self.annealing
        angle = cosines.detach().clamp(-1, 1).acos()
        k = (self.margin * angle / math.pi).floor()
        psi = (1 - 2 * (k % 2)) * chebyshev(self.margin, cosines) - 2 * k
        return (annealing * cosines + psi) / (1 + annealing)

    def advance(self) -> None:
        """λ falls."""
        self.steps += 1


class AdaFace(Head):
    """AdaFace (Kim et al., CVPR 2022, section 3.3): a margin by the image's quality, told by its embedding's length.

    With ẑ the length's standard score over batches, times h and clipped to ±1: cos(θ − m·ẑ) − (m·ẑ + m).

    A batch is scored by statistics that it is part of, as the authors' code has it. Of a batch in parts, each is scored
    with itself and those before it, so the last with all; and the batch counts once, as if it were undivided.

    Args:
        classes: C.
        embedding: D.
        scale: s.
        margin: m.
        concentration: h.
        momentum: α, how much of the running mean and deviation a batch replaces.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self, classes: int, embedding: int, scale: float, margin: float, concentration: float, momentum: float
    ) -> None:
        super().__init__(classes, embedding, scale)
        self.margin, self.concentration, self.momentum = margin, concentration, momentum
        self.register_buffer("mean", torch.tensor(20.0))  # where the authors' code begins
        self.register_buffer("deviation", torch.tensor(100.0))
        self._lengths: list[Tensor] = []  # of this iteration's embeddings, so far

    def margined(self, cosines: Tensor, norms: Tensor) -> Tensor:
        """cos(θ + g_angle) − g_add"""
        norms = norms.clamp(1e-3, 100)
        if self.training:
            self._lengths.append(norms)
        mean, deviation = self._statistics()
        score = ((norms - mean) / (deviation + 1e-3) * self.concentration).clamp(-1, 1)
        limit = 1e-3
        angle = cosines.clamp(-1 + limit, 1 - limit).acos()
        turned = (angle - self.margin * score).clamp(limit, math.pi - limit).cos()
        return turned - (self.margin + self.margin * score)

    def advance(self) -> None:
        """The running statistics take in the lengths of this iteration's embeddings."""
        mean, deviation = self._statistics()
        self.mean.copy_(mean)
        self.deviation.copy_(deviation)
        self._lengths.clear()

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Running mean and deviation, with what there is of this iteration."""
        if sum(map(len, self._lengths)) < 2:
            return self.mean, self.deviation
        lengths = torch.cat(self._lengths)
        return self.mean.lerp(lengths.mean(), self.momentum), self.deviation.lerp(lengths.std(), self.momentum)


def chebyshev(degree: int, cosines: Tensor) -> Tensor:
    """cos(degree · θ) as a polynomial in cos θ."""
    before, now = torch.ones_like(cosines), cosines
    for _ in range(degree - 1):
        before, now = now, 2 * cosines * now - before
    return now


def build_head(section: params.Head, classes: int, embedding: int, ranks: Ranks = ALONE) -> Head:
    """A freshly initialised head, or this rank's slice of it; its centres follow from torch's global random state.

    Raises:
        InputError: there are fewer than two classes for each rank.
    """
    mine = _slice(classes, ranks)
    if ranks.size == 1:
        return _head(section, classes, embedding)
    centres = draw_centres(classes, embedding, mine)
    head = _head(section, 2, embedding)
    head.hold(centres, classes, ranks)
    return head


def _slice(classes: int, ranks: Ranks) -> range:
    if classes < 2 * ranks.size:
        raise InputError(f"{classes} identities are too few for {ranks.size} processes: lower machine.processes")
    return ranks.share(classes)


def draw_centres(classes: int, embedding: int, wanted: range) -> Tensor:
    """Some rows of C×D centres, drawn as nn.init.xavier_normal_ draws all of them, of which never more is held."""
    size, first = classes * embedding, wanted.start * embedding
    deviation = math.sqrt(2 / (classes + embedding))
    kept, start = torch.empty(len(wanted) * embedding), 0
    while start < size:
        # torch draws 16 numbers at once, and so the last ones together with those before
        stop = start + _STRETCH if size - start >= _STRETCH + 16 else size
        drawn = torch.empty(stop - start).normal_(0, deviation)
        low, high = max(start, first), min(stop, first + len(kept))
        if low < high:
            kept[low - first : high - first] = drawn[low - start : high - start]
        start = stop
    return kept.view(len(wanted), embedding)


def _head(section: params.Head, classes: int, embedding: int) -> Head:
    match section:
        case params.Softmax():
            return Softmax(classes, embedding)
        case params.NSL():
            return CosFace(classes, embedding, section.scale, 0.0)
        case params.ASoftmax():
            return ASoftmax(classes, embedding, section.margin, section.first, section.least, section.rate)
        case params.CosFace():
            return CosFace(classes, embedding, section.scale, section.margin)
        case params.ArcFace():
            return ArcFace(classes, embedding, section.scale, section.margin, easy=section.easy)
        case params.AdaFace():
            return AdaFace(classes, embedding, section.scale, section.margin, section.concentration, section.momentum)


@dataclass(frozen=True)
class Similarities:
    """Of N embeddings to C centres."""

    others: Tensor
    """N, R: log Σ e^{e·w} over the other classes."""
    own: Tensor
    """N, e·w of the own class."""
    nearest: Tensor
    """N, the greatest e·w of the other classes, without gradient."""
    index: Tensor
    """N int64, whose that is."""


def similarities(
    embeddings: Tensor, weight: Tensor, labels: Tensor, *, normalised: bool = True, chunk: int | None = None
) -> Similarities:
    """What a loss needs of the products of embeddings and centres.

    Of the N×C matrix there is never more than one copy, and of more than `chunk` classes never the whole: then each
    chunk is computed twice, forward and backward.

    Args:
        embeddings: N×D fp32.
        weight: C×D fp32, the centres, C ≥ 2.
        labels: N int64 below C; negative where the own class is none of these.
        normalised: whether centres are to be normalised.
        chunk: classes at a time; by default CHUNK.
    """
    size = chunk or CHUNK
    return Similarities(*cast(Any, _Similarities).apply(embeddings, weight, labels, normalised, size))


class _Similarities(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, embeddings: Tensor, weight: Tensor, labels: Tensor, normalised: bool, chunk: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        nearest = torch.full_like(embeddings[:, 0], -torch.inf)
        total, own, index = torch.zeros_like(nearest), torch.zeros_like(nearest), torch.zeros_like(labels)
        ctx.normalised, ctx.chunk, ctx.whole = normalised, chunk, chunk >= len(weight)
        ctx.exponentials = None
        for start in range(0, len(weight), chunk):
            products, _ = _products(embeddings, weight[start : start + chunk], normalised)
            where, here = _place(labels, start, products.shape[1])
            value = products.gather(1, where)
            own = torch.where(here, value, own[:, None])[:, 0]
            products.scatter_(1, where, value.masked_fill(here, -torch.inf))
            top, at = products.max(dim=1)
            index = torch.where(top > nearest, at + start, index)
            before, nearest = nearest, torch.maximum(nearest, top)
            # −∞ − −∞ where a chunk holds but the own class
            shift = nearest.clamp_min(torch.finfo(nearest.dtype).min)
            total = total * (before - shift).exp() + products.sub_(shift[:, None]).exp_().sum(dim=1)
            if ctx.whole:
                ctx.exponentials = products
            del products  # before there are the next ones
        ctx.save_for_backward(embeddings, weight, labels, nearest, total)
        ctx.mark_non_differentiable(nearest, index)
        return nearest + total.log(), own, nearest, index

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, of_others: Tensor, of_own: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, ...]:
        if ctx.whole and ctx.exponentials is None:
            raise RuntimeError("the gradient of a head is computed in place, so once only: run it forward again")
        embeddings, weight, labels, nearest, total = ctx.saved_tensors
        of_embeddings, of_weight = torch.zeros_like(embeddings), torch.empty_like(weight)
        share = (of_others / total)[:, None]
        with torch.autocast(embeddings.device.type, enabled=False):
            for start in range(0, len(weight), ctx.chunk):
                centres = weight[start : start + ctx.chunk]
                if ctx.exponentials is not None:
                    gradient, ctx.exponentials = ctx.exponentials, None
                    inverse = _inverse_norms(centres) if ctx.normalised else None
                else:
                    gradient, inverse = _products(embeddings, centres, ctx.normalised)
                    gradient.sub_(nearest[:, None]).exp_()
                gradient.mul_(share)
                where, here = _place(labels, start, len(centres))
                gradient.scatter_(1, where, torch.where(here, of_own[:, None], gradient.gather(1, where)))
                out = torch.mm(gradient.T, embeddings, out=of_weight[start : start + ctx.chunk])
                if inverse is not None:
                    _through_normalisation(out, centres, inverse)
                    gradient.mul_(inverse)
                of_embeddings.addmm_(gradient, centres)
                del gradient
        return of_embeddings, of_weight, None, None, None


def _products(embeddings: Tensor, centres: Tensor, normalised: bool) -> tuple[Tensor, Tensor | None]:
    """N×c, and what centres were divided by, inverted."""
    products = embeddings @ centres.T
    if not normalised:
        return products, None
    inverse = _inverse_norms(centres)
    return products.mul_(inverse), inverse


def _inverse_norms(centres: Tensor) -> Tensor:
    return centres.norm(dim=1).clamp_min(EPSILON).reciprocal()


def _through_normalisation(gradient: Tensor, centres: Tensor, inverse: Tensor) -> None:
    """Turn the gradient of c×D normalised centres into that of the centres, in place: at a right angle to them, and as
    much smaller as they are longer.
    """
    rows = _ROWS[centres.device.type]
    for out, some, by in zip(gradient.split(rows), centres.split(rows), inverse.split(rows), strict=True):
        along = torch.linalg.vecdot(out, some) * by.pow(3)
        out.mul_(by[:, None]).addcmul_(some, along[:, None], value=-1)


def _place(labels: Tensor, start: int, count: int) -> tuple[Tensor, Tensor]:
    """(N×1 int64, N×1 bool) columns of the labels in a chunk of classes, and whether they are in it at all."""
    column = (labels - start)[:, None]
    return column.clamp(0, count - 1), (column >= 0) & (column < count)


def scale_lower_bound(classes: int, probability: float) -> float:
    """The least scale at which a class centre can reach a posterior probability (CosFace, Eq. 6).

    s ≥ (C − 1)/C · ln((C − 1)·P / (1 − P))
    """
    return (classes - 1) / classes * math.log((classes - 1) * probability / (1 - probability))


def margin_upper_bound(classes: int, embedding: int) -> float:
    """The greatest cosine margin that there can be between C centres in K dimensions (CosFace, section 3.4).

    1 − cos(2π/C) for K = 2; otherwise C/(C − 1), which is reached only for C ≤ K + 1 and out of reach by far beyond.
    """
    if embedding == 2:
        return 1 - math.cos(2 * math.pi / classes)
    return classes / (classes - 1)
