"""Distributions of one pixel given the model's output at it: draws by the inverse CDF, and log-probabilities.

A distribution is any object with these methods:

    noise_shape(n, shape) -> (n, U, H, W), the shape of the uniforms for a batch of n images of the shape (C, H, W)
    draw(params, noise, channel, previous) -> int64 levels (n,) of one channel
    log_prob(params, levels) -> (n,) nats

All arguments belong to one pixel: params (n, ...) is the model's output, noise (n, U) are float32 uniforms in [0, 1),
channel is the channel to draw, and previous (n, channel) are the levels of the channels before it. The `log_prob` of
this package's distributions also accepts further trailing dimensions, so that one call scores a whole image.

Optional attributes describe what is drawn:

    levels: the number of levels, an int; or ints broadcastable to (C, H, W), if the number depends on the place
    dtype: a floating-point dtype, if the distribution draws real values instead of levels; see `real`
    independent_channels: True if the draw of a channel does not read those of other channels. Several channels can then
        be drawn at once, if the model's output at the pixel does not depend on them either: `channel` is then a tensor
        of channels, and draw returns (n, channels). Indexing with `params[:, channel]` and `noise[:, channel]` handles
        both cases.

Optional methods; `channel` and the shape of the results are as in `draw`:

    tempered(temperature, top_k, top_p) -> the distribution with these sampling options
    uncertain(params, noise, channel, previous, error) -> bool, True where the level that `draw` gives for this noise
        could change if every entry of params changed by at most `error`. It may be True where nothing changes.
    steps(params, channel) -> the values of noise[:, channel], along one more dimension, at which the level that `draw`
        gives changes; None if draws depend on params in any other way
    check_params(params, channels): raises ValueError if the model's output at a pixel does not fit
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
