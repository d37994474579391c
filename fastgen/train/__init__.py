"""Training: AdamW with warm-up and a cosine, clipped gradients, averaged weights, early stopping, exact resumption.

A run is a folder:

    model.safetensors, config.json   the averaged weights that were best on the validation images (`fastgen.load`)
    metrics.jsonl                    what was measured, one JSON object a line; the same run gives the same bytes
    training.pt                      all that is needed to go on as if nothing had happened, tensors and numbers only
    tensorboard/                     the metrics again, where TensorBoard is installed

Every file is replaced whole.
"""

from fastgen.train.loop import Result, train
from fastgen.train.measure import check_fit, images_at_once, mean_loss, unit
from fastgen.train.run import METRICS, STATE, read_state
from fastgen.train.settings import Settings

__all__ = [
    "METRICS",
    "STATE",
    "Result",
    "Settings",
    "check_fit",
    "images_at_once",
    "mean_loss",
    "read_state",
    "train",
    "unit",
]
