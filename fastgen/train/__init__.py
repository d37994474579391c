"""Training in one process or several: AdamW with warm-up and a cosine schedule, gradient clipping, averaged weights,
early stopping, exact resumption.

A run is a folder:

    model.safetensors, config.json   the averaged weights that were best on the validation images; see `fastgen.load`
    metrics.jsonl                    losses over the steps, one JSON object per line; the same run gives the same bytes
    training.pt                      the state from which the run resumes; holds only tensors, numbers and text
    train.toml                       all options of `fastgen train` with their values
    samples/                         pictures of samples at each validation, if the settings ask for them
    tensorboard/                     the same metrics and pictures for TensorBoard, if it is installed

Every file is replaced atomically.
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
