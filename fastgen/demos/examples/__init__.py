"""Short programs to copy from, each of at most 40 lines: python -m fastgen.demos.examples.NAME

codec         the serial loop of a learned image codec (needs compressai)
"""
