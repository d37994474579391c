"""The diagonal and the Row LSTM: a scan over the image in one launch.

`cell` has what both share, `diagonal` and `row` a program an image, `tiles` sizes that do not fit one, `choice` what is
launched. Two designs were studied and not built:

More programs an image, where a batch leaves the chip empty (16 images of 64 units): a step of one program is estimated
at 1.1 us, of which 0.4 are a barrier, a load and a store. Four programs save 0.5 us of products and functions a step,
and wait 1.0 to 1.5 us for each other. It pays from about 128 units, where `choice.shared_scan` is to be measured.

Layer pipelining, in which a layer begins before the one below it has ended. What a layer adds to a pixel comes from the
scan of its own row and from the opposite scan of the row above, shifted down; that row's last state is N steps later
than its first. A layer can therefore trail the one below it by N diagonals at best: 12 layers of N = 32 take
63 + 11 * 32 = 415 dependent steps instead of 12 * 63 = 756. It needs one kernel for all layers in which 24 scans (and
the convolutions and residual sums between them) wait for each other a row at a time: 16 images make 384 programs, more
than run at once on 132 processors with the weights in their memory, so that most of the gain is lost again, and it is a
second code path for every layer. Without that kernel layers can trail by bands of rows, a launch each: a band of R rows
takes R + N - 1 steps, so that 12 layers take 611 steps in bands of 16 and 585 in bands of 8, with two and four times
as many launches. Neither reaches 400 steps with one code path.
"""
