"""Short programs to copy from, each of at most 40 lines: python -m fastgen.demos.examples.NAME

codec         the serial loop of a learned image codec (needs compressai)
any_model     sample a PixelCNN that knows nothing of fastgen
patch_layers  swap the masked layers of such a model and train on
pixelrnn      train PixelRNN and complete images
vae_loss      the VAE's loss in a training loop of one's own
two_gpus      the same run on one GPU or many, under torchrun
"""
