"""The diagonal and the Row LSTM: a scan over the image in one launch.

`cell` has what both share, `diagonal` and `row` a program an image, `tiles` sizes that do not fit one, `choice` what is
launched. Two designs were studied and not built:

More programs an image, where a batch leaves the chip empty: 16 images of 64 units are 16 programs a direction, 32 of
132 processors. A program has one image then, and what divides an image further, its units or its rows, must wait for
other programs in each of its steps. A step of one program was estimated at 1.1 us, when its states still went by global
memory. Four programs save 0.5 us of products and functions a step, and wait 1.0 to 1.5 us for each other. From
about 128 units it may pay; such a launch was written, and removed, as nobody could measure it: it needs all its
programs at once, a bound for the wait, and an error where one is lost. Rows in bands, each of which trails the one
above, would wait for no answer, but must publish every state to other processors: a fence a step, which is estimated
at half a microsecond.

Layer pipelining, in which a layer begins before the one below it has ended. What a layer adds to a pixel comes from the
scan of its own row and from the opposite scan of the row above, shifted down; that row's last state is N steps later
than its first. A layer can therefore trail the one below it by N diagonals at best: 12 layers of N = 32 take 63 + 11 *
32 = 415 dependent steps instead of 12 * 63 = 756. It needs one kernel for all layers in which 24 scans (and the
convolutions and residual sums between them) wait for each other a row at a time: 16 images make 384 programs, more than
run at once on 132 processors with the weights in their memory, so that most of the gain is lost again, and it is a
second code path for every layer. Without that kernel layers can trail by bands of rows, a launch each: a band of R rows
takes R + N - 1 steps, so that 12 layers take 611 steps in bands of 16 and 585 in bands of 8, with two and four times as
many launches. Neither reaches 400 steps with one code path.
"""
