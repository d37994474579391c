"""Short programs to copy from, each at most 40 lines long. Run one with: python -m fastgen.demos.examples.NAME

any_model     sample from a PixelCNN that was written without fastgen
patch_layers  replace the masked layers of such a model and go on training it
pixelrnn      train PixelRNN and complete images (needs scikit-learn)
vae_loss      use the fused loss of a VAE in your own training loop
codec         decode a learned image codec (needs compressai)
two_gpus      train on one GPU or several, under torchrun (needs scikit-learn)
"""
