"""The masked convolution. Read launch.py (what runs), products.py (a product), forward.py and backward.py (kernels),
walk.py (which weights are visited), layout.py (how tensors lie in memory), config.py and cudnn.py (what else could
run), check.py (is it right), tune.py (what is fastest).

Words that all of them use:

    tap          a place (ky, kx) of the weight (O, I, kh, kw); live where some weight of it is not masked
    sums         what enters the activation: convolution, biases and condition together
    gate, half   tanh(first half of the sums' channels) * sigmoid(second half); the second one is called the valve
    map          a tensor (B, C, H, W); a pixel is a place (image, y, x) of it
    row, column  of packed weights: an output channel; a pair (tap, channel read)
    part         the channels read, or in the gradient of the input each half of a gate
    tile, step   what a program computes; what it multiplies at a time, a block of columns
    box          a block of pixels (images, height, width) that a tensor descriptor addresses
    unit         16 bytes in elements, where all sizes and strides are multiples of them, else 1
    share        the pixels of which one program adds up the gradient of a weight
    kept, saved  what the forward writes for the backward beside its result, and what the backward calls it
"""
