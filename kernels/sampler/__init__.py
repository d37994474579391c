"""The step machine: draws and steps of whole images in one launch."""
