"""Training, in one process or many: AdamW with warm-up and a cosine, clipped gradients, averaged weights, early
stopping, exact resumption.

A run is a folder:

    model.safetensors, config.json   the averaged weights that were best on the validation images (`fastgen.load`)
    metrics.jsonl                    what was measured, one JSON object a line; the same run gives the same bytes
    training.pt                      all that is needed to go on as if nothing had happened, tensors and numbers only
    train.toml                       how `fastgen train` was called, all options with their values
    samples/                         pictures of samples at each validation, where the settings ask for them
    tensorboard/                     the metrics and the pictures again, where TensorBoard is installed

Every file is replaced whole.
"""

from fastgen.train.callbacks import Callback
from fastgen.train.loop import Result, train
from fastgen.train.measure import check_fit, images_at_once, mean_loss, unit
from fastgen.train.settings import Settings
from fastgen.train.state import METRICS, STATE
from fastgen.train.state import read as read_state

__all__ = [
    "METRICS",
    "STATE",
    "Callback",
    "Result",
    "Settings",
    "check_fit",
    "images_at_once",
    "mean_loss",
    "read_state",
    "train",
    "unit",
]
