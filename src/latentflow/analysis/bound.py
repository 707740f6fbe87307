"""How far the model's images can be from the data: the Wasserstein-2 bound of arXiv 2307.08698, term by term.

With f the encoder, g the decoder, q the distribution of the latents the flow was trained on, q_hat that of the
latents it generates, p_t that of x_t, v the velocity of the path at x_t (the mean over all pairs through x_t), v_hat
the model's, and e(t) = E|v - v_hat|^2 over x_t ~ p_t, squared distances summed over all elements:

    W2(p_data, p_model) <= sqrt(E|x - g(f(x))|^2) + Lip(g) W2(q, q_hat)
    W2(q, q_hat)        <= sigma(0) sqrt(d) + W2(p_0, q_hat)

by the triangle inequality over g#q and p_0, each with an explicit coupling: an image and its reconstruction; the same
latent decoded twice; a latent and itself with the noise sigma(0) that the path leaves on it, of d elements.

For the last distance start both flows from the same noise at t = 1: dx/dt = v(x, t), which passes through p_t and
ends in p_0, and dy/dt = v_hat(y, t), which ends in q_hat. Time falls, so with s = 1 - t and D = E|y - x|^2

    D' = 2 E<y - x, -v_hat(y) + v_hat(x)> + 2 E<y - x, v(x) - v_hat(x)>         D(s = 0) = 0
      <= 2 M(t) D + 2 sqrt(D e(t))

by Cauchy and Schwarz, if <y - x, -v_hat(y) + v_hat(x)> <= M(t) |y - x|^2. A one-sided constant of MINUS v_hat is
enough; the two-sided L(t) is one too, and >= 0. From here there are three variants of the bound on W2(p_0, q_hat):

    sup         2 sqrt(D e) <= D + e, M = sup_t L:    sqrt(exp(1 + 2 sup_t L) int e dt)       the paper's
    integrated  sqrt(D)' <= L sqrt(D) + sqrt(e):      int exp(int_0^t L) sqrt(e) dt
    one_sided   sqrt(D)' <= M sqrt(D) + sqrt(e):      int exp(int_0^t M) sqrt(e) dt

An error made at t is stretched on the way from t to 0, hence the inner integral. By Cauchy and Schwarz the second is
at most sqrt(exp(2 int_0^1 L) int e dt), so it is at least exp(1/2) = 1.65 times smaller than the first; the third is
not above the second, as M <= L. In n bins of time with M the largest of its bin, both are computed as
sum_k sqrt(W_k E_k), where E_k is the integral of e and W_k that of exp(2 int_0^t M) over bin k: not below the
integral, by Cauchy and Schwarz.

The bound is for the exact solution of dx/dt = v_hat; the discretisation of a solver is not in it. With conditions it
holds for pairs of image and condition, v being the velocity given the condition. A guided velocity is measured as such.
Of e(t) there are three measurements: the loss, which is e(t) + E Var(u | x_t) and so an upper bound; against a known
velocity v; and against `empirical_velocity`. The Lipschitz constants are lower estimates (`analysis/lipschitz.py`):
the result is an estimate of the bound, not a certificate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from latentflow.analysis.lipschitz import TimeCurve, VelocityGrowth, check_times
from latentflow.errors import ConfigError, DataError, NonFiniteError, nearest
from latentflow.flow.loss import flow_matching_loss
from latentflow.flow.path import Path

VARIANTS = ("sup", "integrated", "one_sided")
"""The three bounds on the distance of the flows, as in the text above; each is at most the one before."""

ERRORS = ("loss", "velocity")
"""What stands for e(t): the raw loss, or the error against the velocity of the path (conditional variance removed)."""


@dataclass(frozen=True)
class Estimate:
    """One number of the bound and its uncertainty.

    Attributes:
        name: what it is.
        value: the estimate, >= 0 but for one-sided constants.
        standard_error: of `value`, from the spread of independent draws; None if it has none.
        count: number of draws or points.
        bias: relative to the quantity in the theorem: "exact"; "none" (the mean of independent draws, or a
            smooth function of such means); "low" (a lower estimate: a supremum over the points looked at);
            "high" (an upper bound in the mean); "mixed" (made of low and high ones).
    """

    name: str
    value: float
    standard_error: float | None
    count: int
    bias: Literal["exact", "none", "low", "high", "mixed"]


@dataclass(frozen=True)
class Reconstruction:
    """How far images are from their reconstructions; those of several batches add up.

    Attributes:
        squared: [B] float64 on the CPU, squared Euclidean distance of each image, summed over its 3 S S values.
        elements: values per image.
    """

    squared: Tensor
    elements: int

    def __add__(self, other: Reconstruction) -> Reconstruction:
        if self.elements != other.elements:
            raise DataError(f"cannot add images of {self.elements} and of {other.elements} values")
        return Reconstruction(torch.cat([self.squared, other.squared]), self.elements)

    @property
    def distance(self) -> Estimate:
        """sqrt(E|x - g(f(x))|^2): the first term of the bound, in units of the pixels' range."""
        mean, count = float(self.squared.mean()), len(self.squared)
        error = float(self.squared.std()) / math.sqrt(count) if count > 1 else math.nan
        return Estimate("reconstruction", math.sqrt(mean), _through_sqrt(mean, error), count, "none")

    @property
    def pixel_rms(self) -> float:
        """The root mean square error of one value: `distance` / sqrt(`elements`)."""
        return self.distance.value / math.sqrt(self.elements)


@torch.no_grad()
def reconstruction_term(x: Tensor, x_reconstructed: Tensor) -> Reconstruction:
    """The first term of the bound for one batch of images.

    Args:
        x: [B, 3, H, W], pixels in [-1, 1].
        x_reconstructed: [B, 3, H, W], the same images encoded as for training (a sampled latent, if training
            samples) and decoded, neither clamped nor rounded unless the decoder of `WassersteinBound` is too.

    Raises:
        DataError: no images, or shapes that differ.
        NonFiniteError: a pixel is not finite.
    """
    if x.shape != x_reconstructed.shape or not x.numel():
        raise DataError(f"images {list(x.shape)} and reconstructions {list(x_reconstructed.shape)} must match")
    dtype = torch.promote_types(x.dtype, torch.float32)
    squared = (x.to(dtype) - x_reconstructed.to(dtype)).square().flatten(1).sum(1).cpu().double()
    if not squared.isfinite().all():
        raise NonFiniteError(f"image {int((~squared.isfinite()).nonzero()[0])} or its reconstruction is not finite")
    return Reconstruction(squared, x[0].numel())


@torch.no_grad()
def velocity_error(
    velocity: Callable[[Tensor, Tensor], Tensor],
    path: Path,
    data: Tensor,
    noise: Tensor,
    time: Tensor,
    *,
    marginal: Callable[[Tensor, Tensor], Tensor] | None = None,
    bins: int = 10,
) -> TimeCurve:
    """The squared error of `velocity` along the path, summed over the elements of an image, by time.

    Without `marginal` it is the flow-matching loss, |v_hat(x_t) - u|^2, whose mean exceeds e(t) by the conditional
    variance of u given x_t. With it, it is |v_hat(x_t) - v(x_t)|^2, whose mean is e(t).

    Args:
        velocity: v_hat, a function of x [B, ...] and t [B].
        path: the path between data and noise.
        data: [B, ...], latents drawn as in training.
        noise: [B, ...], standard normal.
        time: [B] in [0, 1]; spread over all bins.
        marginal: v, a function of x [B, ...] and t [B]: in closed form, or `empirical_velocity` of the data set
            that `data` is drawn from. None for the loss.
        bins: equal bins of time.

    Raises:
        ConfigError: times outside [0, 1], or no bins.
        DataError: no images, or not one time for each.
        NonFiniteError: an error is not finite.
    """
    check_times(time, len(data))
    if marginal is None:
        return TimeCurve.of(time, data[0].numel() * flow_matching_loss(velocity, path, data, noise, time), bins)
    dtype = torch.promote_types(data.dtype, torch.float32)
    x_t = path.interpolate(data.to(dtype), noise.to(dtype), time)
    difference = velocity(x_t, time).to(dtype) - marginal(x_t, time).to(dtype)
    return TimeCurve.of(time, difference.square().flatten(1).sum(1), bins)


@torch.no_grad()
def empirical_velocity(path: Path, data_set: Tensor, x: Tensor, time: Tensor, chunk: int = 512) -> Tensor:
    """The exact velocity of the path at x_t = x if the data are the finite set `data_set`, uniformly distributed.

        E[data | x] = sum_i w_i data_i,    w = softmax(-|x - alpha data_i|^2 / (2 sigma^2))

    A network with this velocity would memorise the set: near t = 0 it points at the nearest member. So near data a good
    model differs from it because it generalises, and the error against it measures the distance to the training set,
    not to the distribution that the set is a sample of.

    Args:
        path: the path between data and noise.
        data_set: [N, ...], all the latents (for a class, those of that class), where float64 is available.
        x: [B, ...]; float32 rounding of x is an error of about 1e-7 |x| / sigma(t) in the velocity.
        time: [B] in (0, 1], or [0, 1] where the path leaves noise on the data.
        chunk: members of the set that are processed together; the memory is chunk times the size of one.

    Returns:
        [B, ...] in the dtype and on the device of x; computed in float64.

    Raises:
        ConfigError: a time outside [0, 1], or one at which sigma is 0, where the velocity is not defined.
        DataError: the batch or the set is empty, or their shapes differ.
        NonFiniteError: x or the data set is not finite.
    """
    check_times(time, len(x))
    if not len(data_set) or data_set.shape[1:] != x.shape[1:]:
        raise DataError(f"a data set of shape {list(data_set.shape)} does not match latents {list(x.shape)}")
    t = time.to(data_set.device).double()
    alpha, sigma = path.alpha(t)[:, None], path.sigma(t)[:, None]
    if (sigma == 0).any():
        raise ConfigError(
            f"the velocity of a finite data set is not defined at t = {float(t[sigma[:, 0] == 0][0])}, where the path "
            "has no noise: use times above 0, or a sigma_min above 0"
        )
    flat = x.to(data_set.device).double().flatten(1)
    # The softmax in one pass: all sums are relative to the highest exponent so far.
    highest = flat.new_full((len(x), 1), -torch.inf)
    weight, weighted = torch.zeros_like(highest), torch.zeros_like(flat)
    for members in data_set.split(chunk):
        members = members.double().flatten(1)
        # |x - alpha data| = alpha |x / alpha - data| would fail at t = 1; differences, not products, keep all digits.
        distance = torch.stack(
            [torch.linalg.vector_norm(row - a * members, dim=1) for row, a in zip(flat, alpha, strict=True)]
        )
        exponent = -(distance / sigma).square() / 2
        if not exponent.isfinite().all():
            raise NonFiniteError("the latents or the data set are not finite")
        new = torch.maximum(highest, exponent.amax(1, keepdim=True))
        part = torch.exp(exponent - new)
        weight = weight * torch.exp(highest - new) + part.sum(1, keepdim=True)
        weighted = weighted * torch.exp(highest - new) + part @ members
        highest = new
    velocity = path.velocity_from_data(flat, weighted / weight, t)
    return velocity.reshape(x.shape).to(x.dtype).to(x.device)


@dataclass(frozen=True)
class WassersteinBound:
    """The bound on W2(p_data, p_model), and its terms with their uncertainty. Pixels in [-1, 1], all sums over images.

    Attributes:
        path: the path between data and noise.
        dimensions: elements of one latent.
        reconstruction: images and their reconstructions.
        decoder: [G], largest singular values of the decoder's Jacobian at data latents and generated ones.
        growth: Lipschitz constants of the velocity by time.
        loss: the flow-matching loss by time, summed over elements.
        error: the error against the velocity of the path by time, in as many bins; None if it is not known.
    """

    path: Path
    dimensions: int
    reconstruction: Reconstruction
    decoder: Tensor
    growth: VelocityGrowth
    loss: TimeCurve
    error: TimeCurve | None = None

    def __post_init__(self):
        if not self.decoder.numel():
            raise DataError("there is no singular value of the decoder: measure it for at least one latent")
        if not self.decoder.isfinite().all():
            raise NonFiniteError("a singular value of the decoder is not finite")
        curves = [self.growth.two_sided, self.growth.one_sided, self.loss, *([self.error] if self.error else [])]
        counts = [len(curve.filled().counts) for curve in curves]
        if len(set(counts)) > 1:
            raise ConfigError(f"all curves of a bound need the same bins of time, not {counts}")

    @property
    def errors(self) -> tuple[str, ...]:
        """Those of `ERRORS` that are known."""
        return ERRORS if self.error is not None else ERRORS[:1]

    @property
    def noise_left(self) -> float:
        """sigma(0) sqrt(d): how far the end of the path is from the latents."""
        return float(self.path.sigma(torch.zeros(1, dtype=torch.float64))) * math.sqrt(self.dimensions)

    def terms(self) -> list[Estimate]:
        """Every constant of the bound, in the order of the formula."""
        two_sided, one_sided = self.growth.two_sided, self.growth.one_sided
        found = [
            self.reconstruction.distance,
            Estimate("Lip(decoder)", float(self.decoder.max()), None, len(self.decoder), "low"),
            Estimate("noise left by the path", self.noise_left, None, 0, "exact"),
            Estimate("Lip(velocity), sup over t", float(two_sided.highest.max()), None, two_sided.count, "low"),
            Estimate("Lip(velocity), integral", float(two_sided.highest.mean()), None, two_sided.count, "low"),
            Estimate("one-sided Lip, integral", float(one_sided.highest.mean()), None, one_sided.count, "low"),
            _integral("loss", self.loss, "high"),
        ]
        return found if self.error is None else [*found, _integral("velocity error", self.error, "none")]

    def flow_distance(self, variant: str = "sup", error: str = "loss") -> Estimate:
        """The bound on W2(p_0, q_hat), in latents, by one of `VARIANTS` and one of `ERRORS`; inf beyond 1e308.

        The standard error is that of the errors only, to first order: the constants have none.

        Raises:
            ConfigError: no such variant, no such error, or the error of the velocity is not known.
        """
        curve = self._curve(error)
        if variant == "sup":
            # sqrt(exp(1 + 2 L) int e) as exp(1/2 + L) sqrt(int e), which overflows later
            factor = _exp(0.5 + float(self.growth.two_sided.highest.max()))
            mean, spread = curve.integral(), curve.integral_standard_error()
            value, deviation = factor * math.sqrt(mean), factor * _through_sqrt(mean, spread)
        elif variant in VARIANTS:
            constants = (self.growth.two_sided if variant == "integrated" else self.growth.one_sided).highest
            factors = _stretch(constants) / len(constants)  # sqrt(W_k E_k) = factor sqrt(mean of e in bin k)
            means, spreads = curve.mean.tolist(), curve.standard_error.tolist()
            spreads = [_through_sqrt(mean, spread) for mean, spread in zip(means, spreads, strict=True)]
            value = float((factors * curve.mean.sqrt()).sum())
            deviation = float((factors * torch.tensor(spreads, dtype=torch.float64)).norm())
        else:
            raise ConfigError(f"unknown variant {variant!r}; {nearest(variant, VARIANTS)}")
        bias = "mixed" if error == "loss" else "low"
        return Estimate(f"flow ({variant}, {error})", value, deviation, curve.count, bias)

    def total(self, variant: str = "sup", error: str = "loss") -> Estimate:
        """The bound on W2(p_data, p_model), in pixels, by one of `VARIANTS` and one of `ERRORS`.

        Raises:
            ConfigError: as in `flow_distance`.
        """
        first, flow, lipschitz = self.reconstruction.distance, self.flow_distance(variant, error), self.decoder.max()
        value = first.value + float(lipschitz) * (self.noise_left + flow.value)
        deviation = math.hypot(first.standard_error, float(lipschitz) * flow.standard_error)
        return Estimate(f"bound ({variant}, {error})", value, deviation, min(first.count, flow.count), flow.bias)

    def totals(self) -> list[Estimate]:
        """The bound in every variant with every known error."""
        return [self.total(variant, error) for error in self.errors for variant in VARIANTS]

    def _curve(self, error: str) -> TimeCurve:
        if error not in ERRORS:
            raise ConfigError(f"unknown error {error!r}; {nearest(error, ERRORS)}")
        if error == "velocity" and self.error is None:
            raise ConfigError("the velocity of the path is not known for this bound; use error 'loss'")
        return self.loss if error == "loss" else self.error


def gaussian_w2(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """The exact W2 distance of N(mean1, cov1) and N(mean2, cov2); means [d], covariances [d, d], singular ones too.

        W2^2 = |mean1 - mean2|^2 + min over orthogonal U of |sqrt(cov1) - sqrt(cov2) U|^2

    which is the usual tr(cov1 + cov2 - 2 sqrt(sqrt(cov1) cov2 sqrt(cov1))) without its cancellation. In float64.

    Raises:
        DataError: a covariance that is not symmetric, or has a negative eigenvalue.
    """
    root1, root2 = _matrix_root(cov1), _matrix_root(cov2)
    left, _, right = torch.linalg.svd(root2 @ root1)
    return math.hypot(float((mean1.double() - mean2.double()).norm()), float((root1 - root2 @ left @ right).norm()))


def _matrix_root(covariance: Tensor) -> Tensor:
    covariance = covariance.double()
    slack = 1e-9 * float(covariance.abs().max())
    if not torch.allclose(covariance, covariance.mT, rtol=0, atol=slack):
        raise DataError("a covariance must be symmetric")
    values, vectors = torch.linalg.eigh(covariance)
    if values[0] < -len(values) * slack:
        raise DataError(f"a covariance has the negative eigenvalue {float(values[0]):.3g}")
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.mT


def _stretch(constants: Tensor) -> Tensor:
    """sqrt(n W_k) for `constants` M_k of n equal bins of time; W_k is the integral of exp(2 int_0^t M) over bin k.

    With y = M_k / n, W_k = exp(2 before) (exp(2 y) - 1) / (2 y n), and (exp(2 y) - 1) / (2 y) = exp(y) sinh(y) / y.
    """
    y = constants / len(constants)
    before = y.cumsum(0) - y
    size = y.abs()
    # log(sinh(y) / y), which overflows later; below 1e-4 its series y^2 / 6 is exact to rounding
    log = torch.where(size < 1e-4, y.square() / 6, size + torch.log(-torch.expm1(-2 * size) / (2 * size)))
    return torch.exp(before + (y + log) / 2)


def _integral(name: str, curve: TimeCurve, bias: Literal["none", "high"]) -> Estimate:
    return Estimate(f"{name}, integral", curve.integral(), curve.integral_standard_error(), curve.count, bias)


def _through_sqrt(mean: float, error: float) -> float:
    """The standard error of sqrt(mean), to first order; a mean of 0 of squares is exact."""
    return error / (2 * math.sqrt(mean)) if mean > 0 else 0.0


def _exp(x: float) -> float:
    return math.exp(x) if x < math.log(torch.finfo(torch.float64).max) else math.inf
