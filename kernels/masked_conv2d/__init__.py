"""The masked convolution. Read launch.py (what runs), products.py (a product), forward.py and backward.py (kernels),
walk.py (which weights are visited), config.py and cudnn.py (what else could run), check.py (is it right), tune.py (what
is fastest), catalogue.py (what is compiled without a GPU).

Words that all of them use:

    tap          a place (ky, kx) of the weight (O, I, kh, kw); live where some weight of it is not masked
    sums         what enters the activation: convolution, biases and condition together
    gate, half   tanh(first half of the sums' channels) * sigmoid(second half); the second one is called the valve
    map          a tensor (B, C, H, W), dense and channels-last; a pixel is a place (image, y, x) of it
    row, column  of packed weights: an output channel; a pair (tap, channel read)
    part         the channels read, or in the gradient of the input each half of a gate
    tile, step   what a program computes; what it multiplies at a time, a block of columns
    box          a block of pixels (images, height, width) that a tensor descriptor addresses
    unit         16 bytes in elements, where the channels of a map are multiples of them, else 1
    share        the pixels of which one program adds up the gradient of a weight
    kept, saved  what the forward writes for the backward beside its result, and what the backward calls it

What several kernels are given:

    batch, height, width, ...           sizes of maps; `rows` and `channels` are of a half or a part, `all_rows` of all
    across, down                        how many boxes cover a line of the map written, and how many a column
    taps, first_tap, box_width          the visited taps: so many from first_tap on, in raster order, in the box around
                                        the live ones, which is so wide
    origin_y, origin_x, tap_y, tap_x    a tap (i, j) of the box sees the pixel (origin_y + i tap_y, origin_x + j tap_x)
                                        from where the result is
    group_rows, group_channels, shown   how colours order the last tap, see walk.py
    live_rows                           rows (of packing: outputs) whose mask is read: all, or 0. A pointer that is not
                                        read spares another compilation; so do bias_rows and residual_rows
    UNIT                                of what comes in units, elements
    GATHER                              a block of columns holds several taps, as maps have few channels
    IMAGES, HEIGHT, WIDTH               the box of pixels of a program, see forward.py
    N, K                                the rows (channels written) and the columns of a tile
"""
