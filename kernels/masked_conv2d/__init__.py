"""The masked convolution. Read launch.py (what runs), products.py (one product), forward.py and backward.py (kernels),
walk.py (which weights are visited), config.py and cudnn.py (what else could run), check.py (is it right), tune.py
(measure what is fastest)."""
