"""Distributions of one pixel given the model's output there: draws by inverse CDF, and log-probabilities.

A distribution is any object with

    noise_shape(n, shape) -> the shape of the uniforms one batch of n images needs, (n, U, H, W)
    draw(params, noise, channel, previous) -> (n,) int64 levels of one channel
    log_prob(params, levels) -> (n,) nats

where, at one pixel, params (n, ...) is the model's output, noise (n, U) float32 the uniforms in [0, 1), channel
the channel to draw and previous (n, channel) the levels already drawn there. `log_prob` of those of this package
accepts any further trailing dimensions (a whole image) as well, so that an image is scored in one call.

Attributes say what it draws, where it has them:

    levels: how many there are, an int; or ints that are broadcastable to (C, H, W), where it depends on the place
    dtype: a floating-point type, where real values are drawn, not levels; see `real`
    independent_channels: True where no draw of a channel reads those of others, so that several can be drawn at once.
        `channel` is then a tensor of channels wherever the model's output at a pixel depends on none of them, and draw
        returns (n, channels): `params[:, channel]` and `noise[:, channel]` are right for one and for several

Four further methods are used where they are present, and take a `channel` like that of `draw`:

    tempered(temperature, top_k, top_p) -> the distribution with these sampling options
    uncertain(params, noise, channel, previous, error) -> bool of the shape of a draw, True where an absolute error of
        at most `error` in every entry of params could change the level that `draw` gives for this noise; conservative
    steps(params, channel) -> of that shape with a further dimension, the values of noise[:, channel] at which the level
        that `draw` gives changes, and nothing else in params matters; or None
    check_params(params, channels), which raises ValueError where the model's output at a pixel does not fit
"""

from fastgen.distributions.base import Channels, Distribution
from fastgen.distributions.categorical import LAYOUTS, Bernoulli, Categorical
from fastgen.distributions.logistic_mixture import LogisticMixture
from fastgen.distributions.real import Gaussian, GaussianMixture, Logistic

__all__ = [
    "LAYOUTS",
    "Bernoulli",
    "Categorical",
    "Channels",
    "Distribution",
    "Gaussian",
    "GaussianMixture",
    "Logistic",
    "LogisticMixture",
]
